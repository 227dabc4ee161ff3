"""What the mechanisms of a linear head share: rows of features, and sums over units that are released once each.

A head is ``logits = W f + b`` over features f that no training changes. All that it learns comes from a few sums over
*all* units, so nobody is sampled. Each sum is one Gaussian release. A sum that deserves less noise counts as ``w``
steps: noise of σ/√w on it costs exactly what w releases with noise σ cost, since 1/σ² adds up (Dong et al. 2022,
Corollary 3.3). So a run is ``steps`` equal Gaussians to every accountant, and ``sums()`` says how they are put
together.
"""

import math
from abc import abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NamedTuple

import numpy as np

from dpft.errors import GuaranteeError
from dpft.privacy.mechanisms.every_unit import EveryUnit, bounded, noisy
from dpft.privacy.mechanisms.mechanism import Words
from dpft.privacy.rounding import rounded_down

if TYPE_CHECKING:
    from torch import Tensor

    from dpft.privacy.noise import Randomness

CHUNK = 4096  # rows whose float64 copies are made at a time
WITHIN = 1 - 2.0**-23  # so long that float32 cannot round it up to more than 1
SPREAD = 1.1  # the length of a centred row that is not cut, over the average one


class Head(NamedTuple):
    """``weight`` ``(K, d)`` and ``bias`` ``(K,)``, float64, for the features as they were given."""

    weight: "Tensor"
    bias: "Tensor"


@dataclass(frozen=True)
class Rows:
    """What a head is learned from. Private.

    Attributes:
        features: ``(n, d)``; n may be 0.
        labels: ``(n,)`` whole numbers below ``classes``; or, for a regression, ``(n, K)`` real targets, of which a row
            that is longer than 1 is cut to 1. So divide targets by their public bound.
        members: each unit's rows, by their numbers; each row once, and no unit without a row.
        classes: K, declared and public: classes, or targets.
        scale: a public length: features are divided by it, and a row that is longer is cut to it.
        has_bias: whether the head may add a constant.
        rows_per_unit: a public number. A row weighs one over it, so that all count alike; those of a unit of more weigh
            1 together. At 1 each unit counts alike, however many rows it has.
        balance: the classes' own frequencies are taken out of the head's constants to this part. At 0 a row may be of
            each class as often as seen, at 1 equally often (Menon et al. 2021, arXiv:2007.07314, equation 9).

    Raises:
        GuaranteeError: shapes disagree, a label is none of the classes, the units do not name each row once, or real
            targets or a head without a constant are given what only classes, or a constant, can have.
    """

    features: "Tensor"
    labels: "Tensor"
    members: Sequence[np.ndarray[Any, Any]] | np.ndarray[Any, Any]
    classes: int
    scale: float = 1.0
    has_bias: bool = True
    rows_per_unit: int = 1
    balance: float = 0.0

    def __post_init__(self) -> None:
        labels, rows = self.labels, len(self.features)
        if self.balance and (self.real or not self.has_bias):
            raise GuaranteeError(
                f"balance is {self.balance:g}, and the head has "
                f"{'targets' if self.real else 'no constant, which alone could hold it'}: leave it at 0."
            )
        if self.rows_per_unit < 1 or self.rows_per_unit > 1 and self.real:
            raise GuaranteeError(
                f"rows_per_unit is {self.rows_per_unit}: give at least 1, and 1 for real targets, which have no counts "
                "that would say what all rows weigh."
            )
        if self.features.dim() != 2 or labels.shape != ((rows, self.classes) if self.real else (rows,)):
            raise GuaranteeError(
                f"features of shape {tuple(self.features.shape)} came with labels of shape {tuple(labels.shape)}: give "
                f"(n, d) features and (n,) whole numbers, or (n, {self.classes}) real targets."
            )
        if rows and not self.real and not 0 <= int(labels.min()) <= int(labels.max()) < self.classes:
            raise GuaranteeError(
                f"A label is none of the {self.classes} classes: give whole numbers below the declared number."
            )
        sizes = np.array([len(unit) for unit in self.members], dtype=np.int64)
        named = np.concatenate(self.members) if len(sizes) else sizes
        if not (sizes > 0).all() or not np.array_equal(np.sort(named), np.arange(rows)):
            raise GuaranteeError(
                f"{len(sizes):,} units name {len(named):,} rows, and there are {rows:,}: name each row once, and no "
                "unit without one."
            )

    @property
    def real(self) -> bool:
        """Whether labels are real targets."""
        return self.labels.is_floating_point()

    @cached_property
    def alone(self) -> bool:
        """Whether each row is a unit of its own."""
        return len(self.members) == len(self.features)

    @cached_property
    def weights(self) -> "Tensor":
        """``(n, 1)`` float64: one over the rows of each row's unit, or over ``rows_per_unit`` if that is more.

        So those of a unit sum to at most 1, on which every sensitivity rests.
        """
        import torch

        weights = torch.ones(len(self.features), 1, dtype=torch.float64)
        if not self.alone or self.rows_per_unit > 1:
            for unit in self.members:
                weights[unit] = 1 / max(len(unit), self.rows_per_unit)
        return weights

    def mass(self, counts: "Tensor", number: int) -> float:
        """What sums are divided by: the public number of units, or what all rows weigh by their released counts."""
        return number if self.rows_per_unit == 1 else min(number, max(1.0, float(counts.sum())))

    @cached_property
    def bounded(self) -> "Tensor":
        """``(n, d)`` float32 features over the scale, none longer than 1; zero where they are not finite."""
        import torch

        parts = [bounded(part.double() / self.scale, WITHIN).float() for part in self.features.split(CHUNK)]
        return torch.cat(parts)

    def outputs(self, some: slice) -> "Tensor":
        """``(rows, K)`` float64 of these rows, none longer than 1: 1 in the place of the class, or the targets."""
        import torch

        if self.real:
            return bounded(self.labels[some].double(), 1.0)
        return torch.nn.functional.one_hot(self.labels[some].long(), self.classes).double()

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


