"""A number for each text: its declared range, its loss, and figures in its own units."""

import datasets
import numpy as np
import pytest
import torch
import transformers
from scipy.stats import pearsonr
from sklearn.metrics import mean_absolute_error, r2_score, root_mean_squared_error

from dpft.audit.canaries import Planting, make
from dpft.errors import RecipeError
from dpft.recipe import Recipe
from dpft.tasks import Regression
from dpft.training.data import check
from tests.support.recipes import GOOD
from tests.support.texts import TEXTS, classifier, proven, tokenizer

NUMBERS = [3, 20.5, -7, 11]


def task(**settings):
    return Regression(tokenizer(), **{"low": 0, "high": 20, **settings})


def tables(**settings):
    return {**GOOD, "task": {"name": "regression", "low": 0, "high": 20, **settings}}


def test_the_declared_range_becomes_minus_one_to_one_and_clips():
    found = task().encode({"text": TEXTS, "target": NUMBERS})
    assert [one["labels"] for one in found] == pytest.approx([-0.7, 1, -1, 0.1])


def test_a_number_s_scale_is_the_declared_one_whatever_else_the_data_hold():
    """T14."""
    (alone,) = task().encode({"text": TEXTS[:1], "target": [3]})
    assert alone == task().encode({"text": TEXTS, "target": [3, 1e6, -1e6, 0]})[0]


def test_a_text_file_s_digits_are_numbers():
    assert task().encode({"text": ["w1"], "target": ["12.5"]})[0]["labels"] == pytest.approx(0.25)


@pytest.mark.parametrize(("value", "said"), [(None, "no number"), ("high", "no finite number"), ("inf", "finite")])
def test_what_is_no_number_is_refused(value, said):
    with pytest.raises(RecipeError, match=f"Row 2 of 2 has .*{said}"):
        task().encode({"text": ["w1", "w2"], "target": [1, value]})
    rows = datasets.Dataset.from_dict({"text": ["w1", "w2"], "target": ["1", value]})
    recipe = Recipe.parse(tables())
    with pytest.raises(RecipeError, match=f"data.train row 2 has .*{said}"):
        check(rows, recipe.task, recipe.data, "data.train")


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"low": 20}, "task.low is 20 and task.high is 20, between which there is no number"),
        ({"high": float("inf")}, "task.high is inf, but input should be a finite number"),
    ],
)
def test_what_is_no_range_is_refused(settings, said):
    with pytest.raises(RecipeError, match=said):
        Recipe.parse(tables(**settings))
    undeclared = {**tables(), "task": {"name": "regression", "low": 0}}
    with pytest.raises(RecipeError, match="The recipe lacks task.high"):
        Recipe.parse(undeclared)


@pytest.mark.parametrize("family", ["Bert", "GPT2"])
def test_its_gradients_are_exact_and_its_loss_is_the_model_s_own(family, plan):
    rows = {"text": TEXTS, "target": NUMBERS}
    assert proven(task(), classifier(family, 1, "regression"), rows, plan()).exact


def test_a_model_of_several_outputs_is_refused():
    batch = task().collate(task().encode({"text": TEXTS, "target": NUMBERS}))
    with pytest.raises(RecipeError, match="several outputs .*: load it with num_labels=1"):
        task().losses(classifier("Bert", 3, "regression"), batch)


def outputs(values):
    return lambda **batch: transformers.modeling_outputs.SequenceClassifierOutput(logits=torch.tensor(values)[:, None])


def test_figures_are_in_the_target_s_units():
    wanted, said = np.array([3, 20, 0, 11]), np.array([5, 14, 1, 16])
    made = task()
    batch = {"input_ids": None, "labels": torch.tensor([made.scaled(one) for one in wanted])}
    found = made.evaluate(outputs([made.scaled(one) for one in said]), [batch])
    assert found == {
        "mae": pytest.approx(mean_absolute_error(wanted, said), rel=1e-5),
        "rmse": pytest.approx(root_mean_squared_error(wanted, said), rel=1e-5),
        "r2": pytest.approx(r2_score(wanted, said), rel=1e-5),
        "pearson": pytest.approx(pearsonr(wanted, said)[0], rel=1e-5),
        "at_an_end": 0.5,
        "examples": 4,
    }


def test_outputs_beyond_the_range_say_its_end_and_what_is_no_number_its_middle():
    batch = {"input_ids": None, "labels": torch.tensor([1.0, -1.0, 0.0])}
    found = task().evaluate(outputs([7.0, -torch.inf, torch.nan]), [batch])
    assert found["mae"] == 0 and found["r2"] == 1


def test_where_nothing_varies_there_is_no_correlation():
    batch = {"input_ids": None, "labels": torch.tensor([0.5, 0.5])}
    found = task().evaluate(outputs([0.5, 0.0]), [batch])
    assert found["r2"] == found["pearson"] == 0 and found["mae"] == 2.5


def test_its_canaries_go_into_a_file_of_texts():
    recipe = Recipe.parse(tables())
    rows = datasets.Dataset.from_dict({"text": TEXTS, "target": list(map(str, NUMBERS))})
    planted = make(Planting(canaries=20), recipe, task()).planted(rows, recipe)
    check(planted, recipe.task, recipe.data, "data.train")
    assert len(planted) > len(rows) and planted.features == rows.features


def test_a_decoder_without_a_padding_token_pads_with_what_its_model_takes_for_padding(plan):
    """T2: another token would move the place where the model reads the text's end."""
    made = Regression(tokenizer(pad_token=None), 0, 20)
    model = classifier("GPT2", 1, "regression")
    model.config.pad_token_id = made.tokenizer.eos_token_id  # as Source.labelled_model has it
    assert proven(made, model, {"text": TEXTS, "target": NUMBERS}, plan()).isolated
