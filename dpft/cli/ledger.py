"""``dpft ledger``: the budget of data sets, over all runs and people."""

from pathlib import Path

import click

from dpft.cli.common import as_json, printed, show, table
from dpft.errors import RecipeError
from dpft.privacy.rounding import rounded_up

where = click.option(
    "--ledger", "url", metavar="URL", help="The ledger's file or URL; by default DPFT_LEDGER, or the user's own file."
)
name = click.argument("name")


@click.group()
def ledger() -> None:
    """Keep the privacy budget of data sets over all runs and people.

    \b
    Example:
      dpft ledger list
    """


@ledger.command()
@name
@click.option("--epsilon", type=float, required=True, help="All that may ever be spent.")
@click.option("--delta", type=float, required=True, help="δ, below one over the number of units.")
@click.option("--unit", default="example", show_default=True, help="Whose privacy: example, or a column's name.")
@click.option("--adjacency", default="add-or-remove-one", show_default=True, help="Or replace-one, zero-out.")
@click.option("--data", multiple=True, help="A file with the rows, to recognise them later; none of it is stored.")
@click.option("--expires", type=click.DateTime(["%Y-%m-%d"]), help="The last day on which it may be used.")
@click.option("--spender", "spenders", multiple=True, help="A user who may spend; repeat. By default everyone.")
@where
def create(name, epsilon, delta, unit, adjacency, data, expires, spenders, url) -> None:
    """Open a data set's account.

    \b
    Example:
      dpft ledger create notes --epsilon 8 --delta 1e-6 --unit patient_id --data notes.csv
    """
    rows = None
    if data:
        from dpft.training.data import read

        rows = read(list(data))
        if unit != "example" and unit not in rows.column_names:
            raise RecipeError(
                f"The data have no column {unit!r} that could name the units: they have {', '.join(rows.column_names)}."
            )
    opened = _open(url, create=True)
    made = opened.create(
        name,
        epsilon=epsilon,
        delta=delta,
        unit=unit,
        adjacency=adjacency,
        expires=expires.date() if expires else None,
        spenders=spenders,
        rows=rows,
    )
    click.echo(
        f"Opened {name!r} with ε = {epsilon:g} at δ = {delta:g} in {opened}; its public key is {opened.public_key}."
    )
    for other, share in opened.shared(made.name):
        click.echo(
            f"Warning: about {share:.0%} of the rows or texts are in {other!r} too, and people in both are charged "
            "only where a run is charged: their privacy costs add up.",
            err=True,
        )


@ledger.command("list")
@where
@as_json
def list_(url, as_json) -> None:
    """List the data sets and what they have spent.

    \b
    Example:
      dpft ledger list --json
    """
    rows = []
    for dataset in _open(url).datasets():
        spent = dataset.spent()
        rows.append(
            {
                "dataset": dataset.name,
                "spent": spent,
                "budget": dataset.policy["epsilon"],
                "delta": dataset.policy["delta"],
                "unit": dataset.policy["unit"],
                "runs": len(dataset.record.runs),
            }
        )
    if as_json:
        show({"datasets": rows}, True)
    else:
        table([{**row, "spent": printed(row["spent"])} for row in rows])


@ledger.command("show")
@name
@where
@as_json
def show_(name, url, as_json) -> None:
    """Show an account: its policy, every run, and ε after each.

    \b
    Example:
      dpft ledger show notes
    """
    dataset = _open(url).dataset(name)
    runs = dataset.curve()
    facts = {
        "dataset": name,
        **dataset.policy,
        "spent": dataset.spent(),
        "spent_rdp": dataset.second_opinion(),
        "knows_its_rows": dataset.record.fingerprint is not None,
    }
    if as_json:
        show({**facts, "runs": runs, "notes": dataset.record.notes}, True)
        return
    facts |= {key: printed(facts[key]) for key in ("spent", "spent_rdp")}
    facts["spenders"] = ", ".join(facts["spenders"]) or "everyone"
    show(facts, False)
    if runs:
        click.echo()
    table(
        [
            {
                "run": run["run"],
                "when": run["at"][:16].replace("T", " "),
                "who": run["by"]["user"],
                "model": Path(run["model"] or "-").name,
                "purpose": run["purpose"] or "-",
                "releases": run["steps"],
                "state": "settled" if run["settled"] else "open",
                "epsilon": printed(run["epsilon"]),
            }
            for run in runs
        ]
    )


