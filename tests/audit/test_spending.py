"""A run's folder against its own claim."""

import json

import pytest

from dpft.audit.spending import audit_run
from dpft.errors import RecipeError
from dpft.recipe import Recipe
from dpft.training.run import train


@pytest.fixture
def folder(recipe, tmp_path):
    recipe["data"].pop("validation")
    return train(Recipe.parse(recipe), tmp_path / "run")


def test_an_honest_run_is_consistent(folder):
    found = audit_run(folder)
    pld, own, rdp = found.epsilon.values()
    assert found.verdict == "consistent" and found.stated == pytest.approx(pld, rel=2e-3) == pytest.approx(
        own, rel=2e-3
    )
    assert rdp > pld


@pytest.mark.parametrize(
    ("file", "place", "value", "said"),
    [
        ("run.json", ("epsilon",), 1.0, "states ε = 1, and its events compose to"),
        ("run.json", ("delta",), 0.5, "permits publishing one of them whole"),
        ("run.json", ("released_steps",), 5, "count 4 releases, and it made 5"),
        ("run.json", ("events", 0, "noise_multiplier"), 9.0, "its events say otherwise"),
        ("run.json", ("events", 0, "event"), "shuffled_gaussian", "is not what was executed"),
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
