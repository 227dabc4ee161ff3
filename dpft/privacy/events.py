"""What was released: the record from which every ε is derived."""

import math
from collections.abc import Iterable
from dataclasses import dataclass

from dpft.errors import PlanError


@dataclass(frozen=True, order=True)
class Event:
    """What was released, ``count`` times over.

    Either the Gaussian mechanism with ``noise_multiplier`` on a Poisson sample of rate ``sample_rate``, or, where these are None,
    something of which only its ``(epsilon, delta)`` is known.

    Raises:
        PlanError: a figure is none that a release can have.
    """

    count: int = 1
    noise_multiplier: float | None = None
    sample_rate: float | None = None
    epsilon: float | None = None
    delta: float | None = None

    def __post_init__(self) -> None:
        gaussian, stated = (self.noise_multiplier, self.sample_rate), (self.epsilon, self.delta)
        checks = {"count": self.count >= 0}
        if None not in gaussian and stated == (None, None):
            checks |= {
                "noise_multiplier": 0 <= self.noise_multiplier < math.inf,
                "sample_rate": 0 < self.sample_rate <= 1,
            }
        elif None not in stated and gaussian == (None, None):
            checks |= {"epsilon": 0 <= self.epsilon < math.inf, "delta": 0 <= self.delta < 1}
        else:
            raise PlanError(
                "A release has a noise multiplier and a sample rate, or an epsilon and a delta: give one pair."
            )
        for name, possible in checks.items():
            if not possible:
                raise PlanError(f"A release has {name} = {getattr(self, name)}, which none can have: mend it.")


def merged(events: Iterable[Event]) -> tuple[Event, ...]:
    """The same releases with one event for each kind, in a fixed order."""
    counts: dict[Event, int] = {}
    for event in events:
        kind = Event(1, event.noise_multiplier, event.sample_rate, event.epsilon, event.delta)
        counts[kind] = counts.get(kind, 0) + event.count
    kinds = ((e.noise_multiplier, e.sample_rate, e.epsilon, e.delta, n) for e, n in counts.items() if n)
    return tuple(Event(n, *facts) for *facts, n in sorted(kinds, key=repr))
