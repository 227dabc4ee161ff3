"""The contract of a mechanism, and the registry that finds every mechanism of this package.

A mechanism is a frozen value of public facts. It says what is drawn, how a unit's part is bounded, how much noise is
added and which events that makes; the engine, the ledger, the card, the audits and the accountants read these and
nothing else.

The registry is closed. No check at run time can prove that an event describes what was released, so a mechanism is
reviewed with its file here. One file in this package that holds a subclass with a ``name`` is enough: nothing lists it.

Two kinds of state follow from a run, and no object holds both. What was *released* (weights, a clip norm) may be kept
in a checkpoint. What noise is made from is *secret* (:class:`~dpft.privacy.noise.NoiseStream`) and is kept nowhere.
"""

import pkgutil
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import cache
from importlib import import_module
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self, overload

from dpft.errors import PlanError
from dpft.privacy import clipping
from dpft.privacy.adjacency import Adjacency
from dpft.privacy.clipping import Clip
from dpft.privacy.events import Event, to_dp_event
from dpft.privacy.sampling import PoissonSampler

if TYPE_CHECKING:  # a plan is made in a second; PyTorch takes two to import
    import numpy as np
    from torch import Tensor, device

    from dpft.privacy.noise import NoiseStream, Randomness


@dataclass(frozen=True)
class Words:
    """What a card and a claim say: the ``sampler`` and the ``mechanism``. Rates are rounded up and noise is rounded
    down."""

    sampler: str
    mechanism: str


