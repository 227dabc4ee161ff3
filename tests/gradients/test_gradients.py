"""Norms and clipped sums are the same whether per-example gradients are made or not."""

import copy
from math import inf

import pytest
import torch
import transformers
from torch import nn
from transformers.pytorch_utils import Conv1D

import dpft.gradients.capture_map as capture_map
from dpft.gradients.engine import Engine
from dpft.gradients.rules.embedding import Rows
from dpft.gradients.rules.linear import Product, longest_by_norm
from dpft.gradients.rules.tied import Tied
from dpft.privacy.clipping import FlatClip
from dpft.privacy.plan import Plan
from dpft.training.tuning import SavedBytes

M, N = 40, 24
SWITCH = longest_by_norm(M, N)


@pytest.fixture(autouse=True)
def everything_is_large(monkeypatch):
    monkeypatch.setattr(capture_map, "LARGE", 64)


def plan(**fields):
    return Plan(**{"noise_multiplier": 0.0, "sample_rate": 1.0, "steps": 5, "delta": 1e-3, "units": 4, **fields})


def one_by_one(model, losses):
    """Each loss's gradients by themselves, and their norm."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    for loss in losses:
        gradients = torch.autograd.grad(loss, parameters, retain_graph=True)
        yield gradients, torch.cat([g.flatten() for g in gradients]).norm()


def true_norms(model, losses):
    return torch.stack([norm for _, norm in one_by_one(model, losses)])


def brute_force(model, losses, clip):
    total = [torch.zeros_like(p) for p in model.parameters() if p.requires_grad]
    for gradients, norm in one_by_one(model, losses):
        for place, gradient in zip(total, gradients, strict=True):
            place += gradient * (clip / norm).clamp(max=1.0)
    return total


class Net(nn.Module):
    def __init__(self, layer, *, twice=False):
        super().__init__()
        self.first, self.norm, self.twice = layer, nn.LayerNorm(M), twice
        self.last = nn.Linear(M, 3)

    def forward(self, x):
        y = self.norm(self.first(x))
        if self.twice:
            y = y + self.norm(self.first(x.flip(1).tanh()))
        return self.last(y).square().mean((1, 2))


@pytest.mark.parametrize("tokens", [1, 2, SWITCH - 1, SWITCH, SWITCH + 1, 2 * SWITCH])
@pytest.mark.parametrize("kind", ["linear", "conv1d", "used twice"])
def test_the_clipped_sum_is_that_of_brute_force_on_both_sides_of_the_switch(tokens, kind):
    torch.manual_seed(0)
    model = Net(Conv1D(M, N) if kind == "conv1d" else nn.Linear(N, M), twice=kind == "used twice")
    x = torch.randn(4, tokens, N) * torch.tensor([0.1, 1.0, 3.0, 10.0]).view(-1, 1, 1)
    norms = true_norms(model, [model(one.unsqueeze(0))[0] for one in x])
    clip = float(norms.median())  # so that some are clipped and some are not
    wanted = brute_force(model, model(x), clip)
    with Engine(model, plan(clip=FlatClip(clip))) as engine:
        unmade = tokens * (2 if kind == "used twice" else 1) <= SWITCH
        engine.capture.gradients(model(x))
        gradients = engine.capture.gradients(model(x))
        start = next(trainable.start for trainable in engine.capture.map.trainables if trainable.name == "first.weight")
        assert isinstance(gradients.large[start].gradient, Product) == unmade
        torch.testing.assert_close(gradients.norms(), norms, rtol=2e-5, atol=0)
        engine.accumulate(model(x))
        engine.release()
        for parameter, expected in zip(model.parameters(), wanted, strict=True):
            torch.testing.assert_close(parameter.grad * 4, expected, rtol=1e-4, atol=1e-5 * clip)


class Words(nn.Module):
    """An embedding used once, twice, or also as the head."""

    def __init__(self, use):
        super().__init__()
        self.use, self.table, self.mix = use, nn.Embedding(30, M, padding_idx=0), nn.Linear(M, M)
        self.head = nn.Linear(M, 30, bias=False)
        if use == "tied":
            self.head.weight = self.table.weight

    def forward(self, ids):
        words = self.table(ids)
        if self.use == "twice":
            words = words * self.table(ids.flip(1)).tanh()
        return self.head(self.mix(words).tanh()).square().mean((1, 2))


@pytest.mark.parametrize("use", ["once", "twice", "tied"])
@pytest.mark.parametrize("words", [3, 30])
@pytest.mark.parametrize("tokens", [20, 40])
def test_an_embedding_is_clipped_by_its_rows(use, words, tokens):
    """T4: also of words that come again and again, whose rows add up before the norm is taken."""
    torch.manual_seed(0)
    model = Words(use)
    ids = torch.randint(words, (4, tokens))
    losses = lambda: model(ids) * torch.tensor([1.0, 3.0, 10.0, 100.0])
    norms = true_norms(model, losses())
    clip = float(norms.median())
    wanted = brute_force(model, losses(), clip)
    with Engine(model, plan(clip=FlatClip(clip))) as engine:
        gradients = engine.capture.gradients(losses())
        trainable = next(trainable for trainable in engine.capture.map.trainables if trainable.name == "table.weight")
        assert isinstance(gradients.large[trainable.start].gradient, Rows) == (use != "tied")
        assert isinstance(gradients.large[trainable.start].gradient, Tied) == (
            use == "tied" and tokens <= longest_by_norm(30, M)
        )
        assert trainable.longest_by_norm == (longest_by_norm(30, M) if use == "tied" else inf)
        torch.testing.assert_close(gradients.norms(), norms, rtol=1e-5, atol=0)
        engine.accumulate(losses())
        engine.release()
        for parameter, expected in zip(model.parameters(), wanted, strict=True):
            torch.testing.assert_close(parameter.grad * 4, expected, rtol=1e-4, atol=1e-6 * clip)


@pytest.mark.parametrize("use", ["once", "tied"])
def test_rows_of_a_nonfinite_example_are_forgotten(use):
    """T12."""
    torch.manual_seed(0)
    model, ids = Words(use), torch.randint(30, (3, 20))
    wanted = brute_force(model, model(ids[:2]), 1.0)
    with Engine(model, plan()) as engine:
        engine.accumulate(model(ids) * torch.tensor([1.0, 1.0, torch.inf]))
        assert engine.nonfinite_units == 1
        engine.release()
        for parameter, expected in zip(model.parameters(), wanted, strict=True):
            torch.testing.assert_close(parameter.grad * 4, expected, rtol=1e-4, atol=1e-7)


def test_an_embedding_bounds_no_micro_batch():
    """Its gradients would need V · n numbers for each example; its rows need fewer than the words have."""
    for use, least in (("once", 1_000), ("tied", 1)):
        model = Words(use)
        for parameter in model.parameters():
            parameter.requires_grad_(parameter is model.table.weight)
        with Engine(model, plan()) as engine:
            engine.workspace_bytes = 4 * 30 * M
            assert min(engine.max_examples(512), 1_000) == least


def test_terms_that_cancel_never_hide_a_norm():
    """Two tokens whose contributions cancel but for rounding: a norm that came out too small would clip too little."""
    generator = torch.Generator().manual_seed(0)
    for exponent in range(1, 8):
        left = torch.randn(64, 1, 50, generator=generator).repeat(1, 2, 1) * 1e3
        right = torch.randn(64, 1, 70, generator=generator).repeat(1, 2, 1) * 1e3
        right[:, 1] *= -1 - 10.0**-exponent
        product = Product(left, right)
        truth = Product(left.double(), right.double()).materialize().flatten(1).norm(dim=1)
        assert (product.squared_norms().double().sqrt() >= truth * (1 - 1e-6)).all()


@pytest.mark.parametrize("large", [True, False])
def test_a_long_gradient_is_clipped_by_its_true_norm(large, monkeypatch):
    """T6: in one go, float32 loses 0.01 % of the norm of six million numbers, and with it the bound."""
    monkeypatch.setattr(capture_map, "LARGE", 64 if large else 1 << 40)
    torch.manual_seed(0)
    model = nn.Linear(3000, 2000, bias=False)
    x = torch.rand(1, 2 * longest_by_norm(2000, 3000), 3000) + 0.5
    with Engine(model, plan(clip=FlatClip(1.0))) as engine:
        engine.accumulate(model(x).square().mean((1, 2)))
        assert float(engine._sum().double().norm()) == pytest.approx(1.0, rel=2e-6)


@pytest.mark.parametrize("poison", [float("nan"), float("inf"), 3e38])
@pytest.mark.parametrize("tokens", [2, 2 * SWITCH])
def test_a_nonfinite_example_contributes_nothing_whether_made_or_not(poison, tokens):
    torch.manual_seed(0)
    model = Net(nn.Linear(N, M))
    x = torch.randn(4, tokens, N)
    wanted = brute_force(model, model(x[1:]), 1.0)
    x[0, 0, 0] = poison
    with Engine(model, plan()) as engine:
        engine.accumulate(model(x))
        assert engine.nonfinite_units == 1
        engine.release()
        for parameter, expected in zip(model.parameters(), wanted, strict=True):
            torch.testing.assert_close(parameter.grad * 4, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("per_unit", [1, 3])
def test_a_unit_that_goes_on_in_the_next_micro_batch_is_clipped_once(per_unit):
    """T16: also where the plan expects one example of each unit, and the next micro-batch has each unit once."""
    torch.manual_seed(0)
    model = Net(nn.Linear(N, M))
    x = torch.randn(4, 3, N)
    losses = model(x)
    wanted = brute_force(model, [losses[:3].mean(), losses[3]], 0.01)
    with Engine(model, plan(examples_per_unit=per_unit, clip=FlatClip(0.01))) as engine:
        engine.accumulate(model(x[:2]), ["a", "a"])
        engine.accumulate(model(x[2:]), ["a", "b"])
        engine.release()
        for parameter, expected in zip(model.parameters(), wanted, strict=True):
            torch.testing.assert_close(parameter.grad * 4, expected, rtol=1e-4, atol=1e-8)


@pytest.mark.parametrize("tokens", [3, 2 * SWITCH])
def test_units_of_several_examples_are_whole_before_the_norm(tokens):
    torch.manual_seed(0)
    model = Net(nn.Linear(N, M))
    x = torch.randn(4, tokens, N)
    losses = model(x)
    wanted = brute_force(model, [losses[:3].mean(), losses[3]], 0.01)
    with Engine(model, plan(examples_per_unit=3, clip=FlatClip(0.01))) as engine:
        engine.accumulate(model(x[:2]), ["a", "a"])
        engine.accumulate(model(x[2:]), ["a", "b"])
        engine.release()
        for parameter, expected in zip(model.parameters(), wanted, strict=True):
            torch.testing.assert_close(parameter.grad * 4, expected, rtol=1e-4, atol=1e-8)


def test_every_weight_of_a_real_architecture():
    torch.manual_seed(0)
    none = dict(resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)
    sizes = dict(vocab_size=60, n_embd=32, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0)
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes, **none))
    model.transformer.wpe.requires_grad_(False)  # its input has no batch dimension: the preflight would lift it
    ids = torch.randint(60, (3, 12))
    losses = lambda m: torch.nn.functional.cross_entropy(m(ids).logits.mT, ids, reduction="none").mean(1)
    wanted = brute_force(model, losses(model), 1.0)
    twin = copy.deepcopy(model)
    with Engine(twin, plan(clip=FlatClip(1.0))) as engine:
        engine.accumulate(losses(twin))
        engine.release()
        for parameter, expected in zip(filter(lambda p: p.requires_grad, twin.parameters()), wanted, strict=True):
            torch.testing.assert_close(parameter.grad * 4, expected, rtol=1e-3, atol=1e-5)


def test_a_bias_keeps_no_input_for_its_gradient():
    model = nn.Sequential(nn.Linear(100, 100), nn.Tanh(), Conv1D(100, 100))
    x = torch.randn(50, 100)

    def kept():
        saved = SavedBytes(model)
        with saved:
            model(x).square().sum(1)
        return saved.bytes

    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.endswith("bias"))
    without = kept()
    with Engine(model, plan()):
        assert kept() - without < 100  # bytes


class Branches(nn.Module):
    """Two layers, of which a batch uses one."""

    def __init__(self):
        super().__init__()
        self.left, self.right = nn.Linear(3, 1), nn.Linear(3, 1)

    def forward(self, x, side):
        return getattr(self, side)(x).squeeze(1)


def test_a_layer_that_a_batch_leaves_out_gets_nothing_of_the_batch_before():
    """Three gradients of 1 go to the right, and to the left 0, though the workspace still holds three of 1."""
    model = Branches()
    with Engine(model, plan(clip=FlatClip(100.0))) as engine:
        engine.accumulate(model(torch.ones(3, 3), "left"))
        engine.accumulate(model(torch.ones(3, 3), "right"))
        engine.release()
        assert model.left.weight.grad.tolist() == model.right.weight.grad.tolist() == [[0.75] * 3]
        engine.accumulate(model(torch.ones(3, 3), "right"))
        engine.release()
    assert model.left.weight.grad.tolist() == [[0.0] * 3] and model.right.weight.grad.tolist() == [[0.75] * 3]
