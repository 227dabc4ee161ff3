"""The sampler that the accounting assumes, and nothing else.

A logical batch takes every unit independently with the public probability ``sample_rate`` (Poisson sampling). Its
size is random, zero included, and is private: no part of a run may show it.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Self

import numpy as np

from dpft.errors import GuaranteeError

if TYPE_CHECKING:  # a plan is made in a second; PyTorch takes two to import
    from dpft.privacy.noise import Randomness

ALL = 1 << 62  # of a unit's examples: as many as it has


@dataclass(frozen=True)
class PoissonSampler:
    """Draws logical batches of units; made by :meth:`dpft.Plan.sampler`, so that it cannot disagree with the event.

    ``examples_per_unit`` bounds how many of a unit's examples one step uses; which ones is drawn afresh each step.
    """

    sample_rate: float
    examples_per_unit: int
    randomness: "Randomness" = field(repr=False)

    @property
    def turn(self) -> int:
        """The step whose batch is drawn; always 0 where every step is drawn alike."""
        return 0

    def following(self, released: Callable[[], int]) -> Self:
        """The same for a run that has released so many steps whenever it draws."""
        return self

    def units(self, n: int) -> np.ndarray:
        """Sorted indices, among ``range(n)``, of the units that this step uses. May be empty."""
        return np.flatnonzero(self.randomness.bernoulli(n, self.sample_rate))

    def examples(self, members: np.ndarray) -> np.ndarray:
        """At most ``examples_per_unit`` of one unit's example indices, a uniform subset without replacement."""
        if len(members) <= self.examples_per_unit:
            return members
        return members[np.argsort(self.randomness.uniform(len(members)))[: self.examples_per_unit]]


@dataclass(frozen=True)
class CyclicSampler(PoissonSampler):
    """Poisson sampling from one of ``groups`` groups of units at a time, in turn (Choquette-Choo et al. 2023,
    arXiv:2306.08153).

    Each unit's group is drawn by itself, so that another unit in the data moves nobody. A step takes each unit of its
    group with ``groups`` times the ``sample_rate``, which is thus each unit's rate on average. Two steps that may take
    a unit are at least ``groups`` apart, if batches are drawn as steps are released.
    """

    groups: int = 1
    released: Callable[[], int] | None = field(default=None, repr=False)
    _group: list[np.ndarray] = field(default_factory=list, repr=False)  # of each unit; drawn once

    @property
    def group_rate(self) -> float:
        """The probability with which a step takes each unit of its group."""
        return min(1.0, self.groups * self.sample_rate)

    @property
    def turn(self) -> int:
        """The number of steps that were released.

        Raises:
            GuaranteeError: nobody said how to know it.
        """
        if self.released is None:
            raise GuaranteeError(
                "Units are drawn by groups in turn, and the sampler does not know whose turn it is: use "
                "sampler.following(lambda: engine.steps_released)."
            )
        return self.released()

    def following(self, released: Callable[[], int]) -> Self:
        """The same, with groups of its own, for a run that has released so many steps whenever it draws."""
        return replace(self, released=released, _group=[])

    def units(self, n: int) -> np.ndarray:
        """Sorted indices, among ``range(n)``, of the units that this step uses. May be empty.

        Raises:
            GuaranteeError: the number of units changed, so that groups would.
        """
        turn = self.turn % self.groups
        if not self._group:
            drawn = (self.randomness.uniform(n) * self.groups).astype(np.int64)
            self._group.append(np.minimum(drawn, self.groups - 1))  # a product may be rounded up
        if len(self._group[0]) != n:
            raise GuaranteeError(
                f"{n:,} units are drawn from, and {len(self._group[0]):,} were put into groups: begin another run for "
                "other units."
            )
        return np.flatnonzero((self._group[0] == turn) & self.randomness.bernoulli(n, self.group_rate))
