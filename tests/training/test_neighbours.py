"""Two data sets that differ by one record leave the same files, byte by byte, but for weights and what lies under
private/.

Whatever else differs would tell for certain whether the record was there, and no ε covers certainty.
"""

import csv
import itertools
import json
import os
from datetime import UTC, datetime
from pathlib import Path

import pytest

from dpft.audit.canaries import Planting
from dpft.audit.game import audit_run
from dpft.ledger import Ledger
from dpft.recipe import Recipe
from dpft.runs import RunFolder, RunRecord
from dpft.runs.record import AccountFacts
from dpft.workflows.compare import compare
from dpft.workflows.train import train
from tests.support.recipes import write

COVERED = {".safetensors", ".bin"}  # what the guarantee is for ...
OPTIMIZER = {"optimizer.pt"}  # ... and the optimizer's state, which is made of released gradients


@pytest.fixture
def fixed_names(monkeypatch):
    """Random names, which are independent of the data, are numbered instead."""

    def number():
        numbers = itertools.count()
        monkeypatch.setattr("dpft.training.releases.token_hex", lambda size: f"{next(numbers):0{2 * size}x}")

    return number


def files(folder: Path) -> dict[str, bytes]:
    found = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder)
        weights = path.suffix in COVERED and path.name != "training_args.bin"
        if path.is_file() and "private" not in name.parts and not weights and path.name not in OPTIMIZER:
            found[str(name)] = path.read_bytes()
    return found


def neighbours(tmp_path, recipe):
    """Two folders, each with the data beside it under the same names; the second lacks the first record, the
    longest."""
    rows = list(csv.reader((tmp_path / "train.csv").read_text().splitlines()))
    long = [" ".join(["w5"] * 24), *rows[1][1:]]
    for name, some in (("with", [rows[0], long, *rows[2:]]), ("without", [rows[0], *rows[2:]])):
        folder = tmp_path / name
        folder.mkdir()
        write(folder / "train.csv", some)
        (folder / "validation.csv").write_bytes((tmp_path / "validation.csv").read_bytes())
        yield folder
    recipe["data"] |= {"train": "train.csv", "validation": "validation.csv"}


SETTINGS = {
    "plain": {},
    "dropout": {"model": {"dropout": True}},
    "checkpoints": {"model": {"dropout": True}, "run": {"save_steps": 2}},
    "bf16": {"model": {"dtype": "bfloat16"}, "run": {"save_steps": 2}},
    "frozen prefix": {"subset": "head", "run": {"frozen_prefix": "on", "save_steps": 2}},
    "patients": {"data": {"unit": "patient", "units": 12}, "privacy": {"batch_size": 4}, "run": {"save_steps": 2}},
}


def made(recipe, changes) -> Recipe:
    tables = {
        key: {**value, **changes.get(key, {})} if isinstance(value, dict) else value for key, value in recipe.items()
    }
    return Recipe.parse({**tables, **{k: v for k, v in changes.items() if k not in tables or not isinstance(v, dict)}})


@pytest.mark.parametrize("setting", SETTINGS)
def test_neighbours_leave_the_same_files(tmp_path, recipe, monkeypatch, fixed_names, setting):
    found = []
    for folder in list(neighbours(tmp_path, recipe)):
        monkeypatch.chdir(folder)
        fixed_names()
        train(made(recipe, SETTINGS[setting]), "run")
        found.append(files(folder / "run"))
    assert found[0].keys() == found[1].keys() and {"run.json", "card.md", "releases.json"} <= found[0].keys()
    for name, content in found[0].items():
        assert content == found[1][name], name
    if "save_steps" in SETTINGS[setting].get("run", {}):
        assert any(name.startswith("checkpoint-") for name in found[0])
    assert not any("rng" in name for name in found[0])


def test_neighbours_leave_the_same_comparison(tmp_path, recipe, monkeypatch, fixed_names):
    recipe["data"]["validation_is_public"] = True
    found = []
    for folder in list(neighbours(tmp_path, recipe)):
        monkeypatch.chdir(folder)
        fixed_names()
        compare(made(recipe, {}), "runs", epsilons=[8.0])
        found.append(files(folder / "runs"))
    assert found[0].keys() == found[1].keys()
    figures = {"sweep.json"} | {
        name for name in found[0] if name.endswith(("run.json", "card.md", "card.html", "README.md"))
    }
    for name, content in found[0].items():  # figures of released weights on public data differ as the weights do
        assert content == found[1][name] or name in figures, name
    for one in found:
        record = json.loads(one["sweep.json"])
        assert [cell["kind"] for cell in record["cells"]] == ["untouched", "private"]
        assert all(cell["seconds"] is cell["peak_memory"] is None for cell in record["cells"])
        assert not any(name.startswith("non-private") for name in one)


