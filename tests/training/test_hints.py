"""A head in the span of public sentences."""

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
    assert Recipe.parse(without).method == "head-prototypes"
    train(Recipe.parse(tables), tmp_path / "run")
    with pytest.raises(RecipeError, match=r"task\.hints is set"):
        Recipe.parse({**tables, "privacy": {**tables["privacy"], "batch_size": 8}})
