"""Clipping by layers: the sum is that of brute force under every technique, and no unit moves it by more than C."""

import copy

import pytest
import torch
from torch import nn

import dpft.gradients.capture_map as capture_map
from dpft.gradients.engine import Engine
from dpft.gradients.preflight import preflight
from dpft.privacy.clipping import PerLayerClip
from dpft.privacy.plan import Plan
from dpft.subset import Subset

SHARES = pytest.mark.parametrize("shares", ["equal", "size"])


def plan(clip, **fields):
    return Plan(
        **{"noise_multiplier": 0.0, "sample_rate": 0.125, "steps": 9, "delta": 1e-3, "units": 8, "clip": clip, **fields}
    )


def layers(model):
    """The bounds and the group of each trainable parameter, by their definition: a module's own parameters are a
    layer."""
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
    names = list(dict.fromkeys(name.rpartition(".")[0] for name in trainable))
    sizes = [sum(p.numel() for n, p in trainable.items() if n.rpartition(".")[0] == name) for name in names]
    return trainable, names, sizes


def brute_force(model, losses_of, groups, clip):
    """``{name: sum}`` over units of their clipped mean gradients, each example by a backward pass of its own."""
    trainable, names, sizes = layers(model)
    share = [size / sum(sizes) if clip.shares == "size" else 1 / len(names) for size in sizes]
    total = {name: torch.zeros_like(p, dtype=torch.float64) for name, p in trainable.items()}
    for group in groups:
        unit = [0] * len(trainable)
        for i in group:
            loss = losses_of([i])[0]
            gradients = torch.autograd.grad(loss, list(trainable.values()), allow_unused=True)
            unit = [u + (0 if g is None else g.double() / len(group)) for u, g in zip(unit, gradients, strict=True)]
        unit = dict(zip(trainable, unit, strict=True))
        for layer, part in zip(names, share, strict=True):
            own = [name for name in trainable if name.rpartition(".")[0] == layer]
            norm = sum(float(torch.as_tensor(unit[name]).square().sum()) for name in own) ** 0.5
            factor = min(1.0, clip.clip_norm * part**0.5 / norm) if norm else 1.0
            for name in own:
                total[name] += factor * unit[name]
    return total


def check(model, wanted, clip):
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            torch.testing.assert_close(parameter.grad.double(), wanted[name], rtol=1e-4, atol=1e-6 * clip.clip_norm)


@SHARES
@pytest.mark.parametrize("large", [64, 1 << 16], ids=["products and rows", "workspace"])
@pytest.mark.parametrize("use", ["tied", "twice", "apart"])
def test_norms_without_gradients_are_taken_layer_by_layer(use, large, shares, monkeypatch):
    """T4: an embedding's rows, a linear layer's product, a tied head's both, and what lies in the workspace."""
    monkeypatch.setattr(capture_map, "LARGE", large)
    torch.manual_seed(0)
    model = Words(use)
    ids = torch.randint(1, 30, (4, 6))
    scales = torch.tensor([0.01, 1.0, 10.0, 100.0])
    losses_of = lambda chosen: model(ids[chosen]) * scales[chosen]
    clip = PerLayerClip(0.3, shares)
    wanted = brute_force(model, losses_of, [[0], [1], [2], [3]], clip)
    with Engine(model, plan(clip)) as engine:
        for some in ([0], [1, 2, 3]):
            engine.accumulate(losses_of(some))
        engine.release()
    check(model, wanted, clip)


class Words(nn.Module):
    def __init__(self, use):
        super().__init__()
        self.table, self.mix, self.norm = nn.Embedding(30, 40), nn.Linear(40, 40), nn.LayerNorm(40)
        self.head, self.use = nn.Linear(40, 30, bias=False), use
        if use == "tied":
            self.head.weight = self.table.weight

    def forward(self, ids):
        words = self.mix(self.norm(self.table(ids))).tanh()
        if self.use == "twice":
            words = self.mix(words).tanh()
        return self.head(words).square().mean((1, 2))


