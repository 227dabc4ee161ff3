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
from dpft.subset.evaluating import evaluating


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
    "numpy's beta of the batch": lambda h: h * np.random.beta(1 + float(h.detach().abs().max()), 2.0),
    "a distribution of torch's": lambda h: h + torch.distributions.Laplace(0.0, h.detach().std()).sample(h.shape),
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
    "Python's sample of few among many": lambda h: h + random.sample(range(1000), 3)[0] / 1000,
    "Python's bits": lambda h: h + random.getrandbits(8) / 256,
    "Python's beta, which tries until one fits": lambda h: h * random.betavariate(0.5, 0.5),
    "numpy's choice for each example": lambda h: h * torch.as_tensor(np.random.choice([0.5, 1.0], (len(h), 1))).to(h),
    "numpy's beta": lambda h: h * np.random.beta(0.5, 0.5),
    "a class drawn for each example": lambda h: (
        h + torch.distributions.Categorical(logits=torch.zeros(8)).sample((len(h),)).unsqueeze(1)
    ),
    "a key of each example": lambda h: (
        h + torch.stack([torch.as_tensor(np.random.default_rng(int(1e3 * row[0].abs())).random(8)) for row in h]).to(h)
    ),
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


def forked(h):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return h * torch.rand(h.shape)


@pytest.mark.parametrize("kind", ["torch, restored afterwards", "numpy", "Python"])
def test_masks_of_a_seed_and_a_place_in_the_batch_are_refused(plan, kind):
    """T20: all held still they looked like anybody's own, and a unit that leaves shifts those of all after it."""
    between = {
        "torch, restored afterwards": forked,
        "numpy": lambda h: (np.random.seed(0), h * torch.as_tensor(np.random.rand(*h.shape)).to(h))[1],
        "Python": lambda h: (random.seed(0), h * torch.tensor([[random.random()] for _ in h]))[1],
    }[kind]
    with pytest.raises(GuaranteeError, match=r"seeds a global generator \(.*seed\)"):
        proven(Layer(between), plan)


def test_masks_of_a_generator_made_of_a_constant_seed_are_refused(plan):
    with pytest.raises(IsolationError):
        proven(Layer(lambda h: h * torch.as_tensor(np.random.default_rng(0).random(h.shape)).to(h)), plan)


@pytest.mark.parametrize("generator", [np.random.default_rng(1), np.random.RandomState(1), random.Random(1)])
def test_a_generator_that_goes_on_from_pass_to_pass_is_named_as_the_cause(plan, generator):
    with pytest.raises(IsolationError, match="changes by .* from pass to pass, so .* a generator of its own"):
        proven(Layer(lambda h: h * (0.5 + generator.random())), plan)


def test_what_numpy_draws_without_a_stand_in_is_refused_by_name(plan):
    with pytest.raises(GuaranteeError, match="numpy.random.triangular, which the preflight cannot hold still"):
        proven(Layer(lambda h: h * np.random.triangular(0, 1, 2)), plan)


def test_nothing_is_held_still_afterwards(plan):
    proven(Layer(OWN["dropout"]), plan)
    for seed in (random.seed, np.random.seed, torch.manual_seed):
        seed(0)
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


def test_an_evaluation_leaves_quantized_layers_in_training_mode():
    """bitsandbytes packs them otherwise, and the run would train on nothing but noise."""
    quantized = nn.Linear(2, 2)
    quantized.weight = nn.Parameter(torch.zeros(2, 2, dtype=torch.int8), requires_grad=False)
    model = nn.Sequential(quantized, nn.Dropout(0.5)).train()
    model[1].eval()
    with evaluating(model):
        assert quantized.training and not model.training and not model[1].training
    assert model.training and quantized.training and not model[1].training
