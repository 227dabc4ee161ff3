"""Membership and exposure, on a model that knows its data by heart and on one that was trained privately."""

import pytest

from dpft.audit.canaries import Planting
from dpft.audit.exposure import audit_exposure
from dpft.audit.exposure import describe as describe_exposure
from dpft.audit.game import audit_run
from dpft.audit.membership import _allowed, audit_membership, describe
from dpft.errors import RecipeError
from dpft.privacy.events import Event
from dpft.recipe import Recipe
from dpft.runs.record import ClipFacts, RunRecord
from tests.support.recipes import language_in


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """``(knows by heart, private)``: folders of audited runs with secrets, and their recipe's tables."""
    folder = tmp_path_factory.mktemp("attacks")
    tables = language_in(folder / "language")
    tables["privacy"] |= {"steps": 120, "batch_size": 30, "epsilon": None, "noise_multiplier": 0.0, "clip_norm": 1e9}
    audit_run(Recipe.parse(tables), folder / "plain", Planting(canaries=20, kind="secret", repetitions=2))
    tables["privacy"] |= {"epsilon": 1.0, "noise_multiplier": None, "clip_norm": 1.0, "steps": 30}
    audit_run(Recipe.parse(tables), folder / "private", Planting(canaries=20, kind="secret"))
    return folder / "plain", folder / "private", tables


def test_members_of_a_model_that_knows_them_by_heart_are_told(runs):
    plain, private, tables = runs
    data = tables["data"]
    found = {attack.name: attack for attack in audit_membership(plain, data["train"], data["validation"])}
    assert set(found) == {"loss", "reference", "min-k"}
    assert found["loss"].auc > 0.8 and found["reference"].auc > 0.8 and found["min-k"].auc > 0.7
    weak = {attack.name: attack for attack in audit_membership(private, data["train"], data["validation"])}
    assert weak["reference"].auc < found["reference"].auc
    low, high = weak["reference"].auc_interval
    assert low <= weak["reference"].auc <= high and "guessing" in describe(list(weak.values()))


def test_detection_is_shown_beside_what_the_guarantee_allows(runs, tmp_path):
    _, private, tables = runs
    many = tmp_path / "many.csv"
    many.write_text("text\n" + "\n".join(f"kab kac kad {word}" for word in ["kae", "kaf"] * 60))
    (attack, *_) = audit_membership(private, tables["data"]["train"], str(many))
    (rate,) = attack.rates  # 120 records resolve 1 %, not 0.1 %
    assert rate.false_alarms == 0.01 and 0.01 < rate.allowed < 0.1
    assert rate.interval[0] <= rate.detected <= rate.interval[1] and "the guarantee allows" in describe([attack])


def test_what_a_persons_guarantee_allows_is_not_said_of_one_of_their_rows():
    """One release at σ = 2 of all units: Φ(Φ⁻¹(0.01) + 1/2) = 3.4 % for a row that is a unit, and no figure for a part
    of one."""
    facts = {
        "guarantee": "",
        "private": True,
        "delta": 1e-5,
        "units": 100,
        "adjacency": "add-or-remove-one",
        "subset": "all",
    }
    facts |= {
        "events": (Event(1, 2.0, 1.0),),
        "planned_steps": 1,
        "released_steps": 1,
        "clip": ClipFacts(rule="", clip_norm=1.0),
    }
    assert _allowed(RunRecord(unit="example", **facts))[1] == pytest.approx(0.034, abs=1e-3)
    assert _allowed(RunRecord(unit="patient_id", **facts)) == [None, None]


def test_a_folder_that_is_no_run_needs_a_recipe(runs, tmp_path):
    plain, _, tables = runs
    data = tables["data"]
    with pytest.raises(RecipeError, match="a recipe must say"):
        audit_membership(plain / "weights", data["train"], data["validation"])
    again = audit_membership(plain / "weights", data["train"], data["validation"], Recipe.read(plain / "recipe.toml"))
    assert again[0].auc == audit_membership(plain, data["train"], data["validation"])[0].auc
    with pytest.raises(RecipeError, match="members has no column"):
        (tmp_path / "other.csv").write_text("note\nkab")
        audit_membership(plain, str(tmp_path / "other.csv"), data["validation"])


def test_secrets_that_are_known_by_heart_are_exposed_and_said(runs):
    plain, private, _ = runs
    found = audit_exposure(plain, secrets=6, candidates=30)
    assert found.exposure > 3.5 and found.exposure > found.exposure_of_absent + 1.5
    assert found.extracted > found.extracted_of_absent == 0 and "Said aloud" in describe_exposure(found)
    hidden = audit_exposure(private, secrets=6, candidates=30)
    assert hidden.exposure < found.exposure and hidden.extracted == 0


def test_without_secrets_there_is_nothing_to_expose(tmp_path):
    with pytest.raises(RecipeError, match="--kind secret"):
        audit_exposure(tmp_path)
