"""Fixtures that many tests share; what they are made of is in tests/support."""

import gc

import pytest

from tests.support.recipes import classifier_in, language_in
from tests.support.zoo import Case

# Programs and plug-ins that tests run: to collect doctests would import them.
collect_ignore = ["data/make.py", "tasks/plugin_copied.py", "mutants/run.py"]


def pytest_collection_finish():
    """What was imported stays, so the garbage collector need not look through all of it again and again."""
    gc.collect()
    gc.freeze()


@pytest.fixture
def case():
    return Case


@pytest.fixture
def plan():
    from dpft.privacy.plan import Plan

    def make(**fields):
        return Plan(**{"noise_multiplier": 1.0, "sample_rate": 0.5, "steps": 10, "delta": 1e-3, "units": 8, **fields})

    return make


@pytest.fixture
def recipe(tmp_path):
    """A small model and small data on disk, as a user has them."""
    return classifier_in(tmp_path)


@pytest.fixture
def language(tmp_path):
    return language_in(tmp_path / "language")
