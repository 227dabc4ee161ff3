"""T21, T11: units are added up in float64, each rounded by itself alone, and noise is added before anything is
rounded."""

import numpy as np
import pytest
import torch
from torch import nn

from dpft.gradients.batch_gradients import BatchGradients
from dpft.gradients.engine import Engine
from dpft.privacy.noise import SeededRandomness
from dpft.privacy.plan import Plan


class Silent(SeededRandomness):
    """No noise, so that what is released times B is the clipped sum."""

    def gaussians(self, n, device=None):
        yield torch.zeros(n, dtype=torch.float64)


def clipped_sum(model, inputs, together, output=lambda y: y.flatten(1)[:, 0]):
    plan = Plan(noise_multiplier=1.0, sample_rate=1.0, steps=1, delta=1e-9, units=len(inputs))
    with Engine(model, plan, Silent(0)) as engine:
        for some in inputs.split(together):
            engine.accumulate(output(model(some)))
        return engine._sum().clone()


# One unit lifts a total in float32 over a power of two, and every later one is then rounded up: 2 C for one unit.
HALF = 4096
REST = [1.0] * (HALF - 1) + [2.0**-12 * (1 + 2**-6)] * HALF


@pytest.mark.parametrize("together", [1, 64, 8192])
@pytest.mark.parametrize("width", [1, 300], ids=["small weight", "large weight"])
def test_one_unit_of_eight_thousand_moves_the_sum_by_the_clip(width, together):
    model = nn.Linear(width, width, bias=False)
    totals = []
    for values in ([1.0, *REST], REST):
        inputs = torch.zeros(len(values), width)
        inputs[:, 0] = torch.tensor(values)
        totals.append(clipped_sum(model, inputs, 8 if width > 1 and together == 1 else together))
    assert float((totals[0] - totals[1]).norm()) <= 1 + 1e-6


@pytest.mark.parametrize("tokens", [1, 8, 40])
def test_a_large_weight_is_added_up_example_by_example(tokens):
    """With few tokens in one product of float64, with many each example's product by itself."""
    torch.manual_seed(0)
    model, inputs = nn.Linear(300, 300, bias=False), torch.randn(12, tokens, 300)
    output = lambda y: y.square().sum((1, 2))
    whole = clipped_sum(model, inputs, 12, output)
    parts = clipped_sum(model, inputs, 1, output)
    assert whole.dtype == torch.float64
    assert float((whole - parts).norm()) < 1e-5 * float(parts.norm())
    exact = torch.zeros(300, 300, dtype=torch.float64)
    for x in inputs.double():
        w = model.weight.double().detach().requires_grad_()
        (x @ w.T).square().sum().backward()
        exact += w.grad / w.grad.norm().clamp_min(1.0)
    assert float((whole.view(300, 300) - exact).norm()) < 1e-5 * float(exact.norm())


def test_rows_of_an_embedding_are_added_up_in_float64():
    table, totals = nn.Embedding(1 << 16, 1), []
    for values in ([1.0, *REST], REST):
        scales = torch.tensor(values).unsqueeze(1)
        plan = Plan(noise_multiplier=1.0, sample_rate=1.0, steps=1, delta=1e-9, units=len(values))
        with Engine(table, plan, Silent(0)) as engine:
            for some in scales.split(512):
                engine.accumulate((table(torch.full((len(some), 1), 7)) * some.unsqueeze(2)).flatten())
            totals.append(engine._sum().clone())
    assert float((totals[0] - totals[1]).norm()) <= 1 + 1e-6


def test_half_precision_by_default_does_not_reach_the_sum():
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        model = nn.Linear(1, 1, bias=False)
        plan = Plan(noise_multiplier=1.0, sample_rate=1.0, steps=1, delta=1e-9, units=300)
        with Engine(model, plan, Silent(0)) as engine:
            for _ in range(300):
                engine.accumulate(model(torch.ones(1, 1)).squeeze(1))
            assert engine._sum().dtype == torch.float64 and float(engine._sum()[0]) == 300.0
            assert engine.capture._workspace.dtype == torch.float32
    finally:
        torch.set_default_dtype(before)


@pytest.mark.parametrize("units", [0, 3])
def test_what_is_released_is_the_noisy_mean_rounded_once(units):
    """Noise that is rounded before it is added lies on a grid that a unit's own digits leave: one number would tell."""
    torch.manual_seed(1)
    size, plan = 4000, Plan(noise_multiplier=0.7, sample_rate=0.5, steps=1, delta=1e-3, units=8)
    model, inputs = nn.Linear(size, 1, bias=False), torch.randn(units, 4000)
    with Engine(model, plan, SeededRandomness(3)) as engine:
        if units:
            engine.accumulate(model(inputs).squeeze(1))
        exact = engine._sum().clone()
        engine.release()
    noise = torch.cat([part.clone() for part in SeededRandomness(3).gaussians(size)])
    wanted = ((exact + noise * plan.noise_std) / plan.expected_batch_size).float()
    assert torch.equal(model.weight.grad[0], wanted)


def test_ten_thousand_units_of_a_real_shape_differ_by_their_own_clipped_gradient(case):
    """A whole model, in micro-batches of any cut: the unit that leaves takes its own part along, and others stay where
    they were."""
    made = case("gpt2", tuner="lora")
    examples = (made.examples * 40)[:100]
    plan = Plan(noise_multiplier=1.0, sample_rate=1.0, steps=1, delta=1e-5, units=10_000)
    with Engine(made.model, plan, Silent(0)) as engine:
        made.model.eval()
        rows = engine.capture.rows(made.losses(examples)).clone()
        factors = plan.clip.factors(rows.norm(dim=1))
        order = np.random.default_rng(0).integers(0, 100, 10_000)
        sums = []
        for some in (order, order[1:]):
            total = torch.zeros(engine.capture.map.size, dtype=torch.float64)
            for start in range(0, len(some), 64):
                part = torch.from_numpy(some[start : start + 64])
                BatchGradients(rows[part].clone()).add_to(total, factors[part])
            sums.append(total)
    moved = sums[0] - sums[1]
    assert float(moved.norm()) <= plan.clip.sensitivity * (1 + 1e-6)
    own = rows[order[0]].double() * factors[order[0]].double()
    assert float((moved - own).norm()) < 1e-9
