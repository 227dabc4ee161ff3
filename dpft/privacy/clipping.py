"""Clipping rules: each bounds what one unit can add to the sum.

A clipping rule is a frozen value with two members, and everything else reads them:

- ``sensitivity``: the largest L2 norm that one unit's clipped gradient can have. The noise is scaled by this
  number and by no other, so clip and noise cannot disagree.
- ``factors(norms)``: ``(U,)`` norms of unit gradients in, ``(U,)`` multipliers out, with
  ``norms * factors(norms) <= sensitivity`` (up to float32 rounding, a relative 1e-6).
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from dpft.errors import PlanError

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class FlatClip:
    """Scale a unit's gradient down to ``clip_norm`` if it is longer (Abadi et al. 2016, Algorithm 1)."""

    clip_norm: float = 1.0

    def __post_init__(self) -> None:
        _positive("clip_norm", self.clip_norm)

    @property
    def sensitivity(self) -> float:
        return self.clip_norm

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

    def __post_init__(self) -> None:
        _positive("clip_norm", self.clip_norm)
        _positive("gamma", self.gamma)

    @property
    def sensitivity(self) -> float:
        return self.clip_norm

    def factors(self, norms: "Tensor") -> "Tensor":
        return self.clip_norm / (norms + self.gamma)


Clip = FlatClip | AutoClip


def _positive(name: str, value: float) -> None:
    if not 0 < value < float("inf"):
        raise PlanError(f"{name} is {value}, but a bound on a unit's gradient must be a positive number, such as 1.0.")
