"""The plan: its checks, its calibration and its claim."""

import math
import re

import pytest

from dpft.errors import PlanError
from dpft.privacy import accounting
from dpft.privacy.adjacency import ADJACENCIES
from dpft.privacy.clipping import AutoClip, FlatClip
from dpft.privacy.noise import SeededRandomness
from dpft.privacy.plan import Plan

BASE = dict(noise_multiplier=1.0, sample_rate=0.02, steps=500, delta=1e-5)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (dict(noise_multiplier=-1), "noise_multiplier"),
        (dict(sample_rate=0), "sample_rate"),
        (dict(sample_rate=1.5), "sample_rate"),
        (dict(steps=0), "steps"),
        (dict(delta=0), "delta"),
        (dict(units=0), "units"),
        (dict(adjacency="neighbours"), "adjacency"),
        (dict(examples_per_unit=0), "examples_per_unit"),
        (dict(unit_gradient="max"), "unit_gradient"),
    ],
)
def test_a_field_out_of_range_is_refused_by_name(change, named):
    with pytest.raises(PlanError, match=named):
        Plan(**{**BASE, **change})


@pytest.mark.parametrize("units", [100_000, 200_000])
def test_delta_of_one_over_units_or_more_is_refused(units):
    """T17."""
    with pytest.raises(PlanError, match="publishing a random unit"):
        Plan(**{**BASE, "units": units})
    assert Plan(**{**BASE, "units": 99_999}).units == 99_999


@pytest.mark.parametrize(
    ("epsilon", "units", "batch_size", "steps"),
    [(0.1, 10**6, 64, 1000), (0.25, 10**6, 32, 10_000), (10, 10**6, 1024, 100_000), (0.5, 10**7, 128, 1000)],
)
def test_rare_draws_are_calibrated_without_asking_often(monkeypatch, epsilon, units, batch_size, steps):
    """dp-accounting takes seconds where draws are rare and ε is small, a hundred times as long as dpft's own
    arithmetic."""
    asked, exact = [], accounting.epsilon
    monkeypatch.setattr(
        accounting, "epsilon", lambda event, *given, **how: asked.append(event) or exact(event, *given, **how)
    )
    plan = Plan.calibrate(epsilon=epsilon, delta=0.1 / units, units=units, batch_size=batch_size, steps=steps)
    assert len(asked) <= 3
    assert 0.998 * epsilon <= plan.epsilon <= epsilon


@pytest.mark.parametrize("noise_multiplier", [4.0, 1.0, 0.5])
@pytest.mark.parametrize("adjacency", ADJACENCIES)
def test_what_is_shown_while_training_is_what_will_be_stated(noise_multiplier, adjacency):
    plan = Plan(**BASE | dict(noise_multiplier=noise_multiplier, adjacency=adjacency))
    for steps in (0, 1, 20, 500):
        shown, stated = plan.epsilon_after(steps, exact=False), plan.epsilon_after(steps)
        assert 0.998 * stated <= shown <= 1.01 * stated


@pytest.mark.parametrize("epsilon", [0.1, 1.0, 3.0, 8.0])
def test_calibrated_noise_meets_the_target_and_wastes_nothing(epsilon):
    plan = Plan.calibrate(epsilon=epsilon, delta=1e-6, units=50_000, batch_size=256, steps=300)
    assert epsilon * 0.995 <= plan.epsilon <= epsilon


def test_epochs_round_up_so_that_no_step_is_dropped():
    """T9: int(1/q) would plan 195 steps an epoch where 195.3 are needed."""
    plan = Plan.calibrate(noise_multiplier=1.0, delta=1e-6, units=50_000, batch_size=256, epochs=3)
    assert plan.steps == 586
    assert Plan.calibrate(noise_multiplier=1.0, delta=1e-6, units=1000, batch_size=100, epochs=3).steps == 30


def test_the_most_steps_for_a_budget():
    plan = Plan.calibrate(epsilon=3.0, noise_multiplier=1.0, sample_rate=0.02, delta=1e-5)
    assert plan.epsilon <= 3.0 < plan.epsilon_after(plan.steps + 1)


@pytest.mark.parametrize(
    "facts",
    [
        dict(epsilon=3.0, sample_rate=0.1),
        dict(epsilon=3.0, noise_multiplier=1.0, steps=5, sample_rate=0.1),
        dict(epsilon=3.0, steps=5),
        dict(epsilon=3.0, steps=5, batch_size=10),
        dict(epsilon=3.0, steps=5, batch_size=10, units=5),
        dict(epsilon=3.0, steps=5, epochs=1, sample_rate=0.1),
        dict(epsilon=-1.0, steps=5, sample_rate=0.1),
        dict(epsilon=0.01, noise_multiplier=0.5, sample_rate=0.5),
    ],
)
def test_contradicting_facts_are_refused(facts):
    with pytest.raises(PlanError):
        Plan.calibrate(delta=1e-5, **facts)


def test_noise_follows_the_clip_that_bounds_the_gradient():
    """T6: one object owns C."""
    for clip in (FlatClip(0.25), AutoClip(4.0)):
        assert Plan(**BASE, clip=clip).noise_std == clip.sensitivity


def test_the_claim_states_its_five_parts():
    sentence = Plan(**BASE, unit="patient_id").guarantee()
    for part in ("ε = 2.78", "δ = 1e-05", "patient_id", "add-or-remove-one", "Poisson", "500 Gaussian releases"):
        assert part in sentence


@pytest.mark.parametrize("noise_multiplier", [0.02, 0.7, 1.0, 1.3, 50.0])
def test_no_claim_is_below_what_was_computed(noise_multiplier):
    """ε = 2.773 is printed as 2.78 and not as 2.77."""
    plan = Plan(**BASE | dict(noise_multiplier=noise_multiplier))
    for steps in (1, 10, 499):
        said = float(re.search(r"ε = ([0-9.e+-]+)", plan.guarantee(steps))[1])
        assert plan.epsilon_after(steps) <= said <= plan.epsilon_after(steps) * 1.01


def test_without_noise_the_claim_is_not_private():
    plan = Plan(**{**BASE, "noise_multiplier": 0.0})
    assert math.isinf(plan.epsilon)
    assert plan.guarantee().startswith("NOT PRIVATE")


def test_the_sampler_has_the_rate_that_is_accounted():
    """T9."""
    plan = Plan(**BASE)
    assert plan.sampler(SeededRandomness(0)).sample_rate == plan.events()[0].sample_rate


def test_no_units_no_normaliser():
    with pytest.raises(PlanError, match="normaliser"):
        _ = Plan(**BASE).expected_batch_size
