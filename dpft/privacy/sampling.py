"""The sampler that the accounting assumes, and nothing else.

A logical batch takes every unit independently with the public probability ``sample_rate`` (Poisson sampling). Its
size is random, zero included, and is private: no part of a run may show it.
"""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

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

    def units(self, n: int) -> np.ndarray:
        """Sorted indices, among ``range(n)``, of the units that this step uses. May be empty."""
        return np.flatnonzero(self.randomness.bernoulli(n, self.sample_rate))

    def examples(self, members: np.ndarray) -> np.ndarray:
        """At most ``examples_per_unit`` of one unit's example indices, a uniform subset without replacement."""
        if len(members) <= self.examples_per_unit:
            return members
        return members[np.argsort(self.randomness.uniform(len(members)))[: self.examples_per_unit]]
