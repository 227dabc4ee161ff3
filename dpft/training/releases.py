"""How many releases a run has paid for, on disk before each of them happens."""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from secrets import token_hex
from typing import TYPE_CHECKING

from filelock import FileLock, Timeout

from dpft.errors import GuaranteeError
from dpft.privacy.noise import Randomness
from dpft.privacy.plan import Plan

if TYPE_CHECKING:
    from dpft.gradients.engine import Engine

FILE = "releases.json"
NUMBERS = "released.json"  # in a checkpoint: what the next step needs of what was released, beside the weights
ACCOUNT = "ledger.json"  # which run of the ledger was charged for them


class Releases:
    """A counter that is written and flushed *before* the release it counts, so a crash over-counts, never under-counts.

    It outlives checkpoints: a run that is resumed from an older checkpoint has still released the steps after it, and
    they stay charged. It also keeps what each of them was, so that a run cannot be resumed under another plan. A copy lies in every
    checkpoint, so that a run that goes on in another folder, or whose counter was lost, forgets nothing.
    """

    def __init__(self, folder: Path | str, plan: Plan, randomness: Randomness) -> None:
        self.path = Path(folder) / FILE
        self._mechanism = {
            "noise_multiplier": plan.noise_multiplier,
            "sample_rate": plan.sample_rate,
            "clip": plan.mechanism.clipping,
            "unit": plan.unit,
            "adjacency": plan.adjacency,
            "private_randomness": randomness.private,
        }

    @property
    def charged(self) -> int:
        return _read(self.path).get("charged", 0)

    def check(self) -> None:
        """Raises GuaranteeError: the releases so far were made under another plan, so one claim cannot cover all."""
        before = _read(self.path).get("mechanism", self._mechanism)
        for name, value in self._mechanism.items():
            if before[name] != value:
                raise GuaranteeError(
                    f"The run in {self.path.parent} has released {self.charged:,} steps with {name} = {before[name]}, and now it is "
                    f"{value}, so one claim would not cover both: resume with the same settings, or start another run."
                )

    @contextmanager
    def held(self) -> Iterator[None]:
        """Raises GuaranteeError: another process trains in the folder, and of two that count only one would be counted."""
        private = self.path.parent / "private"
        private.mkdir(parents=True, exist_ok=True)
        lock = FileLock(private / "lock", timeout=0)
        try:
            lock.acquire()
        except Timeout:
            raise GuaranteeError(
                f"Another process trains in {self.path.parent}, and the releases of both would be counted once: wait for it, or choose another folder."
            ) from None
        try:
            yield
        finally:
            lock.release()

    def take_up(self, checkpoint: Path | str) -> None:
        """Count what the checkpoint's run has released, also where it lies in another folder.

        Raises:
            GuaranteeError: it is another run than the folder's, or its steps were not counted.
        """
        here, saved = _read(self.path), _read(Path(checkpoint) / FILE)
        if here and saved and here.get("run") != saved.get("run"):
            raise GuaranteeError(
                f"{checkpoint} is of another run than the one in {self.path.parent}, and one claim would not cover both: resume it in a folder of its own."
            )
        step = json.loads((Path(checkpoint) / "trainer_state.json").read_text(encoding="utf-8"))["global_step"]
        counted = max(here.get("charged", 0), saved.get("charged", 0))
        if counted < step:
            raise GuaranteeError(
                f"{checkpoint} was made at step {step:,}, and only {counted:,} releases were counted, so its claim would leave some out: resume in the "
                f"folder that it was made in, or copy that folder's {FILE} beside it."
            )
        if counted > here.get("charged", 0):
            self._write({**(here or saved), "charged": counted})
        account = self.path.with_name(ACCOUNT)
        if not account.exists():
            _copy(Path(checkpoint) / ACCOUNT, account)

    def charge(self, number: int) -> None:
        """Count release ``number``, the next one.

        Raises:
            GuaranteeError: another was to come, so somebody else counts here too.
        """
        known = _read(self.path)
        if number != known.get("charged", 0) + 1:
            raise GuaranteeError(
                f"Release {number:,} was to be counted in {self.path.parent}, where {known.get('charged', 0):,} were counted, so two runs count in one "
                "folder: give each its own."
            )
        self._write({"run": known.get("run") or token_hex(8), "charged": number, "mechanism": self._mechanism})

    def save(self, checkpoint: Path, engine: "Engine | None" = None) -> None:
        """A copy for a checkpoint, with the account that was charged, and the released numbers that the engine's next step needs."""
        for name in (FILE, ACCOUNT):
            _copy(self.path.with_name(name), checkpoint / name)
        if engine is not None and engine.released_numbers:
            (checkpoint / NUMBERS).write_text(json.dumps(engine.released_numbers), encoding="utf-8")

    def take_up_numbers(self, checkpoint: Path | str, engine: "Engine | None") -> None:
        """Raises GuaranteeError: the engine's next step needs a number that the checkpoint does not hold."""
        if engine is not None:
            engine.take_up(_read(Path(checkpoint) / NUMBERS))

    def _write(self, facts: dict) -> None:
        """The file, its name and its content are on disk when this returns."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        temporary = self.path.with_suffix(".tmp")
        with open(temporary, "w", encoding="utf-8") as file:
            json.dump(facts, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, self.path)
        if hasattr(os, "O_DIRECTORY"):  # Windows has no handle for it
            folder = os.open(self.path.parent, os.O_RDONLY | os.O_DIRECTORY)
            try:
                os.fsync(folder)
            finally:
                os.close(folder)


def _read(path: Path) -> dict:
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def _copy(source: Path, target: Path) -> None:
    if source.exists():
        target.write_bytes(source.read_bytes())
