"""How many releases a run has paid for, on disk before each of them happens."""

import json
import os
from pathlib import Path


class Releases:
    """A counter that is written and flushed *before* the release it counts, so a crash over-counts, never under-counts.

    It outlives checkpoints: a run that is resumed from an older checkpoint has still released the steps after it, and
    they stay charged.
    """

    def __init__(self, folder: Path | str) -> None:
        self.path = Path(folder) / "releases.json"

    @property
    def charged(self) -> int:
        return json.loads(self.path.read_text())["charged"] if self.path.exists() else 0

    def charge(self, number: int) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        temporary = self.path.with_suffix(".tmp")
        with open(temporary, "w") as file:
            json.dump({"charged": number}, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, self.path)
