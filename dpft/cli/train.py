"""``dpft train`` and ``dpft demo``"""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import click

from dpft.cli.common import as_json, overrides, recipe_file, recipe_to_run, show
from dpft.cli.sweep import show_comparison
from dpft.privacy.rounding import rounded_up


@click.command()
@recipe_file
@click.option("--output", type=click.Path(file_okay=False, path_type=Path), required=True, help="The run's folder.")
@click.option("--resume", is_flag=True, help="Continue from the folder's last checkpoint.")
@click.option("--seeded-noise", type=int, hidden=True, help="For tests: reproducible noise, NOT PRIVATE.")
@click.option("--ledger", help="The ledger to charge; the recipe's ledger.dataset says whose account.")
@click.option("--purpose", help="What the run is for; goes on the ledger's record.")
@overrides
@as_json
def train(
    recipe: str,
    output: Path,
    resume: bool,
    seeded_noise: int | None,
    ledger: str | None,
    purpose: str | None,
    overrides: tuple[str, ...],
    as_json: bool,
) -> None:
    """Train under differential privacy and leave a run folder with weights and a privacy card.

    A run that does not fit into its data set's budget is refused with exit code 3, before anything is charged.

    \b
    Example:
      dpft train recipe.toml --output runs/notes --set privacy.epsilon=1
    """
    account = {"ledger.url": ledger, "ledger.purpose": purpose}
    chosen = recipe_to_run(
        recipe,
        (*overrides, *(f"{key}={json.dumps(value, ensure_ascii=False)}" for key, value in account.items() if value)),
    )
    from dpft.cli.progress import progress
    from dpft.privacy.noise import SeededRandomness
    from dpft.workflows.train import train as run

    with _says_what_is_left(output), progress() as bar:
        randomness = None if seeded_noise is None else SeededRandomness(seeded_noise)
        folder = run(chosen, output, randomness=randomness, callbacks=[bar.callback()], resume=resume)
    _show_run(folder, as_json)


@click.command()
@click.option(
    "--output",
    type=click.Path(file_okay=False, path_type=Path),
    default="demo",
    show_default=True,
    help="The folder for data and runs.",
)
@click.option("--fast", is_flag=True, help="Fewer steps: under two minutes, with less accuracy.")
@as_json
def demo(output: Path, fast: bool, as_json: bool) -> None:
    """Learn the chapter of real diagnoses privately, beside the non-private and the untouched model.

    \b
    Example:
      dpft demo --fast --output demo
    """
    from dpft.errors import RecipeError
    from dpft.runs import RunFolder
    from dpft.workflows.demo import recipe as demo_recipe

    if (output / "runs").exists():
        raise RecipeError(f"{output} holds a demo already: choose another --output, or delete it.")
    chosen = demo_recipe(output / "data", fast=fast)
    RunFolder(output).write_recipe(chosen, comments=True)
    rows = show_comparison(chosen, output / "runs", as_json)
    private, plain = rows[-1], rows[1]
    if not as_json:
        lost = 100 * (plain.mean - private.mean)
        cost = f"{lost:.1f} points of accuracy" if lost >= 0.1 else "no accuracy that this run can show"
        click.echo(
            f"\nPrivacy cost {cost} here: every diagnosis' influence was bounded and "
            "covered by noise, which drowns what only a few of them say, so the rarest chapters lose most."
        )
    made = RunFolder(output / "runs" / private.folders[0])
    for path in (*made.cards, made.weights):
        click.echo(path, err=as_json)


@contextmanager
def _says_what_is_left(output: Path) -> Iterator[None]:
    """Note on whatever ends a training early how many steps stay charged, and what its folder is good for."""
    from dpft.runs import RunFolder

    folder = RunFolder(output)
    is_new, before = not output.exists(), _released(folder)
    try:
        yield
    except BaseException as error:
        released = _released(folder)
        charged = (
            f"{output} has released {released:,} step{'s, which stay' if released > 1 else ', which stays'} charged"
        )
        if released > before and folder.goes_on:
            error.add_note(f"{charged}: go on with --resume.")
        elif released > before:
            error.add_note(f"{charged}, and has no checkpoint to resume from: choose another --output.")
        elif is_new and output.exists():
            error.add_note(f"Nothing was released, so {output} can be used again.")
        raise


def _released(folder) -> int:
    from dpft.runs.count import Count

    try:
        return Count.read(folder.releases_file).charged
    except (OSError, ValueError):
        return 0


def _show_run(folder: Path, as_json: bool) -> None:
    from dpft.runs import RunFolder

    run = RunFolder(folder)
    record, metrics = run.record(), run.metrics() or {}
    metrics.pop("notice", None)
    if as_json:
        show({**record.to_dict(), "metrics": metrics, "folder": str(folder)}, True)
        return
    if record.interrupted:
        click.echo(f"Ended after {record.released_steps:,} of {record.planned_steps:,} steps.")
    if record.halted:
        click.echo(record.halted)
    click.echo(record.guarantee)
    account = record.ledger
    if account and account.spent is not None and account.delta is not None:
        click.echo(
            f"{account.dataset!r} has spent ε = {rounded_up(account.spent)} of {account.budget:g} "
            f"at δ = {rounded_up(account.delta, 6)}, over {account.runs:,} run{'s' if account.runs != 1 else ''}."
        )
    marked = " (PRIVATE: computed without noise, do not publish)" if record.metrics_are_private else ""
    shown = {name: value for name, value in metrics.items() if isinstance(value, (int, float))}
    if shown:
        click.echo(f"\nValidation{marked}")
        show(shown, False)
    click.echo()
    for path in (*run.cards, run.weights):
        click.echo(path)
