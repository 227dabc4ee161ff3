"""What a run publishes when it ends, and what stays private."""

import math
import platform
from dataclasses import asdict
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING

from dpft.privacy.sampling import ALL
from dpft.recipe import Recipe
from dpft.runs.folder import RunFolder, today
from dpft.runs.record import AccountFacts, ClipFacts, MechanismFacts, RunRecord

if TYPE_CHECKING:
    from dpft.training.session import Session

PACKAGES = ("dpft", "torch", "opacus", "transformers", "peft", "dp-accounting", "numpy", "datasets")


def write(
    folder: RunFolder, recipe: Recipe, session: "Session", loading: str, metrics: dict | None, interrupted: bool
) -> None:
    """The run's record. Un-noised metrics go to ``private/`` unless the validation data are public."""
    plan, released = session.plan, session.released
    private = session.randomness.private and plan.noise_multiplier > 0
    public = recipe.data.validation_is_public
    found = None if metrics is None else {name.removeprefix("eval_"): value for name, value in metrics.items()}
    record = RunRecord(
        guarantee=session.guarantee,
        private=private,
        epsilon=plan.epsilon_after(released) if private else None,
        epsilon_rdp=plan.epsilon_rdp if private and math.isfinite(plan.epsilon_rdp) else None,
        delta=plan.delta,
        unit=plan.unit,
        units=plan.units,
        examples_per_unit=plan.examples_per_unit if plan.examples_per_unit < ALL else None,
        adjacency=plan.adjacency,
        events=plan.events(released),
        planned_steps=plan.steps,
        released_steps=released,
        interrupted=interrupted,
        halted=session.halted,
        ledger=_account(session),
        expected_batch_size=plan.expected_batch_size,
        mechanism=MechanismFacts(**asdict(plan.mechanism.describe(released))),
        clip=ClipFacts(rule=type(plan.clip).__name__, clip_norm=plan.clip.sensitivity),
        subset=recipe.subset,
        trainable_parameters=session.trainable_parameters,
        all_parameters=sum(p.numel() for p in session.model.parameters()),
        weights=loading,
        metrics=(found or None) if public else None,
        metrics_are_private=found is not None and not public,
        date=today(),
        versions=versions(),
    )
    if found is not None and not public:
        folder.write_private(folder.metrics_file, found)
    folder.write_record(record)  # last, because a record says that the run has ended


def write_private(folder: RunFolder, session: "Session", started: datetime) -> None:
    """What follows the data: times, techniques, the layer that was kept, how many rows the account knew."""
    facts = {
        "techniques": session.preflight.techniques if session.preflight else None,
        "frozen_prefix": session.prefix.name if session.prefix else None,
        "overlap": session.account.overlap if session.account else None,
        "started": started.isoformat(timespec="seconds"),
        "finished": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    notice = "PRIVATE: these follow the data; the guarantee does not cover them."
    folder.write_private(folder.facts_file, facts, notice)


def _account(session: "Session") -> AccountFacts | None:
    """Where the run was charged, and what its data set had spent when it ended."""
    if session.account is None:
        return None
    dataset, facts = session.account.dataset, session.account.facts
    return AccountFacts(
        ledger=facts["ledger"],
        dataset=facts["dataset"],
        run=facts["run"],
        budget=dataset.policy["epsilon"],
        delta=dataset.policy["delta"],
        spent=dataset.spent(),
        runs=len(dataset.record.runs),
    )


def versions() -> dict[str, str]:
    """What a run depended on."""
    found = {"python": platform.python_version(), "platform": f"{platform.system()} {platform.machine()}"}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found
