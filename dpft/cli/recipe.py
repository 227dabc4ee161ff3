"""``dpft init``, ``dpft params`` and ``dpft preflight``: what a recipe says, before anything is charged."""

import json
from dataclasses import asdict
from math import inf
from pathlib import Path

import click

from dpft.cli.common import as_json, overrides, recipe_file, recipe_to_run, show, table
from dpft.errors import RecipeError


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
    starting = Recipe.parse(
        {
            "subset": template["subset"],
            "model": {"path": model},
            "task": {"name": task, **template["task"]},
            "data": {"train": data, "units": 10_000},
            "privacy": {"epsilon": 3.0, "delta": 1e-6, "batch_size": 256, "epochs": 3.0},
        }
    )
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(starting.to_toml(comments=True), encoding="utf-8")
    click.echo(f"Wrote {output}: declare data.units and the labels, then run `dpft preflight {output}`.")


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
    found, setup, engine = _checked(recipe, overrides)
    rows = [
        {
            "parameter": s.name,
            "shape": "x".join(map(str, s.parameter.shape)),
            "count": s.parameter.numel(),
            "technique": s.technique,
            "norm_alone": {0: "", inf: "always"}.get(s.longest_by_norm, f"up to {s.longest_by_norm} tokens"),
        }
        for s in engine.capture.slots
    ]
    total = sum(p.numel() for p in setup.model.parameters())
    summary = {
        "subset": setup.recipe.subset,
        "trainable_parameters": engine.capture.size,
        "all_parameters": total,
        "share": engine.capture.size / total,
        "one_by_one": engine.capture.one_by_one,
    }
    if as_json:
        click.echo(json.dumps({**summary, "parameters": rows}, indent=2))
        return
    table(rows)
    click.echo(
        f"\n{summary['trainable_parameters']:,} of {total:,} parameters train ({summary['share']:.3%}): {setup.recipe.subset}"
    )
    if engine.capture.one_by_one:
        click.echo(f"Each example has a backward pass of its own, because of {engine.capture.one_by_one}.")


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
    found, _, _ = _checked(recipe, overrides)
    if not as_json:
        click.echo(str(found))
        return
    show(asdict(found), True)


def _checked(path: str, overrides: tuple[str, ...]):
    """The preflight's findings, the loaded setup and the engine that was checked."""
    recipe = recipe_to_run(path, overrides)
    from dpft.gradients.engine import Engine
    from dpft.gradients.preflight import preflight as run_preflight
    from dpft.training.batches import Examples
    from dpft.training.run import set_up

    setup = set_up(recipe, with_validation=False)
    examples = Examples.encode(setup.train, setup.task)
    losses = lambda batch: setup.task.losses(setup.model, setup.task.collate(batch))
    with Engine(setup.model, _any_plan(recipe)) as engine:
        found = run_preflight(engine, losses, examples.spread(), longest=examples.longest)
    return found, setup, engine


def _any_plan(recipe):
    """The checks release nothing, so the noise need not be calibrated."""
    from dpft.privacy.plan import Plan

    return Plan(noise_multiplier=1.0, sample_rate=1.0, steps=1, delta=recipe.privacy.delta, clip=recipe.privacy.clip)