@SHARES
@pytest.mark.parametrize(
    "subset",
    ["lora(targets='all-linear') + head", "sparse(fraction=0.2)", "ia3", "prompt_tuning(num_virtual_tokens=2)"],
)
def test_every_technique_is_clipped_by_layers(subset, shares, case):
    """T16: rules, functional differentiation and one example at a time; units of several rows over several
    micro-batches."""
    made = case("bert")
    made.model = Subset(subset).apply(made.model).eval()
    for name, parameter in made.model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.1)
    examples = [made.examples[i] for i in (0, 1, 1, 2, 0)]
    losses_of = lambda chosen: made.losses([examples[i] for i in chosen])
    clip = PerLayerClip(0.05, shares)
    wanted = brute_force(made.model, losses_of, [[0, 1], [2], [3, 4]], clip)
    units = ["a", "a", "b", "c", "c"]
    with Engine(made.model, plan(clip, unit="patient", examples_per_unit=2)) as engine:
        preflight(engine, made.losses, made.examples)
        cuts = [[0, 1, 2, 3, 4]], [[0], [1, 2, 3], [4]], [[0], [1], [2], [3], [4]]
        for cut in cuts if engine.max_examples(9) > 1 else cuts[2:]:
            for some in cut:
                engine.accumulate(losses_of(some), [units[i] for i in some])
            engine.release()
            check(made.model, wanted, clip)


@SHARES
@pytest.mark.parametrize("large", [64, 1 << 16])
def test_a_unit_moves_the_sum_by_the_clip_and_no_more(shares, large, monkeypatch):
    """T6: of a gradient that is long in every layer it is C, to float32."""
    monkeypatch.setattr(capture_map, "LARGE", large)
    torch.manual_seed(1)
    model, ids, clip = Words("apart"), torch.randint(1, 30, (5, 6)), PerLayerClip(0.3, shares)
    sums = []
    for chosen in ([0, 1, 2, 3, 4], [0, 1, 2, 3]):
        with Engine(copy.deepcopy(model), plan(clip)) as engine:
            losses = engine.capture.map.model(ids[chosen])
            engine.accumulate(losses * torch.tensor([1.0, 1.0, 0.1, 1e-3, 1e4])[chosen])
            sums.append(engine._sum().clone())
    moved = float((sums[0] - sums[1]).norm())
    assert 0.99 * 0.3 <= moved <= 0.3 * (1 + 1e-5)


@pytest.mark.parametrize("large", [64, 1 << 16])
def test_a_unit_that_is_not_finite_adds_nothing_to_any_layer(large, monkeypatch):
    """T12."""
    monkeypatch.setattr(capture_map, "LARGE", large)
    torch.manual_seed(2)
    model, ids, clip = Words("tied"), torch.randint(1, 30, (3, 6)), PerLayerClip(0.3)
    wanted = brute_force(model, lambda chosen: model(ids[chosen]), [[0], [1]], clip)
    with Engine(model, plan(clip)) as engine:
        engine.accumulate(model(ids) * torch.tensor([1.0, 1.0, torch.inf]))
        engine.release()
        assert engine.nonfinite_units == 1
    check(model, wanted, clip)


class Apart(nn.Module):
    """Two layers on two inputs, of which one may be infinite."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(12, 12), nn.Linear(12, 12)

    def forward(self, x, y):
        return self.first(x).mean(1) + self.second(y).mean(1)


@pytest.mark.parametrize("large", [64, 1 << 16])
@pytest.mark.parametrize("lost", [0, 1])
def test_a_unit_that_is_finite_in_one_layer_alone_adds_nothing_to_it(large, lost, monkeypatch):
    """T12: a unit counts whole or not at all."""
    monkeypatch.setattr(capture_map, "LARGE", large)
    torch.manual_seed(3)
    model, inputs, clip = Apart(), [torch.randn(3, 12), torch.randn(3, 12)], PerLayerClip(0.3)
    wanted = brute_force(model, lambda chosen: model(*(x[chosen] for x in inputs)), [[0], [2]], clip)
    inputs[lost][1, 4] = torch.inf
    with Engine(model, plan(clip)) as engine:
        engine.accumulate(model(*inputs))
        engine.release()
        assert engine.nonfinite_units == 1
    check(model, wanted, clip)
