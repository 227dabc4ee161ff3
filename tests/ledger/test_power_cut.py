"""T15: what was charged is on disk before anything is released, also when the power goes in that moment."""

import json
from pathlib import Path

import pytest

from dpft.ledger import Ledger
from dpft.ledger.verify import verify
from tests.support.power_cut import cut_after

LEDGER = """
from dpft.ledger import Ledger
from dpft.privacy.plan import Plan
ledger = Ledger("ledger.db")
plan = Plan(noise_multiplier=1.0, sample_rate=0.05, steps=100, delta=1e-4)
run = ledger.create("notes", epsilon=5.0, delta=1e-4).open(plan)
for count in (5, 7, 11):
    run.charge(count)
"""

RELEASES = """
from dpft.privacy.noise import SecureRandomness
from dpft.privacy.plan import Plan
from dpft.training.releases import Releases
releases = Releases(".", Plan(noise_multiplier=1.0, sample_rate=0.05, steps=100, delta=1e-4), SecureRandomness())
for number in (1, 2, 3):
    releases.charge(number)
"""


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "run" / "home" / "dpft" / "keys").mkdir(parents=True)
    return tmp_path / "run"


def test_a_ledger_has_every_charge_and_its_key_after_a_power_cut(folder, tmp_path, monkeypatch):
    """23 releases were charged in three blocks, and the next run is granted what is left of them, no more."""
    found = cut_after(LEDGER, folder, tmp_path, XDG_DATA_HOME=str(folder / "home"))
    monkeypatch.setenv("XDG_DATA_HOME", str(found / "home"))
    ledger = Ledger(str(found / "ledger.db"), create=False)
    (run,) = ledger.dataset("notes").record.runs.values()
    assert run.steps == 23 and verify(*ledger.store.after(0)).verified
    ledger.dataset("notes").amend(epsilon=6.0)  # with the key


def test_a_run_has_counted_every_release_after_a_power_cut(folder, tmp_path):
    found = cut_after(RELEASES, folder, tmp_path)
    assert json.loads((found / "releases.json").read_text(encoding="utf-8"))["charged"] == 3


@pytest.mark.parametrize(
    ("script", "left"),
    [
        ("open('a', 'w').write('lost')", {"old": "kept"}),
        ("import os; f = open('a', 'w'); f.write('x'); f.flush(); os.fsync(f.fileno())", {"old": "kept"}),
        ("import os; f = open('old', 'w'); f.write('x'); f.flush()", {"old": "kept"}),
        ("import os; f = open('old', 'w'); f.write('x'); f.flush(); os.fsync(f.fileno())", {"old": "x"}),
        ("import os; open('a', 'w').close(); os.fsync(os.open('.', os.O_RDONLY))", {"a": "", "old": "kept"}),
        (
            "import os; f = open('a', 'w'); f.write('x'); f.flush(); os.fsync(f.fileno()); os.replace('a', 'old')",
            {"old": "kept"},
        ),
    ],
)
def test_a_power_cut_loses_whatever_was_not_synced(tmp_path, script, left):
    """The instrument itself: without a sync of the file its content is lost, without one of the folder its name."""
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "old").write_text("kept")
    found = cut_after(script, folder, tmp_path)
    assert {path.name: Path(path).read_text() for path in found.iterdir()} == left
