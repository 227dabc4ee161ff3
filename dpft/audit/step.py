"""A step of the engine, audited from inside: Dirac gradients in, noisy gradients out, and what an attacker tells from
them.

Sixteen canaries, each a unit with a gradient along a coordinate of its own and far longer than the clip, are put into
each step by sixteen coins. Whoever sees the released gradient has to tell from a coordinate whether its canary was
there: against a Gaussian mechanism of noise multiplier σ that is a test of μ = 1/σ, which the mechanism states
(Nasr et al. 2023, section 5; Dong et al. 2022). Shorter games (:data:`GAMES`) look where that one is blind. They audit
sensitivity, noise and normaliser as they are executed; the model's own gradients are the preflight's.
"""

import math
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from dpft.audit.bounds import gaussian_epsilon, mu_told
from dpft.errors import GuaranteeError, PlanError
from dpft.gradients.engine import Engine
from dpft.privacy.clipping import to_dict
from dpft.privacy.mechanisms import Mechanism
from dpft.privacy.noise import SecureRandomness
from dpft.privacy.plan import Plan
from dpft.privacy.rounding import rounded_down, rounded_up
from dpft.report.card import VERDICTS

COORDINATES = 16
INFORMATIVE = 0.5  # share of the claimed μ below which a bound says little
WIDE = (1 << 16) + 1000  # coordinates of which the last is beyond what the engine draws noise for at a time
SHARES = {COORDINATES: 4, WIDE: 32}  # by width: the main game is so many times as long
SCALE_ERRORS = 6.0  # standard errors by which the noise may miss what is planned


@dataclass(frozen=True)
class Game:
    """A shorter game: who is in the step, and whether ``(width,)`` released numbers, in units of the clip, betray
    it."""

    about: str
    play: Callable[["_Arena", bool], Tensor]
    betrays: Callable[[Tensor], bool]
    width: int = COORDINATES


@dataclass(frozen=True)
class StepAudit:
    """What one step claims, what was measured, and a verdict: VIOLATION, consistent or uninformative.

    ``mu`` is the estimate, ``mu_lower_bound`` holds with ``confidence``, on trials that did not choose the threshold.
    ``played`` says of what all this is, a ``step`` or a whole ``run``, and ``steps`` counts those.
    ``noise`` is the measured noise over the planned one. ``games`` are the lower bounds on μ of the shorter games,
    ``problems`` what contradicts the claim.
    """

    verdict: str
    mu_claimed: float
    mu: float
    mu_lower_bound: float
    noise: float
    epsilon_claimed: float
    epsilon_lower_bound: float
    delta: float
    confidence: float
    steps: int
    trials: int
    games: dict[str, float]
    problems: list[str]
    threat_model: str = "sees every released gradient and chooses the canaries; one step"
    canary: str = "a unit whose gradient is long and along one coordinate"
    played: str = "step"


