"""A run's ε from its raw events again, by several accountants, and whether its folder contradicts the claim."""

import json
import math
from dataclasses import dataclass, field
from pathlib import Path

from dpft.errors import RecipeError
from dpft.privacy import composition
from dpft.privacy.composition import Event

AGREEMENT = 5e-3  # relative difference that grids explain


@dataclass
class Spending:
    """What a run stated, what each accountant says of its events, and what does not fit together."""

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
    folder = Path(folder)
    if not (folder / "run.json").exists():
        raise RecipeError(
            f"{folder} holds no finished run (no run.json): give the folder that `dpft train --output` made."
        )
    run = json.loads((folder / "run.json").read_text())
    events = tuple(Event(e["count"], e["noise_multiplier"], e["sample_rate"]) for e in run["events"] if e["count"])
    delta, adjacency = run["delta"], run["adjacency"]
    found = {
        "PLD (dp-accounting)": composition.reference(events, delta, adjacency),
        "PLD (dpft)": composition.epsilon(events, delta, adjacency),
        "RDP (dp-accounting)": composition.epsilon_rdp(events, delta, adjacency),
    }
    audit = Spending(
        run["epsilon"], delta, {name: value if math.isfinite(value) else None for name, value in found.items()}
    )
    audit.problems += _problems(run, folder, found["PLD (dp-accounting)"])
    return audit


def _problems(run: dict, folder: Path, known: float) -> list[str]:
    stated, found = run["epsilon"], []
    if stated is not None and stated < known * (1 - AGREEMENT):
        found.append(f"It states ε = {stated:.4g}, and its events compose to {known:.4g}.")
    if run["units"] and run["delta"] >= 1 / run["units"]:
        found.append(f"δ = {run['delta']:g} for {run['units']:,} units permits publishing one of them whole.")
    counted = sum(event["count"] for event in run["events"])
    if counted != run["released_steps"]:
        found.append(f"Its events count {counted:,} releases, and it made {run['released_steps']:,}.")
    kinds = {event["event"] for event in run["events"]} - {"poisson_sampled_gaussian"}
    if kinds:
        found.append(f"It names {', '.join(sorted(kinds))}, which is not what was executed.")
    releases = folder / "releases.json"
    if not releases.exists():
        found.append("releases.json, where every release was counted before it happened, is gone.")
        return found
    kept = json.loads(releases.read_text())
    if kept["charged"] > counted:
        found.append(f"{kept['charged']:,} releases were counted on disk, and its events count {counted:,}.")
    for name in ("noise_multiplier", "sample_rate"):
        if any(event[name] != kept["mechanism"][name] for event in run["events"]):
            found.append(f"{name} was {kept['mechanism'][name]:g} when it was released, and its events say otherwise.")
    if run["private"] and not kept["mechanism"]["private_randomness"]:
        found.append("Its noise came from a seed, so it is not private at all.")
    return found
