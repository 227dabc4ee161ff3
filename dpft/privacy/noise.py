"""Where randomness comes from: the operating system for real runs, a seed for tests.

Noise that anyone can regenerate protects nobody, so the private source has no seed and no state: every draw takes
a fresh 256-bit key from the operating system and expands it with ChaCha20 (RFC 8439). There is nothing to log,
to save in a checkpoint or to restore on resume.

Gaussian numbers come from 53-bit uniforms through the Box-Muller transform in float64. A single such number is
open to attacks on floating-point arithmetic (Mironov 2012; Jin et al. 2022), so each released number is
``(g1 + g2 + g3 + g4) / 2``, four independent Gaussians: Holohan & Braghin 2021, "Secure Random Sampling in
Differential Privacy", section 5.1 with n = 2. The tails of the sum end at about 17 standard deviations, a
probability below 1e-60. The noise is added in float64 and only the noisy sum is rounded.
"""

import hashlib
import os
from abc import ABC, abstractmethod

import numpy as np
import torch
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms
from torch import Tensor

_CHUNK = 1 << 20  # numbers drawn at a time: bounds memory at about 100 MB, whatever the subset's size


class Randomness(ABC):
    """A source of the run's sampling and noise.

    ``private`` says whether a guarantee may be stated for a run that used this source.
    """

    private: bool

    @abstractmethod
    def _key(self) -> bytes:
        """32 bytes of key and 16 of nonce, never the same twice."""

    def _words(self, n: int) -> np.ndarray:
        """``(n,)`` independent uint64."""
        key = self._key()
        stream = Cipher(algorithms.ChaCha20(key[:32], key[32:48]), mode=None).encryptor()
        return np.frombuffer(stream.update(bytes(8 * n)), dtype=np.uint64)

    def uniform(self, n: int) -> np.ndarray:
        """``(n,)`` float64 in [0, 1), multiples of 2**-53."""
        return (self._words(n) >> np.uint64(11)).astype(np.float64) * 2.0**-53

    def bernoulli(self, n: int, probability: float) -> np.ndarray:
        """``(n,)`` independent coins, each True with ``probability`` (to 2**-53)."""
        return self.uniform(n) < probability

    def gaussian(self, n: int) -> Tensor:
        """``(n,)`` float64 standard normal numbers, each the half-sum of four (see the module's text)."""
        out = torch.empty(n, dtype=torch.float64)
        for start in range(0, n, _CHUNK):
            size = min(_CHUNK, n - start)
            pairs = max(size, 2)
            u = torch.from_numpy(self.uniform(4 * pairs)).view(2, 2, pairs)
            radius = torch.log1p(-u[0]).mul_(-2.0).sqrt_()  # 1 - u is in (0, 1]: the logarithm is finite
            angle = u[1].mul_(2.0 * torch.pi)
            cosines = (radius * torch.cos(angle)).sum(0)
            sines = radius.mul_(torch.sin(angle)).sum(0)
            # Shifted by one, so that the four Gaussians of one number come from four different pairs of uniforms.
            out[start : start + size] = (cosines + sines.roll(1)).mul_(0.5)[:size]
        return out

    def __getstate__(self):
        raise TypeError("A source of privacy noise is never saved, copied or sent: make a new one.")


class SecureRandomness(Randomness):
    """Keyed by the operating system's entropy at every draw. The only source that gives a guarantee."""

    private = True

    def _key(self) -> bytes:
        return os.urandom(48)


class SeededRandomness(Randomness):
    """Reproducible, for tests alone: whoever knows the seed can subtract the noise, so the run is NOT PRIVATE."""

    private = False

    def __init__(self, seed: int) -> None:
        self._seed = seed
        self._draws = 0

    def _key(self) -> bytes:
        self._draws += 1
        return hashlib.sha512(f"{self._seed}/{self._draws}".encode()).digest()
