"""Noisy sums of statistics of feature rows: a mean, a second moment, class prototypes, counts. One Gaussian release
each.

Each unit adds one number, vector or matrix to a sum, the mean over its rows of what one row adds. A row that is longer
than the bound C is scaled down to C; one that is not finite adds zero. A mean of vectors is never longer than the
longest of them, so a unit moves the sum by what one row could, however many rows it has:

    mean            x                        sensitivity C
    second moment   the upper triangle of xxᵀ            C²     (‖xxᵀ‖_F = ‖x‖²)
    class means     x in the row of its class            C
    class counts    1 in the place of its class          1

The sum is float64 and gets N(0, (σ·sensitivity)² I) once, before any rounding
(Dwork et al. 2006; Dwork, Talwar, Thakurta, Zhang 2014, Algorithm 1 for second moments). It is divided by the declared,
public number of units; the true number is private.
"""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal, NamedTuple, Self

from dpft.errors import GuaranteeError
from dpft.privacy.clipping import FlatClip
from dpft.privacy.events import Event
from dpft.privacy.mechanisms.every_unit import EveryUnit, bounded, noisy, symmetric, upper_triangle
from dpft.privacy.mechanisms.mechanism import Words, require
from dpft.privacy.rounding import rounded_down
from dpft.privacy.units import unit_ids

if TYPE_CHECKING:
    from torch import Tensor

    from dpft.privacy.noise import Randomness


class Statistic(NamedTuple):
    """A released ``value``, float64, and the ``event`` that it was."""

    value: "Tensor"
    event: Event


