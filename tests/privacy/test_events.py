"""A release is written and read in one way, and what no version wrote is no release."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dpft.errors import GuaranteeError, PlanError
from dpft.privacy.composition import epsilon, epsilon_rdp, reference
from dpft.privacy.delta import check_delta, too_large
from dpft.privacy.events import Event, from_dp_event, merged, to_dp_event

noises, rates = st.floats(1e-3, 1e6), st.floats(1e-9, 1.0)
gaussians = st.builds(
    Event, st.integers(0, 10**6), noises, rates, sensitivity=st.none() | st.floats(1e-9, 1e9), name=st.text(max_size=9)
)
stated = st.builds(lambda n, e, d: Event(n, None, None, e, d), st.integers(0, 99), st.floats(0, 99), st.floats(0, 0.9))


@given(gaussians | stated)
def test_what_is_written_is_read(event):
    facts = event.to_dict()
    assert Event.from_dict(facts) == event and None not in facts.values()


@given(st.lists(st.builds(Event, st.integers(1, 99), st.floats(0.5, 9.0), rates), max_size=4))
def test_what_dp_accounting_is_told_is_what_is_recorded(events):
    assert from_dp_event(to_dp_event(events)) == merged(events)


@pytest.mark.parametrize(
    ("facts", "event"),
    [
        ({"event": "poisson_sampled_gaussian", "noise_multiplier": 1.0, "sample_rate": 0.1, "count": 5}, Event(5, 1.0, 0.1)),
        ({"noise_multiplier": 1.0, "sample_rate": 1.0}, Event(1, 1.0, 1.0)),
        ({"epsilon": 0.3, "delta": 0.0}, Event(1, None, None, 0.3, 0.0)),
    ],
)  # fmt: skip
def test_version_1_is_read(facts, event):
    assert Event.from_dict(facts) == event


@pytest.mark.parametrize(
    ("facts", "said"),
    [
        ({"version": 3, "kind": "gaussian"}, "written in version 3, and this dpft reads up to 2"),
        ({"version": 2, "kind": "laplace", "scale": 1.0}, "'laplace', which is not what was executed"),
        ({"version": 2, "noise_multiplier": 1.0}, "None, which is not what was executed"),
        ({"event": "shuffled_gaussian", "noise_multiplier": 1.0}, "'shuffled_gaussian'"),
        ({"version": 2, "kind": "gaussian", "noise_multiplier": 1.0, "sample_rate": 0.1}, "sample_rate"),
        ({"version": 2, "kind": "gaussian", "noise_multiplier": "1"}, "no number"),
        ({"version": 2, "kind": "gaussian", "noise_multiplier": True}, "no number"),
        ({"version": 2, "kind": "gaussian", "noise_multiplier": 1.0, "count": 0.5}, "count"),
        ({"version": 2, "kind": "gaussian", "noise_multiplier": 1.0, "count": -1}, "count = -1"),
        ({"version": 2, "kind": "gaussian", "noise_multiplier": math.nan}, "nan"),
        ({"version": 2, "kind": "gaussian", "noise_multiplier": 1.0, "sensitivity": 0.0}, "sensitivity = 0.0"),
        ({"version": 2, "kind": "gaussian"}, "one pair"),
        ({"version": 2, "kind": "stated", "epsilon": 1.0}, "one pair"),
        ({"noise_multiplier": 1.0, "sample_rate": 0.1, "discount": 0.5}, "discount"),
        ({"noise_multiplier": 1.0}, "one pair"),
        ({}, "one pair"),
    ],
)
def test_what_no_version_wrote_is_no_release(facts, said):
    """T15: a figure that is not understood could make what was spent less."""
    with pytest.raises(PlanError, match=said):
        Event.from_dict(facts)


def test_no_epsilon_follows_from_a_name_or_a_sensitivity():
    plain, named = Event(3, 2.0, 1.0), Event(3, 2.0, 1.0, sensitivity=0.1, name="class means")
    for compose in (epsilon, epsilon_rdp, reference):
        assert compose((named,), 1e-6) == compose((plain,), 1e-6)
        assert compose((named, plain), 1e-6) == pytest.approx(compose((plain.times(6),), 1e-6), rel=2e-3)
    assert set(merged([named, plain, named])) == {plain, named.times(6)}


def test_what_is_no_mechanism_is_no_event_of_dp_accounting():
    with pytest.raises(PlanError, match="compose it by dpft.privacy.composition"):
        to_dp_event([Event(1, None, None, 1.0, 0.0)])


@pytest.mark.parametrize(
    ("delta", "units", "large"), [(0.01, 100, True), (0.0099, 100, False), (0.5, None, False), (0.9, 0, False)]
)
def test_the_largest_delta(delta, units, large):
    """T17."""
    assert too_large(delta, units) == large
    if large:
        with pytest.raises(GuaranteeError, match="The account's delta is 0.01 for 100 units, .* whole: leave."):
            check_delta(delta, units, subject="The account's delta", error=GuaranteeError, way_out="leave")
    else:
        check_delta(delta, units)
