"""From what happened to ε: a thin door to Google's dp-accounting.

A :class:`dp_accounting.DpEvent` says what was released; ε is always derived from it and never stored instead of it.
The privacy loss distribution (PLD; Koskela et al. 2020, Doroshenko et al. 2022) gives the ε that dpft prints; Rényi
DP (Mironov 2017) is the second opinion, and always the larger of the two.
"""

import logging
import math
import warnings
from collections.abc import Callable, Iterable
from functools import lru_cache
from typing import Literal

import dp_accounting
from dp_accounting import dp_event
from dp_accounting.pld import PLDAccountant
from dp_accounting.rdp import RdpAccountant

from dpft.errors import PlanError

Adjacency = Literal["add-or-remove-one", "replace-one", "zero-out"]
ADJACENCY = {
    "add-or-remove-one": dp_accounting.NeighboringRelation.ADD_OR_REMOVE_ONE,
    "replace-one": dp_accounting.NeighboringRelation.REPLACE_ONE,
    "zero-out": dp_accounting.NeighboringRelation.REPLACE_SPECIAL,
}

GRIDS = (3e-3, 1e-3, 3e-4, 1e-4, 3e-5, 1e-5)  # discretisation of the privacy loss, coarse to fine
AGREEMENT = 1e-3  # share of ε that a grid may overstate
REMAINS = 0.1  # of the last change, when a grid is refined: its error falls with its square

logging.getLogger("absl").setLevel(logging.ERROR)  # RDP orders that do not converge are left out, which is sound


def poisson_gaussian(noise_multiplier: float, sample_rate: float, steps: int) -> dp_event.DpEvent:
    """The event of ``steps`` releases of DP-SGD with Poisson sampling."""
    step = dp_event.GaussianDpEvent(noise_multiplier)
    if sample_rate < 1:
        step = dp_event.PoissonSampledDpEvent(sample_rate, step)
    return dp_event.SelfComposedDpEvent(step, steps)


def composed(events: Iterable[dict]) -> dp_event.DpEvent:
    """The events that a run records, as dp-accounting sees them."""
    steps = [poisson_gaussian(e["noise_multiplier"], e["sample_rate"], e["count"]) for e in events if e["count"]]
    return dp_event.ComposedDpEvent(tuple(steps)) if steps else dp_event.NoOpDpEvent()


def epsilon(
    event: dp_event.DpEvent,
    delta: float,
    adjacency: Adjacency = "add-or-remove-one",
    *,
    grid: float | None = None,
) -> float:
    """ε at ``delta`` by PLD, an upper bound on every grid.

    Args:
        grid: the discretisation interval. By default it is refined until 0.1 % of ε is at stake, because a
            grid that serves a few steps at ε = 8 is loose over many steps or at ε = 0.01.

    Raises:
        PlanError: the event has no PLD under this adjacency.
    """
    if grid is not None:
        return _pld(event, adjacency, grid).get_epsilon(delta)
    return refined(lambda interval: _pld(event, adjacency, interval).get_epsilon(delta))


def refined(epsilon_on: Callable[[float], float]) -> float:
    """ε by dp-accounting, on ever finer grids until 0.1 % of it is at stake."""
    best = math.inf
    for interval in GRIDS:
        finer = epsilon_on(interval)
        if math.isinf(finer) or finer == 0 or REMAINS * (best - finer) <= AGREEMENT * finer:
            return min(best, finer)
        best = finer
    return best


def epsilon_rdp(event: dp_event.DpEvent, delta: float, adjacency: Adjacency = "add-or-remove-one") -> float:
    """ε at ``delta`` by Rényi DP; infinite where no Rényi bound is known for the event and adjacency."""
    accountant = RdpAccountant(neighboring_relation=ADJACENCY[adjacency])
    if not accountant.supports(event):
        return math.inf
    return float(accountant.compose(event).get_epsilon(delta))


def epsilon_prv(
    releases: Iterable[tuple[float, float, int]], delta: float, adjacency: Adjacency = "add-or-remove-one"
) -> float:
    """ε at ``delta`` by privacy random variables (Gopi, Lee, Wutschitz 2021), an upper bound to 0.01, from Opacus.

    Args:
        releases: ``(noise_multiplier, sample_rate, count)``.

    Returns:
        Infinity where it does not apply: another adjacency, nothing released, or figures outside of what Opacus can put on a
        grid, for which it raises or gives a number below zero (its issues 585 and 601).
    """
    history = [release for release in releases if release[2]]
    if adjacency != "add-or-remove-one" or not history:
        return math.inf
    from opacus.accountants import PRVAccountant

    accountant = PRVAccountant()
    accountant.history = history
    try:
        with warnings.catch_warnings():  # about the Rényi orders from which it guesses a first grid
            warnings.simplefilter("ignore")
            found = float(accountant.get_epsilon(delta))
    except (RuntimeError, ValueError, MemoryError, OverflowError, IndexError):
        return math.inf
    return found if found > 0 else math.inf


def deltas(event: dp_event.DpEvent, epsilons: list[float], adjacency: Adjacency = "add-or-remove-one") -> list[float]:
    """δ at each ε: the points of the whole ε-δ curve, by PLD."""
    accountant = _pld(event, adjacency, 1e-3)
    return [float(accountant.get_delta(value)) for value in epsilons]


def detection_rates(
    event: dp_event.DpEvent, false_alarm_rates: list[float], adjacency: Adjacency = "add-or-remove-one"
) -> list[float]:
    """The most often that any attacker can detect a unit's presence, at each rate of false alarms.

    A test of (ε, δ(ε))-indistinguishable outputs obeys ``TPR <= e^ε · FPR + δ(ε)`` for every ε (Kairouz et al. 2015);
    the least of these bounds over the whole curve is returned.
    """
    epsilons = [0.02 * i for i in range(-250, 501)]
    curve = list(zip(epsilons, deltas(event, epsilons, adjacency), strict=True))
    return [min(1.0, *(math.exp(e) * rate + d for e, d in curve)) for rate in false_alarm_rates]


@lru_cache(maxsize=64)
def _pld(event: dp_event.DpEvent, adjacency: Adjacency, interval: float) -> PLDAccountant:
    accountant = PLDAccountant(ADJACENCY[adjacency], value_discretization_interval=interval)
    if not accountant.supports(event):
        raise PlanError(f"{event} has no privacy loss distribution under {adjacency}: use add-or-remove-one.")
    return accountant.compose(event)
