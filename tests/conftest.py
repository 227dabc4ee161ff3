"""Small models of real families, built from their configurations: exactness does not depend on trained weights."""

import pytest

from benchmarks.zoo import Case


@pytest.fixture
def case():
    return Case


@pytest.fixture
def plan():
    from dpft.privacy.plan import Plan

    def make(**fields):
        return Plan(**{"noise_multiplier": 1.0, "sample_rate": 0.5, "steps": 10, "delta": 1e-3, "units": 8, **fields})

    return make
