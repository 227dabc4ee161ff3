"""One cell of a sweep: run, gone on with where it was killed, or found done."""

import sys
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dpft.errors import BudgetError, RecipeError
from dpft.runs.count import Count
from dpft.runs.folder import RunFolder
from dpft.runs.record import read_json
from dpft.runs.sweep import UNTOUCHED, Cell
from dpft.workflows.grid import Planned, same_run

if TYPE_CHECKING:
    from transformers import TrainerCallback

    from dpft.workflows.setup import Setup


def is_done(cell: Planned) -> bool:
    """Whether an earlier sweep ran the cell to its end.

    Raises:
        RecipeError: its folder holds a run of another recipe.
    """
    files = cell.files
    if cell.kind == UNTOUCHED:
        return files.cell_file.exists() and same_run(files.recipe(), cell.recipe)
    if files.releases_file.exists() and not same_run(files.recipe(), cell.recipe):
        raise RecipeError(
            f"{files} holds a run of another recipe, which this sweep would take for its own: choose another --output."
        )
    return files.cell_file.exists() and not files.record().interrupted


def released(cell: Planned) -> int:
    """How many of the cell's steps were released by now; zero of the untouched model."""
    return Count.read(cell.files.releases_file).charged


def progress_of(cell: Planned) -> float:
    """The share of the cell that is done: of its steps while it runs, and all of it only when a sweep saw its end."""
    if cell.files.cell_file.exists():
        return 1.0
    return 0.0 if cell.plan is None else min(0.99, released(cell) / cell.plan.steps)


def run_cells(
    cells: Iterable[Planned],
    *,
    own_process: bool = False,
    announce: Callable[[str], None] = lambda title: None,
    callbacks: Callable[[], "Sequence[TrainerCallback]"] = lambda: (),
) -> None:
    """Run the cells one after another; heads among them share what the frozen model makes of the data.

    Args:
        own_process: whether this process is there for these cells alone, so that its memory is theirs.

    Raises:
        KeyboardInterrupt: the interrupt key ended a cell early; what was to come is not wanted either.
        BudgetError: the ledger ended one early.
        DPFTError: see :func:`dpft.train`.
    """
    from dpft.workflows.setup import set_up

    cells = list(cells)
    shared: Setup | None = None
    for cell in cells:
        announce(cell.title)
        started = time.monotonic()
        found: dict[str, Any] = {}
        if cell.plan is None:
            found["metrics"] = _untouched(cell)
        else:
            if cell.recipe.learns_head:
                shared = shared or set_up(cell.recipe)
                shared.recipe = cell.recipe
            _train(cell, shared if cell.recipe.learns_head else None, callbacks())
        found["seconds"] = time.monotonic() - started
        found["peak_memory"] = _peak_memory() if own_process and len(cells) == 1 else None
        cell.files.write_private(cell.files.cell_file, found)
        if not cell.keeps_checkpoints:
            cell.files.remove_checkpoints()


def result(cell: Planned, output: Path) -> Cell:
    """What a cell that is done found."""
    files, known = cell.files, read_json(cell.files.cell_file)
    trained = cell.plan is not None
    metrics = files.metrics() if trained else known["metrics"]
    return Cell(
        kind=cell.kind,
        subset=cell.subset,
        epsilon=cell.epsilon,
        seed=cell.seed,
        trainable_parameters=files.record().trainable_parameters if trained else None,
        seconds=known["seconds"],
        peak_memory=known["peak_memory"],
        metrics={name: value for name, value in (metrics or {}).items() if name != "notice"},
        folder=cell.folder.relative_to(output).as_posix() if trained else None,
    )


def _train(cell: Planned, setup: "Setup | None", callbacks: "Sequence[TrainerCallback]") -> None:
    from dpft.workflows.train import train

    files = cell.files
    if files.finished and not files.record().interrupted:  # but a sweep did not see its end
        if not files.goes_on:
            return  # an earlier version's, which kept nothing to end it again from
        files.record_file.unlink()  # killed while it ended, so that is done again, from its last checkpoint or its sums
    train(
        cell.recipe, cell.folder, callbacks=callbacks, resume=files.releases_file.exists(), setup=setup, plan=cell.plan
    )
    record = files.record()
    if record.interrupted and record.halted:
        raise BudgetError(
            f"{files} ended after {record.released_steps:,} of {record.planned_steps:,} steps, so it is not the run "
            f"that was to be compared. {record.halted}"
        )
    if record.interrupted:
        raise KeyboardInterrupt


def _untouched(cell: Planned) -> dict[str, Any]:
    """The metrics of the model before training."""
    from dpft.training.data import load
    from dpft.training.measuring import measure
    from dpft.workflows.setup import load_model

    _, validation = load(cell.recipe)
    task, model = load_model(cell.recipe)
    model.eval()
    metrics = measure(validation, task, model)
    cell.folder.mkdir(parents=True, exist_ok=True)
    RunFolder(cell.folder).write_recipe(cell.recipe)
    return metrics


def _peak_memory() -> int | None:
    """The most bytes that this process had in memory; None where the system does not say."""
    status = Path("/proc/self/status")
    if status.exists():  # what getrusage says begins with the memory of the process that started this one
        lines = dict(line.split(":", 1) for line in status.read_text(encoding="utf-8").splitlines())
        return int(lines["VmHWM"].split()[0]) * 1024 if "VmHWM" in lines else None
    if sys.platform == "win32":
        return None
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