def _mechanism(command):
    for option in (
        click.option("--steps", type=click.IntRange(1), default=1, show_default=True, help="How many releases."),
        click.option(
            "--sample-rate", type=float, default=1.0, show_default=True, help="Poisson rate; 1 for all units."
        ),
        click.option("--noise-multiplier", type=float, help="Gaussian noise, in units of the sensitivity."),
    ):
        command = option(command)
    return command


@ledger.command()
@name
@_mechanism
@click.option("--epsilon", type=float, help="Instead: the ε that another tool states for all of it ...")
@click.option("--delta", type=float, default=0.0, help="... at this δ.")
@click.option("--purpose", required=True, help="What it was for.")
@where
def spend(name, noise_multiplier, sample_rate, steps, epsilon, delta, purpose, url) -> None:
    """Record what was released by other means, before it is.

    \b
    Example:
      dpft ledger spend notes --epsilon 0.5 --delta 1e-8 --purpose "table of counts, other tool"
    """
    from dpft.privacy.events import Event

    if (noise_multiplier is None) == (epsilon is None):
        raise click.UsageError("Give --noise-multiplier with --sample-rate and --steps, or --epsilon with --delta.")
    if epsilon is not None and (steps, sample_rate) != (1, 1.0):
        raise click.UsageError("--epsilon is of all releases together: leave --steps and --sample-rate out.")
    event = Event(steps, noise_multiplier, sample_rate) if epsilon is None else Event(epsilon=epsilon, delta=delta)
    dataset = _open(url).dataset(name)
    spent = dataset.spend([event], purpose=purpose)
    click.echo(
        f"{name!r} has spent ε = {rounded_up(spent, 4)} of {dataset.policy['epsilon']:g} at δ = "
        f"{dataset.policy['delta']:g}."
    )


@ledger.command()
@name
@_mechanism
@where
@as_json
def fits(name, noise_multiplier, sample_rate, steps, url, as_json) -> None:
    """Ask whether a plan fits, and how much of it does; charges nothing.

    \b
    Example:
      dpft ledger fits notes --noise-multiplier 1.0 --sample-rate 0.01 --steps 500
    """
    from dpft.privacy.plan import Plan

    if noise_multiplier is None:
        raise click.UsageError("Give --noise-multiplier.")
    dataset = _open(url).dataset(name)
    plan = Plan(noise_multiplier=noise_multiplier, sample_rate=sample_rate, steps=steps, delta=dataset.policy["delta"])
    facts = {
        "fits": dataset.fits(plan),
        "spent": dataset.spent(),
        "spent_after": dataset.after(plan),
        "budget": dataset.policy["epsilon"],
        "most_steps": dataset.most_steps(plan),
        "least_noise_multiplier": dataset.least_noise(plan),
    }
    if not as_json:
        facts |= {key: printed(facts[key]) for key in ("spent", "spent_after", "least_noise_multiplier")}
    show(facts, as_json)


@ledger.command()
@name
@click.option("--epsilon", type=float, help="The new budget.")
@click.option("--expires", type=click.DateTime(["%Y-%m-%d"]), help="The last day on which it may be used.")
@click.option("--spender", "spenders", multiple=True, help="All users who may spend, in place of those before.")
@where
def amend(name, epsilon, expires, spenders, url) -> None:
    """Change an account's policy; who did it and when stays on record.

    \b
    Example:
      dpft ledger amend notes --expires 2027-12-31
    """
    changes = {"epsilon": epsilon, "expires": expires and expires.date().isoformat(), "spenders": sorted(spenders)}
    changes = {key: value for key, value in changes.items() if value}
    if not changes:
        raise click.UsageError("Give --epsilon, --expires or --spender.")
    _open(url).dataset(name).amend(**changes)
    click.echo(f"Amended {name!r}: {', '.join(f'{key} = {value}' for key, value in changes.items())}.")


