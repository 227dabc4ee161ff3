"""``dpft audit``: what a training leaks, measured from outside, and whether the books agree."""

from dataclasses import asdict
from pathlib import Path

import click

from dpft.cli.common import as_json, overrides, recipe_file, show


@click.group()
def audit() -> None:
    """Check a guarantee instead of believing it. An audit can refute ε; it never proves it.

    \b
    Example:
      dpft audit bounds --canaries 1000 --guesses 100 --correct 75 --delta 1e-4
    """


METHODS = {"one-run": "one_run", "f-dp": "f_dp_one_run"}


@audit.command()
@click.option("--canaries", type=int, required=True, help="How many there were, each included with probability 1/2.")
@click.option("--guesses", type=int, required=True, help="For how many the attack said in or out.")
@click.option("--correct", type=int, required=True, help="How many of the guesses are right.")
@click.option("--delta", type=float, required=True, help="δ of the bound.")
@click.option("--significance", type=float, default=0.05, show_default=True, help="Probability of a false alarm.")
@click.option(
    "--method",
    type=click.Choice(list(METHODS)),
    default="one-run",
    show_default=True,
    help="f-dp assumes a Gaussian trade-off.",
)
@as_json
def bounds(method, as_json, **facts) -> None:
    """The lower bound on ε that an attack's success proves, beside what a perfect attack would prove.

    \b
    Example:
      dpft audit bounds --canaries 1000 --guesses 100 --correct 75 --delta 1e-4 --significance 0.05
    """
    from dpft.audit import bounds as module

    show(asdict(getattr(module, METHODS[method])(**facts)), as_json)


@audit.command()
@recipe_file
@click.option("--steps", type=click.IntRange(100), default=10_000, show_default=True, help="Steps of the engine.")
@overrides
@as_json
def step(recipe, steps, overrides, as_json) -> None:
    """Audit the engine's step with the recipe's noise and clip, from inside, in seconds; touches no data.

    Exit code 1 if the step leaks more than it claims.

    \b
    Example:
      dpft audit step recipe.toml --steps 2000
    """
    from dpft.audit.step import audit_step, describe
    from dpft.cli.progress import progress
    from dpft.recipe import Recipe

    plan = Recipe.read(recipe, overrides).plan()
    with progress() as bar:
        bar.announce("auditing")
        found = audit_step(plan, steps=steps)
    if as_json:
        show(asdict(found), True)
    else:
        click.echo(describe(found))
    if found.verdict == "VIOLATION":
        click.get_current_context().exit(1)


@audit.command()
@click.argument("folder", type=click.Path(file_okay=False, path_type=Path))
@as_json
def spending(folder, as_json) -> None:
    """Compose a run's ε from its raw events again, by several accountants, and look for contradictions.

    Exit code 1 if there are any. A ledger is audited by dpft ledger verify.

    \b
    Example:
      dpft audit spending runs/notes
    """
    from dpft.audit.spending import audit_run

    found = audit_run(folder)
    if as_json:
        show({"verdict": found.verdict, **asdict(found)}, True)
    else:
        show({"stated": found.stated, **found.epsilon, "delta": found.delta}, False)
        click.echo(f"\n{found.verdict}" + "".join(f"\n- {problem}" for problem in found.problems))
    if found.problems:
        click.get_current_context().exit(1)
