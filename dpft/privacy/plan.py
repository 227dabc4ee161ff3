"""The plan of a run: what is sampled, clipped, noised and claimed, made together so that it cannot disagree."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cache, cached_property
from typing import TYPE_CHECKING

from dpft.errors import PlanError
from dpft.privacy import accounting, composition, gaussian
from dpft.privacy.accounting import ADJACENCY, Adjacency
from dpft.privacy.clipping import Clip, FlatClip
from dpft.privacy.delta import check_delta
from dpft.privacy.events import Event, to_dp_event
from dpft.privacy.rounding import rounded_up
from dpft.privacy.sampling import PoissonSampler

if TYPE_CHECKING:
    from dpft.privacy.noise import Randomness

MIN_NOISE_MULTIPLIER = 1e-3  # the least that a search finds
MAX_NOISE_MULTIPLIER = 1e6
MAX_STEPS = 10_000_000
LARGEST_EPSILON = 500.0  # beyond it e to its power leaves the range of numbers
TOLERANCE = 1e-3  # of ε: how far below its target a calibrated plan may stay


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Public facts of a run. Every field may be published; nothing in it may be computed from private data.

    Attributes:
        noise_multiplier: σ, the noise's standard deviation in units of the clip's sensitivity.
        sample_rate: q, the probability with which each unit enters each step.
        steps: T, the number of releases. A step whose draw is empty is a release as well.
        delta: δ of the claim; must be below ``1 / units``.
        units: N₀, the declared, public number of units. It sets the normaliser ``expected_batch_size``; the true
            number may differ by the units that joined or left.
        clip: what bounds one unit's gradient.
        adjacency: which data sets must be indistinguishable.
        unit: what one unit is, in words, such as ``"example"`` or ``"all rows that share patient_id"``.
        examples_per_unit: how many of a unit's examples one step uses at most.
        unit_gradient: whether a unit's gradient is the ``"sum"`` or the ``"mean"`` of its examples' gradients.

    Guarantee:
        A run that follows the plan releases ``steps`` Poisson-sampled Gaussian mechanisms of sensitivity
        ``clip.sensitivity``; it is (``epsilon``, ``delta``)-DP for ``unit`` under ``adjacency``.

    Raises:
        PlanError: a field is out of range, or ``delta >= 1 / units``.

    >>> plan = Plan(noise_multiplier=1.0, sample_rate=0.02, steps=500, delta=1e-5)
    >>> round(plan.epsilon, 2)
    2.77
    """

    noise_multiplier: float
    sample_rate: float
    steps: int
    delta: float
    units: int | None = None
    clip: Clip = field(default_factory=FlatClip)
    adjacency: Adjacency = "add-or-remove-one"
    unit: str = "example"
    examples_per_unit: int = 1
    unit_gradient: str = "mean"

    def __post_init__(self) -> None:
        _require(
            self.noise_multiplier >= 0,
            f"noise_multiplier is {self.noise_multiplier}, and noise cannot be negative: use a positive number.",
        )
        _require(
            0 < self.sample_rate <= 1,
            f"sample_rate is {self.sample_rate}, and a probability must be above 0 and at most 1: lower the batch size or mend units.",
        )
        _require(self.steps >= 1, f"steps is {self.steps}, so nothing would train: plan at least one step.")
        _require(
            0 < self.delta < 1,
            f"delta is {self.delta}, and a probability of failure must be between 0 and 1, such as 1e-6.",
        )
        _require(
            self.units is None or self.units >= 1,
            f"units is {self.units}: declare how many units the data set has, at least 1.",
        )
        check_delta(self.delta, self.units)
        _require(self.adjacency in ADJACENCY, f"adjacency is {self.adjacency!r}: choose one of {', '.join(ADJACENCY)}.")
        _require(
            self.examples_per_unit >= 1, f"examples_per_unit is {self.examples_per_unit}: a unit needs at least 1."
        )
        _require(self.unit_gradient in ("sum", "mean"), f"unit_gradient is {self.unit_gradient!r}: choose sum or mean.")

    @property
    def expected_batch_size(self) -> float:
        """B = q·N₀ units: the public number by which every noisy sum is divided.

        Raises:
            PlanError: ``units`` was not declared.
        """
        if self.units is None:
            raise PlanError("The plan declares no number of units, so its sums have no public normaliser: set units.")
        return self.sample_rate * self.units

    def events(self, steps: int | None = None) -> tuple[Event, ...]:
        """What the first ``steps`` releases are (default: all)."""
        return (Event(self.steps if steps is None else steps, self.noise_multiplier, self.sample_rate),)

    @cached_property
    def epsilon(self) -> float:
        """ε of the whole run, by PLD; infinite without noise."""
        return self.epsilon_after(self.steps)

    def epsilon_after(self, steps: int, *, exact: bool = True) -> float:
        """ε spent by the first ``steps`` releases.

        Args:
            exact: as it is stated, by dp-accounting wherever that serves. If not, in hundredths of a second by dpft's own
                arithmetic, an upper bound as well: for what is shown and what is searched.

        Where noise is so little that ε is in the hundreds, the bound is true and may be loose; it is infinite only without noise.
        """
        if steps == 0:
            return 0.0
        if not exact:
            return composition.epsilon(self.events(steps), self.delta, self.adjacency)
        return accounting.epsilon(to_dp_event(self.events(steps)), self.delta, self.adjacency)

    @cached_property
    def epsilon_rdp(self) -> float:
        """The second opinion: ε of the whole run by Rényi DP."""
        return accounting.epsilon_rdp(to_dp_event(self.events()), self.delta, self.adjacency)

    def sampler(self, randomness: "Randomness") -> PoissonSampler:
        """The sampler that this plan's event assumes."""
        return PoissonSampler(self.sample_rate, self.examples_per_unit, randomness)

    @property
    def noise_std(self) -> float:
        """Standard deviation of the noise on the sum of clipped unit gradients: σ times the clip's sensitivity."""
        return self.noise_multiplier * self.clip.sensitivity

    def guarantee(self, steps: int | None = None) -> str:
        """The claim as one sentence, with its five parts, after ``steps`` releases (default: all)."""
        done = self.steps if steps is None else steps
        spent = self.epsilon_after(done)
        if math.isinf(spent):
            return f"NOT PRIVATE: {done:,} steps without noise."
        return (
            f"(ε = {rounded_up(spent)}, δ = {self.delta:g})-differential privacy; unit: {self.unit}; adjacency: {self.adjacency}; "
            f"sampler: Poisson, rate {self.sample_rate:.4g} per step; mechanism: {done:,} Gaussian releases, "
            f"noise multiplier {self.noise_multiplier:.4g}, {type(self.clip).__name__} at {self.clip.sensitivity:g}."
        )

    @classmethod
    def calibrate(
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
        **fields,
    ) -> "Plan":
        """Find the missing one of ε, noise and steps.

        Args:
            epsilon, noise_multiplier, steps: give two; ``epochs`` may stand for ``steps``. The third is found: the
                smallest noise for ε, or the most steps for ε and the noise. ε itself needs no search.
            sample_rate: or ``batch_size`` (expected) and ``units``, from which it follows.
            **fields: the other fields of :class:`Plan`.

        Returns:
            A plan with ``plan.epsilon <= epsilon`` where a target was given (and within 0.1 % of it for noise, where ε is below 100).

        Raises:
            PlanError: too few or too many facts, or no noise or number of steps reaches the target.

        >>> Plan.calibrate(epsilon=3, delta=1e-6, units=50_000, batch_size=256, epochs=3).steps
        586
        """
        sample_rate = _sample_rate(sample_rate, units, batch_size)
        if epochs is not None:
            _require(steps is None, "Both steps and epochs are given, and each sets the other: keep one.")
            _require(0 < epochs < math.inf, f"epochs is {epochs}: train for a positive number of passes.")
            _require(sample_rate > 0, f"sample_rate is {sample_rate}: draw some units.")
            steps = math.ceil(round(epochs / sample_rate, 9))
        facts = dict(sample_rate=sample_rate, units=units, delta=delta, **fields)
        given = {"epsilon": epsilon, "noise_multiplier": noise_multiplier, "steps (or epochs)": steps}
        missing = [name for name, value in given.items() if value is None]
        if len(missing) != 1:
            problem = f"{' and '.join(missing)} are missing" if missing else "All of them are given"
            raise PlanError(
                f"{problem}: give exactly two of epsilon, noise_multiplier and steps, and the third follows."
            )
        if epsilon is None:
            return cls(noise_multiplier=noise_multiplier, steps=steps, **facts)
        _require(0 < epsilon < math.inf, f"epsilon is {epsilon}: a budget must be a positive number, such as 3.")
        _require(
            epsilon <= LARGEST_EPSILON,
            f"epsilon is {epsilon:g}, which protects nobody: ask for at most {LARGEST_EPSILON:g}.",
        )
        if noise_multiplier is None:
            return _noise_for(cls(noise_multiplier=1.0, steps=steps, **facts), epsilon)
        return _steps_for(cls(noise_multiplier=noise_multiplier, steps=1, **facts), epsilon)


