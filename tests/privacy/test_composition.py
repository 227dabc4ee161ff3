"""Hundreds of different releases together: dpft's own arithmetic against Google's."""

import math

import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from dpft.privacy import gaussian
from dpft.privacy.composition import Event, epsilon, epsilon_rdp, merged, reference

RUN = Event(586, 0.6878, 0.00512)
ALONE = Event(1, 1.0, 1.0)
KNOWN = Event(3, None, None, 0.1, 1e-8)


@pytest.mark.parametrize(
    ("events", "delta"),
    [
        ((RUN,), 1e-6),
        ((ALONE,), 1e-5),
        ((Event(200, 1.2124, 0.1),), 1e-6),
        ((Event(2000, 1.8, 0.001),), 1e-6),
        ((Event(100_000, 5.0, 0.01),), 1e-6),
        ((Event(1, 0.4, 0.0003),), 1e-6),
        ((Event(50, 30.0, 1.0),), 1e-8),
        ((Event(10, None, None, 0.1, 0.0),), 1e-6),
        ((KNOWN, Event(100, 1.0, 0.01)), 1e-6),
        ((Event(500, 0.5, 0.001), Event(10, 8.0, 0.5), Event(7, 1.0, 0.2), KNOWN), 1e-7),
    ],
)
def test_two_accountants_agree(events, delta):
    found, known = epsilon(events, delta), reference(events, delta)
    assert known * (1 - 1e-6) <= found * 1.001  # the reference refines its grid as far as it sees fit
    assert found == pytest.approx(known, rel=2e-3)


@settings(max_examples=12, deadline=None, derandomize=True, phases=[Phase.generate])  # shrinking takes minutes
@given(
    st.lists(
        st.builds(
            Event,
            st.integers(1, 2000),
            st.floats(0.6, 20.0),
            st.floats(1e-4, 1.0),
        ),
        min_size=1,
        max_size=4,
    ),
    st.sampled_from([1e-9, 1e-6, 1e-4]),
)
def test_two_accountants_agree_on_anything(events, delta):
    found = epsilon(tuple(events), delta)
    if found < 30:
        known = reference(tuple(events), delta)
        assert known * 0.996 - 1e-5 <= found <= known * 1.004 + 2e-4  # tiny ε are resolved by the finest grid alone


def test_the_second_opinion_is_larger():
    assert epsilon((RUN,), 1e-6) < epsilon_rdp((RUN,), 1e-6) < 2 * epsilon((RUN,), 1e-6)
    assert epsilon_rdp((KNOWN, RUN), 1e-6) == math.inf
    assert epsilon_rdp((), 1e-6) == 0


def test_nothing_costs_nothing_and_no_noise_costs_everything():
    assert epsilon((), 1e-6) == 0
    assert epsilon((RUN, Event(1, 0.0, 0.5)), 1e-6) == math.inf
    assert epsilon((Event(1, None, None, 1.0, 1e-5),), 1e-6) == math.inf  # its failures alone exceed δ


def test_the_order_and_the_grouping_of_releases_do_not_matter():
    halves = (Event(286, 0.6878, 0.00512), ALONE, Event(300, 0.6878, 0.00512))
    assert merged(halves) == merged((ALONE, RUN))
    assert epsilon(halves, 1e-6) == epsilon((ALONE, RUN), 1e-6)


def test_composition_is_not_addition():
    one = epsilon((RUN,), 1e-6)
    assert one < epsilon((Event(2 * 586, 0.6878, 0.00512),), 1e-6) < 1.5 * one


def test_other_adjacencies_take_the_reference():
    sampled = (Event(10, 1.0, 0.1),)
    assert epsilon(sampled, 1e-5, "replace-one") == reference(sampled, 1e-5, "replace-one") > epsilon(sampled, 1e-5)
    assert epsilon(sampled, 1e-5, "zero-out") == epsilon(sampled, 1e-5)
    assert epsilon(sampled, 1e-5) == pytest.approx(reference(sampled, 1e-5, "zero-out"), rel=2e-3)


@pytest.mark.parametrize(("adjacency", "apart"), [("add-or-remove-one", 1), ("zero-out", 1), ("replace-one", 2)])
def test_without_sampling_all_releases_are_one_gaussian(adjacency, apart):
    events = (Event(7, 2.0, 1.0), Event(40, 9.0, 1.0))
    mu = apart * math.sqrt(7 / 2.0**2 + 40 / 9.0**2)
    assert epsilon(events, 1e-5, adjacency) == pytest.approx(gaussian.epsilon(mu, 1e-5), rel=1e-9)
    assert reference(events, 1e-5, adjacency) == pytest.approx(gaussian.epsilon(mu, 1e-5), rel=2e-3)
