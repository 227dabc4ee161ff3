"""What was released, and the only place that knows how it is written, read and told to dp-accounting.

As a plain dictionary, in ``run.json``, ``releases.json`` and the ledger's entries::

    {"version": 2, "kind": "poisson_sampled_gaussian", "count": 500, "noise_multiplier": 1.0, "sample_rate": 0.02}
    {"version": 2, "kind": "gaussian", "count": 1, "noise_multiplier": 5.0, "sensitivity": 0.1, "name": "class means"}
    {"version": 2, "kind": "stated", "count": 1, "epsilon": 0.5, "delta": 1e-8}

A release that spans several steps of training names their number, ``"steps": 4``; others do not.

Version 1, of dpft 0.1 and 0.2, names no version; in ``run.json`` it says ``event`` for ``kind``, in the ledger it names
neither, and its sample rate is 1 where nothing is sampled.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any, NamedTuple

from dpft.errors import PlanError

if TYPE_CHECKING:  # where it runs, it is imported on first use, because it takes a second
    from dp_accounting.dp_event import DpEvent

VERSION = 2  # of the dictionary
SAMPLED, GAUSSIAN, STATED = "poisson_sampled_gaussian", "gaussian", "stated"
KEYS = {  # of each kind, beside version, kind, count and name
    SAMPLED: {"noise_multiplier", "sample_rate", "sensitivity"},
    GAUSSIAN: {"noise_multiplier", "sensitivity"},
    STATED: {"epsilon", "delta"},
}


class Gaussian(NamedTuple):
    """Figures of the Gaussian mechanism on a Poisson sample."""

    noise_multiplier: float
    sample_rate: float


class Stated(NamedTuple):
    """Figures of a release of which nothing else is known."""

    epsilon: float
    delta: float


@dataclass(frozen=True)
class Event:
    """What was released, ``count`` times over.

    Either the Gaussian mechanism with ``noise_multiplier`` on a Poisson sample of rate ``sample_rate``
    (1: on all units, without sampling), or, where these are None, something of which only its ``(epsilon, delta)`` is
    known.

    Attributes:
        noise_multiplier: the noise's standard deviation over the sensitivity, that is, over the most that one unit
            moves. Of a step that releases several sums it is that of all of them together.
        sensitivity: in the units of what was released, where it is worth stating. No ε follows from it.
        name: what was released, in a few public words; empty for steps of training.
        steps: over how many steps of training one such release spreads. A unit is in one of these at most.

    Raises:
        PlanError: a figure is none that a release can have.

    >>> Event(1, 5.0, 1.0, sensitivity=0.1, name="class means").to_dict()["kind"]
    'gaussian'
    """

    count: int = 1
    noise_multiplier: float | None = None
    sample_rate: float | None = None
    epsilon: float | None = None
    delta: float | None = None
    sensitivity: float | None = None
    name: str = ""
    steps: int = 1

    def __post_init__(self) -> None:
        checks = {"count": self.count >= 0, "steps": self.steps >= 1}
        match self.figures:
            case Gaussian(noise, rate):
                checks |= {"noise_multiplier": 0 <= noise < math.inf, "sample_rate": 0 < rate <= 1}
                checks |= {"sensitivity": self.sensitivity is None or 0 < self.sensitivity < math.inf}
            case Stated(epsilon, delta):
                checks |= {"epsilon": 0 <= epsilon < math.inf, "delta": 0 <= delta < 1}
                checks |= {"sensitivity": self.sensitivity is None}
        for name, possible in checks.items():
            if not possible:
                raise PlanError(f"A release has {name} = {getattr(self, name)}, which none can have: fix it.")

    @property
    def figures(self) -> Gaussian | Stated:
        """The pair of figures from which ε follows."""
        noise, rate, epsilon, delta = self.noise_multiplier, self.sample_rate, self.epsilon, self.delta
        if noise is not None and rate is not None and epsilon is None and delta is None:
            return Gaussian(noise, rate)
        if epsilon is not None and delta is not None and noise is None and rate is None:
            return Stated(epsilon, delta)
        raise PlanError("A release has a noise multiplier and a sample rate, or an epsilon and a delta: give one pair.")

    @property
    def kind(self) -> str:
        """How it is called where it is written."""
        if self.noise_multiplier is None:
            return STATED
        return GAUSSIAN if self.sample_rate == 1 else SAMPLED

    @property
    def one(self) -> "Event":
        """The same release, made once."""
        return self.times(1)

    def times(self, count: int) -> "Event":
        """The same release, made ``count`` times."""
        return replace(self, count=count)

    def spanning(self, steps: int) -> "Event":
        """The same release, made as often as so many steps of training need; one that is begun counts whole."""
        return self.times(-(-steps // self.steps))

    def to_dict(self) -> dict[str, Any]:
        """The release as it is written, with its count."""
        facts: dict[str, Any] = {"version": VERSION, "kind": self.kind, "count": self.count}
        keys = [field.name for field in fields(self) if field.name in KEYS[self.kind]]
        facts |= {key: getattr(self, key) for key in keys if getattr(self, key) is not None}
        facts |= {"name": self.name} if self.name else {}
        return facts | ({"steps": self.steps} if self.steps > 1 else {})

    @classmethod
    def from_dict(cls, facts: Mapping[str, Any]) -> "Event":
        """The release that is written there, by this or an older version; made once if no count is given.

        Raises:
            PlanError: it is none that this version knows, or a figure is none that a release can have.
        """
        rest = dict(facts)
        version = rest.pop("version", 1)
        if version == 1:
            kind = rest.pop("event", None) or (SAMPLED if "noise_multiplier" in rest else STATED)
        elif version == VERSION:
            kind = rest.pop("kind", None)
        else:
            raise PlanError(
                f"A release is written in version {version!r}, and this dpft reads up to {VERSION}: update dpft."
            )
        if kind not in KEYS:
            raise PlanError(
                f"A release is called {kind!r}, which is not what was executed by any version up to this one: update "
                "dpft, or fix the record."
            )
        figures = {key: rest.pop(key) for key in sorted(KEYS[kind] & rest.keys())}
        if kind == GAUSSIAN:
            figures["sample_rate"] = 1.0
        count, name, steps = rest.pop("count", 1), rest.pop("name", ""), rest.pop("steps", 1)
        if rest or type(count) is not int or type(name) is not str or type(steps) is not int:
            wrong = rest or {"count": count, "name": name, "steps": steps}
            raise PlanError(f"A release of kind {kind!r} has {wrong}, which no version writes: fix the record.")
        for key, value in figures.items():
            if type(value) not in (int, float):
                raise PlanError(f"A release has {key} = {value!r}, which is no number: fix the record.")
        return cls(count, **figures, name=name, steps=steps)

    @property
    def dp_event(self) -> "DpEvent":
        """The release as dp-accounting sees it.

        Raises:
            PlanError: only its ε and δ are known, for which dp-accounting has no event.
        """
        figures = self.figures
        if isinstance(figures, Stated):
            raise PlanError(
                f"Of a release only ε = {figures.epsilon:g} and δ = {figures.delta:g} are known, which is no "
                "mechanism: compose it by dpft.privacy.composition."
            )
        from dp_accounting import dp_event

        step = dp_event.GaussianDpEvent(figures.noise_multiplier)
        if figures.sample_rate < 1:
            step = dp_event.PoissonSampledDpEvent(figures.sample_rate, step)
        return dp_event.SelfComposedDpEvent(step, self.count)


def merged(events: Iterable[Event]) -> tuple[Event, ...]:
    """The same releases with one event for each kind, in a fixed order."""
    counts: dict[Event, int] = {}
    for event in events:
        counts[event.one] = counts.get(event.one, 0) + event.count
    order = lambda e: repr((e.noise_multiplier, e.sample_rate, e.epsilon, e.delta, e.sensitivity, e.name, e.steps))
    return tuple(sorted((event.times(n) for event, n in counts.items() if n), key=order))


def parted(events: Iterable[Event]) -> tuple[list[tuple[Gaussian, int]], list[tuple[Stated, int]]]:
    """Figures and count of each Gaussian, and of each release of which only (ε, δ) is known."""
    gaussians, stated = [], []
    for event in events:
        figures = event.figures
        if isinstance(figures, Gaussian):
            gaussians.append((figures, event.count))
        else:
            stated.append((figures, event.count))
    return gaussians, stated


def to_dp_event(events: Iterable[Event]) -> "DpEvent":
    """All ``events`` together, as dp-accounting sees them.

    Raises:
        PlanError: of one only its ε and δ are known.
    """
    from dp_accounting import dp_event

    parts = tuple(event.dp_event for event in events if event.count)
    if len(parts) == 1:
        return parts[0]
    return dp_event.ComposedDpEvent(parts) if parts else dp_event.NoOpDpEvent()


def from_dp_event(event: "DpEvent") -> tuple[Event, ...] | None:
    """The event as dpft records releases; None if it is none of dpft's."""
    from dp_accounting import dp_event

    match event:
        case dp_event.NoOpDpEvent():
            return ()
        case dp_event.GaussianDpEvent():
            return (Event(1, event.noise_multiplier, 1.0),)
        case dp_event.PoissonSampledDpEvent(sampling_probability=rate, event=dp_event.GaussianDpEvent() as inner):
            return (Event(1, inner.noise_multiplier, rate),)
        case dp_event.SelfComposedDpEvent(event=inner, count=count):
            parts = from_dp_event(inner)
            return parts and merged(part.times(part.count * count) for part in parts)
        case dp_event.ComposedDpEvent(events=inner):
            each = [from_dp_event(one) for one in inner]
            known = [part for part in each if part is not None]
            return merged(one for part in known for one in part) if len(known) == len(each) else None
    return None
