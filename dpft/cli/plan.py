"""``dpft plan``"""

from pathlib import Path

import click

from dpft.cli.common import as_json, printed, recipe_to_run, show


@click.command()
@click.option("--epsilon", type=float, help="Target ε; the noise (or the steps) follow.")
@click.option("--noise-multiplier", type=float, help="Noise in units of the clip; ε (or the steps) follow.")
@click.option("--delta", type=float, help="δ, below 1/units. Needed but with --advise.")
@click.option("--units", type=int, help="Declared, public number of units.")
@click.option("--batch-size", type=int, help="Expected units per step; needs --units.")
@click.option("--sample-rate", type=float, help="Instead of --batch-size: each unit's probability per step.")
@click.option("--steps", type=int, help="Number of steps.")
@click.option("--epochs", type=float, help="Instead of --steps: expected passes over the data.")
@click.option("--bands", type=click.IntRange(1), help="Correlate the noise over so many steps (dp-sgd-banded).")
@click.option("--adjacency", default="add-or-remove-one", show_default=True, help="Or replace-one, zero-out.")
@click.option("--unit", default="example", show_default=True, help="What one unit is: example, or a column's name.")
@click.option("--advise", "recipe", type=click.Path(), help="Propose the best known plan for this recipe instead.")
@click.option("--hours", type=click.FloatRange(min=0, min_open=True), help="With --advise: the time for training.")
@click.option("--write", type=click.Path(dir_okay=False, path_type=Path), help="With --advise: write the recipe.")
@as_json
def plan(  # noqa: PLR0913  (each is an option)
    as_json: bool, recipe: str | None, hours: float | None, write: Path | None, bands: int | None, **facts
) -> None:
    """Find ε, the noise or the number of steps: give two of the three. Or have a plan advised for a recipe.

    Advice (`dpft plan --advise recipe.toml`) comes from public facts and the model. No private row is read, and
    nothing is charged.

    \b
    Example:
      dpft plan --noise-multiplier 1.0 --sample-rate 0.02 --steps 500 --delta 1e-5
    """
    if recipe is not None:
        return _advise(recipe, hours, write, as_json)
    if hours is not None or write is not None:
        raise click.UsageError("--hours and --write belong to --advise RECIPE.")
    if facts["delta"] is None:
        raise click.UsageError("Missing option '--delta'.")
    from dpft.privacy.plan import Plan

    words: dict[str, object] = {"sampler": "Poisson", "mechanism": "Gaussian"}
    if bands is not None:
        facts |= {"mechanism": "dp-sgd-banded", "bands": bands}
        words = {
            "sampler": "Poisson, by groups of units in turn",
            "mechanism": f"Gaussian, correlated over {bands} steps",
            "bands": bands,
        }
    made = Plan.calibrate(**facts)
    figure = (lambda value: value) if as_json else printed
    show(
        {
            "epsilon": figure(made.epsilon),
            "epsilon_rdp": figure(made.epsilon_rdp),
            "delta": made.delta,
            "noise_multiplier": made.noise_multiplier,
            "sample_rate": made.sample_rate,
            "steps": made.steps,
            "units": made.units,
            "expected_batch_size": made.expected_batch_size if made.units else None,
            "adjacency": made.adjacency,
            "unit": made.unit,
            **words,
        },
        as_json,
    )


def _advise(recipe: str, hours: float | None, write: Path | None, as_json: bool) -> None:
    from dpft.errors import RecipeError

    if write is not None and write.exists():
        raise RecipeError(f"{write} exists already: choose another file.")
    asked = recipe_to_run(recipe)
    from dpft.workflows.advise import advise

    advice = advise(asked, hours)
    if write is not None:
        write.write_text(advice.recipe.to_toml(comments=True), encoding="utf-8")
    facts = advice.facts()
    if as_json:
        show({**facts, "why": list(advice.why)}, True)
        return
    show({name: value for name, value in facts.items() if value is not None}, False)
    click.echo()
    for sentence in advice.why:
        click.echo(sentence)
    click.echo(f"Wrote {write}." if write else "`--write FILE` writes the recipe with this plan.")
