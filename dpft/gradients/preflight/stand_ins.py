"""Constants in the place of chance, as large as what they stand for.

Chance is each example's own, but differs from pass to pass, so that a batch could not be compared with its examples. A
constant of another scale would hide what that scale depends on: noise times the deviation of the batch is a coupling.
So a normal number stands one deviation from its mean, a uniform one a quarter from the end of its range, and a dropout
keeps all and multiplies as it would. Along the last dimension they stand on either side, since a normalisation would
take off what all features share. Two sets of constants, each the other's opposite, leave little room for chance to be
special.
"""

import math
import random
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from torch import Tensor

from dpft.errors import GuaranteeError


@dataclass(frozen=True)
class Draw:
    """What every draw comes to: ``normal`` deviations from the mean, or the share ``uniform`` of a range."""

    normal: float
    uniform: float


DRAWS = (Draw(1.0, 0.75), Draw(-1.0, 0.25))
SIDES = (True, False, True, True, False, False, True, False)  # of the features, again and again


def stand_in(name: str, given: Mapping[str, Any], draw: Draw, found: Tensor) -> Tensor | None:
    """``found``, which PyTorch's random operation ``name`` made, filled with what stands for it; None if that is not
    known.

    Args:
        given: the operation's arguments by name.
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


def _bernoulli(given: Mapping, draw: Draw) -> Tensor | float:
    p = given.get("p", given["self"])
    p = given["self"] if p is None else p
    if draw.normal < 0:
        return p
    return (p > 0).to(p.dtype) if isinstance(p, Tensor) else float(p > 0)


def _integer(given: Mapping, draw: Draw) -> int:
    low, high = given.get("low", given.get("from")) or 0, given.get("high", given.get("to"))
    return low + int(draw.uniform * ((1 << 24) - low if high is None else high - low))


def _permutation(given: Mapping, draw: Draw) -> Tensor:
    found = torch.arange(given["n"])
    return found if draw.normal > 0 else found.flip(0)


def _multinomial(given: Mapping, draw: Draw) -> Tensor:
    weights, number = given["self"], given["num_samples"]
    places = weights.sort(-1, descending=True).indices
    if given["replacement"]:  # the same for all, as each draws its own
        return places[..., int(draw.normal < 0 and places.shape[-1] > 1)].unsqueeze(-1)
    some = places[..., torch.arange(number, device=places.device) % places.shape[-1]]
    return some if draw.normal > 0 else some.flip(-1)


_TORCH: dict[str, Callable[[Mapping, Draw], Tensor | float | int]] = {
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
_INDICES = ("randperm", "multinomial")  # which must stay different from one another
_TORCH |= {f"_{name}": _TORCH[name] for name in ("standard_gamma", "sample_dirichlet")}


class _Python(random.Random):
    """Python's own generator, whose every number is the same; what tries numbers until one fits would try for ever."""

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

    def shuffle(self, x) -> None:
        if self._uniform < 0.5:
            x.reverse()

    def sample(self, population, k: int, *, counts=None) -> list:
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

    def uniform(self, low=0.0, high=1.0, size=None):
        return self._filled(low + self._draw.uniform * (np.asarray(high) - low), size)

    def normal(self, loc=0.0, scale=1.0, size=None):
        return self._filled(loc + self._draw.normal * np.asarray(scale), size)

    def random(self, size=None, **_):
        return self.uniform(size=size)

    def standard_normal(self, size=None, **_):
        return self.normal(size=size)

    def rand(self, *size):
        return self.uniform(size=size or None)

    def randn(self, *size):
        return self.normal(size=size or None)

    def integers(self, low, high=None, size=None, dtype=np.int64, endpoint=False):
        low, high = (0, low) if high is None else (low, high)
        return self._filled(low + (self._draw.uniform * (np.asarray(high) + endpoint - low)).astype(dtype), size)

    def randint(self, low, high=None, size=None, dtype=np.int64):
        return self.integers(low, high, size, dtype)

    def binomial(self, n, p, size=None):
        return self._filled((n * np.asarray(p)).astype(np.int64), size)

    def poisson(self, lam=1.0, size=None):
        return self._filled(np.asarray(lam).astype(np.int64), size)

    def exponential(self, scale=1.0, size=None):
        return self._filled(-np.log1p(-self._draw.uniform) * np.asarray(scale), size)

    def gamma(self, shape, scale=1.0, size=None):
        return self._filled(2 * self._draw.uniform * np.asarray(shape) * scale, size)

    def beta(self, a, b, size=None):
        return self._filled(self._draw.uniform ** (np.asarray(b) / a), size)

    def lognormal(self, mean=0.0, sigma=1.0, size=None):
        return self._filled(np.exp(mean + self._draw.normal * np.asarray(sigma)), size)

    def permutation(self, x):
        found = np.arange(x) if isinstance(x, (int, np.integer)) else np.array(x)
        return found if self._draw.normal > 0 else found[::-1].copy()

    def shuffle(self, x) -> None:
        if self._draw.normal < 0:
            x[:] = x[::-1]

    def choice(self, a, size=None, replace=True, p=None, **_):
        places = self.permutation(a)
        if size is None or replace:
            return places[0] if size is None else self._filled(places[0], size)
        return places[np.arange(math.prod(np.atleast_1d(size))) % len(places)].reshape(size)

    random_sample = ranf = sample = random
    laplace = gumbel = logistic = normal

    @staticmethod
    def _filled(value, size):
        found = np.asarray(value) if size is None else np.broadcast_to(value, size).copy()
        return found.item() if size is None and found.ndim == 0 else found


@contextmanager
def python_and_numpy(draw: Draw, taken: Callable[[], None]) -> Iterator[None]:
    """Their global generators come to constants; ``taken`` is called whenever one is asked.

    A generator that numpy makes of a key, such as an example's own, stays what it is: the isolation check sees whether
    its numbers belong to the example or to a place in the batch.

    Raises:
        GuaranteeError: within, by whoever seeds a global generator, or asks numpy for what has no stand-in.
    """

    def watched(function: Callable) -> Callable:
        def call(*args, **kwargs):
            taken()
            return function(*args, **kwargs)

        return call

    python, numpy = _Python(draw), _Numpy(draw)
    names = [name for name in random.__all__ if callable(getattr(python, name, None)) and name[0].islower()]
    kept = {name: watched(getattr(python, name)) for name in names if name not in ("seed", "getstate", "setstate")}
    methods = [name for name in dir(numpy) if not name.startswith("_") and hasattr(np.random, name)]
    numpys = {
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


def _seeds(name: str) -> Callable:
    def call(*_, **__):
        raise GuaranteeError(
            f"A forward pass or the collator seeds a global generator ({name}), so an example's chance would follow "
            "from a known seed and its place in the batch: leave that out, as dpft gives every step a secret of its "
            f"own."
        )

    return call


def refused(name: str) -> Callable:
    def call(*_, **__):
        raise GuaranteeError(
            f"A forward pass or the collator draws random numbers by {name}, which the preflight cannot hold still to "
            "compare an example alone with itself in a batch: draw them by another function."
        )

    return call
