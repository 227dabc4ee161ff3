"""A run's record, and where its files are."""

import ast
import json
from pathlib import Path

import pytest

from dpft.errors import PlanError, RecipeError
from dpft.privacy.events import Event
from dpft.runs import RunFolder, RunRecord
from dpft.runs.count import Count, Mechanism

ROOT = Path(__file__).parent.parent.parent
FACTS = {
    "version": 3, "guarantee": "", "private": True, "delta": 1e-5, "unit": "example", "units": 100, "adjacency": "zero-out",
    "events": [{"version": 2, "kind": "gaussian", "count": 1, "noise_multiplier": 2.0, "sensitivity": 0.5, "name": "means"}],
    "planned_steps": 1, "released_steps": 1, "clip": {"rule": "FlatClip", "clip_norm": 1.0}, "subset": "all",
    "ledger": {"dataset": "notes", "spent": 1.0},
}  # fmt: skip


def test_what_is_written_is_read(tmp_path):
    record = RunRecord.from_dict(FACTS)
    assert record.events == (Event(1, 2.0, 1.0, sensitivity=0.5, name="means"),)
    RunFolder(tmp_path).write_record(record)
    assert RunFolder(tmp_path).record() == record and json.loads(record.to_json())["events"] == FACTS["events"]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"version": 4}, "version 4, and this dpft reads versions 1 to 3: update"),
        ({"version": "3"}, "version '3'"),
        ({"delta": "small"}, "delta: Input should be a valid number"),
        ({"private": 1}, "private: Input should be a valid boolean"),
        ({"adjacency": "none"}, "adjacency: "),
        ({"clip": {"rule": "FlatClip"}}, "clip.clip_norm: Field required"),
        ({"preflight": "1e-7"}, "preflight: Extra inputs are not permitted"),
        ({"ledger": {"secret": 1}}, "ledger.secret: Extra inputs are not permitted"),
        ({"events": 7}, "not iterable"),
        ({"events": [7]}, "not the record"),
    ],
)
def test_what_is_no_record_is_one_sentence(change, said):
    with pytest.raises(RecipeError, match=said) as caught:
        RunRecord.from_dict({**FACTS, **change}, "x/run.json")
    assert str(caught.value).startswith("x/run.json") and str(caught.value).count(". ") == 0


def test_a_release_that_nobody_knows_is_not_composed():
    with pytest.raises(PlanError, match="'laplace', which is not what was executed"):
        RunRecord.from_dict({**FACTS, "events": [{"version": 2, "kind": "laplace", "count": 1}]})


def test_a_count_is_read_as_written(tmp_path):
    path = tmp_path / "releases.json"
    assert Count.read(path) == Count()
    count = Count(3, "ab", Mechanism(Event(1, 1.0, 0.1), "FlatClip(1.0)", "example", "add-or-remove-one", True))
    path.write_text(json.dumps(count.to_dict()))
    assert Count.read(path) == count
    for wrong in ({"charged": 3}, {**count.to_dict(), "charged": -1}, {**count.to_dict(), "version": 3}, []):
        path.write_text(json.dumps(wrong))
        with pytest.raises(RecipeError):
            Count.read(path)


def test_only_one_module_knows_where_files_are():
    """The layers above find a run's files through RunFolder."""
    names = {
        "run.json",
        "releases.json",
        "ledger.json",
        "metrics.json",
        "card.md",
        "card.html",
        "audit.json",
        "sweep.json",
    }
    names |= {"preflight.json", "canaries.json", "trainer_state.json", "private"}
    for path in (ROOT / "dpft").rglob("*.py"):
        if path.parent.name != "runs":
            found = {
                node.value
                for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
                if isinstance(node, ast.Constant)
            }
            assert not names & {text for text in found if isinstance(text, str)}, path
