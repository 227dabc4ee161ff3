"""The noise, or the number of steps, at which a mechanism spends a given ε."""

import math
from collections.abc import Callable
from functools import cache
from typing import TYPE_CHECKING, TypeVar

from dpft.errors import PlanError
from dpft.privacy import gaussian
from dpft.privacy.rounding import rounded_up

if TYPE_CHECKING:
    from dpft.privacy.adjacency import Adjacency
    from dpft.privacy.mechanisms.mechanism import Mechanism

M = TypeVar("M", bound="Mechanism")

MIN_NOISE_MULTIPLIER = 1e-3  # the least that a search finds
MAX_NOISE_MULTIPLIER = 1e6
MAX_STEPS = 10_000_000
TOLERANCE = 1e-3  # of ε: how far below its target a calibrated mechanism may stay


def noise_for(mechanism: M, target: float, delta: float, adjacency: "Adjacency") -> M:
    """The mechanism with the least noise whose ε is at most ``target``, to 0.1 % of ε.

    Raises:
        PlanError: no noise reaches it.
    """
    steps, rate = mechanism.steps, mechanism.sample_rate

    def epsilon(log_noise: float, exact: bool) -> float:
        changed = mechanism.changed(noise_multiplier=math.exp(log_noise))
        return changed.epsilon(steps, delta, adjacency, exact=exact)

    if epsilon(math.log(MIN_NOISE_MULTIPLIER), True) <= target:  # so few draws that δ covers them all
        return mechanism.changed(noise_multiplier=MIN_NOISE_MULTIPLIER)
    # The central limit theorem of DP-SGD (Bu et al. 2020, equation 5), solved for the noise, says where to look.
    event = mechanism.events()[0]
    mu = gaussian.mu_for(target, delta) / (event.sample_rate or rate)
    guess = -0.5 * math.log(math.log1p(mu**2 / event.count))
    found = _search(epsilon, target, guess, math.inf, math.log(MAX_NOISE_MULTIPLIER), slope=-2.0)
    if found is None:
        raise PlanError(
            f"No noise reaches epsilon = {target:g} over {steps:,} steps at sample rate {rate:g}: "
            "take fewer steps, a lower rate or a larger epsilon."
        )
    return mechanism.changed(noise_multiplier=math.exp(found))


def steps_for(mechanism: M, target: float, delta: float, adjacency: "Adjacency") -> M:
    """The mechanism with the most steps whose ε is at most ``target``.

    Raises:
        PlanError: one step is too much, or more fit than a run can have.
    """
    spent = cache(lambda steps, exact=True: mechanism.epsilon(steps, delta, adjacency, exact=exact))
    noise = mechanism.noise_multiplier
    if spent(1) > target:
        raise PlanError(
            f"One step at noise multiplier {noise:g} already spends epsilon = {rounded_up(spent(1))}, "
            f"above {target:g}: use more noise."
        )
    event = mechanism.events(1)[0]
    mu = gaussian.mu_for(target, delta) / (event.sample_rate or mechanism.sample_rate)
    guess = max(0.0, math.log(mu**2 / math.expm1(noise**-2) * event.steps))
    found = _search(lambda x, exact: spent(int(math.exp(x)), exact), target, guess, 0.0, math.log(MAX_STEPS), slope=0.6)
    if found is None:
        raise PlanError(
            f"More than {MAX_STEPS:,} steps fit into epsilon = {target:g}: give the steps and let the noise follow."
        )
    whole = event.spanning(int(math.exp(found)))  # the rest of a round costs nothing
    return mechanism.changed(steps=whole.count * whole.steps)


def _search(
    epsilon: Callable[[float, bool], float], target: float, x: float, fits: float, limit: float, *, slope: float
) -> float | None:
    """An ``x`` at which the monotone ``epsilon(x, True)`` is at most ``target``, to 0.1 %; None beyond ``limit``.

    It begins at ``x``, knowing one that ``fits`` and about how steep log ε is.

    Composing is what takes time, so a first search by ``epsilon(x, False)`` finds where to start the exact one, and the
    slope of log ε there.
    """
    for exact in (False, True):
        within, beyond, last = fits, math.copysign(math.inf, slope), None
        for _ in range(60):
            value = _log_ratio(epsilon(x, exact), target)
            within, beyond = (x, beyond) if value <= 0 else (within, x)
            if -TOLERANCE <= value <= 0 or abs(beyond - within) < 1e-9:
                break
            if last is not None and math.isfinite(value - last[1]) and (value - last[1]) / (x - last[0]) / slope > 0:
                slope = (value - last[1]) / (x - last[0])
            last = x, value
            x += max(-1.0, min(1.0, (-TOLERANCE / 2 - value) / slope))
            if not min(within, beyond) < x < max(within, beyond):
                x = (within + beyond) / 2
            if x > limit:
                return None
        x = within
    return x


def _log_ratio(epsilon: float, target: float) -> float:
    return math.log(epsilon / target) if epsilon > 0 else -math.inf
