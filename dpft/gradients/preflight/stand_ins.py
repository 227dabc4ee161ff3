"""Constants that replace random numbers while a model is checked. They are as large as typical draws.

Random numbers differ from pass to pass, so a batch could not be compared with its examples. A constant of another scale
would hide a coupling in that scale, such as noise multiplied by the deviation of the batch. So:

- a normal number is one deviation from its mean
- a uniform number is a quarter of the range from its end
- a dropout keeps all values and scales them as usual
- along the last dimension both signs occur, because a normalisation would remove a constant that all features share

A model is checked with two opposite sets of constants, because one set could hide an error by coincidence.
"""

import math
import random
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NoReturn
from unittest.mock import patch

import numpy as np
import torch
from torch import Tensor

from dpft.errors import GuaranteeError


@dataclass(frozen=True)
class Draw:
    """The value of every draw: ``normal`` deviations from the mean, or the share ``uniform`` of a range."""

    normal: float
    uniform: float


DRAWS = (Draw(1.0, 0.75), Draw(-1.0, 0.25))
SIDES = (True, False, True, True, False, False, True, False)  # which features get the draw itself; repeated


def stand_in(name: str, given: Mapping[str, Any], draw: Draw, found: Tensor) -> Tensor | None:
    """Fill the result of a random operation of PyTorch with its constant.

    Args:
        name: the operation.
        given: its arguments by name.
        found: its result.

    Returns:
        ``found``; None if this operation has no constant.
    """
    name = name.rstrip("_").removesuffix("_like").removesuffix("_functional")
    rule = _TORCH.get(name)
    if rule is None:
        return None
    value = torch.as_tensor(rule(given, draw), device=found.device)
    if found.dim() > 1 and found.shape[-1] > 1 and name not in _INDICES:
        other = torch.as_tensor(rule(given, DRAWS[draw == DRAWS[0]]), device=found.device)
        sides = torch.tensor(SIDES, device=found.device)[
            torch.arange(found.shape[-1], device=found.device) % len(SIDES)
        ]
        value = torch.where(sides, value, other)
    return found.copy_(value)


def _bernoulli(given: Mapping[str, Any], draw: Draw) -> Tensor | float:
    p = given.get("p", given["self"])
    p = given["self"] if p is None else p
    if draw.normal < 0:
        return p
    return (p > 0).to(p.dtype) if isinstance(p, Tensor) else float(p > 0)


def _integer(given: Mapping[str, Any], draw: Draw) -> int:
    low, high = given.get("low", given.get("from")) or 0, given.get("high", given.get("to"))
    return low + int(draw.uniform * ((1 << 24) - low if high is None else high - low))


def _permutation(given: Mapping[str, Any], draw: Draw) -> Tensor:
    found = torch.arange(given["n"])
    return found if draw.normal > 0 else found.flip(0)


def _multinomial(given: Mapping[str, Any], draw: Draw) -> Tensor:
    weights, number = given["self"], given["num_samples"]
    places = weights.sort(-1, descending=True).indices
    if given["replacement"]:  # the same for all, because each draw is independent
        return places[..., int(draw.normal < 0 and places.shape[-1] > 1)].unsqueeze(-1)
    some = places[..., torch.arange(number, device=places.device) % places.shape[-1]]
    return some if draw.normal > 0 else some.flip(-1)


