"""T19, T22: nothing trains but what the engine released, and nothing is claimed that was not proven."""

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn

from dpft.errors import BudgetError, BypassError, GuaranteeError
from dpft.gradients.engine import Engine
from dpft.gradients.preflight import preflight
from dpft.privacy.noise import SecureRandomness
from dpft.privacy.plan import Plan


class Silent(SecureRandomness):
    def gaussians(self, n, device=None):
        yield torch.zeros(n, dtype=torch.float64)


@pytest.fixture
def model():
    torch.manual_seed(0)
    return nn.Linear(8, 1, bias=False)


def plan(**fields):
    return Plan(**{"noise_multiplier": 1.0, "sample_rate": 1.0, "steps": 4, "delta": 1e-3, "units": 8, **fields})


# -- units -------------------------------------------------------------------------------------------------------------

SEVEN = {
    "numbers": [7] * 8,
    "a tensor": torch.full((8,), 7),
    "tensors": list(torch.full((8,), 7)),
    "an array": np.full(8, 7),
    "numpy's numbers": list(np.full(8, 7, dtype=np.int32)),
    "texts": np.array(["p7"] * 8),
    "pairs with a tensor": [("ward", torch.tensor(7)) for _ in range(8)],
    "pairs of pairs": [(("ward", torch.tensor(7)), 1) for _ in range(8)],
    "days": [np.datetime64("2026-01-07")] * 8,
    "a column of categories": pd.Series(["p7"] * 8, dtype="category"),
}


@pytest.mark.parametrize("unit_gradient", ["sum", "mean"])
@pytest.mark.parametrize("cut", [8, 4, 1])
@pytest.mark.parametrize("kind", SEVEN)
def test_eight_rows_of_one_person_move_the_sum_by_one_clip(model, kind, cut, unit_gradient):
    """T16: as tensors they were eight people, and moved it by 2.83 C."""
    inputs = torch.eye(8) * 100
    with Engine(model, plan(unit="patient_id", unit_gradient=unit_gradient, examples_per_unit=8), Silent()) as engine:
        for start in range(0, 8, cut):
            some = slice(start, start + cut)
            engine.accumulate(model(inputs[some]).squeeze(1), SEVEN[kind][some])
        engine._close_open_unit()
        assert float(engine._sum().norm()) == pytest.approx(1.0, abs=1e-6) and engine.nonfinite_units == 0


@pytest.mark.parametrize(
    "bad",
    [None, float("nan"), torch.tensor(float("nan")), np.nan, [7], {7}, torch.zeros(2), (1, None), (1, (2, np.nan))]
    + [pd.NA, pd.NaT, frozenset([7]), object(), "7"],
)
def test_a_unit_that_is_nobody_or_several_is_refused(model, bad):
    with Engine(model, plan(), Silent()) as engine, pytest.raises(GuaranteeError, match="place 1"):
        engine.accumulate(model(torch.eye(8)[:3]).squeeze(1), [1, bad, 2])


def test_a_person_who_comes_back_after_another_is_refused(model):
    """T16: the first row closes where the second person begins; clipped once more it would move the sum by 2 C."""
    with Engine(model, plan(unit="patient_id", examples_per_unit=2), Silent()) as engine:
        for row, unit in enumerate(("first", "second")):
            engine.accumulate(model(torch.eye(8)[row : row + 1] * 100).squeeze(1), [unit])
        with pytest.raises(GuaranteeError, match="'first' came back"):
            engine.accumulate(model(torch.eye(8)[:1] * 100).squeeze(1), ["first"])


def test_a_person_whose_step_was_given_up_is_in_no_other(model):
    """T22: their second row might have come; the next release is of nobody, a sum of zero."""
    with Engine(model, plan(unit="patient_id", examples_per_unit=2), Silent()) as engine:
        engine.accumulate(model(torch.eye(8)[:1] * 100).squeeze(1), ["first"])
        engine.discard()
        engine.release()
    assert model.weight.grad.tolist() == [[0.0] * 8]


def test_units_are_needed_where_people_are_protected(model):
    """T22: without them every row is a unit, and four rows of a person are 2 C."""
    with Engine(model, plan(unit="patient_id"), Silent()) as engine:
        with pytest.raises(GuaranteeError, match="no units were given"):
            engine.accumulate(model(torch.eye(8)).squeeze(1))


# -- what an optimizer holds -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("where", ["beside the model's", "by itself"])
def test_a_tensor_that_is_not_the_models_never_trains(model, where):
    soft = torch.zeros(8, requires_grad=True)
    own = list(model.parameters())
    optimizer = torch.optim.SGD([*own, soft] if where == "beside the model's" else [soft], lr=1.0)
    with Engine(model, plan(), Silent()) as engine:
        engine.accumulate(model(torch.eye(8) + soft).squeeze(1))
        assert soft.grad is None  # it held the plain sum
        engine.release()
        soft.grad = torch.ones(8)
        with pytest.raises(BypassError, match="holds a tensor of shape \\(8,\\) that the losses depend on"):
            optimizer.step()
    assert not soft.any()


def test_a_tensor_that_comes_with_a_later_micro_batch_is_noticed(model):
    soft = torch.zeros(8, requires_grad=True)
    optimizer = torch.optim.SGD([soft], lr=1.0)
    with Engine(model, plan(), Silent()) as engine:
        engine.accumulate(model(torch.eye(8)[:4]).squeeze(1))
        engine.accumulate(model(torch.eye(8)[4:] + soft).squeeze(1))
        engine.release()
        assert soft.grad is None
        with pytest.raises(BypassError):
            optimizer.step()