def balanced(rows: Rows, bias: "Tensor", prior: "Tensor") -> "Tensor":
    """The constants for classes that are as frequent as ``rows.balance`` says; both ``(K,)``."""
    return bias - rows.balance * (prior.log() - prior.log().mean()) if rows.balance else bias


class Centre(NamedTuple):
    """Features are centred at ``mean`` ``(d,)``, and cut to the length ``radius``. Both follow from what was released.

    Features of length 1 at most lie on average √(1 - ‖m‖²) from their mean m.
    """

    mean: "Tensor"
    radius: float

    def of(self, features: "Tensor") -> "Tensor":
        """``(rows, d)`` float64."""
        return bounded(features.double() - self.mean, self.radius)


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
            return torch.zeros(shape, dtype=torch.float64) if value is None else value.double().reshape(shape)
        self._before(steps)
        value = total().double().reshape(shape)
        value = noisy(value, self._noise_multiplier * sensitivity / steps**0.5, self._randomness)
        self._keep(value)
        return value


@dataclass(frozen=True, kw_only=True)
class LinearHead(EveryUnit):
    """A head from sums over all units.

    Attributes:
        noise_multiplier: σ of each step, in units of what one unit can add.
        steps: as how many equal Gaussians the run counts; ``rounds`` are the sums that are released.
        clip: what bounds one unit's gradient, where gradients are summed.
    """

    releases: ClassVar[Literal["gradients", "rows", "head"]] = "head"
    flat_because: ClassVar[str] = "a head has one layer"

    @property
    def clipping(self) -> str:
        """The clip, and what is released under it."""
        return f"{self.clip!r} in {self.name} of {self.steps} steps"

    @property
    def rounds(self) -> Sequence[int]:
        """One: a head of some of its sums is no head, so all are charged together."""
        return (self.steps,)

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
            number: the declared, public number of units, by which sums are divided (but see :meth:`Rows.mass`).

        Raises:
            GuaranteeError: labels are real targets, and the mechanism learns classes.
        """

    def noise_on(self, sensitivity: float, steps: int) -> float:
        """Standard deviation of the noise on each number of a sum that is released so."""
        return self.noise_multiplier * sensitivity / math.sqrt(steps)

    def _prior(self, counts: "Tensor", steps: int) -> "Tensor":
        """``(K,)``: shares of the classes by their released counts, none less than what noise may make of nobody."""
        counts = counts.clamp_min(max(1.0, 2 * self.noise_on(1.0, steps)))
        return counts / counts.sum()

    def _classes_alone(self, rows: Rows) -> None:
        if rows.real:
            raise GuaranteeError(
                f"The mechanism {self.name!r} learns classes, and labels are real targets: use 'head-least-squares'."
            )

    def _centre(self, rows: Rows, sums: Sums, number: float, steps: int) -> "Centre":
        """Releases the mean of the features (sensitivity 1)."""
        width = rows.features.shape[1]
        mean = sums.release(lambda: feature_sum(rows), (width,), 1.0, steps) / number
        variance = (self.noise_on(1.0, steps) / number) ** 2
        kept = float(kept_share(mean, variance))
        length = max(0.0, float(mean.square().sum()) - width * variance)  # squared, less what noise adds to it
        around = math.sqrt(max(0.01, 1 - length + kept * width * variance))
        return Centre(mean * kept, min(SPREAD * around, 1 + kept * float(mean.norm())))

    def _centre_if_constant(self, rows: Rows, sums: Sums, number: float, steps: int) -> "Centre":
        """The same, at zero where the head has no constant, which alone could stand for what centring takes away."""
        import torch

        centre = self._centre(rows, sums, number, steps)
        return centre if rows.has_bias else Centre(torch.zeros_like(centre.mean), 1.0)


def feature_sum(rows: Rows) -> "Tensor":
    """``(d,)``: the sum of all rows by their weights, for units of one size the sum of their means."""
    return rows.total(lambda some: (rows.bounded[some].double() * rows.weights[some]).sum(0), rows.features.shape[1:])


def output_sum(rows: Rows) -> "Tensor":
    """``(K,)``: each class's units, of which one of several rows has a part in each; or the sum of targets."""
    return rows.total(lambda some: (rows.outputs(some) * rows.weights[some]).sum(0), (rows.classes,))


