"""From an attack's scores to a lower bound, a ROC curve and one of three verdicts."""

import math
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import ArrayLike
from scipy.stats import norm, rankdata

from dpft.audit.bounds import f_dp_epsilon, one_run_epsilon, upper_rate
from dpft.errors import PlanError
from dpft.privacy.rounding import rounded_down, rounded_up
from dpft.report.card import VERDICTS

SMALLEST = 10  # guesses: fewer prove next to nothing
POINTS = 60  # of a ROC curve that is kept


@dataclass(frozen=True)
class Claim:
    """What an audit tests.

    Attributes:
        delta: δ of the claim, and of the bound on ε.
        epsilon: ε that the training claims for one unit; None where nothing is claimed.
        significance: the probability of a false alarm.

    Raises:
        PlanError: these are no δ, ε and probability.
    """

    delta: float
    epsilon: float | None = None
    significance: float = 0.05

    def __post_init__(self) -> None:
        if not (0 <= self.delta < 1 and 0 < self.significance < 1):
            raise PlanError(
                f"delta is {self.delta} and significance {self.significance}: both are probabilities, such as 1e-5 and "
                "0.05."
            )
        if self.epsilon is not None and not 0 <= self.epsilon < math.inf:
            raise PlanError(f"The claimed epsilon is {self.epsilon}: claim a number from zero up, or nothing.")


@dataclass(frozen=True)
class Audit:
    """What an attack on one training shows.

    ``epsilon_lower_bound`` holds with probability ``confidence`` whatever the training does; ``f_dp_lower_bound`` too,
    if its trade-off is a Gaussian mechanism's. ``ceiling`` is what a perfect attack on as many canaries would have
    shown. ``claimed`` is None where nothing is claimed. ``power`` is what the same attack shows of a training without
    privacy, where that was tried.
    """

    verdict: str
    threat_model: str
    canary: str
    canaries: int
    included: int
    repetitions: int
    guesses: int
    correct: int
    threshold_rule: str
    confidence: float
    delta: float
    epsilon_lower_bound: float
    ceiling: float
    f_dp_lower_bound: float
    claimed: float | None
    auc: float
    auc_interval: tuple[float, float]
    roc: list[tuple[float, float]] = field(repr=False)
    power: float | None = None

    def json(self) -> dict[str, Any]:
        return asdict(self)

    def with_power(self, power: float) -> "Audit":
        """Judged again, knowing how strong the attack is on a training without privacy."""
        return replace(self, power=power, verdict=_verdict(self.epsilon_lower_bound, self.ceiling, self.claimed, power))


