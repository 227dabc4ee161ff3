"""Lower bounds on ε from the success of an attack, each with its confidence and its ceiling. numpy and scipy alone.

An attack on m canaries, each included in the training with probability 1/2, guesses r of them and is right v times. If
the training is (ε, δ)-DP, so good an attack is unlikely; the largest ε for which it is less likely than the
significance is a lower bound.
A bound is only as good as its attack, and even a perfect attack on m canaries proves no more than the ceiling.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from scipy.optimize import brentq
from scipy.special import log_ndtr, ndtr, ndtri
from scipy.stats import beta, binom

from dpft.errors import PlanError

LARGEST = 60.0  # of ε: nothing that is measured proves more


@dataclass(frozen=True)
class Bound:
    """``epsilon_lower_bound`` holds with probability ``confidence``; ``ceiling`` is what a perfect attack would have
    shown."""

    method: str
    epsilon_lower_bound: float
    ceiling: float
    delta: float
    confidence: float


def one_run(canaries: int, guesses: int, correct: int, delta: float, significance: float = 0.05) -> Bound:
    """From one training with all canaries (Steinke, Nasr, Jagielski 2023, Corollary 5.4).

    Args:
        canaries: m, each included independently with probability 1/2; those without a guess count as well.
        guesses: r, for how many the attack said "in" or "out".
        correct: v, how many of the guesses are right.

    Raises:
        PlanError: the counts contradict each other.

    >>> round(one_run(1000, 100, 75, 1e-4).epsilon_lower_bound, 3)
    0.673
    """
    _check(canaries, guesses, correct, delta, significance)
    bound = one_run_epsilon(canaries, guesses, correct, delta, significance)
    ceiling = max(one_run_epsilon(canaries, r, r, delta, significance) for r in _sizes(canaries))
    return Bound("one run (Steinke et al. 2023)", bound, ceiling, delta, 1 - significance)


def one_run_epsilon(canaries: int, guesses: int, correct: int, delta: float, significance: float) -> float:
    """The bound of :func:`one_run` alone."""
    return _largest(lambda epsilon: _one_run_p(canaries, guesses, correct, epsilon, delta) < significance)


def _one_run_p(m: int, r: int, v: int, epsilon: float, delta: float) -> float:
    """How likely v or more of r guesses are right under (ε, δ): ``β + 2·m·δ·α`` with β, α of
    Binomial(r, e^ε/(1 + e^ε))."""
    truth = 1 / (1 + math.exp(-epsilon))
    tail = float(binom.sf(v - 1, r, truth))
    if delta == 0 or v == 0:
        return tail
    below = np.cumsum(binom.pmf(np.arange(v - 1, -1, -1), r, truth))  # P[v - i <= X < v] for i = 1 ... v
    return tail + 2 * m * delta * float((below / np.arange(1, v + 1)).max())


def f_dp_one_run(canaries: int, guesses: int, correct: int, delta: float, significance: float = 0.05) -> Bound:
    """From one training of a mechanism whose trade-off is Gaussian (Mahloujifar, Melis, Chaudhuri 2024, Algorithm
    3, k = 2).

    It is tighter than :func:`one_run` and assumes more: the answer is the ε, at ``delta``, of the least Gaussian
    mechanism that the attack does not refute. Arguments and errors are those of :func:`one_run`.
    """
    _check(canaries, guesses, correct, delta, significance)
    if delta == 0:
        raise PlanError("delta is 0, and a Gaussian mechanism has no epsilon there: give a small delta, such as 1e-6.")
    bound = f_dp_epsilon(canaries, guesses, correct, delta, significance)
    ceiling = max(f_dp_epsilon(canaries, r, r, delta, significance) for r in _sizes(canaries))
    return Bound("one run, Gaussian trade-off (Mahloujifar et al. 2024)", bound, ceiling, delta, 1 - significance)


def f_dp_epsilon(canaries: int, guesses: int, correct: int, delta: float, significance: float) -> float:
    """The bound of :func:`f_dp_one_run` alone."""
    mu = _largest(lambda value: _refutes_gaussian(canaries, guesses, correct, value, significance))
    return gaussian_epsilon(mu, delta)


def _refutes_gaussian(m: int, guesses: int, correct: int, mu: float, significance: float) -> bool:
    """Whether μ-Gaussian DP allows so many right guesses with less than the significance."""
    right = significance * correct / m
    wrong = significance * (guesses - correct) / m
    for i in range(correct - 1, -1, -1):
        wrong_before = wrong
        wrong = max(wrong, float(ndtr(ndtri(min(right, 1.0)) - mu)))
        right += i / (guesses - i) * (wrong - wrong_before)
    return right + wrong > guesses / m


def many_runs(
    false_positives: int, negatives: int, false_negatives: int, positives: int, delta: float, significance: float = 0.05
) -> Bound:
    """From many trainings, with and without one canary, and a threshold that was fixed beforehand.

    Both error rates are bounded from above (Clopper & Pearson 1934), each at half of the significance, and an (ε, δ)-DP
    training obeys ``1 - FNR <= e^ε · FPR + δ`` and its mirror image (Kairouz et al. 2015).
    """
    _check_errors(false_positives, negatives, false_negatives, positives)
    confidence = 1 - significance

    def found(wrong_in: int, wrong_out: int) -> float:
        fpr, fnr = upper_rate(wrong_in, negatives, significance / 2), upper_rate(wrong_out, positives, significance / 2)
        gains = [(1 - fnr - delta) / fpr, (1 - fpr - delta) / fnr]
        return max(0.0, *(math.log(gain) for gain in gains if gain > 0))

    return Bound("many runs (Clopper-Pearson)", found(false_positives, false_negatives), found(0, 0), delta, confidence)


def gaussian_many_runs(
    false_positives: int, negatives: int, false_negatives: int, positives: int, delta: float, significance: float = 0.05
) -> Bound:
    """As :func:`many_runs`, for a mechanism whose trade-off is Gaussian (Nasr et al. 2023, section 4): bounds μ, and so
    ε."""
    _check_errors(false_positives, negatives, false_negatives, positives)
    found = lambda a, b: gaussian_epsilon(least_mu(a, negatives, b, positives, significance), delta)
    method = "many runs, Gaussian trade-off (Nasr et al. 2023)"
    return Bound(method, found(false_positives, false_negatives), found(0, 0), delta, 1 - significance)


def least_mu(false_positives: int, negatives: int, false_negatives: int, positives: int, significance: float) -> float:
    """The least μ of a Gaussian mechanism that errs so rarely: ``Φ⁻¹(1 - FPR) - Φ⁻¹(FNR)``, with both rates bounded."""
    fpr = upper_rate(false_positives, negatives, significance / 2)
    fnr = upper_rate(false_negatives, positives, significance / 2)
    return max(0.0, float(ndtri(1 - fpr) - ndtri(fnr)))


def mu_told(present: np.ndarray, said: np.ndarray, significance: float) -> float:
    """:func:`least_mu` of who was ``present`` and what was ``said`` of each, both ``(trials,)`` booleans."""
    wrong = int((said & ~present).sum()), int((~said & present).sum())
    return least_mu(wrong[0], int((~present).sum()), wrong[1], int(present.sum()), significance)


def gaussian_epsilon(mu: float, delta: float) -> float:
    """ε at ``delta`` of μ-Gaussian DP (Dong et al. 2022, Corollary 2.13)."""
    # e to the ε alone would overflow where the product with a tail does not
    excess = lambda epsilon: ndtr(mu / 2 - epsilon / mu) - math.exp(epsilon + log_ndtr(-mu / 2 - epsilon / mu)) - delta
    if mu <= 0 or excess(0.0) <= 0:
        return 0.0
    if delta == 0:
        return math.inf
    return float(brentq(excess, 0.0, mu**2 / 2 + 40 * mu))


def upper_rate(errors: int, trials: int, significance: float) -> float:
    """The largest rate at which so few errors in so many trials are still as likely as that
    (Clopper & Pearson 1934)."""
    return 1.0 if errors >= trials else float(beta.ppf(1 - significance, errors + 1, trials - errors))


def _largest(refuted: Callable[[float], bool]) -> float:
    """The largest value, up to ``LARGEST``, that is refuted; zero if none is."""
    if not refuted(0.0):
        return 0.0
    low, high = 0.0, LARGEST
    while high - low > 1e-5:
        middle = (low + high) / 2
        low, high = (middle, high) if refuted(middle) else (low, middle)
    return low


def _sizes(canaries: int) -> list[int]:
    """Numbers of guesses among which a perfect attack would choose."""
    return sorted({max(1, round(canaries * 0.7**i)) for i in range(30)})


def _check(canaries: int, guesses: int, correct: int, delta: float, significance: float) -> None:
    if not (0 <= correct <= guesses <= canaries and guesses >= 1):
        raise PlanError(
            f"{correct:,} of {guesses:,} guesses on {canaries:,} canaries are right, which cannot be: an attack "
            "guesses on some of the canaries and is right on some of those."
        )
    if not (0 <= delta < 1 and 0 < significance < 1):
        raise PlanError(f"delta is {delta} and significance {significance}: both are probabilities.")


def _check_errors(false_positives: int, negatives: int, false_negatives: int, positives: int) -> None:
    if not (0 <= false_positives <= negatives and 0 <= false_negatives <= positives and negatives and positives):
        raise PlanError(
            f"{false_positives:,} of {negatives:,} runs without and {false_negatives:,} of {positives:,} runs with "
            "the canary were judged wrongly, which cannot be: count errors among the runs."
        )