_TORCH: dict[str, Callable[[Mapping[str, Any], Draw], Tensor | float | int]] = {
    "normal": lambda given, draw: given["mean"] + draw.normal * given["std"],
    "log_normal": lambda given, draw: math.exp(given["mean"] + draw.normal * given["std"]),
    "randn": lambda given, draw: draw.normal,
    "rand": lambda given, draw: draw.uniform,
    "uniform": lambda given, draw: given["from"] + draw.uniform * (given["to"] - given["from"]),
    "randint": _integer,
    "random": _integer,
    "randperm": _permutation,
    "bernoulli": _bernoulli,
    "exponential": lambda given, draw: -math.log1p(-draw.uniform) / given["lambd"],
    "geometric": lambda given, draw: math.ceil(math.log1p(-draw.uniform) / math.log1p(-min(given["p"], 1 - 1e-9))),
    "cauchy": lambda given, draw: given["median"] + given["sigma"] * math.tan(math.pi * (draw.uniform - 0.5)),
    "poisson": lambda given, draw: given["self"],
    "binomial": lambda given, draw: given["count"] * given["prob"],
    "standard_gamma": lambda given, draw: given["self"],
    "sample_dirichlet": lambda given, draw: given["self"] / given["self"].sum(-1, keepdim=True),
    "multinomial": _multinomial,
}
_INDICES = ("randperm", "multinomial")  # their results must differ from one another
_TORCH |= {f"_{name}": _TORCH[name] for name in ("standard_gamma", "sample_dirichlet")}


Size = int | tuple[int, ...] | None  # of an array; None for one number


class _Python(random.Random):
    """Python's generator with one constant. Methods that draw until a number fits are replaced; they would not end."""

    def __init__(self, draw: Draw) -> None:
        super().__init__()
        self._uniform = draw.uniform

    def random(self) -> float:
        return self._uniform

    def gauss(self, mu: float = 0.0, sigma: float = 1.0) -> float:
        return mu + sigma * (1.0 if self._uniform > 0.5 else -1.0)

    def getrandbits(self, k: int) -> int:
        return self._randbelow(1 << k)

    def _randbelow(self, n: int) -> int:
        return int(self._uniform * n)

    def shuffle(self, x: Any) -> None:
        if self._uniform < 0.5:
            x.reverse()

    def sample(self, population: Any, k: int, *, counts: Any = None) -> list[Any]:
        found = (
            list(population)
            if counts is None
            else [x for x, n in zip(population, counts, strict=True) for _ in range(n)]
        )
        self.shuffle(found)
        return found[:k]

    def gammavariate(self, alpha: float, beta: float) -> float:
        return 2 * self._uniform * alpha * beta

    def betavariate(self, alpha: float, beta: float) -> float:
        return self._uniform ** (beta / alpha)

    def vonmisesvariate(self, mu: float, kappa: float) -> float:
        return mu + self.gauss() / (1 + kappa)

    def binomialvariate(self, n: int = 1, p: float = 0.5) -> int:
        return int(n * p)

    normalvariate = gauss


class _Numpy:
    """The functions of ``numpy.random``, and the methods of its generators, that models and collators use."""

    def __init__(self, draw: Draw) -> None:
        self._draw = draw

    def uniform(self, low: Any = 0.0, high: Any = 1.0, size: Size = None) -> Any:
        return self._filled(low + self._draw.uniform * (np.asarray(high) - low), size)

    def normal(self, loc: Any = 0.0, scale: Any = 1.0, size: Size = None) -> Any:
        return self._filled(loc + self._draw.normal * np.asarray(scale), size)

    def random(self, size: Size = None, **_: Any) -> Any:
        return self.uniform(size=size)

    def standard_normal(self, size: Size = None, **_: Any) -> Any:
        return self.normal(size=size)

    def rand(self, *size: int) -> Any:
        return self.uniform(size=size or None)

    def randn(self, *size: int) -> Any:
        return self.normal(size=size or None)

    def integers(
        self, low: Any, high: Any = None, size: Size = None, dtype: Any = np.int64, endpoint: bool = False
    ) -> Any:
        low, high = (0, low) if high is None else (low, high)
        return self._filled(low + (self._draw.uniform * (np.asarray(high) + endpoint - low)).astype(dtype), size)

    def randint(self, low: Any, high: Any = None, size: Size = None, dtype: Any = np.int64) -> Any:
        return self.integers(low, high, size, dtype)

    def binomial(self, n: Any, p: Any, size: Size = None) -> Any:
        return self._filled((n * np.asarray(p)).astype(np.int64), size)

    def poisson(self, lam: Any = 1.0, size: Size = None) -> Any:
        return self._filled(np.asarray(lam).astype(np.int64), size)

    def exponential(self, scale: Any = 1.0, size: Size = None) -> Any:
        return self._filled(-np.log1p(-self._draw.uniform) * np.asarray(scale), size)

    def gamma(self, shape: Any, scale: Any = 1.0, size: Size = None) -> Any:
        return self._filled(2 * self._draw.uniform * np.asarray(shape) * scale, size)

    def beta(self, a: Any, b: Any, size: Size = None) -> Any:
        return self._filled(self._draw.uniform ** (np.asarray(b) / a), size)

    def lognormal(self, mean: Any = 0.0, sigma: Any = 1.0, size: Size = None) -> Any:
        return self._filled(np.exp(mean + self._draw.normal * np.asarray(sigma)), size)

    def permutation(self, x: Any) -> Any:
        found = np.arange(x) if isinstance(x, (int, np.integer)) else np.array(x)
        return found if self._draw.normal > 0 else found[::-1].copy()

    def shuffle(self, x: Any) -> None:
        if self._draw.normal < 0:
            x[:] = x[::-1]

    def choice(self, a: Any, size: Size = None, replace: bool = True, p: Any = None, **_: Any) -> Any:
        places = self.permutation(a)
        if size is None or replace:
            return places[0] if size is None else self._filled(places[0], size)
        return places[np.arange(math.prod(np.atleast_1d(size))) % len(places)].reshape(size)

    random_sample = ranf = sample = random
    laplace = gumbel = logistic = normal

    @staticmethod
    def _filled(value: Any, size: Size) -> Any:
        found = np.asarray(value) if size is None else np.broadcast_to(value, size).copy()
        return found.item() if size is None and found.ndim == 0 else found


