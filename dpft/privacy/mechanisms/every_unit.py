"""What mechanisms share that sum over all units: bounded rows, one Gaussian release a sum, and nobody sampled."""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar

from dpft.privacy.clipping import FlatClip
from dpft.privacy.events import Event
from dpft.privacy.mechanisms.mechanism import Mechanism, require
from dpft.privacy.sampling import ALL, PoissonSampler

if TYPE_CHECKING:
    from torch import Tensor

    from dpft.privacy.noise import Randomness


@dataclass(frozen=True, kw_only=True)
class EveryUnit(Mechanism):
    """``steps`` Gaussian releases of sums over all units, without sampling.

    Attributes:
        noise_multiplier: σ of each, in units of its sensitivity.
        fewest: the least number of steps.
        too_few: what an error says of fewer, after their number.
        flat_because: why the clip is flat, for an error.

    Raises:
        PlanError: a field is out of range.
    """

    sample_rate: ClassVar[float] = 1.0  # nobody is sampled: every unit is in every sum
    examples_per_unit: ClassVar[int] = ALL
    unit_gradient: ClassVar[str] = "mean"
    fewest: ClassVar[int]
    too_few: ClassVar[str]
    flat_because: ClassVar[str]

    noise_multiplier: float
    steps: int
    clip: FlatClip = field(default_factory=FlatClip)

    def __post_init__(self) -> None:
        require(
            self.noise_multiplier >= 0,
            f"noise_multiplier is {self.noise_multiplier}, and noise cannot be negative: use a positive number.",
        )
        require(self.steps >= self.fewest, f"steps is {self.steps}, {self.too_few}.")
        require(isinstance(self.clip, FlatClip), f"clip is {self.clip}, and {self.flat_because}: give FlatClip.")

    def events(self, steps: int | None = None) -> tuple[Event, ...]:
        """One Gaussian without sampling for each step."""
        count = self.steps if steps is None else steps
        return (Event(count, self.noise_multiplier, 1.0),) if count else ()

    def sampler(self, randomness: "Randomness") -> PoissonSampler:
        """Takes every unit with all its rows."""
        return PoissonSampler(self.sample_rate, self.examples_per_unit, randomness)


def noisy(total: "Tensor", deviation: float, randomness: "Randomness") -> "Tensor":
    """A float64 sum with independent N(0, ``deviation``²) on each number, drawn once; as it is where that is zero."""
    if deviation > 0:
        total = total + randomness.gaussian(total.numel()).view(total.shape) * deviation
    return total


def bounded(rows: "Tensor", length: float) -> "Tensor":
    """``(n, d)`` rows, none longer than ``length``; zero where they are not finite."""
    import torch

    norms = rows.norm(dim=1, keepdim=True)
    finite = torch.isfinite(norms)
    rows = rows.masked_fill(~finite, 0.0)  # 0 · inf would be NaN
    factors: Tensor = (length / norms.masked_fill(~finite, 1.0).clamp_min(1e-30)).clamp_max(1.0)
    return rows * factors


def upper_triangle(matrix: "Tensor") -> "Tensor":
    """``(d, d)`` to the ``(d (d + 1) / 2,)`` numbers on and above the diagonal."""
    import torch

    above = torch.triu_indices(*matrix.shape)
    return matrix[above[0], above[1]]


def symmetric(numbers: "Tensor", width: int) -> "Tensor":
    """The symmetric ``(d, d)`` matrix of which :func:`upper_triangle` made ``numbers``."""
    import torch

    above = torch.triu_indices(width, width)
    matrix = numbers.new_zeros(width, width)
    matrix[above[0], above[1]] = numbers
    return matrix + matrix.triu(1).T