def audit_step(
    plan: Plan,
    *,
    steps: int = 10_000,
    significance: float = 1e-3,
    progress: Callable[[int, int], None] = lambda done, of: None,
) -> StepAudit:
    """Run ``steps`` steps of an engine with the plan's noise and clip, and the shorter games.

    A mechanism that releases the sums of a head is run as a whole (:mod:`.head_step`).

    Raises:
        PlanError: the plan's mechanism releases rows or adds no noise, or fewer than 100 steps are asked for.
    """
    mechanism = plan.mechanism
    if mechanism.releases == "rows":
        raise PlanError(
            f"The mechanism {mechanism.name!r} releases {mechanism.releases}, and this audit attacks the steps of an "
            "engine: audit a plan that trains."
        )
    if plan.noise_multiplier == 0 or steps < 100:
        raise PlanError(
            f"A plan with noise multiplier {plan.noise_multiplier:g} was to be audited over {steps:,} steps: give it "
            "noise, and at least 100 steps."
        )
    if mechanism.releases == "head":
        from dpft.audit.head_step import audit_head

        return audit_head(plan, steps, significance, progress)
    chosen = GAMES | ADAPTIVE if mechanism.adapts else GAMES
    each = significance / (1 + len(chosen))  # so that all games together raise a false alarm no more often
    delta = min(plan.delta, 1e-2)
    tried = plan.changed(
        sample_rate=1 / plan.events(1)[0].steps, steps=steps, units=COORDINATES, examples_per_unit=1, delta=delta
    )
    present, scores = _play(tried, progress)
    spread = np.sqrt((scores[present].var(ddof=1) + scores[~present].var(ddof=1)) / 2)
    half = len(scores) // 2  # the threshold is chosen on one half and judged on the other
    threshold = _best_threshold(scores[:half], present[:half], each)
    bound = mu_told(present[half:], scores[half:] > threshold, each)
    games = {name: _played(game, tried, max(200, steps // SHARES[game.width]), each) for name, game in chosen.items()}
    claimed, noise = mechanism.mu, float(spread / mechanism.gradient_noise_multiplier)
    problems = []
    if (parts := _parts_mu(mechanism)) > claimed * (1 + 1e-9):
        problems.append(f"the parts of a release leak μ = {parts:.3f} together where {claimed:.3f} is charged")
    if bound > claimed:
        problems.append(f"the step leaks μ ≥ {bound:.3f} where it claims {claimed:.3f}")
    if abs(noise - 1) > SCALE_ERRORS / math.sqrt(2 * len(scores)):
        problems.append(f"the released noise is {noise:.3f} of what is planned")
    problems += [
        f"{chosen[name].about} shows in the release, μ ≥ {found:.3f} where {claimed:.3f} is claimed"
        for name, found in games.items()
        if found > claimed
    ]
    return StepAudit(
        verdict(problems, bound, claimed),
        claimed,
        float((scores[present].mean() - scores[~present].mean()) / spread),
        bound,
        noise,
        gaussian_epsilon(claimed, plan.delta),
        gaussian_epsilon(bound, plan.delta),
        plan.delta,
        1 - significance,
        steps,
        len(scores),
        games,
        problems,
    )


def verdict(problems: list[str], bound: float, claimed: float) -> str:
    """VIOLATION, consistent or uninformative, by what contradicts the claim and by the lower bound on μ."""
    return "VIOLATION" if problems else "consistent" if bound > INFORMATIVE * claimed else "uninformative"


def _parts_mu(mechanism: Mechanism) -> float:
    """μ of a step's sums together, by the noise of each: the gradients', and a tally of which a unit adds 1/2 at
    most."""
    tally = 0.5 / mechanism.tally_noise if mechanism.tally_noise else 0.0
    return math.hypot(1 / mechanism.gradient_noise_multiplier, tally)


def _play(plan: Plan, progress: Callable[[int, int], None]) -> tuple[np.ndarray, np.ndarray]:
    """Coins, and what the releases tell of the coordinate of each, in units of the clip.

    Where steps take units by groups in turn, so do they take canaries, the first one in the first step.
    """
    arena, groups = _Arena(plan, COORDINATES), plan.events(1)[0].steps
    turns = (np.arange(plan.steps)[:, None] - np.arange(COORDINATES)) % groups == 0
    coins = turns & SecureRandomness().bernoulli(turns.size, 0.5).reshape(turns.shape)
    scores = np.empty((plan.steps, COORDINATES))
    with arena.engine:
        for step, inside in enumerate(coins):
            if inside.any():
                arena.put(np.flatnonzero(inside))
            scores[step] = arena.release().numpy()
            if step % 100 == 0:
                progress(step, plan.steps)
    told = plan.mechanism.evidence(scores)
    turns, coins = turns[: len(told)], coins[: len(told)]
    return coins[turns], told[turns]


class _Arena:
    """An engine over one weight of ``(1, width)``, into which gradients along its coordinates are put."""

    def __init__(self, plan: Plan, width: int) -> None:
        self.model = nn.Linear(width, 1, bias=False)
        self.engine = Engine(self.model, plan)
        self.moved = plan.clip  # the clip that the last release gave for the next
        self._length = 1e3 * plan.clip.sensitivity
        self._scale = plan.expected_batch_size / plan.clip.sensitivity

    def put(
        self, coordinates: Sequence[int] | np.ndarray, units: Sequence[str] | None = None, length: float = 1.0
    ) -> None:
        """A micro-batch of one long gradient along each coordinate."""
        inputs = torch.zeros(len(coordinates), self.model.in_features)
        inputs[torch.arange(len(coordinates)), torch.as_tensor(coordinates)] = self._length * length
        self.engine.accumulate(self.model(inputs).squeeze(1), list(coordinates) if units is None else units)

    def release(self) -> Tensor:
        """``(width,)``, in units of the clip, which is the plan's in each step: one step is audited, whatever came
        before."""
        self.engine.release()
        self.moved = self.engine.clip
        self.engine.take_up({"clip": to_dict(self.engine.plan.clip)})
        released = self.model.weight.grad
        if released is None:
            raise GuaranteeError("The engine's release left no gradient, so no step can be audited: mend the engine.")
        return released[0] * self._scale


def _alone(arena: _Arena, there: bool) -> Tensor:
    if there:
        arena.put([-1])
    return arena.release()


def _broken(arena: _Arena, there: bool) -> Tensor:
    arena.put([0])
    if there:
        arena.put([-1], length=math.inf)
    return arena.release()


def _two_rows(arena: _Arena, there: bool) -> Tensor:
    arena.put([0, 0], units=["other", "other"])
    if there:
        arena.put([-1, -1], units=["canary", "canary"])
    return arena.release()


def _came_back(arena: _Arena, there: bool) -> Tensor:
    """An engine that refuses a unit's second clip has defended itself: what is released is without it."""
    if there:
        arena.put([-1], units=["canary"])
    arena.put([0], units=["other"])
    if there:
        with suppress(GuaranteeError):
            arena.put([-1], units=["canary"])
    return arena.release()


def _replayed(arena: _Arena, there: bool) -> Tensor:
    """The attacker knows the seed of PyTorch's generator, makes the noise again and subtracts it."""
    releases = []
    for inside in (False, there):
        arena.put([0])
        if inside:
            arena.put([-1])
        torch.manual_seed(0)  # the engine's generators are secret again when it has released
        releases.append(arena.release())
    return releases[1] - releases[0]


def _clip_moved(arena: _Arena, there: bool) -> Tensor:
    """Positive if the next clip is larger than it would be had the canary been half there: a long gradient lifts the
    clip."""
    if there:
        arena.put([-1])
    arena.release()
    plan = arena.engine.plan
    half = plan.mechanism.next_clip(plan.clip, -0.25, plan.expected_batch_size)
    return torch.tensor([arena.moved.sensitivity - half.sensitivity], dtype=torch.float64)


GAMES = {
    "alone": Game("whether a step is empty", _alone, lambda found: bool(found.any()) and float(found[-1]) > 0.5, WIDE),
    "broken": Game("a gradient that is not finite", _broken, lambda found: not bool(found.isfinite().all())),
    "two rows": Game("a unit with two rows", _two_rows, lambda found: float(found[-1]) > 1),
    "came back": Game("a unit that comes back", _came_back, lambda found: float(found[-1]) > 1),
    "replayed": Game("a unit under noise that a seed makes again", _replayed, lambda found: float(found[-1]) > 0.5),
}

ADAPTIVE = {
    "clip": Game("a unit by the clip that follows it", _clip_moved, lambda found: float(found[0]) > 0),
}


def _played(game: Game, plan: Plan, trials: int, significance: float) -> float:
    """The lower bound on μ; the rule by which a release betrays its canary was fixed beforehand."""
    arena = _Arena(plan.changed(steps=2 * trials, examples_per_unit=2), game.width)
    coins = SecureRandomness().bernoulli(trials, 0.5)
    with arena.engine:
        said = [game.betrays(game.play(arena, bool(there))) for there in coins]
    return mu_told(coins, np.array(said), significance)


def _best_threshold(scores: np.ndarray, present: np.ndarray, significance: float) -> float:
    candidates = np.quantile(scores, np.linspace(0.02, 0.98, 49))
    return max(candidates, key=lambda threshold: mu_told(present, scores > threshold, significance))


def describe(found: StepAudit) -> str:
    """The audit in words."""
    ratio = found.mu / found.mu_claimed if found.mu_claimed else math.nan
    return (
        f"{found.verdict}: {VERDICTS[found.verdict]}.\n"
        + "".join(f"- {problem}\n" for problem in found.problems)
        + f"μ = {found.mu:.4f} measured, {found.mu_claimed:.4f} claimed by the mechanism, {ratio:.3f} of it; with "
        f"{found.confidence:.2%} confidence μ ≥ {rounded_down(found.mu_lower_bound, 4)}.\n"
        f"One {found.played}: ε ≥ {rounded_down(found.epsilon_lower_bound)} shown of ε = "
        f"{rounded_up(found.epsilon_claimed)} claimed at δ = {found.delta:g}, from {found.trials:,} trials in "
        f"{found.steps:,} {found.played}s.\nThe noise is {found.noise:.3f} of what is planned. "
        f"{len(found.games)} shorter games ({', '.join(found.games)}) show μ ≥ "
        f"{rounded_down(max(found.games.values()))}."
    )
