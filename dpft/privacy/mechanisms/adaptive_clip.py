"""DP-SGD whose clip follows a quantile of the gradients' norms (Andrew, Thakkar, McMahan, Ramaswamy 2021, Algorithm 1).

Each step releases two sums over the drawn units: of clipped gradients, and of ``b_u - 1/2`` with b_u = 1 where the norm
is at most the clip C and 0 elsewhere. A unit moves the second by 1/2 and not by 1. Both are released by Gaussian noise:

    gradients   N(0, (z_Δ·C)² I)    z_Δ = (z⁻² - (2σ_b)⁻²)^(-1/2)      (Theorem 1)
    tally       N(0, σ_b²)          b̃ = tally / B + 1/2

In units of their noise, one unit moves the pair by sqrt(z_Δ⁻² + (2σ_b)⁻²) = 1/z, so a step is one Gaussian of noise
multiplier z. B is the public expected batch size. The next clip is C·exp(-η(b̃ - γ)), computed from what was released.
"""

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar, Self

from dpft.privacy.clipping import Clip, FlatClip
from dpft.privacy.mechanisms.dp_sgd import DpSgd
from dpft.privacy.mechanisms.mechanism import Words, require

if TYPE_CHECKING:
    from torch import Tensor

RANGE = 1e6  # by how much the clip may leave what it was at first: of no gradients at all it would end at zero


@dataclass(frozen=True, kw_only=True)
class AdaptiveClip(DpSgd):
    """DP-SGD that pays a small share of its budget to learn the clip.

    Attributes:
        noise_multiplier: z, of a whole step: of gradients and quantile together, as they are charged.
        clip: the first step's, a :class:`FlatClip`.
        quantile: γ, the share of units that are to be left unclipped.
        clip_rate: η, how fast the clip follows; at 0.2 it moves by at most e^0.2 a step, but for noise.
        quantile_share: the share of 1/z² that is paid for the quantile. At 0.01 the gradients' noise grows by 0.5 %.

    Raises:
        PlanError: a field is out of range.
    """

    name: ClassVar[str] = "dp-sgd-adaptive-clip"
    adapts: ClassVar[bool] = True

    quantile: float = 0.5
    clip_rate: float = 0.2
    quantile_share: float = 0.01

    def __post_init__(self) -> None:
        super().__post_init__()
        require(
            isinstance(self.clip, FlatClip),
            f"clip is {self.clip}, and only a flat clip can follow a quantile of norms: give FlatClip.",
        )
        require(0 <= self.quantile <= 1, f"quantile is {self.quantile}, and a share lies between 0 and 1: try 0.5.")
        require(
            0 < self.clip_rate <= 1, f"clip_rate is {self.clip_rate}: give a rate above 0 and at most 1, such as 0.2."
        )
        require(
            0 < self.quantile_share < 1,
            f"quantile_share is {self.quantile_share}, and gradients and quantile need a share each: give one between "
            "0 and 1, such as 0.01.",
        )

    @property
    def tally_noise(self) -> float:
        """σ_b, of which (2σ_b)⁻² is ``quantile_share`` of z⁻²."""
        return self.noise_multiplier / (2 * math.sqrt(self.quantile_share))

    @property
    def clipping(self) -> str:
        """The first clip, and what makes the next ones."""
        settings = f"quantile={self.quantile}, clip_rate={self.clip_rate}, quantile_share={self.quantile_share}"
        return f"{self.clip!r} at first, then {self.name}({settings})"

    @property
    def gradient_noise_multiplier(self) -> float:
        """z_Δ (Theorem 1); 0 without noise."""
        if self.noise_multiplier == 0:
            return 0.0
        return float((self.noise_multiplier**-2 - (2 * self.tally_noise) ** -2) ** -0.5)

    def tally(self, norms: "Tensor", clip: Clip) -> "Tensor":
        """``(U,)``: 1/2 for each unit whose gradient was not clipped, -1/2 for others."""
        return (norms <= clip.sensitivity).to(norms.dtype) - 0.5

    def next_clip(self, clip: Clip, tally: float, expected_batch_size: float) -> Clip:
        """C·exp(-η(b̃ - γ)), within a million of the first clip."""
        unclipped = tally / expected_batch_size + 0.5
        # The exponent is bounded so that no noise leaves the range of numbers.
        moved = clip.sensitivity * math.exp(max(-50.0, min(50.0, -self.clip_rate * (unclipped - self.quantile))))
        first = self.clip.sensitivity
        return replace(clip, clip_norm=max(first / RANGE, min(first * RANGE, moved)))

    def describe(self, steps: int | None = None) -> Words:
        """What DP-SGD's words say, and that the clip moves at the same price."""
        words = super().describe(steps)
        return Words(
            words.sampler,
            f"{words.mechanism} at first, then at the {self.quantile:g} quantile of norms, which is part of each "
            "release",
        )

    @classmethod
    def example(cls) -> Self:
        """Four steps whose quantile has a tenth of the budget."""
        return cls(noise_multiplier=1.0, sample_rate=0.1, steps=4, clip=FlatClip(0.5), quantile_share=0.1)
