"""How many releases a run has paid for, on disk before each of them happens."""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from secrets import token_hex
from typing import TYPE_CHECKING

from filelock import FileLock, Timeout

from dpft.errors import GuaranteeError
from dpft.privacy.noise import Randomness
from dpft.privacy.plan import Plan
from dpft.runs.count import Count, Mechanism
from dpft.runs.folder import ACCOUNT, NUMBERS, RELEASES, RunFolder, step_of
from dpft.runs.record import read_json

if TYPE_CHECKING:
    from dpft.gradients.engine import Engine


class Releases:
    """A counter that is written and flushed *before* the release it counts, so a crash over-counts, never under-counts.

    It outlives checkpoints: a run that is resumed from an older checkpoint has still released the steps after it, and
    they stay charged. It also keeps what each of them was, so that a run cannot be resumed under another plan. A copy
    lies in every checkpoint, so that a run that goes on in another folder, or whose counter was lost, forgets nothing.
    """

    def __init__(self, folder: Path | str, plan: Plan, randomness: Randomness) -> None:
        self._folder = RunFolder(folder)
        self.path = self._folder.releases_file
        (event,) = plan.events(1)
        self._mechanism = Mechanism(
            event=event,
            clip=plan.mechanism.clipping,
            unit=plan.unit,
            adjacency=plan.adjacency,
            private_randomness=randomness.private,
        )

    @property
    def charged(self) -> int:
        return Count.read(self.path).charged

    def check(self) -> None:
        """Raises GuaranteeError: the releases so far were made under another plan, so one claim cannot cover all."""
        count = Count.read(self.path)
        for name, before, now in (count.mechanism or self._mechanism).differences(self._mechanism):
            raise GuaranteeError(
                f"The run in {self._folder} has released {count.charged:,} steps with {name} = {before}, and now it is "
                f"{now}, so one claim would not cover both: resume with the same settings, or start another run."
            )

    @contextmanager
    def held(self) -> Iterator[None]:
        """Raises GuaranteeError: another process trains in the folder, and of two that count only one would be
        counted."""
        self._folder.private.mkdir(parents=True, exist_ok=True)
        lock = FileLock(self._folder.lock_file, timeout=0)
        try:
            lock.acquire()
        except Timeout:
            raise GuaranteeError(
                f"Another process trains in {self._folder}, and the releases of both would be counted once: wait for "
                "it, or choose another folder."
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
        here, saved = Count.read(self.path), Count.read(Path(checkpoint) / RELEASES)
        if here.mechanism and saved.mechanism and here.run != saved.run:
            raise GuaranteeError(
                f"{checkpoint} is of another run than the one in {self._folder}, and one claim would not cover both: "
                "resume it in a folder of its own."
            )
        step, counted = step_of(checkpoint), max(here.charged, saved.charged)
        if counted < step:
            raise GuaranteeError(
                f"{checkpoint} was made at step {step:,}, and only {counted:,} releases were counted, so its claim "
                f"would leave some out: resume in the folder that it was made in, or copy that folder's {RELEASES} "
                "beside it."
            )
        if counted > here.charged:
            self._write(replace(here if here.mechanism else saved, charged=counted))
        if not self._folder.account_file.exists():
            _copy(Path(checkpoint) / ACCOUNT, self._folder.account_file)

    def charge(self, number: int, steps: int = 1) -> None:
        """Count releases up to ``number``, the next one, or the next that counts as so many ``steps``.

        Raises:
            GuaranteeError: another was to come, so somebody else counts here too.
        """
        known = Count.read(self.path)
        if number != known.charged + steps:
            raise GuaranteeError(
                f"Release {number:,} was to be counted in {self._folder}, where {known.charged:,} were counted, so "
                "two runs count in one folder: give each its own."
            )
        self._write(Count(number, known.run or token_hex(8), self._mechanism))

    def end_round(self, planned: int) -> None:
        """Count the rest of the round in which the run stopped, up to the ``planned`` steps: what goes on is a new
        mechanism.

        A round's later releases would need noise that is kept nowhere. Where rounds are single steps, nothing is left.
        """
        count = Count.read(self.path)
        size = self._mechanism.event.steps
        if count.charged % size:
            self._write(replace(count, charged=min(planned, count.charged + -count.charged % size)))

    def save(self, checkpoint: Path, engine: "Engine | None" = None) -> None:
        """A copy for a checkpoint, with the account that was charged, and the released numbers that the engine's next
        step needs."""
        for file in (self.path, self._folder.account_file):
            _copy(file, checkpoint / file.name)
        if engine is not None and engine.released_numbers:
            (checkpoint / NUMBERS).write_text(json.dumps(engine.released_numbers), encoding="utf-8")

    def take_up_numbers(self, checkpoint: Path | str, engine: "Engine | None") -> None:
        """Raises GuaranteeError: the engine's next step needs a number that the checkpoint does not hold."""
        file = Path(checkpoint) / NUMBERS
        if engine is not None:
            engine.take_up(read_json(file) if file.exists() else {})

    def _write(self, count: Count) -> None:
        """The file, its name and its content are on disk when this returns."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        temporary = self.path.with_suffix(".tmp")
        with open(temporary, "w", encoding="utf-8") as file:
            json.dump(count.to_dict(), file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, self.path)
        if hasattr(os, "O_DIRECTORY"):  # Windows has no handle for it
            folder = os.open(self.path.parent, os.O_RDONLY | os.O_DIRECTORY)
            try:
                os.fsync(folder)
            finally:
                os.close(folder)


def _copy(source: Path, target: Path) -> None:
    if source.exists():
        target.write_bytes(source.read_bytes())
