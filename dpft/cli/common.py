"""Options and output that several commands share."""

import gc
import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import click

from dpft.privacy.rounding import rounded_up

if TYPE_CHECKING:
    from dpft.recipe import Recipe

as_json = click.option("--json", "as_json", is_flag=True, help="Print JSON.")
overrides = click.option(
    "--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Override a recipe's key, such as privacy.epsilon=1."
)
recipe_file = click.argument("recipe", type=click.Path())


def recipe_to_run(path: str, overrides: tuple[str, ...] = ()) -> "Recipe":
    """The recipe whose model this command will load. The rest of the command imports only what that model needs."""
    with _imports_kept():
        from dpft.recipe import Recipe
        from dpft.subset.quantized import may_need_bitsandbytes, without_bitsandbytes

        recipe = Recipe.read(path, overrides)
    if not may_need_bitsandbytes(recipe):
        click.get_current_context().with_resource(without_bitsandbytes())
    return recipe


@contextmanager
def _imports_kept() -> Iterator[None]:
    """What is made while entered stays until the process ends, so the garbage collector need not look through it.

    PyTorch and transformers make a million objects, and to search them again and again takes half a second.
    """
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()


def show(facts: dict, json_wanted: bool) -> None:
    """Print facts as aligned lines, or as JSON in ASCII, which any pipe passes on as it is."""
    facts = _finite(facts)
    if json_wanted:
        click.echo(json.dumps(facts, indent=2, allow_nan=False))
        return
    width = max(map(len, facts))
    for name, value in facts.items():
        click.echo(f"{name.replace('_', ' '):<{width}}  {_readable(value)}")


def table(rows: list[dict]) -> None:
    """Print rows of equal keys as an aligned table."""
    if not rows:
        return
    rows = _finite(rows)
    texts = [{key: _readable(value) for key, value in row.items()} for row in rows]
    widths = {key: max(len(key), *(len(text[key]) for text in texts)) for key in rows[0]}
    numeric = {key for key in rows[0] if all(isinstance(row[key], (int, float)) for row in rows)}
    line = lambda cells: "  ".join(
        cell.rjust(widths[key]) if key in numeric else cell.ljust(widths[key]) for key, cell in cells.items()
    ).rstrip()
    click.echo(line({key: key for key in widths}))
    for text in texts:
        click.echo(line(text))


def printed(epsilon: float | None) -> str | None:
    """An ε as text, rounded up; None where there is none, or no finite one."""
    return rounded_up(epsilon, 4) if epsilon is not None and math.isfinite(epsilon) else None


def _finite(value):
    """The same without infinity and NaN, which JSON has not: null says that there is no such number."""
    if isinstance(value, dict):
        return {key: _finite(one) for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _readable(value) -> str:
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: "-"}[value]
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:.4g}"
    return str(value)
