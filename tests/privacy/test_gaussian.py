"""The closed form of the Gaussian mechanism against sixty digits, and the bound as if the draws were known."""

import random

import mpmath
import pytest

from dpft.privacy import accounting, gaussian
from dpft.privacy.adjacency import ADJACENCIES
from dpft.privacy.events import Event


def exact_delta(epsilon, mu):
    """Balle & Wang 2018, Theorem 8, with sixty digits."""
    with mpmath.workdps(60):
        epsilon, mu = mpmath.mpf(epsilon), mpmath.mpf(mu)
        return mpmath.ncdf(mu / 2 - epsilon / mu) - mpmath.exp(epsilon) * mpmath.ncdf(-mu / 2 - epsilon / mu)


def test_the_closed_form_is_above_the_exact_value_by_less_than_a_millionth():
    """300 Gaussians of μ from 1e-6 to 300, at δ from 1e-15 to 0.1."""
    draw = random.Random(1)
    for _ in range(300):
        mu, delta = 10 ** draw.uniform(-6, 2.5), 10 ** draw.uniform(-15, -1)
        found = gaussian.epsilon(mu, delta)
        assert exact_delta(found, mu) <= delta, (mu, delta)
        if found:
            assert exact_delta(found * (1 - 2e-6), mu) > delta, (mu, delta)


@pytest.mark.parametrize("noise", [1e-3, 1e6])
def test_the_closed_form_holds_at_the_ends(noise):
    """μ²/2 = 500,000 for one release at σ = 0.001: e to its power is no number, and ε is."""
    found = gaussian.epsilon(1 / noise, 1e-15)
    assert 0 <= found - 0.5 / noise**2 <= 8 / noise


def test_draws_are_bounded_by_their_exact_number():
    for count, rate, failure in ((500, 0.01, 1e-7), (1000, 0.5, 1e-12), (10, 0.9, 1e-3), (3, 1e-5, 1e-6)):
        most = gaussian.draws(count, rate, failure)
        with mpmath.workdps(40):
            q = mpmath.mpf(rate)
            mass = [mpmath.binomial(count, k) * q**k * (1 - q) ** (count - k) for k in range(count + 1)]
            assert sum(mass[most + 1 :]) <= failure and (most == 0 or sum(mass[most:]) > failure)


@pytest.mark.parametrize("adjacency", ADJACENCIES)
@pytest.mark.parametrize(("noise", "rate", "count"), [(0.3, 0.01, 20), (0.3, 0.5, 5), (1.0, 0.02, 500)])
def test_who_is_told_the_draws_learns_more(noise, rate, count, adjacency):
    apart = 2.0 if adjacency == "replace-one" else 1.0
    told = gaussian.revealed([(noise / apart, rate, count)], 1e-6)
    assert told >= accounting.epsilon(Event(count, noise, rate).dp_event, 1e-6, adjacency)


def test_a_failure_is_shared_by_all_kinds_of_releases():
    """Of ten kinds that each draw a unit once in a thousand, one does with 0.00996: more than 0.005, less than 0.02."""
    releases = [(1.0 + i / 10, 1e-3, 1) for i in range(10)]
    assert gaussian.revealed_mu(releases, 0.02) == (0.0, 0.02)
    assert gaussian.revealed_mu(releases, 0.005)[0] ** 2 == pytest.approx(sum(noise**-2 for noise, _, _ in releases))


def test_failures_and_what_the_draws_tell_stay_within_delta_together():
    """Ten releases at σ = 3 that draw a unit half of the time: it is in all ten with 2^-10, half of δ."""
    delta = 2**-9 * 1.01
    found = gaussian.revealed([(3.0, 0.5, 10)], delta)
    assert gaussian.draws(10, 0.5, delta / 2) == 9
    assert exact_delta(found, 3 / 3.0) + 2**-10 <= delta


@pytest.mark.parametrize(("adjacency", "mu"), [("add-or-remove-one", 10), ("replace-one", 20)])
def test_the_curve_where_noise_is_little_is_above_the_exact_one(adjacency, mu):
    epsilons = [30.0, 100.0, 200.0]
    curve = accounting.deltas(Event(1, 0.1, 1.0).dp_event, epsilons, adjacency)
    for epsilon, found in zip(epsilons, curve, strict=True):
        exact = float(exact_delta(epsilon, mu))
        assert exact <= found * (1 + 1e-9) and found <= exact * (1 + 1e-6) + 1e-12


def test_the_curve_of_draws_that_hardly_happen_counts_them():
    """At σ = 0.1 a release tells nearly always that a unit was drawn: δ is at least its rate of 1e-14, times 0.99."""
    (found,) = accounting.deltas(Event(1, 0.1, 1e-14).dp_event, [1.0])
    assert 0.99e-14 <= found <= 1e-12
