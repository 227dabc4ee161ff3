"""What a guarantee means: the most that anyone can do who sees all that was released and knows everything else."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from dpft.errors import RecipeError
from dpft.privacy import accounting
from dpft.privacy.adjacency import Adjacency
from dpft.privacy.events import Event, to_dp_event
from dpft.privacy.rounding import percent_up, rounded_up
from dpft.recipe import Recipe
from dpft.runs.folder import RunFolder

ALARMS = (0.001, 0.01, 0.1)
CHOICES = (2, 10, 1_000, 1_000_000)


@dataclass(frozen=True)
class Meaning:
    """Upper bounds, by the privacy loss distribution.

    Attributes:
        epsilon, delta: the claim.
        advantage: the largest detections − false alarms of any test for a unit's presence.
        detection: detections at each rate of false alarms in ``ALARMS``.
        reconstruction: for each number of equally likely values of a unit's attribute (``CHOICES``), how often the
            right one is guessed at best: the test's power at a false-alarm rate of one over that number
                (Hayes, Mahloujifar, Balle 2023, Theorem 2).
        curve: ``(false alarms, most detections)``, the trade-off curve.
    """

    epsilon: float
    delta: float
    advantage: float
    detection: dict[float, float]
    reconstruction: dict[int, float]
    curve: list[tuple[float, float]] = field(repr=False)


def meaning(events: Iterable[Event], delta: float, adjacency: Adjacency = "add-or-remove-one") -> Meaning:
    """What the guarantee of these events means.

    Raises:
        PlanError: they have no privacy loss distribution under this adjacency.
    """
    event = to_dp_event(events)
    alarms = [10 ** (-4 + i / 15) for i in range(61)]
    asked = [*ALARMS, *(1 / n for n in CHOICES), *alarms]
    powers = accounting.detection_rates(event, asked, adjacency)
    detection, rest = powers[: len(ALARMS)], powers[len(ALARMS) :]
    return Meaning(
        accounting.epsilon(event, delta, adjacency),
        delta,
        accounting.deltas(event, [0.0], adjacency)[0],
        dict(zip(ALARMS, detection, strict=True)),
        dict(zip(CHOICES, rest[: len(CHOICES)], strict=True)),
        list(zip(alarms, rest[len(CHOICES) :], strict=True)),
    )


def of_run(folder: Path | str) -> Meaning:
    """What a finished run's guarantee means.

    Raises:
        RecipeError: no run, or none that is private.
    """
    run = RunFolder(folder).record()
    if not run.claims:
        raise RecipeError(f"{folder} holds no private run, so there is no guarantee to explain.")
    return meaning(run.events, run.delta, run.adjacency)


def of_recipe(recipe: Recipe) -> Meaning:
    """What the guarantee would mean, before anything is run."""
    plan = recipe.plan()
    return meaning(plan.events(), plan.delta, plan.adjacency)


def describe(found: Meaning) -> str:
    """The guarantee in words for whoever has to sign for it; bounds are rounded up."""
    lines = [
        f"ε = {rounded_up(found.epsilon)} at δ = {rounded_up(found.delta, 6)}. The most that anyone can do who sees "
        "everything released and knows all other records:",
        *(
            f"- detect that a unit was in the data in {percent_up(power)} of cases, with false alarms in "
            f"{_percent(rate)}"
            for rate, power in found.detection.items()
        ),
        f"- detect presence in {percent_up(found.advantage)} more of cases than raise a false alarm, with any test "
        "(its advantage)",
        *(
            f"- name the right one of {choices:,} equally likely values of a record in {percent_up(power)} of cases, "
            f"where guessing is right in {_percent(1 / choices)}"
            for choices, power in found.reconstruction.items()
        ),
    ]
    return "\n".join(lines)


def _percent(share: float) -> str:
    return f"{100 * share:.3g} %"
