"""Bounds against the literature's numbers and against mechanisms whose ε is known."""

import numpy as np
import pytest
from scipy.stats import norm

from dpft.audit.bounds import f_dp_one_run, gaussian_epsilon, gaussian_many_runs, least_mu, many_runs, one_run
from dpft.errors import PlanError


@pytest.mark.parametrize(
    ("m", "r", "v", "delta", "significance", "known"),
    [
        (1000, 100, 75, 1e-4, 0.05, 0.673),
        (100_000, 1510, 1439, 1e-5, 0.05, 2.6759),
        (1000, 100, 100, 1e-5, 0.05, 3.4654),
        (1000, 100, 100, 1e-5, 0.01, 2.9892),
        (1000, 1000, 600, 1e-5, 0.05, 0.2972),
        (1000, 1000, 500, 1e-5, 0.05, 0.0),
    ],
)
def test_golden_values_of_one_run(m, r, v, delta, significance, known):
    found = one_run(m, r, v, delta, significance)
    assert found.epsilon_lower_bound == pytest.approx(known, abs=6e-4)
    assert found.epsilon_lower_bound <= found.ceiling and found.confidence == 1 - significance


@pytest.mark.parametrize(("m", "known"), [(10, 1.05), (50, 2.79), (100, 3.49), (500, 5.11), (1000, 5.81)])
def test_golden_ceilings(m, known):
    assert one_run(m, m, m // 2, 0.0).ceiling == pytest.approx(known, abs=0.01)


@pytest.mark.parametrize(("r", "v", "known"), [(100, 75, 1.006), (100, 100, 5.549), (1000, 600, 0.5835)])
def test_golden_values_of_f_dp(r, v, known):
    assert f_dp_one_run(1000, r, v, 1e-5).epsilon_lower_bound == pytest.approx(known, abs=6e-4)


@pytest.mark.parametrize(("runs", "known"), [(100, 3.281), (1000, 5.601)])
def test_golden_values_of_many_runs(runs, known):
    found = many_runs(0, runs, 0, runs, 1e-5)
    assert found.epsilon_lower_bound == found.ceiling == pytest.approx(known, abs=6e-4)


def test_randomised_response_raises_few_false_alarms_and_is_bounded_closely():
    """m independent answers, each true with probability e^ε/(1 + e^ε): ε is known exactly."""
    random, epsilon, m = np.random.default_rng(0), 1.0, 1000
    right = random.binomial(m, 1 / (1 + np.exp(-epsilon)), size=400)
    cache = {v: one_run(m, m, int(v), 0.0).epsilon_lower_bound for v in set(right.tolist())}
    found = np.array([cache[int(v)] for v in right])
    assert (found > epsilon).mean() <= 0.05 + 3 * np.sqrt(0.05 * 0.95 / 400)
    assert np.median(found) > 0.8


def test_the_gaussian_mechanism_raises_few_false_alarms():
    random, sigma, runs, delta = np.random.default_rng(1), 1.0, 1000, 1e-5
    true = gaussian_epsilon(1 / sigma, delta)
    general, gaussian = [], []
    for _ in range(200):
        without, with_ = random.normal(0, sigma, runs), random.normal(1, sigma, runs)
        errors = int((without > 1.5).sum()), runs, int((with_ <= 1.5).sum()), runs
        general.append(many_runs(*errors, delta).epsilon_lower_bound)
        gaussian.append(gaussian_many_runs(*errors, delta).epsilon_lower_bound)
    for found in (general, gaussian):
        assert np.mean(np.array(found) > true) <= 0.05 + 3 * np.sqrt(0.05 * 0.95 / 200)
    assert np.median(general) < np.median(gaussian) and np.median(gaussian) > 0.75 * true


def test_more_success_proves_more():
    found = [one_run(500, 200, v, 1e-6).epsilon_lower_bound for v in range(100, 201, 10)]
    assert found == sorted(found) and found[0] == 0.0
    assert least_mu(5, 100, 5, 100, 0.05) > least_mu(10, 100, 10, 100, 0.05) > least_mu(50, 100, 50, 100, 0.05) == 0


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: one_run(10, 11, 3, 0.0), "3 of 11 guesses on 10 canaries"),
        (lambda: one_run(10, 5, 6, 0.0), "6 of 5 guesses"),
        (lambda: one_run(10, 5, 5, 0.0, 0.0), "significance 0.0"),
        (lambda: many_runs(3, 2, 0, 5, 0.0), "3 of 2 runs without"),
    ],
)
def test_counts_that_cannot_be_are_refused(call, said):
    with pytest.raises(PlanError, match=said):
        call()


def test_large_and_impossible_gaussian_bounds():
    assert gaussian_epsilon(30.0, 1e-5) == pytest.approx(30**2 / 2 + 4.26 * 30, rel=0.02)
    assert gaussian_epsilon(1.0, 0.0) == float("inf")
    with pytest.raises(PlanError, match="small delta"):
        f_dp_one_run(100, 50, 40, 0.0)


@pytest.mark.parametrize(("runs", "mu"), [(20, 1.921), (100, 3.593), (1000, 5.360)])
def test_the_two_error_rates_share_the_significance(runs, mu):
    """Without an error in n runs each rate is at most ``1 - 0.025^(1/n)`` at 95 % together, in closed form."""
    rate = 1 - 0.025 ** (1 / runs)
    assert least_mu(0, runs, 0, runs, 0.05) == pytest.approx(2 * norm.isf(rate))
    assert 2 * norm.isf(rate) == pytest.approx(mu, abs=1e-3)
