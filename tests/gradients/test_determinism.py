"""T2: what the scale of a model's chance depends on is seen, though chance itself is held still."""

import random

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from transformers.integrations import neftune

from dpft.errors import GuaranteeError, IsolationError
from dpft.gradients.engine import Engine
from dpft.gradients.preflight import preflight
from dpft.subset import Subset


class Layer(nn.Module):
    """Two linear layers with something in between that draws."""

    def __init__(self, between) -> None:
        super().__init__()
        self.first, self.last, self.between = nn.Linear(4, 8), nn.Linear(8, 1), between

    def forward(self, x):
        return self.last(torch.tanh(self.between(self.first(x)) if self.training else self.first(x)))


def proven(model, plan):
    torch.manual_seed(0)
    examples = [torch.randn(4) * scale for scale in (0.3, 1.0, 3.0)]
    losses = lambda some: model(torch.stack(some)).squeeze(1).square()
    with Engine(model, plan()) as engine:
        return preflight(engine, losses, examples, longest=5 * examples[-1])


COUPLED = {
    "randn_like times the batch's deviation": lambda h: h + 0.5 * torch.randn_like(h) * h.std(),
    "a normal number in place": lambda h: h + torch.empty_like(h).normal_(0, float(h.detach().std())),
    "a uniform range as wide as the batch": lambda h: (
        h + torch.empty_like(h).uniform_(-float(h.detach().abs().max()), 2.0)
    ),
    "torch.normal": lambda h: h + torch.normal(torch.zeros_like(h), h.detach().std().expand_as(h)),
    "torch.rand": lambda h: h + torch.rand(h.shape) * h.mean(),
    "bernoulli of the batch's mean": lambda h: h * torch.bernoulli(torch.sigmoid(h.detach().mean()).expand_as(h)),
    "dropout of the batch's deviation": lambda h: F.dropout(h, float(torch.sigmoid(h.detach().std())), True),
    "randint below the batch's maximum": lambda h: (
        h + torch.randint(0, 2 + int(100 * h.detach().abs().max()), h.shape) / 100
    ),
    "multinomial over the batch": lambda h: h + h.sum(1)[torch.multinomial(torch.softmax(h.detach().sum(1), 0), 1)],
    "a permutation of the batch": lambda h: h + h[torch.randperm(len(h))],
    "exponential": lambda h: h + torch.empty_like(h).exponential_(1 / (0.1 + float(h.detach().std()))),
    "log-normal": lambda h: h + torch.empty_like(h).log_normal_(0, float(h.detach().std())),
    "poisson": lambda h: h + torch.poisson(h.detach().abs().mean().expand_as(h)),
    "Gumbel over the batch": lambda h: h * F.gumbel_softmax(h.sum(1), dim=0).unsqueeze(1),
    "numpy": lambda h: h + float(np.random.normal(0, float(h.detach().std()))),
    "a generator of numpy's": lambda h: h + float(np.random.default_rng().uniform(0, float(h.detach().abs().max()))),
    "Python": lambda h: h + random.gauss(0, float(h.detach().std())),
    "Python's choice": lambda h: h + random.choice([float(h.detach().max()), float(h.detach().max())]),
}


@pytest.mark.parametrize("kind", COUPLED)
def test_a_coupling_behind_chance_is_refused(plan, kind):
    with pytest.raises(IsolationError, match="when others share its batch"):
        proven(Layer(COUPLED[kind]), plan)


OWN = {
    "dropout": lambda h: F.dropout(h, 0.5, True),
    "dropout of features": nn.FeatureAlphaDropout(0.3),
    "noise as wide as the example": lambda h: h + torch.randn_like(h) * h.std(1, keepdim=True),
    "rrelu": nn.RReLU(),
    "a layer left out by chance": lambda h: h if torch.rand([]) < 0.1 else 2 * h,
    "a layer left out by Python": lambda h: h if random.random() < 0.1 else 2 * h,
    "a layer left out by numpy": lambda h: h if np.random.rand() < 0.1 else 2 * h,
    "shuffled features": lambda h: h[:, torch.randperm(h.shape[1])],
    "Gumbel": lambda h: h * F.gumbel_softmax(h, dim=1),
    "numpy's choice of features": lambda h: h[:, np.random.choice(8, 8, replace=False)],
    "Python's sample of features": lambda h: h[:, random.sample(range(8), 8)],
}


@pytest.mark.parametrize("kind", OWN)
def test_chance_of_each_examples_own_is_no_coupling(plan, kind):
    assert proven(Layer(OWN[kind]), plan).isolated


def test_attention_with_dropout_inside_is_no_coupling(plan):
    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.MultiheadAttention(8, 2, dropout=0.3, batch_first=True)

        def forward(self, h):
            return self.inner(h.unsqueeze(1), h.unsqueeze(1), h.unsqueeze(1), need_weights=False)[0].squeeze(1)

    assert proven(Layer(Attention()), plan).isolated


def test_chance_from_a_generator_of_its_own_is_refused(plan):
    """Its seed is known, or its state is; either way an example's draws follow from how many came before."""
    generator = torch.Generator().manual_seed(1)
    with pytest.raises(GuaranteeError, match="a generator of its own"):
        proven(Layer(lambda h: h + torch.randn(h.shape, generator=generator)), plan)


def test_nothing_is_held_still_afterwards(plan):
    proven(Layer(OWN["dropout"]), plan)
    for draw in (random.random, np.random.rand, lambda: float(torch.rand(1)), np.random.default_rng().random):
        assert len({draw() for _ in range(10)}) == 10


def test_noise_that_a_hook_puts_on_embeddings_by_their_padded_length_is_refused(case, plan):
    """NEFTune: its size goes with the root of the padded length, which the longest text of the batch sets."""
    made = case("gpt2")
    model = Subset("last_blocks(2)").apply(made.model)
    embeddings = model.get_input_embeddings()
    embeddings.neftune_noise_alpha = 5.0
    embeddings.register_forward_hook(neftune.neftune_post_forward_hook)
    with Engine(model, plan()) as engine, pytest.raises(IsolationError):
        preflight(engine, made.losses, made.examples)
