"""``dpft audit``: what a training leaks, measured from outside, and whether the books agree."""

from dataclasses import asdict
from pathlib import Path

import click

from dpft.cli.common import as_json, overrides, recipe_file, show
from dpft.privacy.rounding import rounded_down, rounded_up


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

    found = asdict(getattr(module, METHODS[method])(**facts))
    if not as_json:
        found |= {name: rounded_down(found[name], 4) for name in ("epsilon_lower_bound", "ceiling")}
    show(found, as_json)


@audit.command()
@recipe_file
@click.option("--steps", type=click.IntRange(100), default=10_000, show_default=True, help="Steps of the engine.")
@overrides
@as_json
def step(recipe, steps, overrides, as_json) -> None:
    """Audit the recipe's mechanism from inside, a step of the engine or the sums of a head; touches no data.

    Exit code 1 if the step is not what it claims.

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
        found = audit_step(plan, steps=steps, progress=lambda done, of: bar.update(total=of, completed=done))
        bar.update(total=steps, completed=steps)
    if as_json:
        show(asdict(found), True)
    else:
        click.echo(describe(found))
    if found.verdict == "VIOLATION":
        click.get_current_context().exit(1)


@audit.command()
@click.argument("target", required=False)
@as_json
def spending(target, as_json) -> None:
    """Compose ε from raw events again, by several accountants, and look for contradictions.

    TARGET is a run's folder, or a ledger's file or URL; without one it is the ledger that DPFT_LEDGER names. Exit code
    1 if something contradicts.

    \b
    Example:
      dpft audit spending runs/notes
    """
    from dpft.audit.spending import audit_ledger, audit_run
    from dpft.ledger import Ledger

    run = target is not None and (Path(target).is_dir() or not ("://" in target or Path(target).is_file()))
    found = [audit_run(target)] if run else audit_ledger(Ledger(target, create=False))
    if as_json:
        facts = [{"verdict": one.verdict, **asdict(one)} for one in found]
        show(facts[0] if run else {"datasets": facts}, True)
    else:
        for one in found:
            click.echo(f"{one.name}\n")
            if one.epsilon:
                figures = {"stated": one.stated, **one.epsilon}
                shown = {name: value if value is None else rounded_up(value, 4) for name, value in figures.items()}
                show({**shown, "delta": one.delta}, False)
            click.echo(f"\n{one.verdict}" + "".join(f"\n- {problem}" for problem in one.problems) + "\n")
    if any(one.problems for one in found):
        click.get_current_context().exit(1)


@audit.command()
@click.argument("target", type=click.Path(exists=True, path_type=Path))
@click.option("--plot", type=click.Path(dir_okay=False, path_type=Path), help="Write the trade-off curve here, as SVG.")
@as_json
def meaning(target, plot, as_json) -> None:
    """Say what a guarantee lets anyone do at best: detect, guess, reconstruct.

    TARGET is a run's folder, or a recipe before it is run.

    \b
    Example:
      dpft audit meaning recipe.toml --plot trade-off.svg
    """
    from dpft.recipe import Recipe
    from dpft.report.meaning import describe, of_recipe, of_run

    found = of_run(target) if target.is_dir() else of_recipe(Recipe.read(target))
    if plot:
        from dpft.report.plots import trade_off

        plot.write_text(trade_off(found.curve), encoding="utf-8")
    if as_json:
        show(asdict(found), True)
    else:
        click.echo(describe(found))


PLANTED = (
    click.option("--canaries", type=click.IntRange(10), default=1000, show_default=True, help="How many; half go in."),
    click.option(
        "--kind",
        type=click.Choice(  # dpft.audit.canaries.KINDS, which would import torch for --help
            ["random-tokens", "secret", "new-token", "mislabelled"]
        ),
        help="By default mislabelled where data.public suffices, otherwise random-tokens.",
    ),
    click.option(
        "--repetitions",
        type=click.IntRange(1),
        default=1,
        show_default=True,
        help="How often each is in the data; judged as a group of so many units.",
    ),
    click.option("--significance", type=float, default=0.05, show_default=True, help="Probability of a false alarm."),
)


def planted(command):
    """The options of every audit with canaries in the data."""
    for option in reversed(PLANTED):
        command = option(command)
    return command


@audit.command()
@recipe_file
@click.option(
    "--output", type=click.Path(file_okay=False, path_type=Path), required=True, help="The audited run's folder."
)
@planted
@click.option("--baseline", is_flag=True, help="Also train without privacy, which shows what the attack is worth.")
@overrides
@as_json
def run(recipe, output, overrides, as_json, significance, baseline, **planting) -> None:
    """Train with canaries in the data, then tell from the released weights which were there.

    It is a private run like any other, and its card gets a section on the audit. Exit code 1 if it leaks more than it
    claims.

    \b
    Example:
      dpft audit run recipe.toml --canaries 40 --output runs/audited
    """
    from dpft.audit.canaries import Planting
    from dpft.audit.game import Watch, audit_run
    from dpft.cli.progress import progress
    from dpft.recipe import Recipe
    from dpft.runs import RunFolder

    with progress() as bar:
        found = audit_run(
            Recipe.read(recipe, overrides),
            output,
            Planting(**planting),
            significance=significance,
            baseline=baseline,
            watch=Watch(bar.announce, lambda: [bar.callback()]),
        )
    made = RunFolder(output)
    _show_audit(found, as_json, made.cards[1], made.audit_file)


@audit.command(context_settings={"ignore_unknown_options": True})
@click.option("--recipe", type=click.Path(dir_okay=False), required=True, help="Says what the data and the model are.")
@click.option("--output", type=click.Path(file_okay=False, path_type=Path), required=True, help="The audit's folder.")
@click.option(
    "--claimed",
    type=float,
    help="The ε that the command claims for adding or removing one row; without it nothing is judged.",
)
@click.option("--delta", type=float, help="δ of the claim; by default the recipe's.")
@planted
@as_json
@click.argument("command", nargs=-1, required=True, type=click.UNPROCESSED)
def command(recipe, output, as_json, command, claimed, delta, significance, **planting) -> None:
    """Audit any training command: plant canaries in its data, and tell from its model which were there.

    COMMAND names {data}, the file to train on, and {out}, the folder where it must leave its model. Exit code 1 if it
    leaks more than it claims.

    \b
    Example:
      dpft audit command --recipe recipe.toml --canaries 40 --output audits/theirs --claimed 1 -- python train.py {data} {out}
    """
    from dpft.audit.canaries import Planting
    from dpft.audit.game import audit_command
    from dpft.audit.report import Claim
    from dpft.cli.progress import progress
    from dpft.recipe import Recipe
    from dpft.runs import RunFolder

    described = Recipe.read(recipe)
    claim = Claim(described.privacy.delta if delta is None else delta, claimed, significance)
    with progress() as bar:
        found = audit_command(command, described, output, claim, Planting(**planting), announce=bar.announce)
    made = RunFolder(output)
    _show_audit(found, as_json, made.audit_file, made.command_log)


@audit.command()
@click.argument("model", type=click.Path(file_okay=False, path_type=Path))
@click.option("--members", multiple=True, required=True, help="Data that the model was trained on.")
@click.option("--non-members", multiple=True, required=True, help="Data of the same kind that it never saw.")
@click.option(
    "--recipe", type=click.Path(dir_okay=False), help="What the model and the columns are, if MODEL is no run."
)
@click.option("--plot", type=click.Path(dir_okay=False, path_type=Path), help="Write the ROC curves here, as SVG.")
@as_json
def membership(model, members, non_members, recipe, plot, as_json) -> None:
    """Attack a model with its members: loss, loss beside the model before training, and Min-K%.

    \b
    Example:
      dpft audit membership runs/notes --members train.csv --non-members validation.csv
    """
    from dpft.audit.membership import audit_membership, describe
    from dpft.recipe import Recipe

    found = audit_membership(model, members, non_members, Recipe.read(recipe) if recipe else None)
    if plot:
        from dpft.report.plots import roc

        plot.write_text(roc({attack.name: attack.roc for attack in found}), encoding="utf-8")
    if as_json:
        show({"attacks": [asdict(attack) for attack in found]}, True)
    else:
        click.echo(describe(found))


@audit.command()
@click.argument("folder", type=click.Path(file_okay=False, path_type=Path))
@click.option("--secrets", type=click.IntRange(1), default=20, show_default=True, help="How many that were there.")
@click.option("--candidates", type=click.IntRange(2), default=100, show_default=True, help="Codes to rank each among.")
@as_json
def exposure(folder, secrets, candidates, as_json) -> None:
    """Rank an audit's secrets among random ones, and ask the model for them (dpft audit run --kind secret).

    \b
    Example:
      dpft audit exposure runs/secrets --secrets 5 --candidates 20
    """
    from dpft.audit.exposure import audit_exposure, describe
    from dpft.cli.progress import progress

    with progress() as bar:
        bar.announce("ranking secrets")
        show_progress = lambda done, of: bar.update(total=of, completed=done)
        found = audit_exposure(folder, secrets=secrets, candidates=candidates, progress=show_progress)
    show(asdict(found), True) if as_json else click.echo(describe(found))


def _show_audit(found, as_json: bool, *files: Path) -> None:
    from dpft.audit.report import describe

    if as_json:
        show(found.json(), True)
    else:
        click.echo(describe(found) + "\n")
        for file in files:
            click.echo(file)
    if found.verdict == "VIOLATION":
        click.get_current_context().exit(1)
