"""The plan of a run: what is sampled, clipped, noised and claimed, made together so that it cannot disagree."""

import math
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

from dpft.errors import PlanError
from dpft.privacy.adjacency import ADJACENCIES, Adjacency
from dpft.privacy.clipping import Clip
from dpft.privacy.delta import check_delta
from dpft.privacy.events import Event, to_dp_event
from dpft.privacy.mechanisms.mechanism import Mechanism, made, require, samples
from dpft.privacy.rounding import rounded_up
from dpft.privacy.sampling import PoissonSampler

if TYPE_CHECKING:
    from dpft.privacy.noise import Randomness

LARGEST_EPSILON = 500.0  # beyond it e to its power leaves the range of numbers


@dataclass(frozen=True, kw_only=True, init=False)
class Plan:
    """A mechanism and the claim for it. Every field may be published; nothing in it may be computed from private data.

    Attributes:
        mechanism: what is sampled, clipped, noised and released. Its facts may be given in its place:
            ``Plan(noise_multiplier=1.0, sample_rate=0.02, steps=500, delta=1e-5)`` is DP-SGD, and ``mechanism`` may be
            a name (:func:`dpft.privacy.mechanisms.mechanisms`) beside such facts. Given beside a mechanism, they change
            it.
        delta: δ of the claim; must be below ``1 / units``.
        units: N₀, the declared, public number of units. It sets the normaliser ``expected_batch_size``; the true
            number may differ by the units that joined or left.
        adjacency: which data sets must be indistinguishable.
        unit: what one unit is, in words, such as ``"example"`` or ``"all rows that share patient_id"``.

    Guarantee:
        A run that follows the plan releases ``mechanism.events()``; it is (``epsilon``, ``delta``)-DP for ``unit``
        under ``adjacency``.

    Raises:
        PlanError: a field is out of range, or ``delta >= 1 / units``.

    >>> plan = Plan(noise_multiplier=1.0, sample_rate=0.02, steps=500, delta=1e-5)
    >>> round(plan.epsilon, 2)
    2.77
    """

    mechanism: Mechanism
    delta: float
    units: int | None
    adjacency: Adjacency
    unit: str

    def __init__(
        self,
        *,
        delta: float,
        mechanism: Mechanism | str = "dp-sgd",
        units: int | None = None,
        adjacency: Adjacency = "add-or-remove-one",
        unit: str = "example",
        **facts: Any,
    ) -> None:
        chosen = dict(mechanism=made(mechanism, **facts), delta=delta, units=units, adjacency=adjacency, unit=unit)
        for name, value in chosen.items():
            object.__setattr__(self, name, value)
        self._check()

    def _check(self) -> None:
        require(
            0 < self.delta < 1,
            f"delta is {self.delta}, and a probability of failure must be between 0 and 1, such as 1e-6.",
        )
        require(
            self.units is None or self.units >= 1,
            f"units is {self.units}: declare how many units the data set has, at least 1.",
        )
        check_delta(self.delta, self.units)
        require(
            self.adjacency in ADJACENCIES, f"adjacency is {self.adjacency!r}: choose one of {', '.join(ADJACENCIES)}."
        )

    @property
    def noise_multiplier(self) -> float:
        """σ of each release as it is charged."""
        return self.mechanism.noise_multiplier

    @property
    def sample_rate(self) -> float:
        """q, the probability with which each unit enters each release."""
        return self.mechanism.sample_rate

    @property
    def steps(self) -> int:
        """T, the number of releases."""
        return self.mechanism.steps

    @property
    def clip(self) -> Clip:
        """What bounds one unit's part, as the run begins."""
        return self.mechanism.clip

    @property
    def examples_per_unit(self) -> int:
        """How many of a unit's examples one step uses at most."""
        return self.mechanism.examples_per_unit

    @property
    def unit_gradient(self) -> str:
        """Whether a unit's gradient is the ``"sum"`` or the ``"mean"`` of its examples' gradients."""
        return self.mechanism.unit_gradient

    @property
    def expected_batch_size(self) -> float:
        """B = q·N₀ units: the public number by which every noisy sum is divided.

        Raises:
            PlanError: ``units`` was not declared.
        """
        if self.units is None:
            raise PlanError("The plan declares no number of units, so its sums have no public normaliser: set units.")
        return self.sample_rate * self.units

    def changed(self, **facts: Any) -> "Plan":
        """The same with these fields, or facts of the mechanism, in place of its own."""
        return replace(self, **facts)

    def events(self, steps: int | None = None) -> tuple[Event, ...]:
        """What the first ``steps`` releases are (default: all)."""
        return self.mechanism.events(steps)

    @cached_property
    def epsilon(self) -> float:
        """ε of the whole run, by PLD; infinite without noise."""
        return self.epsilon_after(self.steps)

    def epsilon_after(self, steps: int, *, exact: bool = True) -> float:
        """ε spent by the first ``steps`` releases.

        Args:
            exact: as it is stated, by dp-accounting wherever that serves. If not, in hundredths of a second by dpft's
                own arithmetic, an upper bound as well: for what is shown and what is searched.

        Where noise is so little that ε is in the hundreds, the bound is true and may be loose; it is infinite only
        without noise.
        """
        return self.mechanism.epsilon(steps, self.delta, self.adjacency, exact=exact)

    @cached_property
    def epsilon_rdp(self) -> float:
        """The second opinion: ε of the whole run by Rényi DP."""
        from dpft.privacy import accounting  # here, because it imports SciPy

        return accounting.epsilon_rdp(to_dp_event(self.events()), self.delta, self.adjacency)

    def sampler(self, randomness: "Randomness") -> PoissonSampler:
        """The sampler that this plan's event assumes."""
        return self.mechanism.sampler(randomness)

    @property
    def noise_std(self) -> float:
        """Standard deviation of the noise on the sum of clipped unit gradients, as the run begins."""
        return self.mechanism.noise_std(self.clip)

    def guarantee(self, steps: int | None = None) -> str:
        """The claim as one sentence, with its five parts, after ``steps`` releases (default: all)."""
        done = self.steps if steps is None else steps
        spent = self.epsilon_after(done)
        if math.isinf(spent):
            return f"NOT PRIVATE: {done:,} steps without noise."
        words = self.mechanism.describe(done)
        return (
            f"(ε = {rounded_up(spent)}, δ = {self.delta:g})-differential privacy; unit: {self.unit}; adjacency: "
            f"{self.adjacency}; sampler: {words.sampler}; mechanism: {words.mechanism}."
        )

    def claim(self, released: int, *, private: bool) -> str:
        """What may be said of ``released`` steps, by noise that is ``private`` or follows from a seed."""
        if not private:
            return f"NOT PRIVATE: {released:,} steps with noise from a seed, which anyone can subtract."
        return self.guarantee(released) if released else "Nothing was released."

    @classmethod
    def calibrate(  # noqa: PLR0913  (each is what a user types, by its name)
        cls,
        *,
        delta: float,
        epsilon: float | None = None,
        noise_multiplier: float | None = None,
        sample_rate: float | None = None,
        units: int | None = None,
        batch_size: int | None = None,
        steps: int | None = None,
        epochs: float | None = None,
        **fields: Any,
    ) -> "Plan":
        """Find the missing one of ε, noise and steps.

        Args:
            epsilon, noise_multiplier, steps: give two; ``epochs`` may stand for ``steps``. The third is found: the
                smallest noise for ε, or the most steps for ε and the noise. ε itself needs no search.
            sample_rate: or ``batch_size`` (expected) and ``units``, from which it follows.
            **fields: the other fields of :class:`Plan`, ``mechanism`` (a name) and its facts among them.

        Returns:
            A plan with ``plan.epsilon <= epsilon`` where a target was given
            (and within 0.1 % of it for noise, where ε is below 100).

        Raises:
            PlanError: too few or too many facts, or no noise or number of steps reaches the target.

        >>> Plan.calibrate(epsilon=3, delta=1e-6, units=50_000, batch_size=256, epochs=3).steps
        586
        """
        facts: dict[str, Any] = dict(units=units, delta=delta, **fields)
        if samples(fields.get("mechanism", "dp-sgd")):
            facts["sample_rate"] = sample_rate = _sample_rate(sample_rate, units, batch_size)
        else:
            require(
                sample_rate is batch_size is epochs is None,
                "The mechanism takes every unit in every step: give steps, and no rate, batch size or epochs.",
            )
        if epochs is not None:
            require(steps is None, "Both steps and epochs are given, and each sets the other: keep one.")
            require(0 < epochs < math.inf, f"epochs is {epochs}: train for a positive number of passes.")
            require((sample_rate or 0) > 0, f"sample_rate is {sample_rate}: draw some units.")
            steps = math.ceil(round(epochs / (sample_rate or 1), 9))
        given = {"epsilon": epsilon, "noise_multiplier": noise_multiplier, "steps (or epochs)": steps}
        missing = [name for name, value in given.items() if value is None]
        if len(missing) != 1:
            problem = f"{' and '.join(missing)} are missing" if missing else "All of them are given"
            raise PlanError(
                f"{problem}: give exactly two of epsilon, noise_multiplier and steps, and the third follows."
            )
        if epsilon is None:
            return cls(noise_multiplier=noise_multiplier, steps=steps, **facts)
        require(0 < epsilon < math.inf, f"epsilon is {epsilon}: a budget must be a positive number, such as 3.")
        require(
            epsilon <= LARGEST_EPSILON,
            f"epsilon is {epsilon:g}, which protects nobody: ask for at most {LARGEST_EPSILON:g}.",
        )
        if noise_multiplier is None:
            plan = cls(noise_multiplier=1.0, steps=steps, **facts)
            return plan.changed(mechanism=plan.mechanism.calibrated(epsilon, plan.delta, plan.adjacency))
        from dpft.privacy import calibration  # here, because it imports SciPy

        plan = cls(noise_multiplier=noise_multiplier, steps=1, **facts)
        return plan.changed(mechanism=calibration.steps_for(plan.mechanism, epsilon, plan.delta, plan.adjacency))


def _sample_rate(sample_rate: float | None, units: int | None, batch_size: int | None) -> float:
    if batch_size is None:
        if sample_rate is None:
            raise PlanError("No sampling rate: give sample_rate, or batch_size and units.")
        return sample_rate
    require(sample_rate is None, "Both sample_rate and batch_size are given, and each sets the other: keep one.")
    if units is None or units < 1:
        raise PlanError("batch_size needs units, the declared number of units in the data set.")
    require(
        1 <= batch_size <= units, f"batch_size is {batch_size:,} of {units:,} units: expect between 1 and all of them."
    )
    return batch_size / units
