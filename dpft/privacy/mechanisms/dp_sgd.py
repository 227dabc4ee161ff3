"""DP-SGD: Poisson-sampled units, clipped gradients, one draw of noise (Abadi et al. 2016, Algorithm 1)."""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar, Self

from dpft.privacy.clipping import Clip, FlatClip
from dpft.privacy.events import Event
from dpft.privacy.mechanisms.mechanism import Mechanism, Words, require
from dpft.privacy.rounding import rounded_down, rounded_up
from dpft.privacy.sampling import PoissonSampler

if TYPE_CHECKING:
    from dpft.privacy.noise import Randomness


@dataclass(frozen=True, kw_only=True)
class DpSgd(Mechanism):
    """``steps`` releases of ``Σ_u clip(g_u) + N(0, (noise_multiplier · clip.sensitivity)² I)`` over a Poisson sample of
    units.

    Attributes:
        noise_multiplier: σ, the noise's standard deviation in units of the clip's sensitivity.
        sample_rate: q, the probability with which each unit enters each step.
        steps: T, the number of releases. A step whose draw is empty is a release as well.
        clip: what bounds one unit's gradient.
        examples_per_unit: how many of a unit's examples one step uses at most.
        unit_gradient: whether a unit's gradient is the ``"sum"`` or the ``"mean"`` of its examples' gradients.

    Raises:
        PlanError: a field is out of range.
    """

    name: ClassVar[str] = "dp-sgd"

    noise_multiplier: float
    sample_rate: float
    steps: int
    clip: Clip = field(default_factory=FlatClip)
    examples_per_unit: int = 1
    unit_gradient: str = "mean"

    def __post_init__(self) -> None:
        require(
            self.noise_multiplier >= 0,
            f"noise_multiplier is {self.noise_multiplier}, and noise cannot be negative: use a positive number.",
        )
        require(
            0 < self.sample_rate <= 1,
            f"sample_rate is {self.sample_rate}, and a probability must be above 0 and at most 1: lower the batch "
            "size or fix units.",
        )
        require(self.steps >= 1, f"steps is {self.steps}, so nothing would train: plan at least one step.")
        require(self.examples_per_unit >= 1, f"examples_per_unit is {self.examples_per_unit}: a unit needs at least 1.")
        require(self.unit_gradient in ("sum", "mean"), f"unit_gradient is {self.unit_gradient!r}: choose sum or mean.")

    def events(self, steps: int | None = None) -> tuple[Event, ...]:
        """One Poisson-sampled Gaussian for each step."""
        count = self.steps if steps is None else steps
        return (Event(count, self.noise_multiplier, self.sample_rate),) if count else ()

    def sampler(self, randomness: "Randomness") -> PoissonSampler:
        """Poisson sampling at ``sample_rate``."""
        return PoissonSampler(self.sample_rate, self.examples_per_unit, randomness)

    def describe(self, steps: int | None = None) -> Words:
        """Poisson's rate, and number, noise and clip of the releases."""
        done = self.steps if steps is None else steps
        return Words(
            f"Poisson, rate {rounded_up(self.sample_rate, 4)} per step",
            f"{done:,} Gaussian releases, noise multiplier {rounded_down(self.noise_multiplier, 4)}, "
            f"{type(self.clip).__name__} at {self.clip.sensitivity:g}",
        )

    @classmethod
    def example(cls) -> Self:
        """Four steps."""
        return cls(noise_multiplier=1.0, sample_rate=0.1, steps=4, clip=FlatClip(0.5))
