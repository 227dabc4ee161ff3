"""From what happened to ε: a thin door to Google's dp-accounting.

A :class:`dp_accounting.DpEvent` says what was released; ε is always derived from it and never stored instead of it.
The privacy loss distribution (PLD; Koskela et al. 2020, Doroshenko et al. 2022) gives the ε that dpft prints; Rényi
DP (Mironov 2017) is the second opinion, and the larger of the two wherever ε is below 100 and δ above 1e-12.

dp-accounting cuts tails of 1e-15 at each composition and takes minutes where losses are hundreds. There, and where
draws are so rare that it takes seconds, dpft's own arithmetic answers (:func:`own`).
"""

import logging
import math
import warnings
from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import lru_cache

import dp_accounting
from dp_accounting import dp_event
from dp_accounting.pld import PLDAccountant
from dp_accounting.rdp import RdpAccountant

from dpft.errors import PlanError
from dpft.privacy import convolution, gaussian
from dpft.privacy.adjacency import Adjacency
from dpft.privacy.convolution import AGREEMENT, REMAINS
from dpft.privacy.events import Event, from_dp_event, merged, parted, to_dp_event

RELATION = {
    "add-or-remove-one": dp_accounting.NeighboringRelation.ADD_OR_REMOVE_ONE,
    "replace-one": dp_accounting.NeighboringRelation.REPLACE_ONE,
    "zero-out": dp_accounting.NeighboringRelation.REPLACE_SPECIAL,
}

GRIDS = (3e-3, 1e-3, 3e-4, 1e-4, 3e-5, 1e-5)  # discretisation of the privacy loss, coarse to fine
SMALLEST_DELTA = 1e-12  # for dp-accounting, which leaves out 1e-15 of each composition
SMALLEST_NOISE = 0.2  # for dp-accounting; below, one release's losses are hundreds
LARGEST_EPSILON = 100.0  # for dp-accounting; beyond, its lists are long, and nobody is protected
RAREST = 3e4  # for dp-accounting: one release's largest loss over its spread
CURVE_FAILURE = 1e-13  # added to δ where a curve is bounded as if the draws were known

logging.getLogger("absl").setLevel(logging.ERROR)  # RDP orders that do not converge are left out, which is sound


def epsilon(
    event: dp_event.DpEvent,
    delta: float,
    adjacency: Adjacency = "add-or-remove-one",
    *,
    grid: float | None = None,
) -> float:
    """ε at ``delta`` by PLD, an upper bound on every grid; infinite only without noise.

    Args:
        grid: the discretisation interval. By default it is refined until 0.1 % of ε is at stake, because a
            grid that serves a few steps at ε = 8 is loose over many steps or at ε = 0.01.

    Raises:
        PlanError: the event has no PLD under this adjacency.
    """
    events = from_dp_event(event)
    if events is not None and not (served(events, delta, adjacency) and (grid is not None or not rare(events))):
        return own(events, delta, adjacency)
    if grid is not None:
        return float(_pld(event, adjacency, grid).get_epsilon(delta))
    return float(refined(lambda interval: _pld(event, adjacency, interval).get_epsilon(delta)))


@lru_cache(maxsize=1024)
def own(events: tuple[Event, ...], delta: float, adjacency: Adjacency = "add-or-remove-one") -> float:
    """ε at ``delta`` by dpft's own arithmetic, an upper bound; infinite without noise, or where failures alone exceed
    ``delta``.

    Without sampling it is the closed form. With it, it is the lesser of a convolution of losses and of a bound that is
    looser at much noise and close at little: the attacker is told which samples the unit was in. Under replace-one only
    the latter is known.
    """
    events = unsampled_joined(events)
    gaussians, stated = parted(events)
    if any(figures.noise_multiplier == 0 for figures, _ in gaussians):
        return math.inf
    left = delta - sum(count * figures.delta for figures, count in stated)
    if left <= 0:
        return math.inf
    apart = 2.0 if adjacency == "replace-one" else 1.0
    told = gaussian.revealed([(noise / apart, rate, count) for (noise, rate), count in gaussians], left)
    told += sum(count * figures.epsilon for figures, count in stated)
    exact = not stated and all(figures.sample_rate == 1 for figures, _ in gaussians)
    if exact or adjacency == "replace-one":
        return told
    return min(told, convolution.epsilon(events, delta))


