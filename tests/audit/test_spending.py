"""A run's folder against its own claim."""

import json
import shutil

import pytest

from dpft.audit.spending import audit_ledger, audit_run
from dpft.errors import RecipeError
from dpft.ledger import Ledger
from dpft.privacy import composition
from dpft.privacy.composition import Event
from dpft.privacy.plan import Plan
from dpft.recipe import Recipe
from dpft.workflows.train import train
from tests.support.recipes import classifier_in


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    recipe = classifier_in(tmp_path_factory.mktemp("spending"))
    recipe["data"].pop("validation")
    return train(Recipe.parse(recipe), tmp_path_factory.mktemp("trained") / "run")


@pytest.fixture
def folder(trained, tmp_path):
    return shutil.copytree(trained, tmp_path / "run")


def test_an_honest_run_is_consistent(folder):
    found = audit_run(folder)
    pld, own, rdp, prv = found.epsilon.values()
    assert found.verdict == "consistent" and found.stated == pytest.approx(pld, rel=2e-3) == pytest.approx(
        own, rel=2e-3
    )
    assert rdp > pld and pld - 1e-3 <= prv <= pld + 0.03


@pytest.mark.parametrize(
    ("file", "place", "value", "said"),
    [
        ("run.json", ("epsilon",), 1.0, "states ε = 1, and its events compose to"),
        ("run.json", ("delta",), 0.5, "permits publishing one of them whole"),
        ("run.json", ("released_steps",), 5, "count 4 releases, and it made 5"),
        ("run.json", ("events", 0, "noise_multiplier"), 9.0, "its events say otherwise"),
        ("run.json", ("events", 0, "kind"), "shuffled_gaussian", "is not what was executed"),
        ("run.json", ("versions", "dp-accounting"), "0.3.1", "0.4 is needed"),
        ("run.json", ("versions", "dp-accounting"), "not installed", "0.4 is needed"),
        ("releases.json", ("mechanism", "adjacency"), "replace-one", "adjacency was replace-one"),
        ("releases.json", ("charged",), 7, "7 releases were counted on disk"),
        ("releases.json", ("mechanism", "private_randomness"), False, "came from a seed"),
    ],
)
def test_contradictions_are_found(folder, file, place, value, said):
    facts = json.loads((folder / file).read_text())
    *path, last = place
    inner = facts
    for key in path:
        inner = inner[key]
    inner[last] = value
    (folder / file).write_text(json.dumps(facts))
    found = audit_run(folder)
    assert found.verdict == "VIOLATION" and any(said in problem for problem in found.problems)


def test_a_lost_counter_and_a_folder_without_a_run_are_named(folder, tmp_path):
    (folder / "releases.json").unlink()
    assert "is gone" in audit_run(folder).problems[0]
    with pytest.raises(RecipeError, match="no finished run"):
        audit_run(tmp_path)


def test_every_data_set_of_a_ledger_is_recomputed(tmp_path):
    ledger = Ledger(str(tmp_path / "ledger.sqlite"))
    for name in ("notes", "letters"):
        ledger.create(name, epsilon=8, delta=1e-5).spend([Event(200, 1.0, 0.01), Event(50, 2.0, 0.05)], purpose="try")
    found = audit_ledger(ledger)
    assert [one.name for one in found] == ["notes", "letters"]
    for one in found:
        values = [value for value in one.epsilon.values() if value is not None]
        assert one.verdict == "consistent" and len(values) == 4 and max(values) < 1.5 * min(values)


def test_a_ledger_that_says_too_little_is_a_violation(tmp_path, monkeypatch):
    """T18: the accountant that granted the budget was wrong by a third, and another one says so."""
    ledger = Ledger(str(tmp_path / "ledger.sqlite"))
    account = ledger.create("notes", epsilon=8, delta=1e-5)
    true = composition.epsilon
    monkeypatch.setattr(composition, "epsilon", lambda *args: true(*args) * 2 / 3)
    account.spend([Event(200, 1.0, 0.01)], purpose="try")
    (found,) = audit_ledger(ledger)
    assert found.verdict == "VIOLATION" and any("compose to" in problem for problem in found.problems)


def test_what_only_an_epsilon_is_known_of_has_no_prv(tmp_path):
    ledger = Ledger(str(tmp_path / "ledger.sqlite"))
    ledger.create("notes", epsilon=8, delta=1e-5).spend([Event(1, epsilon=1.0, delta=0.0)], purpose="a count")
    (found,) = audit_ledger(ledger)
    assert found.epsilon["PRV (Opacus)"] is None and found.epsilon["PLD (dp-accounting)"] == pytest.approx(
        1.0, rel=1e-2
    )


def test_a_delta_that_a_run_of_an_account_is_too_large_for_is_a_violation(tmp_path):
    """T17: by the units that its run declared; 0.1.0 never compared them with the account's δ."""
    ledger = Ledger(str(tmp_path / "ledger.sqlite"))
    account = ledger.create("notes", epsilon=8, delta=0.01, unit="patient")
    account.open(Plan(noise_multiplier=9.0, sample_rate=0.1, steps=1, delta=1e-6, units=99, unit="patient")).charge(1)
    assert audit_ledger(ledger)[0].verdict == "consistent"
    record = account.record.runs[next(iter(account.record.runs))]
    facts = {**record.facts, "run": "forged", "units": 100_000}
    ledger._append("notes", "run", lambda book: facts)
    assert "δ = 0.01 for 100,000 units permits" in audit_ledger(ledger)[0].problems[0]


@pytest.mark.parametrize(("noise", "delta"), [(0.05, 1e-6), (5.0, 1e-15)])
def test_what_dp_accounting_does_not_serve_is_audited_as_well(tmp_path, noise, delta):
    ledger = Ledger(str(tmp_path / "ledger.sqlite"))
    account = ledger.create("notes", epsilon=900, delta=delta)
    account.spend([Event(2, noise, 0.5)], purpose="little noise, or a tiny delta")
    (found,) = audit_ledger(ledger)
    assert found.verdict == "consistent" and found.epsilon["PLD (dp-accounting)"] is None
    assert found.stated == found.epsilon["PLD (dpft)"] > 0
