"""What older versions left is read, shown, audited and gone on with; nothing of it is written anew."""

import json
import shutil
from pathlib import Path

import pytest
from click.testing import CliRunner

from dpft.audit.spending import audit_ledger, audit_run
from dpft.cli import main
from dpft.errors import GuaranteeError
from dpft.ledger import Ledger
from dpft.ledger.database import Store
from dpft.ledger.verify import read_export, restore, verify
from dpft.privacy.composition import reference
from dpft.privacy.events import VERSION, Event
from dpft.privacy.noise import SecureRandomness
from dpft.privacy.plan import Plan
from dpft.report import write_card
from dpft.report.meaning import of_run
from dpft.runs import RunFolder
from dpft.runs.count import Count
from dpft.training.releases import Releases

DATA = Path(__file__).parent.parent / "data"
STEPS = {"charged": 4, "interrupted": 2, "without-noise": 4}
LEFT_OPEN = Event(10, 2.0, 0.05)


@pytest.fixture(params=["0.1.0", "0.2.0"])
def left(request, tmp_path, monkeypatch):
    """A copy of what that version left."""
    folder = Path(shutil.copytree(DATA / request.param, tmp_path / "left"))
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("DPFT_LEDGER_KEY", str(folder / "ledger.key"))
    return folder


def command(*arguments):
    result = CliRunner().invoke(main, [str(argument) for argument in arguments])
    assert result.exit_code == 0, result.output
    return result.stdout


@pytest.mark.parametrize("name", STEPS)
def test_every_old_run_has_a_record_a_count_and_a_card(left, name):
    folder = RunFolder(left / name)
    record, count = folder.record(), Count.read(folder.releases_file)
    (event,) = record.events
    assert record.released_steps == count.charged == event.count == STEPS[name]
    assert event.one == count.mechanism.event and count.mechanism.unit == record.unit == "patient"
    assert record.version == 3 and record.date == "2026-11-27" and record.private == (name != "without-noise")
    assert folder.recipe().data.units == record.units == 20
    text = write_card(folder.path)[0].read_text(encoding="utf-8")
    assert text == write_card(folder.path)[0].read_text(encoding="utf-8")
    shown = {
        "charged": "**ε = 2 at δ = 0.001**",
        "interrupted": "ended after 2 of 4",
        "without-noise": "**NOT PRIVATE.**",
    }
    assert shown[name] in text and f"{STEPS[name]} releases of the Gaussian mechanism" in text
    assert "accuracy" in folder.metrics()


def test_old_runs_are_consistent_and_explained(left):
    for name in ("charged", "interrupted"):
        audit = audit_run(left / name)
        assert audit.verdict == "consistent" and audit.stated == pytest.approx(of_run(left / name).epsilon, rel=1e-3)
    assert RunFolder(left / "charged").record().ledger.spent == pytest.approx(2.0, rel=1e-3)
    assert RunFolder(left / "interrupted").last_checkpoint().name == "checkpoint-1"


def test_commands_read_what_is_old(left):
    assert "card.md" in command("report", left / "charged")
    assert "consistent" in command("audit", "spending", left / "charged")
    assert json.loads(command("audit", "meaning", left / "charged", "--json"))["epsilon"] == pytest.approx(2, rel=1e-3)
    ledger = ("--ledger", left / "ledger.db")
    shown = json.loads(command("ledger", "show", "notes", *ledger, "--json"))
    assert [run["steps"] for run in shown["runs"]] == [4, 201, 1] and shown["epsilon"] == 9.0
    # fmt: skip
    assert [row["dataset"] for row in json.loads(command("ledger", "list", *ledger, "--json"))["datasets"]] == [
        "notes",
        "letters",
    ]
    assert "entries verify" in command("ledger", "verify", *ledger)
    assert "entries verify" in command("ledger", "verify", "--export", left / "ledger.jsonl")
    assert "fits" in command("ledger", "fits", "letters", "--noise-multiplier", "2", *ledger)
    command("ledger", "dashboard", "--output", left / "ledger.html", *ledger)
    command("audit", "spending", left / "ledger.db")


def test_every_block_of_an_old_ledger_counts(left):
    """T15: two blocks of five, whose number stands beside their event."""
    ledger = Ledger(str(left / "ledger.db"), create=False)
    letters = ledger.dataset("letters")
    assert letters.record.events == (LEFT_OPEN,)
    assert letters.spent() == pytest.approx(reference((LEFT_OPEN,), 1e-5), rel=2e-3)
    stated, sampled, charged, whole = (
        Event(1, None, None, 0.3, 1e-9),
        Event(200, 5.0, 0.01),
        *(RunFolder(left / "charged").record().events),
        Event(1, 40.0, 1.0),
    )
    assert set(ledger.dataset("notes").record.events) == {stated, sampled, charged, whole}
    assert all(one.verdict == "consistent" for one in audit_ledger(ledger))


def test_an_old_ledger_goes_on_and_its_entries_stay_as_they_are(left):
    ledger = Ledger(str(left / "ledger.db"), create=False)
    old = ledger.store.after(0)[0]
    letters = ledger.dataset("letters")
    (known,) = letters.record.runs
    plan = Plan(noise_multiplier=2.0, sample_rate=0.05, steps=100, delta=1e-5, units=1000)
    run = letters.open(plan, resumed=known, released=10)
    run.charge(3)
    run.settle(2)
    letters.spend([Event(1, 5.0, 1.0, sensitivity=0.1, name="class means")], purpose="means")
    rows, end = ledger.store.after(0)
    assert rows[: len(old)] == old and verify(rows, end).verified
    charges = [row.facts for row in rows[len(old) :] if row.kind == "charge"]
    assert [charge["event"]["version"] for charge in charges] == [VERSION, VERSION]
    assert [charge["event"]["count"] for charge in charges] == [3, 1]
    again = Ledger(str(left / "ledger.db"), create=False).dataset("letters").record
    assert set(again.events) == {LEFT_OPEN.times(12), Event(1, 5.0, 1.0, sensitivity=0.1, name="class means")}


def test_an_old_export_is_imported(left, tmp_path):
    store = Store(str(tmp_path / "restored.db"))
    assert restore(left / "ledger.jsonl", store).verified
    assert store.after(0) == read_export(left / "ledger.jsonl")


def test_an_old_run_goes_on_under_its_own_plan_alone(left):
    folder = RunFolder(left / "interrupted")
    mine = folder.recipe().plan()
    before = folder.record().events[0]
    plan = Plan(**{**vars(mine), "noise_multiplier": before.noise_multiplier})
    counter = Releases(folder.path, plan, SecureRandomness())
    counter.check()
    counter.charge(3)
    assert Count.read(folder.releases_file).charged == 3
    with pytest.raises(GuaranteeError, match="released 3 steps with noise_multiplier"):
        Releases(folder.path, Plan(**{**vars(plan), "noise_multiplier": 9.0}), SecureRandomness()).check()