def unsampled_joined(events: Iterable[Event]) -> tuple[Event, ...]:
    """The same with one event for all Gaussians without sampling: together they are one, with noise
    ``1 / sqrt(Σ 1/σ²)``."""
    events = merged(events)
    whole = {event: noise for event in events if event.sample_rate == 1 and (noise := event.noise_multiplier)}
    if not whole:
        return events
    signal = math.sqrt(math.fsum(event.count / noise**2 for event, noise in whole.items()))
    return merged([*(event for event in events if event not in whole), Event(1, 1 / signal, 1.0)])


@lru_cache(maxsize=1024)
def served(events: tuple[Event, ...], delta: float, adjacency: Adjacency = "add-or-remove-one") -> bool:
    """Whether dp-accounting answers well: δ is not tiny, noise not little and ε not in the hundreds."""
    noises = [event.noise_multiplier for event in events if event.noise_multiplier is not None]
    if delta < SMALLEST_DELTA or min(noises, default=1.0) < SMALLEST_NOISE:
        return False
    if adjacency == "replace-one":  # about as much as half the noise when one is removed
        events = _half_the_noise(events)
    return own(events, delta) <= LARGEST_EPSILON


def _half_the_noise(events: Iterable[Event]) -> tuple[Event, ...]:
    return tuple(replace(e, noise_multiplier=e.noise_multiplier and e.noise_multiplier / 2) for e in events)


def rare(events: tuple[Event, ...]) -> bool:
    """Whether losses are so much larger than their spread that dp-accounting's lists are long."""
    noises = [event.noise_multiplier for event in events if event.noise_multiplier]
    return bool(noises) and 20 / min(noises) > RAREST * convolution.spread(events)


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
    """ε at ``delta`` by Rényi DP; infinite where no Rényi bound is known for the event and adjacency.

    dp-accounting reads a Gaussian's noise as in units of what adding a unit moves; replacing one moves twice that.
    """
    if adjacency == "replace-one":
        events = from_dp_event(event)
        if events is None or any(e.sample_rate != 1 for e in events):
            return math.inf
        event = to_dp_event(_half_the_noise(events))
    accountant = RdpAccountant(neighboring_relation=RELATION[adjacency])
    if not accountant.supports(event):
        return math.inf
    return float(accountant.compose(event).get_epsilon(delta))


def epsilon_prv(events: Iterable[Event], delta: float, adjacency: Adjacency = "add-or-remove-one") -> float:
    """ε at ``delta`` by privacy random variables (Gopi, Lee, Wutschitz 2021), an upper bound to 0.01, from Opacus.

    Returns:
        Infinity where it does not apply: another adjacency, nothing released, a release without noise or of which only
            its (ε, δ) is known,
        or figures outside of what Opacus can put on a
        grid, for which it raises or gives a number below zero (its issues 585 and 601).
    """
    events = tuple(event for event in events if event.count)
    if not all(event.noise_multiplier for event in events):
        return math.inf
    if adjacency != "add-or-remove-one" or not events or not served(events, delta):
        return math.inf
    from opacus.accountants import PRVAccountant

    accountant = PRVAccountant()
    accountant.history = [(event.noise_multiplier, event.sample_rate, event.count) for event in events]
    try:
        with warnings.catch_warnings():  # about the Rényi orders from which it guesses a first grid
            warnings.simplefilter("ignore")
            found = float(accountant.get_epsilon(delta))
    except (RuntimeError, ValueError, MemoryError, OverflowError, IndexError):
        return math.inf
    return found if found > 0 else math.inf


def deltas(event: dp_event.DpEvent, epsilons: list[float], adjacency: Adjacency = "add-or-remove-one") -> list[float]:
    """δ at each ε: the points of the whole ε-δ curve, by PLD; where noise is little, as if the draws were known."""
    events = from_dp_event(event)
    if events is None or served(events, 1e-6, adjacency):
        accountant = _pld(event, adjacency, 1e-3)
        return [max(0.0, float(accountant.get_delta(value))) for value in epsilons]
    gaussians, _ = parted(events)  # dp-accounting has no event for others
    if any(figures.noise_multiplier == 0 for figures, _ in gaussians):
        return [1.0] * len(epsilons)
    apart = 2.0 if adjacency == "replace-one" else 1.0
    releases = [(noise / apart, rate, count) for (noise, rate), count in gaussians]
    mu, failure = gaussian.revealed_mu(releases, CURVE_FAILURE)
    return [min(1.0, failure + gaussian.delta(value, mu)) for value in epsilons]


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
    accountant = PLDAccountant(RELATION[adjacency], value_discretization_interval=interval)
    if not accountant.supports(event):
        raise PlanError(f"{event} has no privacy loss distribution under {adjacency}: use add-or-remove-one.")
    return accountant.compose(event)
