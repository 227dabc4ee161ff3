"""What a run publishes: every key of ``run.json`` and where its value comes from. Nothing else is written there.

``plan``      a field of the plan or recipe, chosen and public
``released``  counted releases, what follows from them and the plan, or released weights
``public``    computed from data that are declared public
``software``  versions and the model's structure
``ledger``    what the data set's account says of all runs
``day``       a date without its time, which would follow the true batch sizes
``user``      what the user did
"""

import os
from collections.abc import Iterable
from datetime import UTC, datetime
from pathlib import Path

KEYS = {
    "guarantee": "released",
    "private": "plan",
    "epsilon": "released",
    "epsilon_rdp": "plan",
    "delta": "plan",
    "unit": "plan",
    "units": "plan",
    "examples_per_unit": "plan",
    "adjacency": "plan",
    "events": "released",
    "planned_steps": "plan",
    "released_steps": "released",
    "interrupted": "user",
    "halted": "ledger",
    "ledger": "ledger",
    "expected_batch_size": "plan",
    "mechanism": "released",
    "clip": "plan",
    "subset": "plan",
    "trainable_parameters": "software",
    "all_parameters": "software",
    "weights": "software",
    "metrics": "public",
    "metrics_are_private": "plan",
    "date": "day",
    "versions": "software",
}
LEDGER_KEYS = ("ledger", "dataset", "run", "budget", "delta", "spent", "runs")
PRIVATE = "private"  # the folder that is never published


def today() -> str:
    return datetime.now(UTC).date().isoformat()


def published(record: dict) -> dict:
    """The record, if it has just the keys of the list.

    Raises:
        ValueError: it has others, or lacks some: what is published is decided here.
    """
    if set(record) != set(KEYS) or set(record["ledger"] or ()) - set(LEDGER_KEYS):
        raise ValueError(f"run.json is to have the keys {', '.join(KEYS)}, not {', '.join(record)}.")
    return record


def round_dates(folder: Path) -> None:
    """Date every file below ``folder``, but for what is private, to the beginning of the day: seconds would follow the true batch sizes."""
    midnight = datetime.now(UTC).replace(hour=0, minute=0, second=0, microsecond=0).timestamp()
    for path in _files(folder):
        os.utime(path, (midnight, midnight))


def _files(folder: Path) -> Iterable[Path]:
    for path in sorted(folder.iterdir(), reverse=True):
        if path.name == PRIVATE or path.is_symlink():
            continue
        if path.is_dir():
            yield from _files(path)
        yield path
