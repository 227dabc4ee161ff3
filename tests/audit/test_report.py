"""From scores to a bound and a verdict: right as often as promised, and able to show something."""

import math

import numpy as np
import pytest

from dpft.audit.bounds import gaussian_epsilon, one_run
from dpft.audit.report import Claim, area, bound_epsilon, describe, expected_power, group, guess_sizes, roc
from dpft.errors import PlanError
from dpft.privacy.rounding import rounded_down

DELTA = 1e-5


def trial(generator, canaries, mu):
    """Coins, and what a Gaussian mechanism of that μ shows of each canary."""
    coins = generator.random(canaries) < 0.5
    return mu * coins + generator.standard_normal(canaries), coins


def test_a_gaussian_mechanism_is_seldom_accused_and_often_seen():
    generator = np.random.default_rng(0)
    claimed = gaussian_epsilon(1.0, DELTA)
    found = [bound_epsilon(*trial(generator, 400, 1.0), Claim(DELTA, claimed)) for _ in range(100)]
    assert sum(one.verdict == "VIOLATION" for one in found) == 0
    assert sum(one.f_dp_lower_bound > claimed for one in found) <= 5
    assert np.mean([one.epsilon_lower_bound for one in found]) > 0.5


def test_randomised_response_is_accused_at_most_as_often_as_promised():
    generator = np.random.default_rng(1)
    truth, accused = 1.0, 0
    for _ in range(200):
        coins = generator.random(300) < 0.5
        said = np.where(generator.random(300) < 1 / (1 + math.exp(-truth)), coins, ~coins)
        accused += bound_epsilon(said + 1e-6 * generator.random(300), coins, Claim(0.0, truth)).verdict == "VIOLATION"
    assert accused <= 0.05 * 200 + 3 * math.sqrt(0.05 * 200)


def test_twice_the_claim_is_a_violation():
    generator = np.random.default_rng(2)
    scores, coins = trial(generator, 2000, 6.0)
    found = bound_epsilon(scores, coins, Claim(DELTA, 2.0))
    assert found.verdict == "VIOLATION" and found.epsilon_lower_bound > 2.0
    assert found.epsilon_lower_bound <= found.ceiling and "contradicts the claim" in describe(found)


def test_the_threshold_is_corrected_for_having_been_chosen():
    scores, coins = trial(np.random.default_rng(3), 500, 2.0)
    found = bound_epsilon(scores, coins, Claim(DELTA))
    each = 0.05 / len(guess_sizes(500))
    assert found.epsilon_lower_bound == one_run(500, found.guesses, found.correct, DELTA, each).epsilon_lower_bound
    assert "Bonferroni" in found.threshold_rule and found.guesses in guess_sizes(500)


def test_verdicts_say_what_was_shown():
    generator = np.random.default_rng(4)
    nothing = bound_epsilon(*trial(generator, 200, 0.0), Claim(DELTA, 1.0))
    assert nothing.verdict == "uninformative" and nothing.epsilon_lower_bound == 0
    assert nothing.with_power(2.0).verdict == "consistent" and "without privacy" in describe(nothing.with_power(2.0))
    assert nothing.with_power(0.5).verdict == "uninformative"
    beyond = bound_epsilon(*trial(generator, 200, 9.0), Claim(DELTA, 20.0))
    assert beyond.verdict == "uninformative" and beyond.ceiling < 20
    assert bound_epsilon(*trial(generator, 400, 2.0), Claim(DELTA, 30.0)).claimed == 30.0


def test_repetitions_are_judged_as_a_group():
    assert group(1.0, 1e-6, 1) == (1.0, 1e-6) and group(None, 1e-6, 3) == (None, 1e-6)
    epsilon, delta = group(1.0, 1e-6, 3)
    assert epsilon == 3.0 and delta == pytest.approx(1e-6 * (1 + math.e + math.e**2))
    found = bound_epsilon(*trial(np.random.default_rng(5), 400, 3.0), Claim(1e-6, 1.0), repetitions=3)
    assert found.claimed == 3.0 and found.delta == delta and "group of 3 units" in describe(found)


def test_what_can_be_shown_is_said_beforehand():
    best = bound_epsilon(*trial(np.random.default_rng(6), 200, 0.0), Claim(DELTA)).ceiling
    assert f"up to {rounded_down(best)}" in expected_power(200, Claim(DELTA))
    assert "never contradict" not in expected_power(200, Claim(DELTA, 1.0))
    assert "never contradict the claim of 8" in expected_power(200, Claim(DELTA, 8.0))
    assert "never contradict the claim of 6" in expected_power(200, Claim(DELTA, 2.0), 3)


def test_the_curve_and_its_area():
    generator = np.random.default_rng(6)
    inside, outside = generator.standard_normal(500) + 1, generator.standard_normal(400)
    auc, (low, high) = area(inside, outside)
    brute = (inside[:, None] > outside[None, :]).mean()
    assert auc == pytest.approx(brute) and low < auc < high and high - low == pytest.approx(0.06, abs=0.02)
    points = roc(inside, outside)
    assert points[0] == (0.0, 0.0) and points[-1] == (1.0, 1.0)
    alarms, detected = points[len(points) // 2]
    threshold = np.sort(outside)[::-1][round(alarms * 400) - 1] if alarms else outside.max()
    assert detected == pytest.approx((inside >= threshold).mean(), abs=0.05)
    assert area(np.ones(3), np.ones(4))[0] == 0.5
    assert area(np.ones(50), np.zeros(40)) == (1.0, (pytest.approx(0.025 ** (1 / 40)), 1.0))


def test_the_area_s_interval_covers():
    generator = np.random.default_rng(7)
    truth = 0.5 * (1 + math.erf(0.5))  # Φ(1/√2)
    covered = 0
    for _ in range(200):
        _, (low, high) = area(generator.standard_normal(80) + 1, generator.standard_normal(80))
        covered += low <= truth <= high
    assert covered >= 180


@pytest.mark.parametrize(
    ("scores", "coins", "said"),
    [
        ([1.0] * 20, [True] * 19, "one of each"),
        ([1.0] * 5, [True] * 5, "at least 10"),
        ([1.0] * 20, [True] * 20, "same side"),
        ([math.nan] * 20, [True, False] * 10, "is NaN"),
    ],
)
def test_what_cannot_be_judged_is_refused(scores, coins, said):
    with pytest.raises(PlanError, match=said):
        bound_epsilon(scores, coins, Claim(DELTA))


def test_a_score_that_is_no_number_counts_as_none():
    scores, coins = trial(np.random.default_rng(8), 100, 3.0)
    scores[3], scores[4] = np.nan, np.inf
    assert math.isfinite(bound_epsilon(scores, coins, Claim(DELTA)).epsilon_lower_bound)
    assert bound_epsilon(scores, coins, Claim(0.0)).f_dp_lower_bound == 0.0
    assert "nothing is judged" in describe(bound_epsilon(scores, coins, Claim(DELTA)))


@pytest.mark.parametrize(
    "claim",
    [
        {"delta": -0.5},
        {"delta": 1e-5, "epsilon": -1},
        {"delta": 1e-5, "epsilon": math.nan},
        {"delta": 1e-5, "significance": 5},
    ],
)
def test_a_claim_that_cannot_be_one_is_refused(claim):
    with pytest.raises(PlanError):
        Claim(**claim)
