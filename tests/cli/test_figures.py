"""Figures of a guarantee that commands print are bounds, and what no guarantee covers is marked."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
from click.testing import CliRunner

from dpft.cli import main
from dpft.cli.progress import _Callback
from dpft.cli.train import _show_run
from dpft.privacy.accounting import epsilon
from dpft.privacy.events import Event
from dpft.recipe import Recipe
from dpft.runs.sweep import NON_PRIVATE, PRIVATE, UNTOUCHED, Cell, Sweep
from dpft.workflows import compare

OLD = Path(__file__).parent.parent / "report" / "run-0.1.0"


def run(*arguments):
    return CliRunner().invoke(main, list(arguments))


@pytest.mark.parametrize(("sigma", "least"), [(1.0, 1.0), (30.0, 0.01), (300.0, 0.0001)])
def test_the_bar_shows_no_less_than_was_spent(plan, sigma, least):
    """0.1.0 showed "ε ≤ 0.00" of 0.0036, and 1.21 of 1.2149."""
    private = plan(noise_multiplier=sigma, steps=40, delta=1e-6)
    bar = _Callback(None)
    bar.watch(SimpleNamespace(plan=private, randomness=SimpleNamespace(private=True)))
    for done in (1, 7, 40):
        shown = float(bar._spent(done, private).removeprefix("ε ≤ "))
        assert shown >= epsilon(Event(done, sigma, 0.5).dp_event, private.delta) and shown > least


@pytest.fixture
def compared(recipe, tmp_path, monkeypatch):
    """``dpft compare`` where the runs are there already: what is printed of them."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "recipe.toml").write_text(Recipe.parse(recipe).to_toml())
    settings = [(UNTOUCHED, None), (NON_PRIVATE, None), (PRIVATE, 2.0), (PRIVATE, 1.0)]
    cells = [Cell(kind, "", e, 0, None, None, None, {"accuracy": 0.5}, f"x/{kind}-{e}") for kind, e in settings]
    found = Sweep({}, {}, 1e-3, 40, "accuracy", 2.3412, tuple(cells))
    monkeypatch.setattr(compare, "compare", lambda *_, **__: found)
    return lambda *more: run("compare", "recipe.toml", "--output", "x", *more)


PUBLIC = ("--set", "data.validation_is_public=true")


@pytest.mark.parametrize(("public", "published"), [((), [False] * 4), (PUBLIC, [True, False, True, True])])
def test_figures_of_the_model_without_privacy_are_never_to_be_published(compared, public, published):
    """Its validation data may be public; what they show of it was learned from private data without noise."""
    rows = json.loads(compared("--json", *public).stdout)["rows"]
    assert [row["publish"] for row in rows] == published
    text = compared(*public).stdout
    assert [line.endswith("yes") for line in text.splitlines()[1:5]] == published
    assert ("Do not publish the row non-private" in text) == bool(public)
    assert ("PRIVATE: computed from the validation data" in text) == (not public)


def test_what_compared_runs_cost_together_is_rounded_up(compared):
    assert "together they cost ε = 2.35 at δ = 0.001." in compared().stdout
    assert json.loads(compared("--json").stdout)["composed_epsilon"] == 2.3412


def test_what_an_account_has_spent_is_rounded_up(tmp_path, capsys):
    folder = Path(shutil.copytree(OLD, tmp_path / "run"))
    record = json.loads((folder / "run.json").read_text())
    record["ledger"]["spent"] = 2.3412
    (folder / "run.json").write_text(json.dumps(record))
    _show_run(folder, as_json=False)
    assert "'notes' has spent ε = 2.35 of 8 at δ = 0.001, over 1 run." in capsys.readouterr().out
    _show_run(folder, as_json=True)
    assert json.loads(capsys.readouterr().out)["epsilon"] == record["epsilon"]  # every digit: nothing is rounded


def test_what_an_audit_shows_is_rounded_down():
    command = "audit bounds --canaries 1000 --guesses 100 --correct 75 --delta 1e-4".split()
    exact = json.loads(run(*command, "--json").stdout)
    (shown,) = (
        line.split()[-1] for line in run(*command).stdout.splitlines() if line.startswith("epsilon lower bound")
    )
    shown = float(shown)
    assert shown <= exact["epsilon_lower_bound"] < shown + 1e-4
