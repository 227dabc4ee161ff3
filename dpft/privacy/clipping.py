"""Clipping rules: each bounds what one unit can add to the sum.

A clipping rule is a frozen value with three members, and everything else reads them:

- ``sensitivity``: the largest L2 norm that one unit's clipped gradient can have. The noise is scaled by this
  number and by no other, so clip and noise cannot disagree.
- ``over(sizes)``: the rule for a model whose parameters have these names and numbers of scalars. Its ``groups`` say
  which parameters are clipped together: None for all as one, else one number from 0 to G - 1 for each parameter.
- ``factors(norms)``, of what ``over`` returns: norms of unit gradients in, multipliers out, both ``(U,)`` without
  groups and ``(U, G)`` with them. A unit whose groups are multiplied so has a norm of at most ``sensitivity``
  (up to float32 rounding, a relative 1e-6).
"""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal, get_args

from dpft.errors import PlanError

if TYPE_CHECKING:
    from torch import Tensor

Shares = Literal["equal", "size"]


@dataclass(frozen=True)
class FlatClip:
    """Scale a unit's gradient down to ``clip_norm`` if it is longer (Abadi et al. 2016, Algorithm 1)."""

    clip_norm: float = 1.0
    groups: ClassVar[None] = None

    def __post_init__(self) -> None:
        _positive("clip_norm", self.clip_norm)

    @property
    def sensitivity(self) -> float:
        return self.clip_norm

    def over(self, sizes: Mapping[str, int]) -> "FlatClip":
        return self

    def factors(self, norms: "Tensor") -> "Tensor":
        return (self.clip_norm / norms).clamp(max=1.0)


@dataclass(frozen=True)
class AutoClip:
    """Normalise every unit's gradient to just under ``clip_norm`` (AUTO-S, Bu et al. 2023, equation 5).

    The factor is ``clip_norm / (norm + gamma)``, so no clipping threshold has to be tuned: with Adam-like
    optimizers ``clip_norm`` only rescales the learning rate.
    """

    clip_norm: float = 1.0
    gamma: float = 0.01
    groups: ClassVar[None] = None

    def __post_init__(self) -> None:
        _positive("clip_norm", self.clip_norm)
        _positive("gamma", self.gamma)

    @property
    def sensitivity(self) -> float:
        return self.clip_norm

    def over(self, sizes: Mapping[str, int]) -> "AutoClip":
        return self

    def factors(self, norms: "Tensor") -> "Tensor":
        return self.clip_norm / (norms + self.gamma)


@dataclass(frozen=True)
class PerLayerClip:
    """Scale each layer's part of a unit's gradient down to that layer's share of ``clip_norm``
    (McMahan et al. 2018, Algorithm 1).

    A layer is a module that has trainable parameters of its own, such as a linear layer with its weight and bias. The
    squares of the layers' bounds sum to ``clip_norm²``, so a whole gradient is at most ``clip_norm`` long.

    Attributes:
        clip_norm: C, the bound on a whole gradient.
        shares: ``"equal"``, C/√G for each of G layers, or ``"size"``, C·√(n/N) for a layer of n of the N trainable
            scalars.
    """

    clip_norm: float = 1.0
    shares: Shares = "equal"

    def __post_init__(self) -> None:
        _positive("clip_norm", self.clip_norm)
        if self.shares not in get_args(Shares):
            raise PlanError(f"shares is {self.shares!r}: choose one of {', '.join(get_args(Shares))}.")

    @property
    def sensitivity(self) -> float:
        return self.clip_norm

    def over(self, sizes: Mapping[str, int]) -> "GroupClip":
        """The bounds of a model's layers.

        Args:
            sizes: for each trainable parameter's name, such as ``encoder.0.weight``, its number of scalars.
        """
        layers: dict[str, int] = {}
        for name, size in sizes.items():
            layer = name.rpartition(".")[0]
            layers[layer] = layers.get(layer, 0) + size
        weights = [size if self.shares == "size" else 1 for size in layers.values()]
        bounds = tuple(self.clip_norm * math.sqrt(weight / sum(weights)) for weight in weights)
        numbers = {layer: number for number, layer in enumerate(layers)}
        return GroupClip(tuple(numbers[name.rpartition(".")[0]] for name in sizes), bounds)


@dataclass(frozen=True)
class GroupClip:
    """Scale each group's part of a unit's gradient down to the group's bound; made by :meth:`PerLayerClip.over`.

    Attributes:
        groups: for each parameter, the number of its group.
        bounds: for each of G groups, the largest norm of its part.
    """

    groups: tuple[int, ...]
    bounds: tuple[float, ...]

    @property
    def sensitivity(self) -> float:
        return math.hypot(*self.bounds)

    def factors(self, norms: "Tensor") -> "Tensor":
        return (norms.new_tensor(self.bounds) / norms).clamp(max=1.0)


Clip = FlatClip | AutoClip | PerLayerClip
RULES: dict[str, type[Clip]] = {kind.__name__: kind for kind in get_args(Clip)}


def to_dict(clip: Clip) -> dict[str, Any]:
    """The rule as JSON has it."""
    return {"rule": type(clip).__name__, **asdict(clip)}


def from_dict(facts: Mapping[str, Any]) -> Clip:
    """The rule of which :func:`to_dict` made ``facts``.

    Raises:
        PlanError: there is no such rule, or a bound is not positive.
    """
    facts = dict(facts)
    rule = facts.pop("rule")
    if rule not in RULES:
        raise PlanError(f"There is no clipping rule {rule!r}: choose one of {', '.join(RULES)}.")
    return RULES[rule](**facts)


def _positive(name: str, value: float) -> None:
    if not 0 < value < float("inf"):
        raise PlanError(f"{name} is {value}, but a bound on a unit's gradient must be a positive number, such as 1.0.")
