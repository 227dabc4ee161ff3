"""A run's ``run.json`` as reports read it, whichever version of dpft wrote it."""

import json
from pathlib import Path

from dpft.errors import RecipeError

# The claim and its five parts: without one of them there is nothing to report.
REQUIRED = (
    *("guarantee", "private", "delta", "unit", "units", "adjacency", "events", "clip"),
    *("subset", "planned_steps", "released_steps"),
)


class Record(dict):
    """The record's keys; one that its version did not write is None."""

    def __missing__(self, key: str) -> None:
        return None


def read_record(folder: Path | str) -> Record:
    """The record of the run in ``folder``.

    Raises:
        RecipeError: there is none, or it is no record of a run.
    """
    path = Path(folder) / "run.json"
    if not path.exists():
        raise RecipeError(
            f"{folder} holds no finished run (no run.json): give the folder that `dpft train --output` made."
        )
    record = read_json(path)
    missing = [key for key in REQUIRED if key not in record]
    if missing:
        raise RecipeError(f"{path} lacks {', '.join(missing)}: it is not the record of a run of dpft.")
    return Record(record)


def read_json(path: Path) -> dict:
    """The object in the file.

    Raises:
        RecipeError: it is damaged.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise RecipeError(f"{path} is not JSON ({error}): restore it from a backup, or make it again.") from error
    if not isinstance(found, dict):
        raise RecipeError(f"{path} holds no JSON object: restore it from a backup, or make it again.")
    return found
