"""``dpft sweep``: every subset with every ε and every seed, beside the untouched model, as one charge and one table."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from filelock import FileLock, Timeout

from dpft.errors import BudgetError, RecipeError
from dpft.privacy import composition
from dpft.privacy.events import Event, merged
from dpft.privacy.rounding import rounded_up
from dpft.recipe import Recipe
from dpft.runs.folder import RunFolder
from dpft.runs.sweep import NON_PRIVATE, PRIVATE, Sweep
from dpft.workflows import pool
from dpft.workflows.cell import is_done, released, result, run_cells
from dpft.workflows.grid import Grid, Planned

if TYPE_CHECKING:
    from transformers import TrainerCallback


def sweep(  # noqa: PLR0913  (each is what a user types, by its name)
    recipe: Recipe,
    output: Path | str,
    *,
    subsets: Sequence[str] = (),
    epsilons: Sequence[float | None] = (),
    seeds: Sequence[int] = (0,),
    changes: Mapping[str, Sequence[str]] | None = None,
    jobs: int | None = None,
    ray: str | None = None,
    watch: Callable[[Sequence[Planned]], None] = lambda cells: None,
    announce: Callable[[str], None] = lambda title: None,
    callbacks: Callable[[], "Sequence[TrainerCallback]"] = lambda: (),
) -> Sweep:
    """Run every subset with every ε and every seed, each in a run folder below ``output``; writes ``sweep.json``.

    The same call goes on with a sweep that was killed: a cell that is done is not run again, and one under way goes on
    from its last checkpoint, or, of a head, from its last sum.

    Args:
        subsets, epsilons, changes: see :class:`Grid`.
        jobs: how many processes run cells at once; by default what cores and memory have room for. One: this process.
        ray: the address of a Ray cluster that runs the cells, or ``"local"`` for a new one on this machine.
        watch: called with all cells before the first one begins.
        announce, callbacks: where this process runs the cells: called with each one's title, and for its callbacks.

    Returns:
        What was found, runs without privacy among it. ``output/private/sweep.json`` holds the same, and
        ``output/sweep.json`` what may be published of it, if the validation data are public.

    Guarantee:
        Every private run is charged by itself, and none is charged again once it is done. Where the recipe names an
        account, no run begins before all that is left of the sweep fits into it.

    Raises:
        RecipeError: a recipe of a cell cannot be used; there are no validation data; or a folder holds another run.
        BudgetError: the sweep does not fit into the data set's account, or the account ended a run early.
        DPFTError: see :func:`dpft.train`.
    """
    files, output = RunFolder(output), Path(output)
    cells = Grid(subsets, epsilons, seeds, changes).cells(recipe, output)
    _check(recipe, cells)
    pending = [cell for cell in cells if not is_done(cell)]
    _check_budget(recipe, pending)
    _check_subsets(pending)
    with _alone_in(files):
        watch(cells)
        pending = [cell for cell in pending if not is_done(cell)]  # again, because a sweep may just have ended here
        if pending and ray is not None:
            pool.on_ray(pending, ray, jobs)
        elif pending and (at_once := jobs or pool.default_jobs(pending)) > 1:
            pool.in_processes(pending, at_once)
        else:
            run_cells(pending, announce=announce, callbacks=callbacks)
        found = _found(recipe, cells, output)
        found.write(RunFolder(files.private).sweep_file)
        if recipe.data.validation_is_public:
            found.public.write(files.sweep_file)
        files.round_dates()
    return found


def spent(cells: Sequence[Planned]) -> float:
    """ε of all private cells that have begun, each counted whole, and together: an upper bound, while they run, of what
    the sweep has spent."""
    begun = [cell.plan for cell in cells if cell.kind == PRIVATE and cell.folder.exists()]
    plans = [plan for plan in begun if plan is not None]
    events = merged(event for plan in plans for event in plan.events())
    return composition.epsilon(events, plans[0].delta, plans[0].adjacency) if plans else 0.0


def _check(recipe: Recipe, cells: Sequence[Planned]) -> None:
    if recipe.data.validation is None:
        raise RecipeError("A comparison needs data.validation: name held-out data in the recipe.")
    if any(cell.kind == NON_PRIVATE for cell in cells) and recipe.ledger.dataset is not None:
        raise RecipeError(
            f"A run without privacy would spend all of {recipe.ledger.dataset!r}, and a ledger is kept for it: "
            "run the private cells alone (compare --private-only, or a sweep without inf)."
        )


def _check_budget(recipe: Recipe, pending: Sequence[Planned]) -> None:
    """Raises BudgetError: all that is left of the sweep does not fit into the account at once."""
    from dpft.workflows.setup import open_account

    account = open_account(recipe)
    left = [(cell.plan, cell.plan.steps - released(cell)) for cell in pending if cell.plan is not None]
    events: tuple[Event, ...] = merged(event for plan, steps in left if steps > 0 for event in plan.events(steps))
    if account is None or not events:
        return
    after, policy = account.after(events), account.policy
    if after > policy["epsilon"]:
        raise BudgetError(
            f"The sweep's {len(left):,} private runs would take {account.name!r} from ε = "
            f"{rounded_up(account.spent(), 4)} to {rounded_up(after, 4)}, above its budget of {policy['epsilon']:g} at "
            f"δ = {policy['delta']:g}, and nothing was begun: sweep fewer subsets, ε or seeds, or smaller ε."
        )
    for plan, steps in left:
        account.open(plan, released=plan.steps - steps)  # which writes nothing, and refuses what the policy forbids


def _check_subsets(pending: Sequence[Planned]) -> None:
    """Load the model for each of several subsets, so that none is found impossible when others were paid for.

    Raises:
        SubsetError, RecipeError: see :mod:`dpft.errors`.
    """
    from dpft.workflows.setup import set_up

    first = {cell.subset: cell for cell in reversed(pending) if cell.plan is not None}
    if len(first) > 1:
        for cell in first.values():
            set_up(cell.recipe, with_validation=False)


@contextmanager
def _alone_in(files: RunFolder) -> Iterator[None]:
    files.private.mkdir(parents=True, exist_ok=True)
    lock = FileLock(files.lock_file, timeout=0)
    try:
        lock.acquire()
    except Timeout:
        raise RecipeError(f"Another sweep runs in {files}: wait for it, or choose another --output.") from None
    try:
        yield
    finally:
        lock.release()


def _found(recipe: Recipe, cells: Sequence[Planned], output: Path) -> Sweep:
    from dpft.tasks.registry import find
    from dpft.workflows.record import versions

    records = [cell.files.record() for cell in cells if cell.kind == PRIVATE]
    private = [record for record in records if record.private]
    composed = None
    if private:
        events = merged(event for record in private for event in record.events)
        composed = composition.epsilon(events, private[0].delta, private[0].adjacency)
    return Sweep(
        recipe=recipe.model_dump(),
        versions=versions(),
        delta=recipe.privacy.delta,
        units=recipe.data.units,
        headline=find(recipe.task.name).headline,
        composed_epsilon=composed,
        cells=tuple(result(cell, output) for cell in cells),
    )
