"""Membership: whether a model tells the records that it was trained on from others of the same kind."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from dpft.audit.bounds import upper_rate
from dpft.audit.report import area, roc
from dpft.audit.scores import least_likely, losses, trained
from dpft.errors import RecipeError
from dpft.privacy import accounting
from dpft.privacy.events import to_dp_event
from dpft.privacy.rounding import percent_up
from dpft.recipe import Recipe
from dpft.runs import RunFolder, RunRecord
from dpft.training.batches import Examples
from dpft.training.data import check, read_for
from dpft.workflows.setup import load_model

RATES = (0.001, 0.01)  # of false alarms at which detection is reported


@dataclass(frozen=True)
class Rate:
    """Detections at a rate of false alarms, with their interval for this threshold, and what the model's guarantee
    allows."""

    false_alarms: float
    detected: float
    interval: tuple[float, float]
    allowed: float | None


@dataclass(frozen=True)
class Attack:
    """One attack: ``auc`` is 0.5 for guessing. Rates that too few non-members can resolve are left out."""

    name: str
    auc: float
    auc_interval: tuple[float, float]
    rates: list[Rate]
    roc: list[tuple[float, float]] = field(repr=False)


def audit_membership(
    model: Path | str,
    members: str | Sequence[str],
    non_members: str | Sequence[str],
    recipe: Recipe | None = None,
) -> list[Attack]:
    """Attack a model with its members and with records of the same kind that it never saw.

    ``loss`` takes a low loss for membership (Yeom et al. 2018), ``reference`` a loss that fell from the model before
    training (calibration by difficulty: Watson et al. 2022, the one-reference form of LiRA, Carlini et al. 2022),
    ``min-k`` likely tokens even where a text is least likely (Shi et al. 2024; language models alone). The two sets
    must come from one distribution, or the attack tells the sets apart and not membership.

    Args:
        model: a run's folder, or a folder with an adapter or a model.
        recipe: what the model before training, the task and the columns are; by default the run's.

    Raises:
        RecipeError: no model, no recipe, or data without the task's columns.
    """
    folder = RunFolder(model)
    run = folder.record() if folder.finished else None
    if recipe is None:
        if run is None:
            raise RecipeError(f"{folder} is no run's folder, so a recipe must say what its model and columns are.")
        recipe = folder.recipe()
    single = recipe.data.model_copy(update=dict(unit="example"))
    rows = []
    for name, paths in (("members", members), ("non-members", non_members)):
        rows.append(read_for(recipe.task, paths if isinstance(paths, str) else list(paths)))
        check(rows[-1], recipe.task, single, name)
    task, before = load_model(recipe)
    features = [f for part in rows for f in Examples.encode(part, task).features]
    inside = np.arange(len(features)) < len(rows[0])
    known = losses(before, task, features)
    after = trained(before, recipe, folder.weights if run else folder.path)
    found = losses(after, task, features)
    scores = {"loss": -found, "reference": known - found}
    if task.likelihoods is not None:
        scores["min-k"] = least_likely(after, task, features)
    allowed = _allowed(run)
    return [_attack(name, each[inside], each[~inside], allowed) for name, each in scores.items()]


def _allowed(run: RunRecord | None) -> Sequence[float | None]:
    # Of a person with several rows the attack takes one, which the person's guarantee does not speak of.
    if run is None or not run.claims or run.unit != "example":
        return [None] * len(RATES)
    return accounting.detection_rates(to_dp_event(run.events), list(RATES), run.adjacency)


def _attack(name: str, members: np.ndarray, others: np.ndarray, allowed: Sequence[float | None]) -> Attack:
    auc, interval = area(members, others)
    rates = []
    for rate, most in zip(RATES, allowed, strict=True):
        if rate * len(others) < 1:
            continue
        threshold = np.quantile(others, 1 - rate, method="higher")
        hits, n = int((members > threshold).sum()), len(members)
        interval_of_rate = (1 - upper_rate(n - hits, n, 0.025), upper_rate(hits, n, 0.025))
        rates.append(Rate(rate, hits / n, interval_of_rate, most))
    return Attack(name, auc, interval, rates, roc(members, others))


def describe(attacks: Sequence[Attack]) -> str:
    """The attacks in words."""
    lines = []
    for attack in attacks:
        low, high = attack.auc_interval
        lines.append(f"{attack.name:<9}  AUC {attack.auc:.3f} ({low:.3f} to {high:.3f})")
        for rate in attack.rates:
            allowed = "" if rate.allowed is None else f"; the guarantee allows {percent_up(rate.allowed)}"
            interval = f"{100 * rate.interval[0]:.2f} to {100 * rate.interval[1]:.2f} %"
            lines.append(
                f"           detects {100 * rate.detected:.2f} % ({interval}) at {100 * rate.false_alarms:g} % false "
                f"alarms{allowed}"
            )
    lines.append(
        "PRIVATE: figures of these very records, without noise. AUC 0.5 is guessing. A weak attack proves nothing; "
        "both sets must come from one distribution."
    )
    return "\n".join(lines)
