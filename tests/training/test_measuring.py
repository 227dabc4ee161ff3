"""Metrics by groups of rows, and calibration."""

import json

import datasets
import pytest
import torch
import transformers

from dpft.errors import RecipeError
from dpft.recipe import Recipe
from dpft.runs import RunFolder
from dpft.tasks.class_metrics import ClassMetrics
from dpft.training.data import MOST_GROUPS, check_groups, load
from dpft.training.measuring import measure
from dpft.workflows.train import train


class OfLogits:
    """Classifies rows whose logits are given; ``label`` is the class."""

    group = "clinic"

    def encode(self, rows):
        return [
            {"logits": logits, "labels": label} for logits, label in zip(rows["logits"], rows["label"], strict=True)
        ]

    def length(self, features):
        return 1

    def collate(self, features):
        return {key: torch.tensor([feature[key] for feature in features]) for key in features[0]}

    def metrics(self):
        return ClassMetrics(["a", "b", "c"])

    def evaluate(self, model, batches):
        metrics = self.metrics()
        for batch in batches:
            metrics.update(model, batch)
        return metrics.compute()


def model(logits):
    return transformers.modeling_outputs.SequenceClassifierOutput(logits=logits)


def sure(chosen, probability):
    """Logits of three classes that give ``chosen`` this probability."""
    other = torch.tensor((1 - probability) / 2).log().item()
    return [torch.tensor(probability).log().item() if i == chosen else other for i in range(3)]


ROWS = {
    "logits": [sure(0, 0.9), sure(0, 0.9), sure(1, 0.6), sure(2, 0.6), sure(0, 0.9)],
    "label": [0, 1, 1, 2, 0],
    "clinic": ["north", "south", "north", "south", "south"],
}


AS_DATASET = datasets.Dataset.from_dict(ROWS)


@pytest.mark.parametrize("rows", [AS_DATASET, list(AS_DATASET)])
def test_each_group_has_its_own_figures_and_the_whole_is_unchanged(rows):
    task = OfLogits()
    found = measure(rows, task, model)
    assert found.pop("groups") == {
        "north": {"accuracy": 1.0, "macro_f1": 1.0, "count": 2},
        "south": {"accuracy": pytest.approx(2 / 3), "macro_f1": pytest.approx((2 / 3 + 0 + 1) / 3), "count": 3},
    }
    task.group = None
    assert json.dumps(found) == json.dumps(measure(rows, task, model))


def test_calibration_compares_confidence_with_accuracy():
    task = OfLogits()
    task.group = None
    found = measure(AS_DATASET, task, model)
    six, nine = found["reliability"]
    assert six == {"confidence": pytest.approx(0.6), "accuracy": 1.0, "count": 2}
    assert nine == {"confidence": pytest.approx(0.9), "accuracy": pytest.approx(2 / 3), "count": 3}
    assert found["ece"] == pytest.approx((2 * 0.4 + 3 * (0.9 - 2 / 3)) / 5)


@pytest.mark.parametrize(
    ("values", "said"),
    [
        (["a", None], "row 2 has no group in column 'clinic'"),
        (["a", "  "], "row 2 has no group in column 'clinic'"),
        ([1.0, 2.0], "row 1 has a float, which is no group"),
        ([str(i) for i in range(MOST_GROUPS + 1)], "more than 100 values"),
    ],
)
def test_what_is_no_group_is_refused(values, said):
    with pytest.raises(RecipeError, match=said):
        check_groups(datasets.Dataset.from_dict({"clinic": values}), "clinic", "data.validation")


def test_a_missing_group_column_is_found_before_anything_is_charged(recipe):
    recipe["task"]["group"] = "nowhere"
    with pytest.raises(RecipeError, match="data.validation has no column 'nowhere' for task.group"):
        load(Recipe.parse(recipe))


def test_a_run_says_how_well_it_does_for_each_group(recipe, tmp_path):
    recipe["task"]["group"] = "patient"
    found = RunFolder(train(Recipe.parse(recipe), tmp_path / "run")).metrics()
    assert [group["count"] for group in found["groups"].values()] == [1] * 9
    right = sum(group["accuracy"] * group["count"] for group in found["groups"].values())
    assert right / found["examples"] == pytest.approx(found["accuracy"])
    assert 0 <= found["ece"] <= 1 and sum(one["count"] for one in found["reliability"]) == found["examples"]
