"""What the mechanisms of a linear head share: rows of features, and sums over units that are released once each.

A head is ``logits = W f + b`` over features f that no training changes. All that it learns comes from a few sums over
*all* units, so nobody is sampled. Each sum is one Gaussian release. A sum that deserves less noise counts as ``w``
steps: noise of σ/√w on it costs exactly what w releases with noise σ cost, since 1/σ² adds up (Dong et al. 2022,
Corollary 3.3). So a run is ``steps`` equal Gaussians to every accountant, and ``sums()`` says how they are put
together.
"""

from abc import abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NamedTuple

import numpy as np

from dpft.errors import GuaranteeError
from dpft.privacy.clipping import FlatClip
from dpft.privacy.events import Event
from dpft.privacy.mechanisms.mechanism import Mechanism, Words, require
from dpft.privacy.rounding import rounded_down
from dpft.privacy.sampling import ALL, PoissonSampler

if TYPE_CHECKING:
    from torch import Tensor

    from dpft.privacy.noise import Randomness

CHUNK = 4096  # rows whose float64 copies are made at a time


class Head(NamedTuple):
    """``weight`` ``(K, d)`` and ``bias`` ``(K,)``, float64, for the features as they were given."""

    weight: "Tensor"
    bias: "Tensor"


@dataclass(frozen=True)
class Rows:
    """What a head is learned from. Private.

    Attributes:
        features: ``(n, d)``; n may be 0.
        labels: ``(n,)`` whole numbers below ``classes``.
        members: each unit's rows, by their numbers.
        classes: K, declared and public.
        scale: a public length: features are divided by it, and a row that is longer is cut to it.
        has_bias: whether the head may add a constant.
    """

    features: "Tensor"
    labels: "Tensor"
    members: Sequence[np.ndarray[Any, Any]] | np.ndarray[Any, Any]
    classes: int
    scale: float = 1.0
    has_bias: bool = True

    def __post_init__(self) -> None:
        labels, rows = self.labels, len(self.features)
        if self.features.dim() != 2 or labels.shape != (rows,):
            raise GuaranteeError(
                f"features of shape {tuple(self.features.shape)} came with labels of shape {tuple(labels.shape)}: give "
                "(n, d) features and (n,) labels."
            )
        if rows and not 0 <= int(labels.min()) <= int(labels.max()) < self.classes:
            raise GuaranteeError(
                f"A label is none of the {self.classes} classes: give whole numbers below the declared number."
            )
        if sum(map(len, self.members)) != rows:
            raise GuaranteeError(
                f"The units have {sum(map(len, self.members)):,} rows together, of {rows:,}: name each once."
            )

    @cached_property
    def alone(self) -> bool:
        """Whether each row is a unit of its own."""
        return len(self.members) == len(self.features)

    @cached_property
    def weights(self) -> "Tensor":
        """``(n, 1)`` float64: one over the number of rows of each row's unit, so that a unit's rows sum to a mean."""
        import torch

        weights = torch.ones(len(self.features), 1, dtype=torch.float64)
        if not self.alone:
            for unit in self.members:
                weights[unit] = 1 / len(unit)
        return weights

    @cached_property
    def bounded(self) -> "Tensor":
        """``(n, d)`` float32 features over the scale, none longer than 1; zero where they are not finite."""
        import torch

        parts = [bounded(part.double() / self.scale, 1.0).float() for part in self.features.split(CHUNK)]
        return torch.cat(parts) if parts else self.features.float()

    def total(self, part: Callable[[slice], "Tensor"], shape: tuple[int, ...]) -> "Tensor":
        """The sum over chunks of rows of ``part(rows)``, float64 of this shape."""
        import torch

        total = torch.zeros(shape, dtype=torch.float64)
        for start in range(0, len(self.features), CHUNK):
            total += part(slice(start, start + CHUNK))
        return total

    def units(self, most: int) -> Iterator[tuple["Tensor", "Tensor"]]:
        """Units in turn, in chunks of at most so many rows or one unit: numbers of the rows, and each row's unit."""
        import torch

        start = 0
        while start < len(self.members):
            size = len(self.members[start])
            stop = start + 1
            while stop < len(self.members) and size + len(self.members[stop]) <= most:
                size += len(self.members[stop])
                stop += 1
            sizes = torch.tensor([len(unit) for unit in self.members[start:stop]])
            rows = torch.as_tensor(np.concatenate(self.members[start:stop]))
            yield rows, torch.arange(stop - start).repeat_interleave(sizes)
            start = stop


