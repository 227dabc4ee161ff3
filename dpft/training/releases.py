"""How many releases a run has paid for, on disk before each of them happens."""

import json
import os
from pathlib import Path

from dpft.errors import GuaranteeError
from dpft.privacy.noise import Randomness
from dpft.privacy.plan import Plan


class Releases:
    """A counter that is written and flushed *before* the release it counts, so a crash over-counts, never under-counts.

    It outlives checkpoints: a run that is resumed from an older checkpoint has still released the steps after it, and
    they stay charged. It also keeps what each of them was, so that a run cannot be resumed under another plan.
    """

    def __init__(self, folder: Path | str, plan: Plan, randomness: Randomness) -> None:
        self.path = Path(folder) / "releases.json"
        self._mechanism = {
            "noise_multiplier": plan.noise_multiplier,
            "sample_rate": plan.sample_rate,
            "clip": repr(plan.clip),
            "unit": plan.unit,
            "adjacency": plan.adjacency,
            "private_randomness": randomness.private,
        }

    @property
    def charged(self) -> int:
        return json.loads(self.path.read_text(encoding="utf-8"))["charged"] if self.path.exists() else 0

    def check(self) -> None:
        """Raises GuaranteeError: the releases so far were made under another plan, so one claim cannot cover all."""
        before = (
            json.loads(self.path.read_text(encoding="utf-8"))["mechanism"] if self.path.exists() else self._mechanism
        )
        for name, value in self._mechanism.items():
            if before[name] != value:
                raise GuaranteeError(
                    f"The run in {self.path.parent} has released {self.charged:,} steps with {name} = {before[name]}, and now it is "
                    f"{value}, so one claim would not cover both: resume with the same settings, or start another run."
                )

    def charge(self, number: int) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        temporary = self.path.with_suffix(".tmp")
        with open(temporary, "w") as file:
            json.dump({"charged": number, "mechanism": self._mechanism}, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, self.path)
