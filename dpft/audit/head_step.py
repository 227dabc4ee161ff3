"""The sums of a head, audited from inside: a canary unit is in the data or not, and every release is scored.

An attacker who sees every release, and knows all units but one, can compute what each sum would be with the canary and
without it, under the releases that came before. So the likelihood ratio of a whole run is the sum of
``⟨release - without, with - without⟩ / s²`` over its releases, s being the planned noise, less half of the same with
the difference in both places. Against ``steps`` Gaussian releases of noise multiplier σ it is a test of μ = √steps/σ
(Dong et al. 2022, Corollary 3.3), and no attack is stronger. A fair coin says whether the canary is there, and the
attacker says so where the ratio is above one.

Each game has a canary of its own (:data:`GAMES`). All are played at μ = 2, at which a few hundred runs tell most: how
a mechanism uses σ is what is audited. Noise is measured at the plan's σ. What the canary moves is computed as well,
without any chance: ``‖(with - without) / s‖`` over all releases is the leak of a run, and may not exceed √steps/σ.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from dpft.audit.bounds import gaussian_epsilon, mu_told
from dpft.audit.step import SCALE_ERRORS, StepAudit, verdict
from dpft.privacy.mechanisms.linear_head import LinearHead, Rows, Sums
from dpft.privacy.noise import SecureRandomness

if TYPE_CHECKING:
    from dpft.privacy.plan import Plan

WIDTH, CLASSES, OTHERS = 6, 4, 9
AUDIBLE = 2.0  # the μ at which games are played
MEASURED = 30  # runs that measure the noise
FEWEST = 60  # trials of a game
SHARE = 25  # steps of an engine for which a run is played
ROUNDING = 1e-5  # of a leak
LONG = 1e3


@dataclass(frozen=True)
class Canary:
    """A unit of ``(n, WIDTH)`` rows, all of the last class, beside so many others; ``share`` of the trials."""

    about: str
    rows: Callable[[], Tensor]
    others: int = OTHERS
    share: int = 4


def _along(length: float, count: int = 1) -> Tensor:
    rows = torch.zeros(count, WIDTH)
    rows[:, 0] = -length
    return rows


GAMES = {
    "long": Canary("a unit whose features are long", lambda: _along(LONG), share=1),
    "alone": Canary("whether there is nobody", lambda: _along(LONG), others=0),
    "many rows": Canary("a unit with many rows", lambda: _along(LONG, 25)),
    "broken": Canary("a unit whose features are not finite", lambda: _along(math.inf)),
}


@dataclass
class Run:
    """One run: the ratio's logarithm, the leak, the noise of each release over the planned one, and whether all is
    finite."""

    ratio: float
    leak: float
    noise: list[Tensor]
    finite: bool


class _Watched(Sums):
    """Sums with noise, of which the exact values are kept."""

    def __init__(self, noise_multiplier: float) -> None:
        super().__init__(noise_multiplier, SecureRandomness())
        self.exact: list[Tensor] = []
        self.released: list[Tensor] = []
        self.planned: list[float] = []
        self._sigma = noise_multiplier

    def release(
        self, total: Callable[[], Tensor], shape: tuple[int, ...], sensitivity: float, steps: int = 1
    ) -> Tensor:
        value = super().release(lambda: self._seen(total()), shape, sensitivity, steps)
        self.released.append(value)
        self.planned.append(self._sigma * sensitivity / math.sqrt(steps))
        return value

    def _seen(self, value: Tensor) -> Tensor:
        self.exact.append(value)
        return value


class _Replayed(Sums):
    """Sums of other data under the same releases; nothing is released."""

    def __init__(self, released: list[Tensor]) -> None:
        super().__init__(0.0, SecureRandomness())
        self.exact: list[Tensor] = []
        self._released = released

    def release(
        self, total: Callable[[], Tensor], shape: tuple[int, ...], sensitivity: float, steps: int = 1
    ) -> Tensor:
        self.exact.append(total())
        return self._released[len(self.exact) - 1]


def data(canary: Canary, there: bool) -> Rows:
    """Others that lie close together and have all classes but the last, and perhaps the canary."""
    features = torch.zeros(canary.others, WIDTH)
    features[:, 0] = 0.5
    features[torch.arange(canary.others), 1 + torch.arange(canary.others) % (WIDTH - 1)] = 0.25
    labels = torch.arange(canary.others) % (CLASSES - 1)
    members = [np.array([row]) for row in range(canary.others)]
    if there:
        rows = canary.rows()
        members.append(np.arange(len(features), len(features) + len(rows)))
        features = torch.cat([features, rows])
        labels = torch.cat([labels, labels.new_full((len(rows),), CLASSES - 1)])
    return Rows(features, labels, members, CLASSES)


def play(mechanism: LinearHead, canary: Canary, there: bool) -> Run:
    """One run of the mechanism, and what the attacker makes of it."""
    sums = _Watched(mechanism.noise_multiplier)
    other = _Replayed(sums.released)
    try:
        head = mechanism.fit(data(canary, there), sums, OTHERS + 1)
        mechanism.fit(data(canary, not there), other, OTHERS + 1)
    except torch.linalg.LinAlgError:  # of numbers that are not finite
        return Run(math.nan, math.nan, [], False)
    inside, outside = (sums.exact, other.exact) if there else (other.exact, sums.exact)
    ratio = leak = 0.0
    for value, one, none, planned in zip(sums.released, inside, outside, sums.planned, strict=True):
        away = one.reshape(value.shape) - none.reshape(value.shape)
        ratio += float(((value - none.reshape(value.shape) - away / 2) * away).sum()) / planned**2
        leak += float(away.square().sum()) / planned**2
    noise = [
        (value - exact.reshape(value.shape)) / planned
        for value, exact, planned in zip(sums.released, sums.exact, sums.planned, strict=True)
    ]
    finite = all(bool(value.isfinite().all()) for value in (*sums.released, *head))
    return Run(ratio, math.sqrt(leak), noise, finite)


def trials_of(mechanism: LinearHead, canary: Canary, trials: int) -> tuple[np.ndarray, list[Run]]:
    """``(trials,)`` coins, and the runs with the canary or without it."""
    coins = SecureRandomness().bernoulli(trials, 0.5)
    return coins, [play(mechanism, canary, bool(there)) for there in coins]


def least(coins: np.ndarray, runs: list[Run], significance: float) -> float:
    """The lower bound on μ of a whole run; a release that is not finite betrays its canary."""
    said = np.array([run.ratio > 0 or not run.finite for run in runs])
    return mu_told(coins, said, significance)


def measured(coins: np.ndarray, runs: list[Run]) -> float:
    """μ by the distance of the ratios' means and their spread."""
    ratios = np.array([run.ratio for run in runs])
    spread = math.sqrt((ratios[coins].var(ddof=1) + ratios[~coins].var(ddof=1)) / 2)
    return float(ratios[coins].mean() - ratios[~coins].mean()) / max(spread, 1e-12)


