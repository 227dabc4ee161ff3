"""What bounds a unit is computed in float32, whatever the model is computed in."""

from contextlib import nullcontext

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import dpft.gradients.capture_map as capture_map
from dpft.gradients.engine import Engine
from dpft.gradients.precision import full_precision, precise_bmm
from dpft.gradients.rules import linear
from dpft.gradients.rules.linear import Product
from dpft.privacy.clipping import FlatClip
from dpft.privacy.plan import Plan
from dpft.subset import Subset
from dpft.training.tuning import SavedBytes

aten = torch.ops.aten
PRODUCTS = (aten.bmm, aten.addmm_, aten.addmv_, aten.mm, aten.mv)


@pytest.fixture(params=["medium", "high", "highest"])
def allowed(request):
    """What the process allows for float32 products."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(request.param)
    yield request.param
    torch.set_float32_matmul_precision(before)


class Watch(TorchDispatchMode):
    """Which precision each matrix product was computed in."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket in PRODUCTS:
            self.seen.append((torch.backends.cuda.matmul.fp32_precision, torch.backends.mkldnn.matmul.fp32_precision))
        return func(*args, **(kwargs or {}))


def test_norms_and_sums_are_not_rounded_by_tf32(allowed, monkeypatch):
    """T6: a norm and the gradient's part of the sum, each rounded in its own way, need not bound each other."""
    monkeypatch.setattr(capture_map, "LARGE", 20)
    monkeypatch.setattr(
        linear, "OPERATIONS_PER_NUMBER", 1
    )  # so that with 2 tokens the norm alone is cheaper, with 9 not
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 2))
    plan = Plan(noise_multiplier=0.0, sample_rate=1.0, steps=5, delta=1e-3, units=4)
    for tokens in (2, 9):
        with Engine(model, plan) as engine:
            losses = model(torch.randn(4, tokens, 6)).square().sum((1, 2))
            gradients = engine.capture.gradients(losses)
            unmade = [large for large in gradients.large.values() if isinstance(large.gradient, Product)]
            with Watch() as watch:
                for large in unmade:
                    large.gradient.squared_norms()
                gradients.add_to(torch.zeros(engine.capture.map.size), torch.ones(4))
        assert len(unmade) == (tokens == 2)
        assert watch.seen == [("ieee", "ieee")] * (2 + 2 * len(unmade))
    assert torch.get_float32_matmul_precision() == allowed
    assert torch.backends.cuda.matmul.allow_tf32 == (allowed != "highest")


def test_what_a_backend_was_allowed_is_kept_as_well():
    """``TrainingArguments.tf32`` sets one, which PyTorch's older setting does not know."""
    backend = torch.backends.cuda.matmul
    before = backend.fp32_precision
    backend.fp32_precision = "tf32"
    try:
        with full_precision():
            assert backend.fp32_precision == "ieee"
        assert backend.fp32_precision == "tf32"
    finally:
        backend.fp32_precision = before


def test_what_was_allowed_is_allowed_again_after_an_error(allowed):
    with pytest.raises(ZeroDivisionError), full_precision():
        raise ZeroDivisionError
    assert torch.backends.cuda.matmul.allow_tf32 == (allowed != "highest")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_factors_lose_nothing_more(dtype):
    """T6: their products are exact in float32; a norm or a sum in bfloat16 would be off by a thousandth and more."""
    torch.manual_seed(0)
    product = Product.of(torch.randn(3, 50, 8).to(dtype), torch.randn(3, 50, 6).to(dtype))
    truth = torch.bmm(product.left.double().mT, product.right.double())
    norms = truth.flatten(1).norm(dim=1)
    rounded = torch.bmm(product.left.mT, product.right)
    assert (rounded.double() - truth).norm() > 1e-4 * truth.norm()  # the test could fail
    torch.testing.assert_close(product.materialize().double(), truth, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(precise_bmm(product.left.mT, product.right), product.materialize())
    torch.testing.assert_close(product.squared_norms().sqrt().double(), norms, rtol=3e-5, atol=0)
    written, total = torch.empty(3, 8, 6), torch.zeros(8, 6)
    product.write(written)
    assert torch.equal(written, product.materialize())
    product.add_to(total, 1 / norms.float())
    torch.testing.assert_close(total.double(), (truth / norms.view(-1, 1, 1)).sum(0), rtol=1e-5, atol=1e-5)


def test_autocast_around_the_engine_does_not_reach_its_norms(monkeypatch):
    """T6: norms rounded to bfloat16 would not bound a sum in float32."""
    monkeypatch.setattr(capture_map, "LARGE", 20)
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(40, 50), nn.Tanh(), nn.Linear(50, 2)), torch.randn(4, 3, 40)
    plan = Plan(noise_multiplier=0.0, sample_rate=1.0, steps=5, delta=1e-3, units=4, clip=FlatClip(1e-3))
    sums = []
    for enabled in (False, True):
        with Engine(model, plan) as engine:
            losses = model(x).square().sum((1, 2))
            with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
                engine.accumulate(losses)
            sums.append(engine._sum().clone())
    assert torch.equal(*sums)


@pytest.mark.parametrize("subset", ["lora(targets='all-linear')", "lora + head"])
def test_under_autocast_no_more_is_kept_than_plain_training_keeps(subset, case):
    """A layer under autocast rounds its input and keeps that; the input itself would be twice as large."""
    made = case("llama")
    model = Subset(subset).apply(made.model.bfloat16())
    kept = []
    with Engine(model, Plan(noise_multiplier=1.0, sample_rate=0.1, steps=5, delta=1e-3, units=40)) as engine:
        for paused in (True, False):
            saved = SavedBytes(model)
            with engine.capture.paused() if paused else nullcontext(), torch.autocast("cpu", torch.bfloat16), saved:
                made.losses(made.examples)
            kept.append(saved.bytes)
    assert kept[1] <= kept[0]
