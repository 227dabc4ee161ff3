"""DP-SGD whose noise is correlated over steps by a banded matrix, with sampling by groups in turn (BandMF).

Choquette-Choo, Ganesh, McKenna, McMahan, Rush, Thakurta, Xu 2023, "(Amplified) Banded Matrix Factorization: A unified
approach to private training", arXiv:2306.08153; McKenna 2024, "Scaling up the Banded Matrix Factorization Mechanism
for Differentially Private ML", arXiv:2405.15913.

With x_t the clipped sum of step t, z_t fresh noise N(0, (σ·clip)² I) and C lower-triangular with b bands, step t
releases ``x_t + (C⁻¹z)_t``. That tells as much as the rows of ``Cx + z``. A later step takes back some of an earlier
one's noise, so that the weights, which follow the sum of all steps, have less of it than under DP-SGD at the same σ.

What it costs (2306.08153, Theorem 4), step by step:

1. Each unit has one of b groups, and step t takes units of group t mod b alone, each with probability b·q. So a unit
   may be in steps j, j + b, j + 2b, ... and in no other.
2. In ``Cx`` a unit of step t shows in rows t to t + b - 1, by column t of C times its clipped gradient: by the clip at
   most, since no column of C is longer than 1. Of two of its steps these rows are disjoint.
3. So, given all rows before t, rows t to t + b - 1 are a Gaussian of noise multiplier σ on a unit that is there with
   probability b·q. What others add to these rows follows from what was released before and from their own coins.
4. A unit has at most ⌈n/b⌉ such turns in n steps: n steps are ⌈n/b⌉ Poisson-sampled Gaussians of rate b·q.

Of groups the paper asks that they are fixed. Here each unit's is drawn by itself, uniformly. Whatever the draw was, (1)
to (4) hold, so they hold on average over draws, which are alike with and without a unit: one more unit moves no other.
Nothing rests on groups being secret. Of two units that replace each other the groups are drawn alike, so they may be
thought of in the same one.

C is the Toeplitz matrix of the first b coefficients of 1/√(1 - x), which are 1, 1/2, 3/8, ..., over their length
(Kalinin and Lampert 2024, arXiv:2405.13763). With up to 32 bands and 1,024 steps its noise on sums of steps is at most
14 % above that of the best banded Toeplitz matrix. It depends on no number of steps, so a run may end early, and begin
anew after any step (:class:`dpft.privacy.noise.BandedNoise`).
"""

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Self

import numpy as np

from dpft.privacy.clipping import FlatClip
from dpft.privacy.events import Event
from dpft.privacy.mechanisms.dp_sgd import DpSgd
from dpft.privacy.mechanisms.mechanism import Words, require
from dpft.privacy.rounding import rounded_up
from dpft.privacy.sampling import CyclicSampler

if TYPE_CHECKING:
    from torch import device

    from dpft.privacy.noise import NoiseStream, Randomness


@dataclass(frozen=True, kw_only=True)
class BandedDpSgd(DpSgd):
    """DP-SGD with noise that is correlated over ``bands`` steps; with one band it is DP-SGD.

    Attributes:
        noise_multiplier: σ of z, before it is correlated. The noise of a single release is larger.
        sample_rate: q, each unit's rate on average. In its group's turn it is b·q.
        bands: b, the bands of C and the number of groups.

    Raises:
        PlanError: a field is out of range; b·q is above 1.

    >>> BandedDpSgd(noise_multiplier=1.0, sample_rate=0.02, steps=10, bands=4).events()[0].count
    3
    """

    name: ClassVar[str] = "dp-sgd-banded"

    bands: int

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.bands >= 1, f"bands is {self.bands}: correlate noise over 2 steps or more; 1 is DP-SGD.")
        require(
            self.bands * self.sample_rate <= 1 + 1e-9,
            f"bands is {self.bands} and sample_rate {self.sample_rate:g}, so a step would take units of its group with "
            f"probability {self.bands * self.sample_rate:g}: lower one, until their product is at most 1.",
        )

    @property
    def column(self) -> tuple[float, ...]:
        """``(bands,)``, the first column of C, of length 1."""
        numbers = [1.0]
        for k in range(1, self.bands):
            numbers.append(numbers[-1] * (2 * k - 1) / (2 * k))
        length = math.sqrt(math.fsum(number**2 for number in numbers))
        return tuple(number / length for number in numbers)

    def events(self, steps: int | None = None) -> tuple[Event, ...]:
        """One Poisson-sampled Gaussian of rate b·q for each ``bands`` steps, and for what is left of them."""
        rate = min(1.0, self.bands * self.sample_rate)
        event = Event(1, self.noise_multiplier, rate, steps=self.bands)
        return tuple(one for one in [event.spanning(self.steps if steps is None else steps)] if one.count)

    def sampler(self, randomness: "Randomness") -> CyclicSampler:
        """Poisson sampling from each of ``bands`` groups in turn."""
        return CyclicSampler(self.sample_rate, self.examples_per_unit, randomness, groups=self.bands)

    def noise(self, size: int, randomness: "Randomness", device: "device") -> "NoiseStream":
        """Rows of C⁻¹z."""
        from dpft.privacy.noise import BandedNoise

        return BandedNoise(size, randomness, device, self.column)

    def evidence(self, releases: np.ndarray) -> np.ndarray:
        """``CᵀC`` of what was released: each step's sum, by all rows that it shows in. The last b - 1 steps are left
        out, some of whose rows were not made."""
        from scipy.signal import lfilter

        rows = lfilter(self.column, [1.0], releases, axis=0)
        found: np.ndarray = lfilter(self.column, [1.0], rows[::-1], axis=0)[::-1]
        return found[: max(0, len(found) - self.bands + 1)]

    @property
    def running_noise(self) -> float:
        """The noise on the sum of all releases up to a step, in units of the clip: its root mean square over steps.

        It is what such matrices are to make small (McKenna 2024). Of DP-SGD it is σ·√((T + 1)/2).
        """
        from scipy.signal import lfilter

        impulse = np.zeros(self.steps)
        impulse[0] = 1.0
        prefix = lfilter([1.0], np.convolve(self.column, [1.0, -1.0]), impulse)  # of 1/((1 - x) C(x))
        return float(self.noise_multiplier * np.sqrt(np.cumsum(prefix**2).mean()))

    def describe(self, steps: int | None = None) -> Words:
        """What DP-SGD's words say, the groups, and over how many steps noise is correlated."""
        words = super().describe(steps)
        if self.bands == 1:
            return words
        rate = rounded_up(min(1.0, self.bands * self.sample_rate), 4)
        return Words(
            f"Poisson, rate {rate} per step on one of {self.bands} groups of units in turn",
            f"{words.mechanism}, noise correlated over {self.bands} steps, of which a unit is in one at most",
        )

    @classmethod
    def example(cls) -> Self:
        """Two rounds of two steps."""
        return cls(noise_multiplier=1.0, sample_rate=0.1, steps=4, clip=FlatClip(0.5), bands=2)
