"""Small data for heads, and sums of which the exact values are kept."""

import numpy as np
import pytest
import torch

from dpft.privacy.mechanisms import mechanisms
from dpft.privacy.mechanisms.linear_head import Rows, Sums
from dpft.privacy.noise import SeededRandomness

with_and_without = pytest.mark.parametrize("has_bias", [True, False], ids=["constant", "no constant"])
WIDTH, CLASSES, NUMBER = 4, 3, 12
UNITS = [[0, 3, 4], [1], [2, 6], [5], [7], [8, 9, 10, 11]]
HEADS = [kind.example() for kind in mechanisms().values() if kind.releases == "head"]
every_head = pytest.mark.parametrize("mechanism", HEADS, ids=lambda mechanism: mechanism.name)


class Recorded(Sums):
    """Sums that keep what was summed and how, under a past that may be given."""

    def __init__(self, past=(), noise_multiplier=0.0, randomness=None):
        super().__init__(noise_multiplier, randomness)
        self.past, self.totals, self.values, self.how = list(past), [], [], []

    def release(self, total, shape, sensitivity, steps=1):
        exact = total()
        assert exact.dtype == torch.float64 and exact.shape == tuple(shape)
        value = super().release(lambda: exact, shape, sensitivity, steps)
        if len(self.totals) < len(self.past):
            value = self.past[len(self.totals)]
        self.totals.append(exact)
        self.values.append(value)
        self.how.append((sensitivity, steps))
        return value


def rows(seed=0, units=UNITS, real=False, **facts):
    """Units of unequal sizes. Their rows are of dyadic numbers, so that float32 holds them, and some are long."""
    generator = torch.Generator().manual_seed(seed)
    n = sum(map(len, units))
    features = torch.randint(-64, 65, (n, WIDTH), generator=generator) / 128 + torch.tensor([0.25, 0, 0, 0])
    labels = torch.randint(CLASSES, (n,), generator=generator)
    features[torch.arange(n), labels + 1] += 0.5  # so that classes differ
    if real:
        labels = torch.randn(n, CLASSES, generator=generator)
    members = [np.array(unit) for unit in units]
    return Rows(features, labels, members, CLASSES, **facts)


def nobody(width=WIDTH, **facts):
    return Rows(torch.zeros(0, width), torch.zeros(0, dtype=torch.long), [], CLASSES, **facts)


def silent(mechanism, data, past=(), number=NUMBER):
    """Without noise in the sums; the mechanism computes as if there were noise."""
    sums = Recorded(past)
    return mechanism.fit(data, sums, number), sums


def noisy(mechanism, data, seed=0, number=NUMBER):
    sums = Recorded(noise_multiplier=mechanism.noise_multiplier, randomness=SeededRandomness(seed))
    return mechanism.fit(data, sums, number), sums