class Sums:
    """The one door through which sums over units leave: each is released once, with noise.

    Args:
        before: called with the number of steps that the next release counts as, before its noise is drawn.
        known: what was released before this start, in order; None stands for one that was counted and lost. These are
            neither computed nor charged again.
        keep: called with each release's value.
    """

    def __init__(
        self,
        noise_multiplier: float,
        randomness: "Randomness",
        *,
        before: Callable[[int], None] = lambda steps: None,
        known: Sequence["Tensor | None"] = (),
        keep: Callable[["Tensor"], None] = lambda value: None,
    ) -> None:
        self._noise_multiplier, self._randomness = noise_multiplier, randomness
        self._before, self._known, self._keep = before, list(known), keep

    def release(
        self, total: Callable[[], "Tensor"], shape: tuple[int, ...], sensitivity: float, steps: int = 1
    ) -> "Tensor":
        """``total()``, float64 of this shape, with noise of ``σ · sensitivity / √steps`` on each number.

        A sum that was lost is zero.
        """
        import torch

        if self._known:
            value = self._known.pop(0)
            return torch.zeros(shape, dtype=torch.float64) if value is None else value.view(shape)
        self._before(steps)
        value = total()
        if self._noise_multiplier > 0:
            noise = self._randomness.gaussian(value.numel()).view(shape)
            value = value + noise * (self._noise_multiplier * sensitivity / steps**0.5)
        self._keep(value)
        return value


@dataclass(frozen=True, kw_only=True)
class LinearHead(Mechanism):
    """A head from sums over all units.

    Attributes:
        noise_multiplier: σ of each step, in units of what one unit can add.
        steps: as how many equal Gaussians the run counts; ``rounds`` are the sums that are released.
        clip: what bounds one unit's gradient, where gradients are summed.
    """

    releases: ClassVar[Literal["gradients", "rows", "head"]] = "head"
    sample_rate: ClassVar[float] = 1.0
    examples_per_unit: ClassVar[int] = ALL
    unit_gradient: ClassVar[str] = "mean"

    noise_multiplier: float
    steps: int
    clip: FlatClip = field(default_factory=FlatClip)

    def __post_init__(self) -> None:
        require(
            self.noise_multiplier >= 0,
            f"noise_multiplier is {self.noise_multiplier}, and noise cannot be negative: use a positive number.",
        )
        require(self.steps >= 1, f"steps is {self.steps}, so nothing would be released: plan at least one step.")
        require(
            isinstance(self.clip, FlatClip),
            f"clip is {self.clip}, and a head has one layer: give FlatClip.",
        )

    @property
    def clipping(self) -> str:
        """The clip, and what is released under it."""
        return f"{self.clip!r} in {self.name} of {self.steps} steps"

    @property
    def rounds(self) -> Sequence[int]:
        """One: a head of some of its sums is no head, so all are charged together."""
        return (self.steps,)

    def events(self, steps: int | None = None) -> tuple[Event, ...]:
        """One Gaussian without sampling for each step."""
        count = self.steps if steps is None else steps
        return (Event(count, self.noise_multiplier, 1.0),) if count else ()

    def sampler(self, randomness: "Randomness") -> PoissonSampler:
        """Takes every unit with all its rows."""
        return PoissonSampler(self.sample_rate, self.examples_per_unit, randomness)

    def describe(self, steps: int | None = None) -> Words:
        """Number and noise of the releases, and what they are."""
        done = self.steps if steps is None else steps
        return Words(
            "none: every unit is in every sum",
            f"{done:,} Gaussian releases of sums over all units, noise multiplier "
            f"{rounded_down(self.noise_multiplier, 4)}: {self.about}",
        )

    @property
    @abstractmethod
    def about(self) -> str:
        """The sums, in words."""

    @abstractmethod
    def sums(self) -> tuple[int, ...]:
        """As how many steps each release counts, in order; they sum to ``steps``."""

    @abstractmethod
    def fit(self, rows: Rows, sums: Sums, number: int) -> Head:
        """The head, a function of what ``sums`` releases and of public numbers alone.

        Args:
            number: the declared, public number of units, by which sums are divided.
        """


def bounded(rows: "Tensor", length: float) -> "Tensor":
    """``(n, d)`` rows, none longer than ``length``; zero where they are not finite."""
    import torch

    norms = rows.norm(dim=1, keepdim=True)
    finite = torch.isfinite(norms)
    rows = rows.masked_fill(~finite, 0.0)  # 0 · inf would be NaN
    factors: Tensor = (length / norms.masked_fill(~finite, 1.0).clamp_min(1e-30)).clamp_max(1.0)
    return rows * factors


def unit_means(values: "Tensor", units: "Tensor") -> "Tensor":
    """``(rows, …)`` values and each row's unit to the ``(units, …)`` means."""
    import torch

    counts = torch.bincount(units).to(values.dtype)
    total = values.new_zeros(len(counts), *values.shape[1:])
    return total.index_add_(0, units, values) / counts.view(-1, *[1] * (values.dim() - 1))
