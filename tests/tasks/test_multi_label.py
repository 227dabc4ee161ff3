"""Several labels for each text: how cells name them, their loss, and figures."""

import datasets
import numpy as np
import pytest
import torch
import transformers
from sklearn import metrics

from dpft.audit.canaries import Planting, make
from dpft.errors import RecipeError
from dpft.recipe import Recipe
from dpft.tasks import MultiLabel
from dpft.training.data import check
from tests.support.recipes import GOOD
from tests.support.texts import TEXTS, classifier, proven, tokenizer

LABELS = ["cough", "fever", "7"]
LISTS = [["cough"], [], ["7", "cough"], ["fever", "7", "cough"]]


def task(separator=None):
    return MultiLabel(tokenizer(), LABELS, separator=separator)


def tables(**settings):
    return {**GOOD, "task": {"name": "multi_label", "labels": LABELS, **settings}}


@pytest.mark.parametrize(
    ("separator", "cells"),
    [
        (None, LISTS),
        (None, [["cough"], [], [7, "cough"], ["fever", 7, "cough", "cough"]]),
        (";", ["cough", "", "7; cough", " fever ;7;;cough"]),
        (" | ", ["cough", " ", "7 | cough", "fever | 7 | cough"]),
    ],
)
def test_a_cell_is_a_list_or_a_text_with_separators(separator, cells):
    found = task(separator).encode({"text": TEXTS, "labels": cells})
    assert [one["labels"] for one in found] == [[1, 0, 0], [0, 0, 0], [1, 0, 1], [1, 1, 1]]
    assert not any(Recipe.parse(tables(separator=separator)).task.columns["labels"].fault(c, "labels") for c in cells)


@pytest.mark.parametrize(
    ("separator", "cell", "said"),
    [
        (None, "cough;fever", "has a text in column 'labels', not a list of labels: declare .* in task.separator"),
        (None, None, "not a list of labels"),
        (None, ["cough", "lupus"], "not among the 3 declared"),
        (None, ["cough", None], "has no label"),
        (";", ["cough"], "has a list in column 'labels', not a text of labels with ';' between them"),
        (";", None, "not a text of labels"),
        (";", "cough;lupus", "not among the 3 declared"),
        (",", "cough;fever", "not among the 3 declared"),
    ],
)
def test_what_names_no_declared_labels_is_refused_unquoted(separator, cell, said):
    """T14."""
    with pytest.raises(RecipeError, match=f"Row 2 of 2 .*{said}") as error:
        first = [] if separator is None else ""
        task(separator).encode({"text": ["w1"] * 2, "labels": [first, cell]})
    assert "lupus" not in str(error.value)


def test_a_separator_that_tears_a_label_is_refused():
    with pytest.raises(RecipeError, match="task.separator is 'u', which does not leave the label 'cough' whole"):
        Recipe.parse(tables(separator="u"))
    with pytest.raises(RecipeError, match="does not leave the label 'a ' whole"):
        Recipe.parse(tables(separator=";", labels=["a ", "b"]))
    assert Recipe.parse(tables(labels=["a ", "u;v"])).task.labels == ["a ", "u;v"]


@pytest.mark.parametrize("family", ["Bert", "GPT2"])
def test_its_gradients_are_exact_and_its_loss_is_the_model_s_own(family, plan):
    model = classifier(family, 3, "multi_label_classification")
    assert proven(task(), model, {"text": TEXTS, "labels": LISTS}, plan()).exact


def test_a_loss_is_the_mean_over_all_declared_labels():
    """T1: over those of the example alone, named or not, and over no other example's."""
    logits = torch.tensor([[2.0, -1.0, 0.5], [0.0, 3.0, -2.0]])
    labels = torch.tensor([[1.0, 0.0, 0.0], [0.0, 0.0, 0.0]])
    model = lambda **batch: transformers.modeling_outputs.SequenceClassifierOutput(logits=logits[: len(batch["at"])])
    found = task().losses(model, {"at": [0, 1], "labels": labels})
    expected = -(labels * logits.sigmoid().log() + (1 - labels) * (1 - logits.sigmoid()).log()).sum(1) / 3
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(task().losses(model, {"at": [0], "labels": labels[:1]}), expected[:1])


def test_a_model_of_other_outputs_is_refused():
    batch = task().collate(task().encode({"text": TEXTS, "labels": LISTS}))
    with pytest.raises(RecipeError, match="one for each of 3 declared labels: load it with num_labels=3"):
        task().losses(classifier("Bert", 2, "multi_label_classification"), batch)


def test_figures_are_those_of_scikit_learn():
    random = np.random.default_rng(0)
    wanted, logits = random.random((40, 3)) < (0.6, 0.2, 0.0), random.normal(size=(40, 3))
    logits += wanted
    named, likely = logits >= 0, torch.tensor(logits).float().sigmoid().numpy()
    some = iter(torch.tensor(logits).float().split(25))
    model = lambda **batch: transformers.modeling_outputs.SequenceClassifierOutput(logits=next(some))
    found = task().evaluate(model, [{"labels": part} for part in torch.tensor(wanted).float().split(25)])
    occur = [0, 1]  # nobody has the third
    each = metrics.precision_recall_fscore_support(wanted, named, labels=occur, zero_division=0)
    precise = [metrics.average_precision_score(wanted[:, i], likely[:, i]) for i in occur]
    assert found["micro_f1"] == pytest.approx(metrics.f1_score(wanted, named, average="micro"))
    assert found["macro_f1"] == pytest.approx(each[2].mean())
    assert found["average_precision"] == pytest.approx(np.mean(precise))
    assert found["subset_accuracy"] == pytest.approx(metrics.accuracy_score(wanted, named)) and found["examples"] == 40
    assert list(found["per_class"]) == LABELS[:2]
    for i, one in enumerate(found["per_class"].values()):
        figures = zip(("precision", "recall", "f1", "count", "average_precision"), (*each, precise), strict=True)
        assert one == {name: pytest.approx(values[i]) for name, values in figures}


def test_where_no_label_occurs_there_is_nothing_to_average():
    model = lambda **batch: transformers.modeling_outputs.SequenceClassifierOutput(logits=-torch.ones(2, 3))
    found = task().evaluate(model, [{"labels": torch.zeros(2, 3)}])
    assert found["micro_f1"] == found["macro_f1"] == found["average_precision"] == 0 and found["subset_accuracy"] == 1


@pytest.mark.parametrize("separator", [None, ";"])
def test_its_canaries_go_into_the_data(separator):
    recipe = Recipe.parse(tables(separator=separator))
    cells = LISTS if separator is None else [separator.join(one) for one in LISTS]
    rows = datasets.Dataset.from_dict({"text": TEXTS, "labels": cells})
    planted = make(Planting(canaries=20), recipe, task(separator)).planted(rows, recipe)
    check(planted, recipe.task, recipe.data, "data.train")
    assert len(planted) > len(rows) and planted.features == rows.features