@dataclass(frozen=True)
class Rounds(Sequence[int]):
    """``steps`` steps in rounds of ``size``, of which the last may be shorter."""

    size: int
    steps: int

    def __len__(self) -> int:
        return -(-self.steps // self.size)

    @overload
    def __getitem__(self, place: int) -> int: ...

    @overload
    def __getitem__(self, place: slice) -> list[int]: ...

    def __getitem__(self, place: int | slice) -> int | list[int]:
        chosen = range(0, self.steps, self.size)[place]  # IndexError beyond the last
        if isinstance(chosen, int):
            return min(self.size, self.steps - chosen)
        return [min(self.size, self.steps - start) for start in chosen]


@dataclass(frozen=True, kw_only=True)
class Mechanism(ABC):
    """What a run may release. Subclasses are frozen dataclasses with keyword-only fields.

    Attributes:
        name: by which recipes, records and ``Plan(mechanism=...)`` call it.
        releases: ``"gradients"`` are released by an Engine, ``"rows"`` by the mechanism's own methods, a ``"head"`` by
            its ``fit``.
        adapts: whether the clip follows from what was released, so that a checkpoint must keep it.
        noise_multiplier: σ of each release as it is charged, in units of what one unit can add.
        sample_rate: q, the probability with which each unit enters each release.
        steps: T, the number of releases.
        clip: what bounds one unit's part, as the run begins.
        examples_per_unit: how many of a unit's examples one release uses at most.
        unit_gradient: whether a unit's part is the ``"sum"`` or the ``"mean"`` of its examples' parts.

    Guarantee:
        ``steps`` releases, each with fresh chance and under the clip that :meth:`next_clip` gave before it, are
        ``events()``.
    """

    name: ClassVar[str]
    releases: ClassVar[Literal["gradients", "rows", "head"]] = "gradients"
    adapts: ClassVar[bool] = False

    if TYPE_CHECKING:  # fields of the subclasses, or constants

        @property
        def noise_multiplier(self) -> float: ...

        @property
        def sample_rate(self) -> float: ...

        @property
        def steps(self) -> int: ...

        @property
        def clip(self) -> Clip: ...

        @property
        def examples_per_unit(self) -> int: ...

        @property
        def unit_gradient(self) -> str: ...

    # -- what is charged -----------------------------------------------------------------------------------------

    @abstractmethod
    def events(self, steps: int | None = None) -> tuple[Event, ...]:
        """What the first ``steps`` releases are (default: all); empty for none."""

    @property
    def rounds(self) -> Sequence[int]:
        """How many steps each piece has that is charged, and stopped at, as a whole; they sum to ``steps``."""
        return Rounds(self.events(1)[0].steps, self.steps)

    def epsilon(
        self, steps: int, delta: float, adjacency: Adjacency = "add-or-remove-one", *, exact: bool = True
    ) -> float:
        """ε of the first ``steps`` releases at ``delta``; infinite without noise.

        Args:
            exact: as it is stated, by dp-accounting wherever that serves. If not, by dpft's own arithmetic, an upper
                bound too.
        """
        events = self.events(steps)
        if not events:
            return 0.0
        from dpft.privacy import accounting, composition  # here, because they import SciPy

        if not exact:
            return composition.epsilon(events, delta, adjacency)
        return accounting.epsilon(to_dp_event(events), delta, adjacency)

    @property
    def mu(self) -> float:
        """μ of one release to an attacker who knows who was drawn: 1/σ (Dong et al. 2022, Theorem 2.7)."""
        return 1 / self.noise_multiplier

    def changed(self, **facts: Any) -> Self:
        """The same with these facts in place of its own."""
        return replace(self, **facts)

    def calibrated(self, epsilon: float, delta: float, adjacency: Adjacency = "add-or-remove-one") -> Self:
        """The same with the least noise whose ε is at most ``epsilon``, to 0.1 % of ε where ε is below 100.

        Raises:
            PlanError: no noise reaches it.
        """
        from dpft.privacy import calibration  # here, because it imports SciPy

        return calibration.noise_for(self, epsilon, delta, adjacency)

    # -- what happens --------------------------------------------------------------------------------------------

    @abstractmethod
    def sampler(self, randomness: "Randomness") -> PoissonSampler:
        """The sampler that the events assume."""

    def batches(self, units: int, randomness: "Randomness") -> Iterator["np.ndarray"]:
        """For each step, the sorted numbers below ``units`` of the units that are drawn; may be empty. Private."""
        released = 0
        sampler = self.sampler(randomness).following(lambda: released)
        while released < self.steps:
            yield sampler.units(units)
            released += 1

    def noise(self, size: int, randomness: "Randomness", device: "device") -> "NoiseStream":
        """Where the noise on ``size`` numbers comes from, in units of :meth:`noise_std`: here, fresh for each
        release."""
        from dpft.privacy.noise import FreshNoise

        return FreshNoise(size, randomness, device)

    @property
    def clipping(self) -> str:
        """The bound on one unit's part and all that moves it, in which two runs that one claim covers must agree."""
        return repr(self.clip)

    @property
    def gradient_noise_multiplier(self) -> float:
        """The noise on the sum alone, in units of its sensitivity: σ, or more where other sums are released with it."""
        return self.noise_multiplier

    def noise_std(self, clip: Clip) -> float:
        """Standard deviation of the noise on each number of the sum that is released under ``clip``."""
        return self.gradient_noise_multiplier * clip.sensitivity

    def evidence(self, releases: "np.ndarray") -> "np.ndarray":
        """``(T, K)`` numbers that T steps released, in units of the clip, to what all of them tell of each step's sum.

        Its noise has the deviation :attr:`gradient_noise_multiplier`. The last steps may be left out.
        """
        return releases

    def tally(self, norms: "Tensor", clip: Clip) -> "Tensor | None":
        """``(U,)`` norms of unit gradients to ``(U,)`` numbers of size 1/2 at most that are summed too; None if none
        are."""
        return None

    @property
    def tally_noise(self) -> float:
        """Standard deviation of the noise on the sum of :meth:`tally`; 0 where nothing is tallied."""
        return 0.0

    def next_clip(self, clip: Clip, tally: float, expected_batch_size: float) -> Clip:
        """The clip of the next step, from the noisy ``tally`` alone and public numbers: it is a release and no
        secret."""
        return clip

    # -- what is said --------------------------------------------------------------------------------------------

    @abstractmethod
    def describe(self, steps: int | None = None) -> Words:
        """The sampler and the mechanism, after ``steps`` releases (default: all), as every card and claim says them."""

    @classmethod
    @abstractmethod
    def example(cls) -> Self:
        """A small one with noise, for documents and for the tests that every mechanism must pass."""

    def to_dict(self) -> dict[str, Any]:
        """All its facts as JSON has them."""
        facts = {field.name: getattr(self, field.name) for field in fields(self)}
        return {"mechanism": self.name, **facts, "clip": clipping.to_dict(self.clip)}

    @staticmethod
    def from_dict(facts: Mapping[str, Any]) -> "Mechanism":
        """The mechanism of which :meth:`to_dict` made ``facts``.

        Raises:
            PlanError: there is no such mechanism, or a fact is out of range.
        """
        facts = dict(facts)
        return made(facts.pop("mechanism"), **{**facts, "clip": clipping.from_dict(facts["clip"])})


@cache
def mechanisms() -> dict[str, type[Mechanism]]:
    """Every mechanism by its name: the classes that the files of this package define."""
    package = __name__.rpartition(".")[0]
    found: dict[str, type[Mechanism]] = {}
    for file in pkgutil.iter_modules(import_module(package).__path__, f"{package}."):
        for kind in vars(import_module(file.name)).values():
            own = isinstance(kind, type) and issubclass(kind, Mechanism) and kind.__module__ == file.name
            if own and "name" in vars(kind):
                if kind.name in found:
                    raise TypeError(f"{kind.__module__} and {found[kind.name].__module__} both define {kind.name!r}.")
                found[kind.name] = kind
    return dict(sorted(found.items()))


def made(mechanism: str | Mechanism, **facts: Any) -> Mechanism:
    """The mechanism called so, with these facts; or this one, with these facts changed.

    Raises:
        PlanError: there is none of that name, or a fact is out of range.
        TypeError: it has no such fact, or lacks one.
    """
    if isinstance(mechanism, Mechanism):
        return mechanism.changed(**facts) if facts else mechanism
    return _kind(mechanism)(**facts)


def samples(mechanism: str | Mechanism) -> bool:
    """Whether the mechanism called so has a sample rate of its own; without one every unit is in every step.

    Raises:
        PlanError: there is none of that name.
    """
    kind = type(mechanism) if isinstance(mechanism, Mechanism) else _kind(mechanism)
    return any(fact.name == "sample_rate" for fact in fields(kind))


def _kind(name: str) -> type[Mechanism]:
    if name not in mechanisms():
        raise PlanError(f"There is no mechanism {name!r}: choose one of {', '.join(mechanisms())}.")
    return mechanisms()[name]


def require(condition: bool, sentence: str) -> None:
    """Raises PlanError: the condition does not hold."""
    if not condition:
        raise PlanError(sentence)