def second_moment(rows: Rows, centre: Centre) -> "Tensor":
    """``(d, d)``: the sum over units of their mean (x - m)(x - m)ᵀ, x - m cut to r."""

    def part(some: slice) -> "Tensor":
        centred = centre.of(rows.bounded[some])
        return (centred * rows.weights[some]).T @ centred

    return rows.total(part, (len(centre.mean), len(centre.mean)))


def cross_moment(rows: Rows, centre: Centre) -> "Tensor":
    """``(K, d)``: the sum over units of their mean y(x - m)ᵀ, x - m cut to r."""
    part = lambda some: (rows.outputs(some) * rows.weights[some]).T @ centre.of(rows.bounded[some])
    return rows.total(part, (rows.classes, len(centre.mean)))


def kept_share(vectors: "Tensor", variance: "float | Tensor") -> "Tensor":
    """``(…, d)`` vectors with noise of this variance on each number to ``(…)``: what a vector is to be multiplied with.

    It is 1 - (d - 2) s² / ‖v‖², and 0 where that is negative (James & Stein 1961; Efron & Morris 1973 for the positive
    part): shrunk so, it is nearer to the truth on average. There is no such number below three dimensions.
    """
    import torch

    noise = max(0, vectors.shape[-1] - 2) * torch.as_tensor(variance, dtype=torch.float64)
    return (1 - noise / vectors.square().sum(-1).clamp_min(1e-30)).clamp_min(0.0)


def unit_sums(values: "Tensor", units: "Tensor") -> "Tensor":
    """``(rows, …)`` values and each row's unit to the ``(units, …)`` sums."""
    return values.new_zeros(int(units[-1]) + 1, *values.shape[1:]).index_add_(0, units, values)
