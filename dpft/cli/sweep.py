"""``dpft sweep`` and ``dpft compare``"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from dpft.cli.common import as_json, overrides, recipe_file, recipe_to_run, show, table
from dpft.privacy.rounding import rounded_up

if TYPE_CHECKING:
    from dpft.cli.progress import Bar
    from dpft.recipe import Recipe
    from dpft.runs.sweep import Row, Sweep

output_folder = click.option(
    "--output", type=click.Path(file_okay=False, path_type=Path), required=True, help="The folder for all runs."
)
seeds_of_each = click.option("--seeds", type=click.IntRange(1), default=1, show_default=True, help="Runs per setting.")


class Numbers(click.ParamType):
    """Numbers that commas separate; ``inf`` is one."""

    name = "float,..."

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> tuple[float, ...]:
        try:
            found = tuple(float(part) for part in str(value).split(","))
        except ValueError:
            found = ()
        if not found or not all(number > 0 for number in found):
            self.fail(f"{value!r} is no list of budgets: write for example 1,3,8.", param, ctx)
        return found


@click.command()
@recipe_file
@output_folder
@click.option(
    "--epsilon",
    "epsilons",
    type=Numbers(),
    multiple=True,
    help="Budgets, separated by commas; inf is the run without privacy, which no ledger can pay for.",
)
@click.option(
    "--subset",
    "subsets",
    multiple=True,
    metavar="SUBSET,...",
    help="What to train, separated by commas; by default the recipe's. `head` alone is learned from sums.",
)
@seeds_of_each
@click.option(
    "--with",
    "changes",
    multiple=True,
    metavar="SUBSET: KEY=VALUE",
    help="Override a key for one subset, such as 'bias: optimizer.learning_rate=0.01'.",
)
@click.option(
    "--jobs", type=click.IntRange(1), help="Runs at once; by default as many as cores and memory have room for."
)
@click.option("--ray", metavar="ADDRESS", help="Run on a Ray cluster; `local` starts one on this machine.")
@overrides
@as_json
def sweep(
    recipe: str,
    output: Path,
    epsilons: tuple[tuple[float, ...], ...],
    subsets: tuple[str, ...],
    seeds: int,
    changes: tuple[str, ...],
    jobs: int | None,
    ray: str | None,
    overrides: tuple[str, ...],
    as_json: bool,
) -> None:
    """Train every subset with every ε and every seed, beside the untouched model.

    The same command goes on with a sweep that was stopped: no run that is done is made, or paid for, again. What
    all private runs cost together is printed. A sweep that does not fit into its data set's budget is refused with
    exit code 3, before anything is charged.

    \b
    Example:
      dpft sweep recipe.toml --output runs/sweep --epsilon 3,inf --subset "head, bias + norms" --seeds 3
    """
    chosen = recipe_to_run(recipe, overrides)
    from dpft.workflows.grid import split_subsets
    from dpft.workflows.sweep import sweep as run

    show_sweep(
        lambda bar: run(
            chosen,
            output,
            subsets=[subset for text in subsets for subset in split_subsets(text)],
            epsilons=[epsilon for some in epsilons for epsilon in some],
            seeds=range(seeds),
            changes=_by_subset(changes),
            jobs=jobs,
            ray=ray,
            **bar.hears(),
        ),
        chosen,
        output,
        as_json,
    )


@click.command()
@recipe_file
@output_folder
@click.option("--epsilon", "epsilons", type=float, multiple=True, help="A budget to compare; repeat for several.")
@seeds_of_each
@click.option("--private-only", is_flag=True, help="Leave out the run without privacy, which no ledger can pay for.")
@overrides
@as_json
def compare(
    recipe: str,
    output: Path,
    epsilons: tuple[float, ...],
    seeds: int,
    private_only: bool,
    overrides: tuple[str, ...],
    as_json: bool,
) -> None:
    """Compare the untouched model, the non-private run and private runs on the validation data.

    It is `dpft sweep` with one subset, the recipe's. Every private run here spends budget of the same data; what they
    cost together is printed.

    \b
    Example:
      dpft compare recipe.toml --output runs/sweep --epsilon 8 --epsilon 3 --epsilon 1 --seeds 3
    """
    show_comparison(
        recipe_to_run(recipe, overrides), output, as_json, epsilons=epsilons, seeds=seeds, non_private=not private_only
    )


def show_comparison(
    recipe: "Recipe",
    output: Path,
    as_json: bool,
    *,
    epsilons: Sequence[float] = (),
    seeds: int = 1,
    non_private: bool = True,
) -> "tuple[Row, ...]":
    """Compare, and print the table; returns its rows."""
    from dpft.workflows import compare as workflow

    return show_sweep(
        lambda bar: workflow.compare(
            recipe,
            output,
            epsilons=list(epsilons) or None,
            seeds=range(seeds),
            non_private=non_private,
            **bar.hears(),
        ),
        recipe,
        output,
        as_json,
    )


def show_sweep(run: "Callable[[Bar], Sweep]", recipe: "Recipe", output: Path, as_json: bool) -> "tuple[Row, ...]":
    """Run below a progress bar, make the page, and print the table and what its private runs cost together; returns the
    rows."""
    from dpft.cli.progress import progress
    from dpft.report.page import write_page
    from dpft.runs.sweep import NON_PRIVATE, PRIVATE

    with progress() as bar:
        found = run(bar)
    pages = [str(page) for page in write_page(found, output) if page.suffix == ".html"]
    rows, public = found.rows(), recipe.data.validation_is_public
    several = len({row.subset for row in rows if row.subset}) > 1
    lines = [
        ({"subset": row.subset or "-"} if several else {})
        | {"setting": row.setting, row.metric: row.mean, "spread": row.spread, "runs": len(row.values)}
        | {"publish": public and row.kind != NON_PRIVATE}
        for row in rows
    ]
    if as_json:
        folders = [str(output / folder) for row in rows for folder in row.folders]
        composed = found.composed_epsilon
        show({"rows": lines, "composed_epsilon": composed, "folders": folders, "pages": pages}, True)
        return rows
    table(lines)
    if not public:
        click.echo("\nPRIVATE: computed from the validation data without noise; the guarantee does not cover it.")
    elif any(row.kind == NON_PRIVATE for row in rows):
        click.echo(
            f"\nDo not publish the row {NON_PRIVATE}: its model was trained on the private data without noise, "
            "so no guarantee covers what its figures show."
        )
    private = sum(len(row.folders) for row in rows if row.kind == PRIVATE)
    if private > 1 and found.composed_epsilon is not None:
        click.echo(
            f"\nThe {private} private runs used the same data: together they cost "
            f"ε = {rounded_up(found.composed_epsilon)} at δ = {rounded_up(recipe.privacy.delta, 6)}."
        )
    click.echo("\nPages: " + ", ".join(pages))
    return rows


def _by_subset(changes: tuple[str, ...]) -> dict[str, list[str]]:
    from dpft.errors import RecipeError

    found: dict[str, list[str]] = {}
    for change in changes:
        subset, colon, assignment = change.partition(": ")
        if not colon or "=" not in assignment:
            raise RecipeError(
                f"--with {change!r} is not of the form 'SUBSET: KEY=VALUE': write for example "
                "'bias: optimizer.learning_rate=0.01'."
            )
        found.setdefault(subset.strip(), []).append(assignment.strip())
    return found
