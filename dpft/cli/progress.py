"""The progress bar on stderr: step, ε spent, examples per second, time left."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeRemainingColumn
from transformers import TrainerCallback

from dpft.privacy.plan import Plan
from dpft.privacy.rounding import rounded_up

MARKS = 20  # ε is computed at so many points of a run; between them the next one, an upper bound, is shown


@contextmanager
def progress() -> Iterator["Bar"]:
    console = Console(stderr=True)
    columns = (
        SpinnerColumn("line" if console.options.ascii_only else "dots"),
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TextColumn("{task.fields[spent]}"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console) as shown:
        yield Bar(shown)


class Bar:
    def __init__(self, shown: Progress) -> None:
        self._shown = shown
        self._task = shown.add_task("reading data and model", total=None, spent="")
        self._title = "training"

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
