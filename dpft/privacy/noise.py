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
from collections.abc import Iterator, Sequence
from typing import NoReturn

import numpy as np
import torch
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms
from torch import Tensor

from dpft.errors import GuaranteeError
from dpft.privacy.chacha import DeviceStream

_CHUNK = 1 << 16  # numbers drawn at a time: their few MB stay in the processor's cache
_DEVICE_CHUNK = 1 << 22  # on a GPU, where a part is hundreds of operations and each should have much to do
_CPU = torch.device("cpu")


class Randomness(ABC):
    """A source of the run's sampling and noise.

    ``private`` says whether a guarantee may be stated for a run that used this source.
    """

    private: bool

    @abstractmethod
    def _key(self) -> bytes:
        """32 bytes of key and 12 of nonce, never the same twice."""

    def _chance_key(self) -> bytes:
        """A key for :meth:`words`."""
        return self._key()

    def _stream(self, device: torch.device = _CPU) -> "DeviceStream | _Stream":
        """A fresh key's stream of uniform numbers; its blocks are counted from 0, so that none ends before 2**32 of
        them."""
        key = self._key()
        return DeviceStream(key[:32], key[32:], device) if device.type == "cuda" else _Stream(key[:32], key[32:])

    def uniform(self, n: int) -> np.ndarray:
        """``(n,)`` float64 in [0, 1), multiples of 2**-53."""
        numbers = torch.empty(n, dtype=torch.float64)
        self._stream().fill(numbers)
        return numbers.numpy()

    def words(self, n: int) -> np.ndarray:
        """``(n,)`` uniform uint32, for the state of another generator."""
        key = self._chance_key()
        cipher = Cipher(algorithms.ChaCha20(key[:32], bytes(4) + key[32:]), mode=None).encryptor()
        return np.frombuffer(cipher.update(bytes(4 * n)), dtype=np.uint32)

    def bernoulli(self, n: int, probability: float) -> np.ndarray:
        """``(n,)`` independent coins, each True with ``probability`` (to 2**-53)."""
        return self.uniform(n) < probability

    def gaussian(self, n: int) -> Tensor:
        """``(n,)`` float64 standard normal numbers, each the half-sum of four (see the module's text)."""
        return torch.cat([part.clone() for part in self.gaussians(n)]) if n else torch.empty(0, dtype=torch.float64)

    def gaussians(self, n: int, device: torch.device = _CPU) -> Iterator[Tensor]:
        """The same draw in parts, one after another; each is valid until the next is asked for.

        On CUDA devices the numbers are made there, with another rounding of the last bits; for others, on the
        processor.
        """
        device, chunk = (device, _DEVICE_CHUNK) if device.type == "cuda" else (_CPU, _CHUNK)
        stream, size = self._stream(device), max(2, min(chunk, n))
        size += size % 2  # four uniforms make a number, and a block of the stream is eight of them
        u = torch.empty(2, 2, size, dtype=torch.float64, device=device)
        cosines = torch.empty(2, size, dtype=torch.float64, device=device)
        for start in range(0, n, size):
            stream.fill(u)
            radius = u[0].neg_().log1p_().mul_(-2.0).sqrt_()  # 1 - u is in (0, 1]: the logarithm is finite
            angle = u[1].mul_(2.0 * torch.pi)
            torch.cos(angle, out=cosines).mul_(radius)
            sines = angle.sin_().mul_(radius)
            # Shifted by one, so that the four Gaussians of one number come from four different pairs of uniforms.
            yield cosines.sum(0).add_(sines.sum(0).roll(1)).mul_(0.5)[: n - start]

    def __getstate__(self) -> NoReturn:
        raise TypeError("A source of privacy noise is never saved, copied or sent: make a new one.")


class SecureRandomness(Randomness):
    """Keyed by the operating system's entropy at every draw. The only source that gives a guarantee."""

    private = True

    def _key(self) -> bytes:
        return os.urandom(44)


