"""A head in the span of public sentences."""

from dataclasses import replace

import pytest
import torch

from dpft.errors import RecipeError
from dpft.privacy.mechanisms.linear_head import Sums
from dpft.privacy.noise import SeededRandomness
from dpft.recipe import Recipe
from dpft.subset.evaluating import evaluating
from dpft.tasks.task import made_up
from dpft.training.features import features_of, output_layer
from dpft.training.head import HeadSession, spanned
from dpft.workflows.setup import set_up
from dpft.workflows.train import train

HINTS = ["w1 w2 w3", "w4", "w4", "w7 w2"]


@pytest.fixture
def tables(recipe):
    privacy = {"epsilon": 8.0, "delta": 1e-3, "steps": 20}
    return {**recipe, "subset": "head", "privacy": privacy, "task": {**recipe["task"], "hints": HINTS}}


@pytest.fixture
def session(tables, tmp_path):
    setup, plan = set_up(Recipe.parse(tables)), Recipe.parse(tables).plan()
    randomness = SeededRandomness(0)
    return HeadSession(setup.model, plan, setup.task, setup.train, tmp_path / "run", randomness=randomness)


def hint_features(session):
    with evaluating(session.model), torch.no_grad():
        head = output_layer(session.model, made_up(session.task))
        given = [features_of(session.model, head, session.collated([one])) for one in session.task.hinted()]
    return torch.cat(given).double(), head


def test_the_head_is_learned_in_the_span_and_equals_one_of_its_coordinates(session):
    session.solve()
    hints, head = hint_features(session)
    basis = session._span(head).double()
    assert basis.shape[0] == 3  # of four hints two say the same
    assert torch.allclose(basis @ basis.T, torch.eye(3).double(), atol=1e-6)
    assert torch.allclose(hints @ basis.T @ basis, hints, atol=1e-5)
    weight = session.model.classifier.weight.detach().double()
    assert torch.allclose(weight @ basis.T @ basis, weight, atol=1e-5) and weight.abs().max() > 1e-3
    few = spanned(session.features, basis.float())
    number = round(session.plan.expected_batch_size)
    sums = Sums(session.plan.noise_multiplier, SeededRandomness(0))
    found = session.plan.mechanism.fit(few, sums, number)
    assert torch.allclose(found.weight @ basis, weight, atol=1e-4)


def test_the_span_does_not_follow_the_training_data(session, tmp_path):
    """T14."""
    _, head = hint_features(session)
    rows = session.rows.select(range(10))
    other = HeadSession(session.model, session.plan, session.task, rows, tmp_path / "other")
    with evaluating(session.model):
        assert torch.equal(session._span(head), other._span(head))
    hints, _ = hint_features(session)
    basis = session._span(head).double()
    assert torch.allclose(hints @ basis.T @ basis, hints, atol=1e-5)


def test_hints_make_descent_the_method_of_few_units(tables, tmp_path):
    assert Recipe.parse(tables).method == "head-descent"
    without = {**tables, "task": {**tables["task"], "hints": []}}
    assert Recipe.parse(without).method == "head-centred"
    train(Recipe.parse(tables), tmp_path / "run")
    with pytest.raises(RecipeError, match=r"task\.hints is set"):
        Recipe.parse({**tables, "privacy": {**tables["privacy"], "batch_size": 8}})


def test_rows_that_count_alike_and_balance_reach_the_sums(tables, tmp_path):
    """T16: what the recipe says of a unit's rows is what the head is learned with."""
    from dpft.workflows.setup import make_trainer

    data = {**tables["data"], "unit": "patient", "units": 12, "examples_per_unit": 4, "unit_gradient": "sum"}
    recipe = Recipe.parse({**tables, "data": data, "task": {**tables["task"], "balance": 0.5}})
    trainer = make_trainer(set_up(recipe), tmp_path / "run", randomness=SeededRandomness(0))
    session = trainer.session
    session.solve()
    basis = session._span(hint_features(session)[1])
    few = replace(spanned(session.features, basis), rows_per_unit=4, balance=0.5)
    sums = Sums(session.plan.noise_multiplier, SeededRandomness(0))
    found = session.plan.mechanism.fit(few, sums, round(session.plan.expected_batch_size))
    torch.testing.assert_close(session.model.classifier.bias.detach().double(), found.bias, rtol=1e-4, atol=1e-4)


def test_a_head_by_itself_alone_has_a_balance(tables):
    tables["task"] = {**tables["task"], "hints": [], "balance": 0.5}
    assert Recipe.parse(tables).learns_head
    with pytest.raises(RecipeError, match=r"task\.balance is set"):
        Recipe.parse({**tables, "privacy": {"epsilon": 8.0, "delta": 1e-3, "steps": 20, "batch_size": 8}})
    mean = {**tables["data"], "unit": "patient", "units": 12, "examples_per_unit": 4}
    with pytest.raises(RecipeError, match=r"data\.examples_per_unit is set"):
        Recipe.parse({**tables, "data": mean})
