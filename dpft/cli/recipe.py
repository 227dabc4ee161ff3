"""``dpft init``, ``dpft params`` and ``dpft preflight``: what a recipe says, before anything is charged."""

import json
from dataclasses import asdict
from math import inf
from pathlib import Path

import click

from dpft.cli.common import as_json, overrides, recipe_file, recipe_to_run, show, table
from dpft.errors import RecipeError

OPEN = {"plan": "auto", "epochs": 3.0}  # where more than a head trains


class _TaskName(click.ParamType):
    """The name of a registered task; tasks import torch, so they are listed only when asked for."""

    name = "task"

    def get_metavar(self, *_, **__) -> str:
        from dpft.tasks.registry import names

        return f"[{'|'.join(names())}]"

    def convert(self, value, param, ctx) -> str:
        from dpft.tasks.registry import names

        if value not in names():
            self.fail(f"{value!r} is no task: choose one of {', '.join(names())}.", param, ctx)
        return value


@click.command()
@click.option("--task", type=_TaskName(), required=True, help="What is learned.")
@click.option("--model", required=True, help="A checkpoint folder, or a model's name on a hub.")
@click.option("--data", default="train.csv", show_default=True, help="The training data.")
@click.option(
    "--output",
    type=click.Path(dir_okay=False, path_type=Path),
    default="recipe.toml",
    show_default=True,
    help="The file to write.",
)
def init(task: str, model: str, data: str, output: Path) -> None:
    """Write a commented recipe to start from.

    \b
    Example:
      dpft init --task causal_lm --model ./smollm2-135m --output notes.toml
    """
    from dpft.recipe import Recipe
    from dpft.tasks.registry import find

    if output.exists():
        raise RecipeError(f"{output} exists already: choose another --output.")
    template = find(task).template
    starting = Recipe.checked(
        {
            "subset": template["subset"],
            "model": {"path": model},
            "task": {"name": task, **template["task"]},
            "data": {"train": data, "units": 10_000},
            "privacy": {"epsilon": 3.0, "delta": 1e-6, **({} if template["subset"] == "head" else OPEN)},
        }
    )
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(starting.to_toml(comments=True), encoding="utf-8")
    click.echo(
        f"Wrote {output}: declare data.units and what [task] says of the data, then run `dpft preflight {output}`."
    )


@click.command()
@recipe_file
@overrides
@as_json
def params(recipe: str, overrides: tuple[str, ...], as_json: bool) -> None:
    """List what trains: parameters, their share, and the technique that makes their gradients.

    \b
    Example:
      dpft params recipe.toml --set subset="norms + head"
    """
    checked = _checked(recipe, overrides)
    setup, engine = checked.setup, checked.engine
    rows = [
        {
            "parameter": s.name,
            "shape": "x".join(map(str, s.parameter.shape)),
            "count": s.parameter.numel(),
            "technique": s.technique,
            "norm_alone": {0: "", inf: "always"}.get(s.longest_by_norm, f"up to {s.longest_by_norm} tokens"),
        }
        for s in engine.capture.map.trainables
    ]
    total = sum(p.numel() for p in setup.model.parameters())
    summary = {
        "subset": setup.recipe.subset,
        "trainable_parameters": engine.capture.map.size,
        "all_parameters": total,
        "share": engine.capture.map.size / total,
        "one_by_one": engine.capture.map.one_by_one,
    }
    if as_json:
        click.echo(json.dumps({**summary, "parameters": rows}, indent=2))
        return
    table(rows)
    click.echo(
        f"\n{summary['trainable_parameters']:,} of {total:,} parameters train ({summary['share']:.3%}): "
        f"{setup.recipe.subset}"
    )
    if engine.capture.map.one_by_one:
        click.echo(f"Each example has a backward pass of its own, because of {engine.capture.map.one_by_one}.")


@click.command()
@recipe_file
@overrides
@as_json
def preflight(recipe: str, overrides: tuple[str, ...], as_json: bool) -> None:
    """Prove on a few real examples that gradients are exact and examples isolated; spends no budget.

    \b
    Example:
      dpft preflight recipe.toml
    """
    found = _checked(recipe, overrides).found
    if not as_json:
        click.echo(str(found))
        return
    show(asdict(found), True)


def _checked(path: str, overrides: tuple[str, ...]):
    recipe = recipe_to_run(path, overrides)
    from dpft.workflows.preflight import preflight_recipe

    return preflight_recipe(recipe)