@dataclass(frozen=True, kw_only=True)
class Statistics(EveryUnit):
    """``steps`` statistics over all units, each one Gaussian release. Charge ``events()`` before the first call.

    Attributes:
        noise_multiplier: σ, each statistic's noise in units of its sensitivity.
        steps: how many statistics are released. Each call of a method is one.
        clip: C, the bound on a row.

    Guarantee:
        ``steps`` calls together are ``events()``. Each value is a function of noisy sums and declared numbers alone.

    Raises:
        PlanError: a field is out of range.

    >>> statistics = Statistics(noise_multiplier=5.0, steps=1, clip=FlatClip(2.0))
    >>> [(event.count, event.noise_multiplier, event.sample_rate) for event in statistics.events()]
    [(1, 5.0, 1.0)]
    """

    name: ClassVar[str] = "statistics"
    releases: ClassVar[Literal["gradients", "rows", "head"]] = "rows"
    fewest: ClassVar[int] = 1
    too_few: ClassVar[str] = "so nothing would be released: plan at least one statistic"
    flat_because: ClassVar[str] = "a row is bounded by its own norm"

    steps: int = 1

    def describe(self, steps: int | None = None) -> Words:
        """Number, noise and bound of the statistics."""
        done = self.steps if steps is None else steps
        return Words(
            "none: every unit is in every sum",
            f"{done:,} Gaussian releases of sums, noise multiplier {rounded_down(self.noise_multiplier, 4)}, rows "
            f"within {self.clip.sensitivity:g}",
        )

    @classmethod
    def example(cls) -> Self:
        """Two statistics."""
        return cls(noise_multiplier=1.0, steps=2, clip=FlatClip(0.5))

    # -- statistics ----------------------------------------------------------------------------------------------

    def mean(
        self, rows: "Tensor", units: Sequence[object] | None, *, number: int, randomness: "Randomness | None" = None
    ) -> Statistic:
        """The mean of feature rows.

        Args:
            rows: ``(n, d)``, private; n may be 0.
            units: ``(n,)`` identifiers of whose rows they are; None if each row is a unit.
            number: the declared, public number of units, by which the sum is divided.
            randomness: where noise comes from. The default is the only source that gives a guarantee.

        Returns:
            ``(d,)``: noisy, with deviation ``noise_multiplier · C / number`` in each place.

        Raises:
            GuaranteeError: rows are not ``(n, d)``, or units are not one for each row.
        """
        clipped = self._clipped(rows)
        total = (clipped * _weights(units, len(clipped))).sum(0)
        return self._released(total, self.clip.sensitivity, number, randomness)

    def second_moment(
        self, rows: "Tensor", units: Sequence[object] | None, *, number: int, randomness: "Randomness | None" = None
    ) -> Statistic:
        """The mean of xxᵀ, which is the covariance of rows whose mean is zero; arguments and errors are those of
        :meth:`mean`.

        Returns:
            ``(d, d)``, symmetric; noise may make an eigenvalue negative.
        """
        clipped = self._clipped(rows)
        total = (clipped * _weights(units, len(clipped))).T @ clipped
        released = self._released(upper_triangle(total), self.clip.sensitivity**2, number, randomness)
        return Statistic(symmetric(released.value, len(total)), released.event)

    def class_means(
        self,
        rows: "Tensor",
        labels: "Tensor",
        units: Sequence[object] | None,
        *,
        classes: int,
        number: int,
        randomness: "Randomness | None" = None,
    ) -> Statistic:
        """Each class's sum of rows over the number of all units: the direction of its prototype; see also :meth:`mean`.

        Divide by what :meth:`class_counts` released for the prototypes themselves; the true sizes of classes are
        private.

        Args:
            labels: ``(n,)`` whole numbers below ``classes``, a declared, public number.

        Returns:
            ``(classes, d)``.

        Raises:
            GuaranteeError: a label is none of the classes; and see :meth:`mean`.
        """
        clipped = self._clipped(rows)
        chosen = _one_of(labels, classes, len(clipped))
        total = clipped.new_zeros(classes, clipped.shape[1])
        total.index_add_(0, chosen, clipped * _weights(units, len(clipped)))
        released = self._released(total.flatten(), self.clip.sensitivity, number, randomness)
        return Statistic(released.value.view(total.shape), released.event)

    def class_counts(
        self,
        labels: "Tensor",
        units: Sequence[object] | None,
        *,
        classes: int,
        number: int,
        randomness: "Randomness | None" = None,
    ) -> Statistic:
        """The share of each class among all units, of which a unit of several rows has a part in each; see
        :meth:`class_means`.

        Returns:
            ``(classes,)``.
        """
        import torch

        chosen = _one_of(labels, classes, len(labels))
        total = torch.zeros(classes, dtype=torch.float64)
        total.index_add_(0, chosen, _weights(units, len(chosen)).squeeze(1))
        return self._released(total, 1.0, number, randomness)

    # -- what they share -----------------------------------------------------------------------------------------

    def _clipped(self, rows: "Tensor") -> "Tensor":
        """``(n, d)`` float64 on the processor, each row at most C long; rows that are not finite are zero."""
        import torch

        rows = torch.as_tensor(rows).detach().to("cpu", torch.float64)
        if rows.dim() != 2:
            raise GuaranteeError(
                f"rows has shape {tuple(rows.shape)}, but each row is bounded by itself: give (n, d) features."
            )
        return bounded(rows, self.clip.sensitivity)

    def _released(self, total: "Tensor", sensitivity: float, number: int, randomness: "Randomness | None") -> Statistic:
        """``(size,)``: the noisy sum over the public number."""
        from dpft.privacy.noise import SecureRandomness

        require(
            number >= 1, f"number is {number}: declare how many units the data have, at least 1, and do not count them."
        )
        released = noisy(total, self.noise_multiplier * sensitivity, randomness or SecureRandomness())
        return Statistic(released / number, *self.events(1))


def _weights(units: Sequence[object] | None, rows: int) -> "Tensor":
    """``(n, 1)`` float64: one over the number of rows of each row's unit, so that weighted rows of a unit sum to their
    mean."""
    import torch

    ids = list(range(rows)) if units is None else unit_ids(units)
    if len(ids) != rows:
        raise GuaranteeError(f"{len(ids)} units were given for {rows} rows: give one unit for each row.")
    numbers: dict[Hashable, int] = {}
    places = torch.tensor([numbers.setdefault(one, len(numbers)) for one in ids], dtype=torch.long)
    return 1 / torch.bincount(places).to(torch.float64)[places].unsqueeze(1)


def _one_of(labels: "Tensor", classes: int, rows: int) -> "Tensor":
    """``(n,)`` labels as numbers."""
    import torch

    labels = torch.as_tensor(labels).detach().to("cpu", torch.long)
    if labels.shape != (rows,) or bool(((labels < 0) | (labels >= classes)).any()):
        raise GuaranteeError(
            f"labels of shape {tuple(labels.shape)} were given for {rows} rows and {classes} classes: give each row a "
            "whole number below classes, which is declared and not counted."
        )
    return labels
