"""The chance inside a step: dropout, masks, crops, noise that a model adds while it trains.

Models and collators draw from the global generators of Python, numpy and torch. If these followed from a published
seed, a unit that leaves the batch would shift everybody's masks, and the clipped sum would move by many times the clip.
So their states are secret, fresh in every step, and saved nowhere. Masks are then independent of who else is drawn, the
bound holds for each of them, and so for their mixture.
"""

import random
from collections.abc import Callable
from types import ModuleType
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray

from dpft.privacy.noise import Randomness

_WORDS = 624  # 32-bit words in the state of a Mersenne Twister, which Python, numpy and torch (on the processor) share
# Places in torch's saved state, in 32-bit words: its seed, the numbers left, the next place, and the twister's words in
# 64 bits each.
_SEED, _LEFT, _NEXT, _STATE = 0, 2, 4, 6
_Numpy = dict[str, Any] | tuple[str, NDArray[np.uint32], int, int, float]  # its state


class StepChance:
    """Holds the global generators while entered; the last of several to leave puts back what they were."""

    _holders: ClassVar[list["StepChance"]] = []  # the generators are the process's, so its engines hold them together
    _before: ClassVar[tuple[tuple[Any, ...], _Numpy, torch.Tensor, dict[str, object]]]

    def __init__(self, randomness: Randomness) -> None:
        self._randomness = randomness
        self._seed = 0

    def __enter__(self) -> "StepChance":
        if not self._holders:
            StepChance._before = (random.getstate(), np.random.get_state(), torch.get_rng_state(), _device_states())
        self._holders.append(self)
        self.renew()
        return self

    def __exit__(self, *_: object) -> None:
        self._holders.remove(self)
        if self._holders:
            return
        python, numpy, processor, devices = self._before
        random.setstate(python)
        np.random.set_state(numpy)
        torch.set_rng_state(processor)
        for device, state in devices.items():
            _all(torch.get_device_module(device), "set_rng_state")(state)

    def renew(self) -> None:
        """Give every generator a state that nobody knows, of full length: a seed of 32 bits could be searched."""
        words = self._randomness.words(3 * _WORDS + 2)
        python, numpy, processor = words[: 3 * _WORDS].reshape(3, _WORDS)
        random.setstate((3, (*python.tolist(), _WORDS), None))
        np.random.set_state(("MT19937", numpy, _WORDS, 0, 0.0))
        self._seed = int(words[-2]) << 31 | int(words[-1]) >> 1
        torch.set_rng_state(_torch_state(processor, self._seed))
        for device in _device_states():
            _all(torch.get_device_module(device), "manual_seed")(self._seed)

    @property
    def is_kept(self) -> bool:
        """Whether nobody but an engine with such a source has seeded torch since: the step's masks would follow from
        it."""
        private = self._randomness.private
        return torch.initial_seed() in [one._seed for one in self._holders if one._randomness.private >= private]


def step_generator() -> np.random.Generator:
    """A generator whose seed comes from numpy's global state: while an engine holds that, it is secret, and new in
    every step."""
    return np.random.default_rng(np.random.randint(1 << 32, size=8, dtype=np.uint32))


def _torch_state(words: np.ndarray, seed: int) -> torch.Tensor:
    """The state of torch's generator on the processor, with these words for its twister."""
    state = torch.Generator().get_state()
    numbers = state.numpy().view(np.uint32)
    numbers[_SEED : _SEED + 2] = seed & 0xFFFFFFFF, seed >> 32
    numbers[_LEFT], numbers[_NEXT : _NEXT + 2] = 1, 0  # the next draw makes new numbers of these words
    numbers[_STATE : _STATE + 2 * _WORDS : 2] = words
    return state


def _device_states() -> dict[str, object]:
    """The generators' states of the accelerator in use, if one is; others have drawn nothing."""
    states = {}
    for device in ("cuda", "xpu", "mps"):
        module: ModuleType | None = getattr(torch, device, None)
        ready = getattr(module, "is_initialized", getattr(module, "is_available", lambda: False))
        if module is not None and ready():
            states[device] = _all(module, "get_rng_state")()
    return states


def _all(module: ModuleType, name: str) -> Callable[..., Any]:
    """The function for all devices of a kind; MPS has one device and no such function."""
    function: Callable[..., Any] = getattr(module, f"{name}_all", None) or getattr(module, name)
    return function