def _noise_for(plan: Plan, target: float) -> Plan:
    """The least noise whose ε is at most ``target``, to 0.1 % of ε."""

    def epsilon(log_noise: float, exact: bool) -> float:
        return replace(plan, noise_multiplier=math.exp(log_noise)).epsilon_after(plan.steps, exact=exact)

    if epsilon(math.log(MIN_NOISE_MULTIPLIER), True) <= target:  # so few draws that δ covers them all
        return replace(plan, noise_multiplier=MIN_NOISE_MULTIPLIER)
    # The central limit theorem of DP-SGD (Bu et al. 2020, equation 5), solved for the noise, says where to look.
    mu = gaussian.mu_for(target, plan.delta) / plan.sample_rate
    guess = -0.5 * math.log(math.log1p(mu**2 / plan.steps))
    found = _search(epsilon, target, guess, math.inf, math.log(MAX_NOISE_MULTIPLIER), slope=-2.0)
    if found is None:
        raise PlanError(
            f"No noise reaches epsilon = {target:g} over {plan.steps:,} steps at sample rate {plan.sample_rate:g}: "
            "take fewer steps, a lower rate or a larger epsilon."
        )
    return replace(plan, noise_multiplier=math.exp(found))


def _steps_for(plan: Plan, target: float) -> Plan:
    """The most steps whose ε is at most ``target``, to 0.1 % of ε."""

    spent = cache(plan.epsilon_after)
    if spent(1) > target:
        raise PlanError(
            f"One step at noise multiplier {plan.noise_multiplier:g} already spends epsilon = {rounded_up(spent(1))}, "
            f"above {target:g}: use more noise."
        )
    mu = gaussian.mu_for(target, plan.delta) / plan.sample_rate
    guess = max(0.0, math.log(mu**2 / math.expm1(plan.noise_multiplier**-2)))
    found = _search(
        lambda x, exact: spent(int(math.exp(x)), exact=exact), target, guess, 0.0, math.log(MAX_STEPS), slope=0.6
    )
    if found is None:
        raise PlanError(
            f"More than {MAX_STEPS:,} steps fit into epsilon = {target:g}: give the steps and let the noise follow."
        )
    return replace(plan, steps=int(math.exp(found)))


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


def _sample_rate(sample_rate: float | None, units: int | None, batch_size: int | None) -> float:
    if batch_size is None:
        _require(sample_rate is not None, "No sampling rate: give sample_rate, or batch_size and units.")
        return sample_rate
    _require(sample_rate is None, "Both sample_rate and batch_size are given, and each sets the other: keep one.")
    _require(units is not None and units >= 1, "batch_size needs units, the declared number of units in the data set.")
    _require(
        1 <= batch_size <= units, f"batch_size is {batch_size:,} of {units:,} units: expect between 1 and all of them."
    )
    return batch_size / units


def _require(condition: bool, sentence: str) -> None:
    if not condition:
        raise PlanError(sentence)