def noise_of(runs: list[Run]) -> tuple[float, list[str]]:
    """The measured noise over the planned one, and what contradicts fresh noise on every number."""
    flat = torch.stack([torch.cat([part.flatten() for part in run.noise]) for run in runs])
    problems = []
    for place in range(len(runs[0].noise)):
        part = torch.stack([run.noise[place].flatten() for run in runs])
        size = float(part.square().mean().sqrt())
        if abs(size - 1) > SCALE_ERRORS / math.sqrt(2 * part.numel()):
            problems.append(f"the noise of release {place + 1} is {size:.3f} of what is planned")
    steps = [(a, b) for run in runs for a, b in zip(run.noise, run.noise[1:], strict=False) if a.shape == b.shape]
    shared = {
        "two runs": [(flat[:-1], flat[1:])],
        "two releases": steps,
        "two numbers of a release": [(part[1:], part[:-1]) for run in runs for part in run.noise if len(part) > 1],
    }
    for who, pairs in shared.items():
        products = torch.cat([(one * other).flatten() for one, other in pairs] or [torch.zeros(1)])
        if float(products.mean().abs()) > SCALE_ERRORS / math.sqrt(len(products)):
            problems.append(f"{who} have noise in common")
    return float(flat.square().mean().sqrt()), problems


def audit_head(plan: "Plan", steps: int, significance: float, progress: Callable[[int, int], None]) -> StepAudit:
    """Play the games on whole runs; arguments are those of :func:`~dpft.audit.step.audit_step`, and one run is played
    for each 25 ``steps``.

    The verdict and ``mu_claimed``, √steps/σ, are of the run as it was played.
    """
    quiet = plan.mechanism
    assert isinstance(quiet, LinearHead)
    mechanism = replace(quiet, noise_multiplier=math.sqrt(quiet.steps) / AUDIBLE)
    claimed = math.sqrt(mechanism.steps) / mechanism.noise_multiplier
    each = significance / len(GAMES)  # so that all games together raise a false alarm no more often
    noise, problems = noise_of([play(quiet, GAMES["long"], there=False) for _ in range(MEASURED)])
    found: dict[str, float] = {}
    numbers = {name: max(FEWEST, steps // SHARE // canary.share) for name, canary in GAMES.items()}
    mu = 0.0
    for done, (name, canary) in enumerate(GAMES.items()):
        progress(done * steps // len(GAMES), steps)
        coins, runs = trials_of(mechanism, canary, numbers[name])
        found[name] = least(coins, runs, each)
        if name == "long":
            mu = measured(coins, runs)
        if not all(run.finite for run in runs):
            problems.append(f"{canary.about} makes a release that is not finite")
        if not (leak := max(run.leak for run in runs)) <= claimed * (1 + ROUNDING):
            problems.append(f"{canary.about} moves the sums of a run by μ = {leak:.3f} where {claimed:.3f} is claimed")
        if found[name] > claimed:
            problems.append(f"{canary.about} shows in the run, μ ≥ {found[name]:.3f} where {claimed:.3f} is claimed")
    shown = found["long"]
    return StepAudit(
        verdict(problems, shown, claimed),
        claimed,
        mu,
        shown,
        noise,
        gaussian_epsilon(claimed, plan.delta),
        gaussian_epsilon(shown, plan.delta),
        plan.delta,
        1 - significance,
        sum(numbers.values()),
        numbers["long"],
        found,
        problems,
        "sees every release of a run, knows all units but one and chooses it; a whole run",
        "a unit whose features are long and whose class nobody else has",
        "run",
    )
