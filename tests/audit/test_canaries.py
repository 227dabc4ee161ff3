"""Canaries are made of public material, are units of their own, and go where their coins say."""

import json
import stat
from pathlib import Path

import numpy as np
import pytest

from dpft.audit.canaries import Canaries, Canary, Planting, columns, features, make
from dpft.errors import RecipeError
from dpft.privacy.noise import SeededRandomness
from dpft.recipe import Recipe
from dpft.tasks.losses import IGNORED
from dpft.training.data import load
from dpft.workflows.setup import load_model


def planted(tables, kind, number=20, **options):
    recipe = Recipe.parse(tables)
    rows, validation = load(recipe)
    planting = Planting(canaries=number, kind=kind, **options)
    return recipe, rows, make(planting, recipe, load_model(recipe)[0], validation)


def test_every_coin_decides_for_its_canary(language):
    recipe, rows, canaries = planted(language, "random-tokens", repetitions=2)
    whole = canaries.planted(rows, recipe)
    texts = list(whole["text"])
    for canary, inside in zip(canaries.canaries, canaries.included, strict=True):
        assert texts.count(canary.text) == (2 if inside else 0)
    assert len(whole) == len(rows) + 2 * canaries.included.sum() and set(rows["text"]) <= set(texts)
    assert texts[: len(rows)] != list(rows["text"])  # their place does not give them away
    assert canaries.units == 20


def test_coins_are_fair_and_fresh(language):
    first, second = (planted(language, "random-tokens", 400)[2] for _ in range(2))
    assert (first.included != second.included).any() and first.canaries[0] != second.canaries[0]
    assert 140 < first.included.sum() < 260
    seeded = [planted(language, "random-tokens", randomness=SeededRandomness(1))[2] for _ in range(2)]
    assert (seeded[0].included == seeded[1].included).all()


@pytest.mark.parametrize("unit", ["patient", "number"])
def test_a_canary_is_nobody_s_unit(recipe, unit):
    recipe["data"]["unit"], recipe["data"]["units"] = unit, 12
    path = recipe["data"]["train"]
    lines = Path(path).read_text().splitlines()
    more = [lines[0] + ",number"] + [f"{line},{i % 12}" for i, line in enumerate(lines[1:])]
    Path(path).write_text("\n".join(more))
    recipe["data"].pop("validation")
    found = Recipe.parse(recipe)
    rows, _ = load(found)
    canaries = make(Planting(canaries=10, kind="random-tokens", repetitions=2), found, load_model(found)[0])
    whole = canaries.planted(rows, found)
    owners = list(whole[unit])
    mine = set(owners) - set(rows[unit])
    assert len(mine) == 2 * canaries.included.sum() and all(owners.count(one) == 1 for one in mine)


def test_a_new_token_is_another_for_each_and_alone_is_judged(language):
    recipe, _, canaries = planted(language, "new-token")
    task, _ = load_model(recipe)
    last = set()
    for one in features(canaries.canaries, recipe, task):
        judged = [label for label in one["labels"] if label != IGNORED]
        assert len(judged) == 1
        last.update(judged)
    assert len(last) == 20


def test_of_a_secret_only_the_code_is_judged(language):
    recipe, _, canaries = planted(language, "secret")
    task, _ = load_model(recipe)
    for canary, one in zip(canaries.canaries, features(canaries.canaries, recipe, task), strict=True):
        judged = [label for label in one["labels"] if label != IGNORED]
        assert task.tokenizer.decode(judged).replace(" ", "") == canary.secret + "."
        assert canary.cue.endswith("is") and canary.secret not in canary.cue


def test_a_mislabelled_row_has_another_label(recipe):
    recipe["data"]["validation"] = recipe["data"]["train"]
    found, _, canaries = planted(recipe, "mislabelled", 10)
    _, public = load(found)
    rows = list(zip(public["text"], public["label"], strict=True))
    for canary in canaries.canaries:
        labels = {label for text, label in rows if text == canary.record["text"]}
        other = canary.record["label"]
        assert labels and (other not in labels or len(labels) > 1) and other in "abc"


def test_labels_are_written_as_the_data_write_them(recipe):
    recipe["task"]["labels"] = ["True", "False"]
    found = Recipe.parse(recipe)
    values = {"True": True, "False": False}
    assert columns(Canary({"text": "w1", "label": "False"}), found, values)["label"] is False
    assert columns(Canary({"text": "w1", "label": "2"}), found, {"1": 1})["label"] == 2


def test_what_max_length_cuts_off_is_refused_before_training(language):
    language["task"]["max_length"] = 12
    recipe, _, canaries = planted(language, "secret")
    with pytest.raises(RecipeError, match="raise it to"):
        features(canaries.canaries, recipe, load_model(recipe)[0])


def test_prompts_and_responses(language):
    language["task"] |= {"prompt": "question", "response": "answer"}
    recipe = Recipe.parse(language)
    task, _ = load_model(recipe)
    import datasets

    rows = datasets.Dataset.from_dict({"question": ["kab kac"] * 3, "answer": ["kad"] * 3})
    canaries = make(Planting(canaries=10, kind="secret"), recipe, task)
    row = columns(canaries.canaries[0], recipe)
    assert row["question"].endswith("is") and canaries.canaries[0].secret in row["answer"]
    assert len(canaries.planted(rows, recipe)) == 3 + canaries.included.sum()
    random = columns(make(Planting(canaries=10, kind="random-tokens"), recipe, task).canaries[0], recipe)
    assert len(random["question"].split()) == 4 and len(random["answer"].split()) == 12


def test_they_are_kept_for_the_scoring_alone(language, tmp_path):
    _, _, canaries = planted(language, "secret")
    path = tmp_path / "private" / "canaries.json"
    canaries.save(path)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600 and "included" in json.loads(path.read_text())
    again = Canaries.load(path)
    assert again.canaries == canaries.canaries and (again.included == canaries.included).all()


@pytest.mark.parametrize(
    ("kind", "number", "said"),
    [
        ("mislabelled", 20, "causal_lm has none"),
        ("random-tokens", 5, "show nothing"),
        ("random-words", 20, "choose one of random-tokens"),
        ("new-token", 10_000, "rare words of one token"),
    ],
)
def test_what_shows_nothing_is_refused(language, kind, number, said):
    with pytest.raises(RecipeError, match=said):
        planted(language, kind, number)


@pytest.mark.parametrize(
    ("kind", "said"), [("secret", "says nothing"), ("new-token", "says nothing"), ("mislabelled", "data.public")]
)
def test_a_classifier_s_canaries(recipe, kind, said):
    with pytest.raises(RecipeError, match=said):
        planted(recipe, kind, 20)


def test_random_labels_are_declared_ones(recipe):
    _, _, canaries = planted(recipe, "random-tokens", 60)
    assert {canary.record["label"] for canary in canaries.canaries} == {"a", "b", "c"}
    assert len({canary.record["text"] for canary in canaries.canaries}) == 60
    assert np.mean([len(canary.record["text"].split()) for canary in canaries.canaries]) == 12