@ledger.command()
@click.option(
    "--export", "exported", type=click.Path(dir_okay=False, path_type=Path), help="An export, instead of a ledger."
)
@click.option("--public-key", help="Whose ledger it must be, in hexadecimal.")
@click.option("--quick", is_flag=True, help="Only the chain and the signatures, not the figures.")
@where
@as_json
def verify(exported, public_key, quick, url, as_json) -> None:
    """Prove that no entry was changed, and compose every stored ε with another accountant.

    \b
    Example:
      dpft ledger verify --quick
    """
    from dpft.ledger.database import Store, default_url
    from dpft.ledger.verify import read_export
    from dpft.ledger.verify import verify as check

    rows, end = read_export(exported) if exported else Store(url or default_url(), create=False).after(0)
    found = check(rows, end, public_key=public_key, figures=not quick)
    if found.verified and not exported:
        _open(url)  # refuses an older copy of what this machine has seen
    names = ("verified", "entries", "figures", "public_key", "problems")
    facts = {name: getattr(found, name) for name in names}
    if as_json:
        show(facts, True)
    elif found.verified:
        composed = "" if quick else f", {found.figures:,} figures composed again"
        click.echo(f"{found.entries:,} entries verify{composed}; signed by {found.public_key}.")
    else:
        for problem in found.problems:
            click.echo(f"Error: {problem}", err=True)
    if not found.verified:
        click.get_current_context().exit(1)


@ledger.command()
@click.argument("path", type=click.Path(dir_okay=False, path_type=Path))
@where
def export(path, url) -> None:
    """Write all entries as JSON lines, which verify offline.

    \b
    Example:
      dpft ledger export ledger.jsonl
    """
    from dpft.ledger.verify import export as write

    count = write(_open(url).store, path)
    click.echo(f"Wrote {count:,} entries to {path}.")


@ledger.command("import")
@click.argument("path", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("--public-key", help="Whose ledger it must be, in hexadecimal.")
@where
def import_(path, public_key, url) -> None:
    """Fill a new ledger from an export that verifies; the signing key travels apart.

    \b
    Example:
      dpft ledger import ledger.jsonl --ledger restored.db
    """
    from dpft.errors import LedgerError
    from dpft.ledger.database import Store, default_url
    from dpft.ledger.verify import restore

    found = restore(path, Store(url or default_url()), public_key=public_key)
    if not found.verified:
        raise LedgerError(found.problems[0])
    click.echo(f"Imported {found.entries:,} entries, signed by {found.public_key}.")


@ledger.command()
@click.option("--output", type=click.Path(dir_okay=False, path_type=Path), default="ledger.html", show_default=True)
@click.option("--sample-rate", type=float, default=0.01, show_default=True, help="Of the run whose price is shown.")
@click.option("--steps", type=int, default=500, show_default=True, help="Of the run whose price is shown.")
@where
def dashboard(output, sample_rate, steps, url) -> None:
    """Write one page with every account: spent against budget, ε over time, and what a run would cost.

    \b
    Example:
      dpft ledger dashboard --output ledger.html
    """
    from dpft.report.dashboard import write_dashboard

    opened = _open(url)
    accounts = []
    for dataset in opened.datasets():
        facts = {"name": dataset.name, "policy": dataset.policy, "spent": dataset.spent()}
        accounts.append({**facts, "runs": dataset.curve(), "planned": dataset.prices(sample_rate, steps)})
    write_dashboard(output, str(opened), opened.public_key, accounts)
    click.echo(output)


def _open(url: str | None, *, create: bool = False):
    from dpft.ledger import Ledger

    return Ledger(url, create=create)
