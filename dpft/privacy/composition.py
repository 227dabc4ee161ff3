"""ε of all that was released together, by dpft's own arithmetic, by Google's and by Rényi DP.

dpft's own (:mod:`dpft.privacy.convolution`) composes hundreds of different releases in a second. Google's dp-accounting
gives the same numbers and stays dpft's reference: it composes one release in 0.1 s, and three hundred different ones in
half a minute.
"""

import math
from functools import lru_cache

from dp_accounting.pld import privacy_loss_distribution
from dp_accounting.pld.common import DifferentialPrivacyParameters

from dpft.privacy import accounting
from dpft.privacy.adjacency import Adjacency
from dpft.privacy.events import Event, Stated, merged, parted, to_dp_event

__all__ = ["Event", "epsilon", "epsilon_rdp", "merged", "reference"]


@lru_cache(maxsize=1024)
def epsilon(events: tuple[Event, ...], delta: float, adjacency: Adjacency = "add-or-remove-one") -> float:
    """ε at ``delta`` of all ``events`` together, an upper bound.

    Infinite if something was released without noise, or if failures alone exceed ``delta``. For replace-one
    dp-accounting is asked.
    """
    events = merged(events)
    if adjacency == "replace-one" and any(event.sample_rate != 1 for event in events):
        return min(reference(events, delta, adjacency), accounting.own(events, delta, adjacency))
    return accounting.own(events, delta, adjacency)


def reference(events: tuple[Event, ...], delta: float, adjacency: Adjacency = "add-or-remove-one") -> float:
    """The same ε by dp-accounting, which composes each kind of release by itself; infinite where it does not serve."""
    events = merged(events)
    if not accounting.served(events, delta, adjacency):
        return math.inf

    def epsilon_on(grid: float) -> float:
        total = None
        for event in events:
            one = _reference_loss(event, adjacency, grid)
            total = one if total is None else total.compose(one)
        return 0.0 if total is None else float(total.get_epsilon_for_delta(delta))

    return accounting.refined(epsilon_on)


def epsilon_rdp(events: tuple[Event, ...], delta: float, adjacency: Adjacency = "add-or-remove-one") -> float:
    """The same by Rényi DP; infinite where of a release only its (ε, δ) is known."""
    events = merged(events)
    if parted(events)[1]:
        return math.inf
    return accounting.epsilon_rdp(to_dp_event(events), delta, adjacency) if events else 0.0


def _reference_loss(
    event: Event, adjacency: Adjacency, grid: float
) -> privacy_loss_distribution.PrivacyLossDistribution:
    figures = event.figures
    if isinstance(figures, Stated):
        known = DifferentialPrivacyParameters(figures.epsilon, figures.delta)
        one = privacy_loss_distribution.from_privacy_parameters(known, value_discretization_interval=grid)
    else:
        one = privacy_loss_distribution.from_gaussian_mechanism(
            figures.noise_multiplier,
            sampling_prob=figures.sample_rate,
            value_discretization_interval=grid,
            neighboring_relation=accounting.RELATION[adjacency],
        )
    return one.self_compose(event.count) if event.count > 1 else one