@contextmanager
def python_and_numpy(draw: Draw, note: Callable[[], None]) -> Iterator[None]:
    """Their global generators return constants, and each call of one calls ``note``.

    A generator that numpy makes from a key, such as an example's own, is left alone. The isolation check finds out
    whether its numbers belong to the example or to a position in the batch.

    Raises:
        GuaranteeError: within the context, if code seeds a global generator or calls a numpy function that has no
            constant.
    """

    def watched(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            note()
            return function(*args, **kwargs)

        return call

    python, numpy = _Python(draw), _Numpy(draw)
    names = [name for name in random.__all__ if callable(getattr(python, name, None)) and name[0].islower()]
    kept: dict[str, Any] = {
        name: watched(getattr(python, name)) for name in names if name not in ("seed", "getstate", "setstate")
    }
    methods = [name for name in dir(numpy) if not name.startswith("_") and hasattr(np.random, name)]
    numpys: dict[str, Any] = {
        name: refused(f"numpy.random.{name}")
        for name in np.random.__all__
        if name.islower() and name not in ("get_state", "set_state")
    }
    numpys |= {name: watched(getattr(numpy, name)) for name in methods}
    keyed = np.random.default_rng
    numpys |= {
        "default_rng": lambda seed=None: numpy if seed is None else keyed(seed),
        "seed": _seeds("numpy.random.seed"),
    }
    kept["seed"] = _seeds("random.seed")
    torches = patch.object(torch, "manual_seed", _seeds("torch.manual_seed"))
    with patch.multiple(random, **kept), patch.multiple(np.random, **numpys), torches:
        yield


def _seeds(name: str) -> Callable[..., NoReturn]:
    def call(*_: Any, **__: Any) -> NoReturn:
        raise GuaranteeError(
            f"A forward pass or the collator seeds a global generator ({name}), so an example's chance would follow "
            "from a known seed and its place in the batch: leave that out, as dpft gives every step a secret of its "
            "own."
        )

    return call


def refused(name: str) -> Callable[..., NoReturn]:
    """A function that raises GuaranteeError, in place of a random one that has no constant."""

    def call(*_: Any, **__: Any) -> NoReturn:
        raise GuaranteeError(
            f"A forward pass or the collator draws random numbers by {name}, which the preflight cannot hold still to "
            "compare an example alone with itself in a batch: draw them by another function."
        )

    return call