class SeededRandomness(Randomness):
    """Reproducible, for tests alone: whoever knows the seed can subtract the noise, so the run is NOT PRIVATE."""

    private = False

    def __init__(self, seed: int) -> None:
        self._seed = seed
        self._draws = self._chances = 0

    def _key(self) -> bytes:
        self._draws += 1
        return self._derived(str(self._draws))

    def _chance_key(self) -> bytes:
        """Counted apart, so that a test's noise is the same however often its dropout is renewed."""
        self._chances += 1
        return self._derived(f"chance {self._chances}")

    def _derived(self, number: str) -> bytes:
        return hashlib.sha512(f"{self._seed}/{number}".encode()).digest()[:44]


class NoiseStream(ABC):
    """The noise of one run's releases, one after another. It is secret and never saved, copied or sent.

    A stream with memory, whose releases share noise, cannot go on from a checkpoint: the run ends there, and goes on as
    a new mechanism that is charged as one.
    """

    @abstractmethod
    def following(self) -> Iterator[Tensor]:
        """The next release's noise, ``(n,)`` float64 in parts, each with deviation 1; a part is valid until the next is
        asked for."""

    def __getstate__(self) -> NoReturn:
        raise TypeError(
            "A stream of privacy noise is never saved, copied or sent: make a new mechanism of what is left."
        )


class FreshNoise(NoiseStream):
    """Independent noise for each release, so that nothing is remembered."""

    def __init__(self, size: int, randomness: Randomness, device: torch.device = _CPU) -> None:
        self._size, self._randomness, self._device = size, randomness, device

    def following(self) -> Iterator[Tensor]:
        return self._randomness.gaussians(self._size, self._device)


class BandedNoise(NoiseStream):
    """Row t is (C⁻¹z)_t, for fresh z and the lower-triangular Toeplitz matrix C whose first column is ``column``.

    So ``y_t = (z_t - Σ_j column[j] · y_(t-j)) / column[0]``, over the last ``len(column) - 1`` rows y. They are kept
    here, at 8 bytes a number. Not they but z has deviation 1.

    Where it ends and another stream begins, the two matrices are the blocks of one that has as many bands. So a new
    stream may begin at any step, and one of which a row was lost must end.

    Raises:
        GuaranteeError: of the last row not all was asked for, so that the next would not be what is accounted for.
    """

    def __init__(self, size: int, randomness: Randomness, device: torch.device, column: Sequence[float]) -> None:
        self._size, self._randomness, self._device, self._column = size, randomness, device, tuple(column)
        self._row, self._whole = 0, True
        kept = (len(self._column) - 1, size)  # row s at s modulo their number; before the first they are zero
        self._rows = torch.zeros(kept, dtype=torch.float64, device=device if device.type == "cuda" else _CPU)

    def following(self) -> Iterator[Tensor]:
        if not self._whole:
            raise GuaranteeError(
                "A row of correlated noise was made in part, and later rows need all of it: begin another stream."
            )
        self._whole, start, kept = False, 0, len(self._rows)
        for part in self._randomness.gaussians(self._size, self._device):
            end = start + len(part)
            for back, weight in enumerate(self._column[1:], 1):
                part.sub_(self._rows[(self._row - back) % kept, start:end], alpha=weight)
            part.div_(self._column[0])
            if kept:
                self._rows[self._row % kept, start:end] = part  # where the oldest was, which was needed last
            yield part
            start = end
        self._row, self._whole = self._row + 1, True


class _Stream:
    """The stream of a 32-byte key and a 12-byte nonce, as uniform numbers, by OpenSSL."""

    def __init__(self, key: bytes, nonce: bytes) -> None:
        self._cipher = Cipher(algorithms.ChaCha20(key, bytes(4) + nonce), mode=None).encryptor()
        self._zeros = b""

    def fill(self, out: Tensor) -> None:
        """Fill ``out``, contiguous float64 on the processor, with the stream's next in [0, 1): 53 of each 64 bits."""
        numbers = out.view(-1).numpy()
        words = numbers.view(np.uint64)  # in place: the stream's bits become the numbers
        if len(self._zeros) != words.nbytes:
            self._zeros = bytes(words.nbytes)
        self._cipher.update_into(self._zeros, words.view(np.uint8).data)
        np.right_shift(words, np.uint64(11), out=words)
        np.multiply(words, 2.0**-53, out=numbers, casting="unsafe")