def test_a_second_tensor_over_a_parameters_memory_never_trains(model):
    """It is no parameter of the model, and a step on it moves one all the same."""
    twin = model.weight.detach().requires_grad_()
    optimizer, before = torch.optim.SGD([twin], lr=1.0), model.weight.detach().clone()
    with Engine(model, plan(), Silent()) as engine:
        engine.accumulate(model(torch.eye(8)).squeeze(1) + twin.sum())
        engine.release()
        twin.grad = torch.ones_like(twin)
        with pytest.raises(BypassError, match="that the losses depend on and the model lacks"):
            optimizer.step()
    assert torch.equal(model.weight, before)


def test_a_gradient_clipped_again_after_its_release_is_refused_with_the_reason(model):
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    with Engine(model, plan(), Silent()) as engine:
        engine.accumulate(model(torch.eye(8)).squeeze(1))
        engine.release()
        nn.utils.clip_grad_norm_(model.parameters(), 1e-3)
        with pytest.raises(BypassError, match="weight was changed after engine.release, as by clip_grad_norm_"):
            optimizer.step()


@pytest.mark.parametrize("as_keyword", [True, False])
def test_a_closure_is_refused(model, as_keyword):
    """It runs after the gradients were checked, and leaves others."""
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)

    def closure():
        model.weight.grad = torch.full_like(model.weight, 5.0)
        return torch.zeros(())

    before = model.weight.detach().clone()
    with Engine(model, plan(), Silent()) as engine:
        engine.accumulate(model(torch.eye(8)).squeeze(1))
        engine.release()
        with pytest.raises(BypassError, match="closure"):
            optimizer.step(closure=closure) if as_keyword else optimizer.step(closure)
    assert torch.equal(model.weight, before)


# -- releases that fail ------------------------------------------------------------------------------------------------


class Cut(Exception):
    pass


@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt, Cut])
@pytest.mark.parametrize("place", ["the charge", "the noise"])
def test_a_release_that_fails_is_forgotten(model, place, error):
    """T9, T22: its draw would join the next, and two draws would get one noise."""
    calls = []

    def once(*_):
        calls.append(1)
        if len(calls) == 1:
            raise error
        return iter([torch.zeros(8, dtype=torch.float64)])

    source, charge = Silent(), None
    if place == "the charge":
        charge = once
    else:
        source.gaussians = once
    with Engine(model, plan(), source, before_release=charge) as engine:
        engine.accumulate(model(torch.eye(8)[:4] * 9).squeeze(1), range(4))
        with pytest.raises(error):
            engine.release()
        assert engine._total is None and model.weight.grad is None
        assert engine.steps_released == (place == "the noise")  # what was charged counts
        engine.accumulate(model(torch.eye(8)[4:] * 9).squeeze(1), range(4, 8))
        engine.release()
    assert not model.weight.grad[0, :4].any() and model.weight.grad[0, 4:].all()


def test_a_release_beyond_the_plan_is_refused_and_forgotten(model):
    with Engine(model, plan(steps=1), Silent()) as engine:
        engine.release()
        engine.accumulate(model(torch.eye(8)).squeeze(1))
        with pytest.raises(BudgetError):
            engine.release()
        assert engine._total is None


# -- what is claimed ---------------------------------------------------------------------------------------------------


def test_nothing_is_claimed_before_the_proof(model):
    """T22: a model with BatchNorm moved by 22 C under the same sentence."""
    examples = list(torch.randn(3, 8))
    losses = lambda some: model(torch.stack(some)).squeeze(1)
    with Engine(model, plan()) as engine:
        assert engine.guarantee == "Nothing was released."
        preflight(engine, losses, examples)
        engine.release()
        assert engine.guarantee.startswith("(ε = ")
    with Engine(model, plan()) as engine:
        engine.release()
        assert engine.guarantee.startswith("NOT PROVEN: 1 of 1 steps") and "ε" not in engine.guarantee
        preflight(engine, losses, examples)
        engine.release()
        assert engine.guarantee.startswith("NOT PROVEN: 1 of 2 steps")  # what was released stays what it was


# -- chance ------------------------------------------------------------------------------------------------------------


def test_every_steps_dropout_is_secret_and_its_own(model):
    """T20: under a published seed a unit that leaves gives all others other masks, and the sum moves by many times the
    clip."""
    drop, masks = nn.Dropout(0.5), []
    for _ in range(2):
        torch.manual_seed(42)
        with Engine(model, plan(), Silent()) as engine:
            for _ in range(2):
                masks.append(tuple(drop(torch.ones(64)).tolist()))
                engine.release()
        masks.append(tuple(drop(torch.ones(64)).tolist()))
    assert len(set(masks)) == 5 and masks[2] == masks[5]  # the engine's are secret; afterwards the seed's go on


def test_a_step_whose_generator_was_seeded_is_refused(model):
    with Engine(model, plan(), Silent()) as engine:
        torch.manual_seed(42)
        with pytest.raises(GuaranteeError, match="seeded torch's generator during the step"):
            engine.accumulate(model(torch.eye(8)).squeeze(1))
        engine.renew_chance()
        engine.accumulate(model(torch.eye(8)).squeeze(1))
