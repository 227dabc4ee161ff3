"""ε from raw events again, by several accountants, and whether a run's folder or a ledger contradicts its claim."""

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from dpft.errors import PlanError
from dpft.ledger import Dataset, Ledger
from dpft.ledger.verify import verify
from dpft.privacy import accounting, composition
from dpft.privacy.adjacency import Adjacency
from dpft.privacy.delta import too_large
from dpft.privacy.events import Event
from dpft.privacy.rounding import rounded_up
from dpft.runs import RunFolder, RunRecord
from dpft.runs.count import Count

AGREEMENT = 5e-3  # relative difference that grids explain
PRV_ERROR = 0.01  # that PRV adds to ε
OLDEST = {"dp-accounting": (0, 4)}  # before, DP-SGD's PLD under other adjacencies than add-or-remove was not there


@dataclass
class Spending:
    """What was stated, what each accountant says of the events, and what does not fit together. None: does not
    apply."""

    name: str
    stated: float | None
    delta: float
    epsilon: dict[str, float | None]
    problems: list[str] = field(default_factory=list)

    @property
    def verdict(self) -> str:
        return "VIOLATION" if self.problems else "consistent"


def audit_run(folder: Path | str) -> Spending:
    """Audit the folder of a finished run.

    Raises:
        RecipeError: the folder holds no finished run.
    """
    place = RunFolder(folder)
    try:
        run = place.record()
    except PlanError as error:  # nobody can compose it
        return Spending(str(place), None, 0.0, {}, [str(error)])
    events = [event for event in run.events if event.count]
    audit = _recomputed(str(place), run.epsilon, events, run.delta, run.adjacency)
    audit.problems += _problems(run, place)
    return audit


def audit_ledger(ledger: Ledger) -> list[Spending]:
    """Audit every data set of a ledger; what its entries' own verification finds stands with the data set that it
    names."""
    found = [_dataset(dataset) for dataset in ledger.datasets()]
    rest = Spending("entries", None, 0.0, {})
    for problem in verify(*ledger.store.after(0)).problems:
        named = [one for one in found if repr(one.name) in problem]
        (named or [rest])[0].problems.append(problem)
    return [*found, rest] if rest.problems else found


def _dataset(dataset: Dataset) -> Spending:
    policy, record = dataset.policy, dataset.record
    audit = _recomputed(dataset.name, dataset.spent(), record.events, policy["delta"], policy["adjacency"])
    declared = [run.facts.get("units") for run in record.runs.values()]
    if policy["unit"] == "example" and record.fingerprint is not None:
        declared.append(record.fingerprint.get("rows"))  # which 0.1.0 kept
    units = max((one for one in declared if one), default=None)
    if units is not None and too_large(policy["delta"], units):
        audit.problems.append(_delta_problem(policy["delta"], units))
    return audit


def _recomputed(
    name: str, stated: float | None, events: Iterable[Event], delta: float, adjacency: Adjacency
) -> Spending:
    events = tuple(events)
    found = {
        "PLD (dp-accounting)": composition.reference(events, delta, adjacency),
        "PLD (dpft)": composition.epsilon(events, delta, adjacency),
        "RDP (dp-accounting)": composition.epsilon_rdp(events, delta, adjacency),
        "PRV (Opacus)": accounting.epsilon_prv(events, delta, adjacency),
    }
    known, prv = found["PLD (dp-accounting)"], found["PRV (Opacus)"]
    if math.isinf(known):  # where it does not serve
        known = found["PLD (dpft)"]
    audit = Spending(name, stated, delta, {k: v if math.isfinite(v) else None for k, v in found.items()})
    if stated is not None and stated < known * (1 - AGREEMENT):
        audit.problems.append(f"It states ε = {stated:.4g}, and its events compose to {rounded_up(known, 4)}.")
    if math.isfinite(prv) and prv + AGREEMENT * known < known - PRV_ERROR:
        audit.problems.append(
            f"Two accountants disagree: PLD gives ε = {rounded_up(known, 4)} and PRV {rounded_up(prv, 4)}; take the "
            "larger."
        )
    return audit


def _delta_problem(delta: float, units: int) -> str:
    return f"δ = {delta:g} for {units:,} units permits publishing one of them whole."


def _problems(run: RunRecord, folder: RunFolder) -> list[str]:
    found = []
    if run.units is not None and too_large(run.delta, run.units):
        found.append(_delta_problem(run.delta, run.units))
    steps = [event for event in run.events if not event.name]
    counted = sum(event.count * event.steps for event in steps)
    begun = max((event.steps for event in steps), default=1)  # steps of a release that may have ended early
    if not counted - begun < run.released_steps <= counted:
        found.append(f"Its events count {counted:,} releases, and it made {run.released_steps:,}.")
    for package, oldest in OLDEST.items():
        used = (run.versions or {}).get(package, "")
        if not used[:1].isdigit() or tuple(int(part) for part in used.split(".")[:2]) < oldest:
            found.append(
                f"{package} {used or 'of no known version'} accounted for it: {'.'.join(map(str, oldest))} is needed."
            )
    kept = Count.read(folder.releases_file)
    if kept.mechanism is None:
        found.append(f"{folder.releases_file.name}, where every release was counted before it happened, is gone.")
        return found
    if kept.charged > counted:
        found.append(f"{kept.charged:,} releases were counted on disk, and its events count {counted:,}.")
    for name in ("noise_multiplier", "sample_rate", "steps"):
        known = getattr(kept.mechanism.event, name)
        if any(getattr(event, name) != known for event in steps):
            found.append(f"{name} was {known:g} when it was released, and its events say otherwise.")
    if kept.mechanism.adjacency not in (None, run.adjacency):
        found.append(f"Its adjacency was {kept.mechanism.adjacency}, and it states {run.adjacency}.")
    if run.private and not kept.mechanism.private_randomness:
        found.append("Its noise came from a seed, so it is not private at all.")
    return found