def test_neighbours_leave_the_same_account(tmp_path, recipe, monkeypatch, fixed_names):
    """All that a ledger's entries say but for the keyed fingerprint, names made by chance, signatures and hashes."""
    found = []
    for folder in list(neighbours(tmp_path, recipe)):
        monkeypatch.chdir(folder)
        monkeypatch.setenv("XDG_DATA_HOME", str(folder / "keys"))
        fixed_names()
        ledger = Ledger(str(folder / "ledger.db"))
        rows = list(csv.DictReader((folder / "train.csv").read_text().splitlines()))
        ledger.create("notes", epsilon=8, delta=1e-3, rows=rows)
        train(made(recipe, {"ledger": {"dataset": "notes", "url": "ledger.db"}}), "run")
        entries = [{"kind": row.kind, **row.facts} for row in ledger.store.after(0)[0]]
        for entry in entries[1:]:
            entry.pop("run", None)
            entry["at"] = "" if entry["kind"] == "dataset" else entry["at"][:13]
            entry["fingerprint"] = sorted(entry.get("fingerprint") or ())
        record = json.loads((folder / "run" / "run.json").read_text())
        assert set(record["ledger"]) == set(AccountFacts.sources())
        found.append(entries[1:])
    assert found[0] == found[1]


def test_neighbours_leave_the_same_audit(tmp_path, language, monkeypatch, fixed_names):
    """The coins, and what they show of the released weights, are chance and noise; the rest is the same."""
    found, folder = [], tmp_path / "language"
    language["data"] |= {"train": "train.csv", "validation": "validation.csv"}
    rows = (folder / "train.csv").read_text().splitlines()
    for name, some in (("with", rows), ("without", [rows[0], *rows[2:]])):
        (tmp_path / name).mkdir()
        (tmp_path / name / "train.csv").write_text("\n".join(some) + "\n")
        (tmp_path / name / "validation.csv").write_bytes((folder / "validation.csv").read_bytes())
        monkeypatch.chdir(tmp_path / name)
        fixed_names()
        audit_run(made(language, {}), "run", Planting(canaries=20))
        found.append(files(tmp_path / name / "run"))
    assert found[0].keys() == found[1].keys() and "audit.json" in found[0]
    shown = {"audit.json", "card.md", "card.html", "weights/README.md"}
    for name, content in found[0].items():
        assert content == found[1][name] or name in shown, name
    assert json.loads(found[0]["audit.json"]).keys() == json.loads(found[1]["audit.json"]).keys()


PUBLISHED = {
    **{"version": "software", "guarantee": "released", "private": "plan", "epsilon": "released", "epsilon_rdp": "plan"},
    **{"delta": "plan", "unit": "plan", "units": "plan", "examples_per_unit": "plan", "adjacency": "plan"},
    **{"events": "released", "planned_steps": "plan", "released_steps": "released", "interrupted": "user"},
    **{"halted": "ledger", "ledger": "ledger", "expected_batch_size": "plan", "mechanism": "released", "clip": "plan"},
    **{"subset": "plan", "trainable_parameters": "software", "all_parameters": "software", "weights": "software"},
    **{"metrics": "public", "metrics_are_private": "plan", "date": "day", "versions": "software"},
}


def test_only_what_the_list_allows_is_published(tmp_path, recipe):
    """Another key is a decision, so it is made here as well."""
    train(made(recipe, {}), tmp_path / "run")
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    assert list(record) == list(PUBLISHED) and RunRecord.sources() == PUBLISHED
    known = RunFolder(tmp_path / "run").record()
    for extra in ({"preflight": "exact, 1.3e-07"}, {"started": "2024-01-01T12:31:07"}):
        with pytest.raises(ValueError, match="Extra inputs are not permitted"):
            RunRecord(**{**dict(known), **extra})
    old = AccountFacts(dataset="notes", overlap=0.992)
    assert "overlap" not in known.model_copy(update={"ledger": old}).to_json()


def test_published_files_are_of_the_day_alone(tmp_path, recipe):
    train(made(recipe, {"run": {"save_steps": 2}}), tmp_path / "run")
    midnight = datetime.now(UTC).replace(hour=0, minute=0, second=0, microsecond=0).timestamp()
    seen = 0
    for folder, _, names in os.walk(tmp_path / "run"):
        for path in (Path(folder), *(Path(folder) / name for name in names)):
            if "private" not in path.parts and path != tmp_path / "run":
                assert path.stat().st_mtime == midnight, path
                seen += 1
    assert seen > 10
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    assert record["date"] == datetime.now(UTC).date().isoformat() and ":" not in record["date"]
