"""A step of the engine, audited from inside: Dirac gradients in, noisy gradients out, and what an attacker tells from them.

Sixteen canaries, each a unit with a gradient along a coordinate of its own and far longer than the clip, are put into each
step by sixteen coins. Whoever sees the released gradient has to tell from a coordinate whether its canary was there: against a
Gaussian mechanism of noise multiplier σ that is a test of μ = 1/σ (Nasr et al. 2023, section 5; Dong et al. 2022). It audits
sensitivity, noise and normaliser as they are executed; the model's own gradients are the preflight's.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import nn

from dpft.audit.bounds import gaussian_epsilon, least_mu
from dpft.errors import PlanError
from dpft.gradients.engine import Engine
from dpft.privacy.noise import SecureRandomness
from dpft.privacy.plan import Plan
from dpft.report.card import VERDICTS

COORDINATES = 16
INFORMATIVE = 0.5  # share of the claimed μ below which a bound says little


@dataclass(frozen=True)
class StepAudit:
    """What one step claims, what was measured, and a verdict: VIOLATION, consistent or uninformative.

    ``mu`` is the estimate, ``mu_lower_bound`` holds with ``confidence``, on trials that did not choose the threshold.
    """

    verdict: str
    mu_claimed: float
    mu: float
    mu_lower_bound: float
    epsilon_claimed: float
    epsilon_lower_bound: float
    delta: float
    confidence: float
    steps: int
    trials: int
    threat_model: str = "sees every released gradient and chooses the canaries; one step"
    canary: str = "a unit whose gradient is long and along one coordinate"


def audit_step(
    plan: Plan,
    *,
    steps: int = 10_000,
    significance: float = 1e-3,
    progress: Callable[[int, int], None] = lambda done, of: None,
) -> StepAudit:
    """Run ``steps`` steps of an engine with the plan's noise and clip.

    Raises:
        PlanError: the plan adds no noise, or fewer than 100 steps are asked for.
    """
    if plan.noise_multiplier == 0 or steps < 100:
        raise PlanError(
            f"A plan with noise multiplier {plan.noise_multiplier:g} was to be audited over {steps:,} steps: give it noise, and at least 100 steps."
        )
    present, scores = _play(
        replace(
            plan, sample_rate=1.0, steps=steps, units=COORDINATES, examples_per_unit=1, delta=min(plan.delta, 1e-2)
        ),
        progress,
    )
    noise = np.sqrt((scores[present].var(ddof=1) + scores[~present].var(ddof=1)) / 2)
    mu = (scores[present].mean() - scores[~present].mean()) / noise
    half = len(scores) // 2  # the threshold is chosen on one half and judged on the other
    threshold = _best_threshold(scores[:half], present[:half], significance)
    inside, said = present[half:], scores[half:] > threshold
    bound = least_mu(
        int((said & ~inside).sum()), int((~inside).sum()), int((~said & inside).sum()), int(inside.sum()), significance
    )
    claimed = 1 / plan.noise_multiplier
    verdict = "VIOLATION" if bound > claimed else "consistent" if bound > INFORMATIVE * claimed else "uninformative"
    return StepAudit(
        verdict,
        claimed,
        float(mu),
        bound,
        gaussian_epsilon(claimed, plan.delta),
        gaussian_epsilon(bound, plan.delta),
        plan.delta,
        1 - significance,
        steps,
        len(scores),
    )


def _play(plan: Plan, progress: Callable[[int, int], None]) -> tuple[np.ndarray, np.ndarray]:
    """``(steps · COORDINATES,)`` coins, and the released coordinates in units of the clip."""
    model = nn.Linear(COORDINATES, 1, bias=False)
    canaries = 1e3 * plan.clip.sensitivity * torch.eye(COORDINATES)
    coins = SecureRandomness().bernoulli(plan.steps * COORDINATES, 0.5).reshape(plan.steps, COORDINATES)
    scores = np.empty((plan.steps, COORDINATES))
    with Engine(model, plan) as engine:
        for step, inside in enumerate(coins):
            if inside.any():
                engine.accumulate(model(canaries[torch.from_numpy(inside)]).squeeze(1))
            engine.release()
            scores[step] = model.weight.grad[0].numpy()
            if step % 100 == 0:
                progress(step, plan.steps)
    return coins.ravel(), scores.ravel() * plan.expected_batch_size / plan.clip.sensitivity


def _best_threshold(scores: np.ndarray, present: np.ndarray, significance: float) -> float:
    def bound(threshold: float) -> float:
        said = scores > threshold
        errors = int((said & ~present).sum()), int((~said & present).sum())
        return least_mu(errors[0], int((~present).sum()), errors[1], int(present.sum()), significance)

    return max(np.quantile(scores, np.linspace(0.02, 0.98, 49)), key=bound)


def describe(found: StepAudit) -> str:
    """The audit in words."""
    ratio = found.mu / found.mu_claimed if found.mu_claimed else math.nan
    return (
        f"{found.verdict}: {VERDICTS[found.verdict]}.\n"
        f"μ = {found.mu:.4f} measured, {found.mu_claimed:.4f} claimed (1/σ), {ratio:.3f} of it; with {found.confidence:.2%} confidence μ ≥ {found.mu_lower_bound:.4f}.\n"
        f"One step: ε ≥ {found.epsilon_lower_bound:.3f} shown of ε = {found.epsilon_claimed:.3f} claimed at δ = {found.delta:g}, from {found.trials:,} trials in {found.steps:,} steps."
    )
