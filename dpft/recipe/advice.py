"""How many steps, of how many units: a plan from public numbers alone, for a recipe that leaves it open.

With N units, T steps and E passes over the data that a user has time for, each step draws a unit with q = E/T. What
counts is the noise on the mean gradient of the whole run (the noise-batch ratio of McKenna et al. 2025,
arXiv:2501.18914, averaged over the steps),

    ν(T) = σ(q, T; ε, δ) / (q N √T)

At q = 1 it is 1/(μN) for every T; below that fewer and larger steps have less of it. So the advice is the most steps
whose ν is at most SLACK above the least that is possible, and at least as many as learning needs.

σ is taken from the central limit of subsampled Gaussians, σ = 1/√ln(1 + μ²/(q²T)) (Dong et al. 2022, Corollary 5.4).
That orders plans and claims nothing: the plan's own noise is calibrated by the accountant.
"""

import math
from typing import NamedTuple

from dpft.privacy.gaussian import mu_for
from dpft.recipe.tables import HEAD_STEPS

SLACK = 1.15
FEWEST = 2  # steps that move an adapter of a model which does its task already
FEWEST_NEW = 64  # steps in which layers that begin at random learn anything
MOST = 200  # beyond which more steps bring nothing but overhead
USUAL_WIDTH = 384  # of small sentence encoders, with which heads were compared
LOUD, SCARCE = 0.08, 2  # ν of a head, and its units for each weight, at which whitening stops to pay
DISPLACEMENT = 12.0  # learning rate times steps, of normalised gradients and plain descent: see mts_notes in benchmarks


class Steps(NamedTuple):
    """``steps`` steps of ``batch_size`` expected units."""

    steps: int
    batch_size: int


def noise_of(steps: int, passes: float, units: int, mu: float) -> float:
    """ν of so many steps that take so many expected passes over the data together."""
    rate = min(1.0, passes / steps)
    if rate == 1.0:
        return 1 / (mu * units)
    sigma = 1 / math.sqrt(math.log1p((mu / rate) ** 2 / steps))
    return sigma / (rate * units * math.sqrt(steps))


def advised(units: int, passes: float, *, epsilon: float, delta: float, new_layers: bool) -> Steps:
    """The steps for a budget of noise and of time.

    Args:
        units: N, the declared number of units.
        passes: E, expected passes over the data.
        new_layers: whether layers train that begin at random.
    """
    mu = mu_for(epsilon, delta)
    fewest = FEWEST_NEW if new_layers else FEWEST
    possible = range(fewest, max(fewest, min(MOST, round(passes * units))) + 1)
    noise = {steps: noise_of(steps, passes, units, mu) for steps in possible}
    least = min(noise.values())
    steps = max(steps for steps, value in noise.items() if value <= SLACK * least)
    return Steps(steps, max(1, min(units, round(units * passes / steps))))


def head_method(units: int, labels: int, mu: float) -> str:
    """The better head from sums: whitened features pay where noise is small and each weight has its units (decision 5).

    ν = √T √(K d) / (μ N) is the noise on a mean gradient of a head of K labels, over its clip, in T usual steps.
    """
    weights = labels * USUAL_WIDTH
    noise = math.sqrt(HEAD_STEPS * weights) / (mu * units)
    scarce = noise > 0 and units < SCARCE * weights
    return "head-centred" if noise > LOUD or scarce else "head-descent"


def rate_of(steps: int) -> float:
    """The first rate of a linear schedule whose rates sum to half of :data:`DISPLACEMENT`."""
    return round(DISPLACEMENT / (steps + 1), 4)