def bound_epsilon(
    scores: ArrayLike,
    included: ArrayLike,
    claim: Claim,
    *,
    repetitions: int = 1,
    threat_model: str = "",
    canary: str = "",
) -> Audit:
    """Guess "in" for the highest scores, "out" for the lowest and nothing between, and bound ε by how often that is
    right.

    How many to guess is tried for several numbers; each is tested at the claim's significance over their number
    (Bonferroni), so that the best of them still errs with at most that.

    Args:
        scores: ``(m,)``, higher for a canary that seems to have been in the training; one that is NaN is put in the
            middle.
        included: ``(m,)``, the coins.
        repetitions: canaries that are in it so many times are a group of units.

    Raises:
        PlanError: scores and coins do not fit, or there are too few.
    """
    values, coins = np.asarray(scores, dtype=float), np.asarray(included, dtype=bool)
    if values.shape != coins.shape or len(values) < SMALLEST:
        raise PlanError(
            f"{values.size:,} scores and {coins.size:,} coins: an audit needs one of each for every canary, and at "
            f"least {SMALLEST} canaries."
        )
    if not (coins.any() and not coins.all()):
        raise PlanError("Every coin fell on the same side, so that nothing can be told apart: audit again.")
    claimed, delta = group(claim.epsilon, claim.delta, repetitions)
    if np.isnan(values).all():
        raise PlanError("Every canary's score is NaN, so the model says nothing about any: look at what was trained.")
    values = np.where(np.isnan(values), np.nanmedian(values), values)
    order = np.argsort(-values, kind="stable")
    right = np.where(np.arange(len(values)) < len(values) // 2, coins[order], ~coins[order])
    sizes = guess_sizes(len(values))
    each = claim.significance / len(sizes)
    found = []
    for size in sizes:
        half = size // 2
        correct = int(right[:half].sum() + right[-half:].sum())
        found.append((one_run_epsilon(len(values), size, correct, delta, each), correct / size, size, correct))
    bound, _, guesses, correct = max(found)
    best = ceiling(len(values), delta, claim.significance)
    auc, interval = area(values[coins], values[~coins])
    return Audit(
        verdict=_verdict(bound, best, claimed, None),
        threat_model=threat_model,
        canary=canary,
        canaries=len(values),
        included=int(coins.sum()),
        repetitions=repetitions,
        guesses=guesses,
        correct=correct,
        threshold_rule=f"the best of {len(sizes)} numbers of guesses, each at {each:.2g} (Bonferroni)",
        confidence=1 - claim.significance,
        delta=delta,
        epsilon_lower_bound=bound,
        ceiling=best,
        f_dp_lower_bound=f_dp_epsilon(len(values), guesses, correct, delta, each) if delta else 0.0,
        claimed=claimed,
        auc=auc,
        auc_interval=interval,
        roc=roc(values[coins], values[~coins]),
    )


def group(epsilon: float | None, delta: float, size: int) -> tuple[float | None, float]:
    """The guarantee for ``size`` units at once: ``(kε, δ(e^{kε} − 1)/(e^ε − 1))``
    (Dwork & Roth 2014, section 2.3; Vadhan 2017, Lemma 2.2)."""
    if epsilon is None or size == 1:
        return epsilon, delta
    grown = size if epsilon == 0 else math.expm1(min(size * epsilon, 700)) / math.expm1(min(epsilon, 700))
    return size * epsilon, min(delta * grown, 0.999)


def ceiling(canaries: int, delta: float, significance: float) -> float:
    """The lower bound that :func:`bound_epsilon` gives an attack that guesses all of so many canaries right."""
    sizes = guess_sizes(canaries)
    return max(one_run_epsilon(canaries, size, size, delta, significance / len(sizes)) for size in sizes)


def expected_power(canaries: int, claim: Claim, repetitions: int = 1) -> str:
    """What so many canaries can show at best, to be said before anything is spent on it."""
    claimed, delta = group(claim.epsilon, claim.delta, repetitions)
    best = ceiling(canaries, delta, claim.significance)
    said = f"training with {canaries:,} canaries, which can show ε up to {rounded_down(best)}"
    if claimed is None or best > claimed:
        return said
    return f"{said} and so never contradict the claim of {rounded_up(claimed)}"


def guess_sizes(canaries: int) -> list[int]:
    """Even numbers of guesses, each about half of the one before."""
    sizes = []
    size = canaries
    while size >= SMALLEST:
        sizes.append(size // 2 * 2)
        size //= 2
    return sizes


def area(positives: np.ndarray, negatives: np.ndarray, confidence: float = 0.95) -> tuple[float, tuple[float, float]]:
    """The area under the ROC curve and its interval (DeLong, DeLong, Clarke-Pearson 1988)."""
    p, n = len(positives), len(negatives)
    ranks = rankdata(np.concatenate([positives, negatives]))
    auc = (ranks[:p].sum() - p * (p + 1) / 2) / (p * n)
    of_positives = (ranks[:p] - rankdata(positives)) / n
    of_negatives = 1 - (ranks[p:] - rankdata(negatives)) / p
    variance = (of_positives.var(ddof=1) / p if p > 1 else 0.25) + (of_negatives.var(ddof=1) / n if n > 1 else 0.25)
    least = min(p, n)
    if variance == 0 and auc in (0.0, 1.0):  # none is out of order, which of so few proves no more than this
        missed = upper_rate(0, least, (1 - confidence) / 2)
        return float(auc), (0.0, missed) if auc == 0 else (1 - missed, 1.0)
    reach = norm.ppf((1 + confidence) / 2) * math.sqrt(variance or auc * (1 - auc) / least)
    return float(auc), (float(max(0.0, auc - reach)), float(min(1.0, auc + reach)))


def roc(positives: np.ndarray, negatives: np.ndarray) -> list[tuple[float, float]]:
    """``(false alarms, detections)`` at a spread of thresholds, both as rates."""
    scores = np.concatenate([positives, negatives])
    order = np.argsort(-scores, kind="stable")
    inside = np.arange(len(scores))[order] < len(positives)
    last = np.append(np.diff(scores[order]) != 0, True)  # equal scores move together
    detected, alarms = np.cumsum(inside)[last] / len(positives), np.cumsum(~inside)[last] / len(negatives)
    kept = np.unique(np.geomspace(1, len(detected), POINTS).round().astype(int)) - 1
    return [(0.0, 0.0), *((float(alarms[i]), float(detected[i])) for i in kept)]


def _verdict(bound: float, ceiling: float, claimed: float | None, power: float | None) -> str:
    if claimed is not None and bound > claimed:
        return "VIOLATION"
    if claimed is not None and ceiling <= claimed:
        return "uninformative"
    seen = bound > 0 if power is None or claimed is None else power > claimed
    return "consistent" if seen else "uninformative"


def describe(audit: Audit) -> str:
    """The audit in words."""
    claim = "nothing is claimed" if audit.claimed is None else f"ε = {rounded_up(audit.claimed)} is claimed"
    times = (
        ""
        if audit.repetitions == 1
        else f", {audit.repetitions} times each, which is judged as a group of {audit.repetitions} units"
    )
    headline = "Nothing is claimed, so nothing is judged."
    lines = [
        headline if audit.claimed is None else f"{audit.verdict}: {VERDICTS[audit.verdict]}.",
        f"With {audit.confidence:.0%} confidence ε ≥ {rounded_down(audit.epsilon_lower_bound)} at δ = "
        f"{rounded_up(audit.delta, 6)}; {claim}; a perfect attack on so many canaries would have shown "
        f"{rounded_down(audit.ceiling)}.",
        f"{audit.canaries:,} canaries ({audit.canary}){times}; {audit.included:,} were in the data; {audit.correct:,} "
        f"of {audit.guesses:,} guesses were right.",
        f"AUC {audit.auc:.3f} ({audit.auc_interval[0]:.3f} to {audit.auc_interval[1]:.3f}). If the trade-off is "
        f"Gaussian, ε ≥ {rounded_down(audit.f_dp_lower_bound)}.",
    ]
    if audit.power is not None:
        lines.append(f"The same attack on a training without privacy shows ε ≥ {rounded_down(audit.power)}.")
    return "\n".join([*lines, f"The attacker {audit.threat_model}."])
