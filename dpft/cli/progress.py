"""The progress bar on stderr: step, ε spent, examples per second, time left; of a sweep, its cells as well."""

import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    Task,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
)
from rich.text import Text
from transformers import TrainerCallback

from dpft.privacy.plan import Plan
from dpft.privacy.rounding import rounded_up

if TYPE_CHECKING:
    from dpft.workflows.grid import Planned

LOOKS = 1.0  # seconds between two looks at what a sweep's cells have counted
MARKS = 20  # ε is computed at so many points of a run; between them the next one, an upper bound, is shown


@contextmanager
def progress() -> Iterator["Bar"]:
    console = Console(stderr=True)
    columns = (
        SpinnerColumn("line" if console.options.ascii_only else "dots"),
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        _Count(),
        TextColumn("{task.fields[spent]}"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console) as shown:
        bar = Bar(shown)
        try:
            yield bar
        finally:
            bar.close()


class _Count(MofNCompleteColumn):
    """Done and all; of cells, those that are done."""

    def render(self, task: Task) -> Text:
        done = task.fields.get("done")
        return super().render(task) if done is None else Text(f"{done}/{task.total:.0f}", "progress.download")


class Bar:
    def __init__(self, shown: Progress) -> None:
        self._shown = shown
        self._task = shown.add_task("reading data and model", total=None, spent="")
        self._title = "training"
        self._ended = threading.Event()
        self._watcher: threading.Thread | None = None

    def watch(self, cells: "Sequence[Planned]") -> None:
        """Show how far all cells of a sweep are, wherever they run: by what they counted in their folders."""
        whole = self._shown.add_task("cells of the sweep", total=len(cells), spent="", done=0)
        self._watcher = threading.Thread(target=self._look, args=(whole, cells), daemon=True)
        self._watcher.start()

    def hears(self) -> dict[str, Any]:
        """What a sweep is given, by its own names, to be shown here."""
        return {"watch": self.watch, "announce": self.announce, "callbacks": lambda: [self.callback()]}

    def close(self) -> None:
        """Look no more."""
        self._ended.set()
        if self._watcher is not None:
            self._watcher.join()

    def _look(self, whole: TaskID, cells: "Sequence[Planned]") -> None:
        from dpft.workflows.cell import progress_of
        from dpft.workflows.sweep import spent

        before: list[bool] = []
        goes_on = True
        while goes_on:
            goes_on = not self._ended.wait(LOOKS)  # the last look is after the end
            with suppress(OSError, ValueError):  # a file that is being written is whole at the next look
                shares = [progress_of(cell) for cell in cells]
                done = sum(share == 1 for share in shares)
                self._shown.update(whole, completed=sum(shares), done=done)
                begun = [cell.folder.exists() for cell in cells]  # before anything of it is released
                if begun != before:  # ε is composed only where it changed, since it takes a moment
                    before = begun
                    self._shown.update(whole, spent=f"ε ≤ {rounded_up(spent(cells))} together")

    def announce(self, title: str) -> None:
        """Name what the following run is."""
        self._title = title
        self._shown.update(self._task, description=title, total=None, completed=0, spent="")

    def callback(self) -> TrainerCallback:
        return _Callback(self)

    def update(self, **state) -> None:
        self._shown.update(self._task, description=self._title, **state)


class _Callback(TrainerCallback):
    def __init__(self, bar: Bar) -> None:
        self._bar, self._started, self._first = bar, 0.0, 0
        self._engine: Any = None
        self._marks: dict[int, float] = {}

    def on_init_end(self, args, state, control, **_) -> None:
        self._bar.update(spent="preflight")

    def on_train_begin(self, args, state, control, **_) -> None:
        self._started, self._first = time.monotonic(), state.global_step

    def on_step_end(self, args, state, control, **_) -> None:
        engine = self._engine
        if engine is None:
            return
        done, plan = engine.steps_released, engine.plan
        rate = (state.global_step - self._first) * plan.expected_batch_size / (time.monotonic() - self._started)
        self._show(done, plan, engine.randomness.private, f"  {rate:,.0f} examples/s")

    def watch(self, engine) -> None:
        """Called by the trainer with the engine whose budget is shown."""
        self._engine = engine

    def released(self, done: int, plan: Plan, private: bool) -> None:
        """Called before a release that is none of an engine's."""
        self._show(done, plan, private)

    def say(self, text: str) -> None:
        """Called by the trainer before work that takes a while and is no step."""
        self._bar.update(spent=text)

    def _show(self, done: int, plan: Plan, private: bool, more: str = "") -> None:
        spent = self._spent(done, plan) if private and plan.noise_multiplier else "NOT PRIVATE"
        self._bar.update(total=plan.steps, completed=done, spent=f"{spent}{more}")

    def _spent(self, done: int, plan: Plan) -> str:
        every = max(1, plan.steps // MARKS)
        mark = min(plan.steps, -(-done // every) * every)
        if mark not in self._marks:
            self._marks[mark] = plan.epsilon_after(mark, exact=False)
        return f"ε ≤ {rounded_up(self._marks[mark])}"
