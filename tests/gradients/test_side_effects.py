"""T2, T5, T22: a forward pass leaves nothing of the data in what is saved."""

import copy

import pytest
import torch
from torch import nn

from dpft.errors import GuaranteeError, IsolationError
from dpft.gradients.engine import Engine
from dpft.gradients.preflight import preflight
from dpft.gradients.preflight.side_effects import FrozenState


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(4, 8), nn.Linear(8, 1)
        self.shift = nn.Parameter(torch.zeros(4), requires_grad=False)
        self.register_buffer("bank", torch.zeros(0, 8))
        self.ready = False

    def keep(self, x, h) -> None:
        """What a subclass does beside its work."""

    def forward(self, x):
        h = self.first(x + self.shift)
        self.keep(x, h)
        return self.last(torch.tanh(h))


class Grows(Net):
    def keep(self, x, h):
        self.bank = torch.cat([self.bank, h.detach()])


class ComesLate(Net):
    def keep(self, x, h):
        if not hasattr(self, "mean"):
            self.register_buffer("mean", x.detach().mean(0))


class InitialisedByData(Net):
    """As ActNorm is."""

    def keep(self, x, h):
        if not self.ready:
            self.shift.data.copy_(-x.mean(0))
            self.ready = True


class LateParameter(Net):
    def keep(self, x, h):
        if not hasattr(self, "scale"):
            self.scale = nn.Parameter(h.detach().std(0), requires_grad=False)


class FlagInAList(Net):
    def __init__(self):
        super().__init__()
        self.done = []

    def keep(self, x, h):
        if not self.done:
            self.register_buffer("largest", x.detach().amax(0))
            self.done.append(True)


class Replaced(Net):
    """The buffer is there before, and becomes another tensor of another size."""

    def keep(self, x, h):
        self.bank = h.detach()[:1]


class ExtraState(Net):
    """Neither a buffer nor a parameter, and in the state dict all the same."""

    def keep(self, x, h):
        self.seen = {"inputs": [x.detach().clone()]}

    def get_extra_state(self):
        return getattr(self, "seen", {"inputs": []})

    def set_extra_state(self, state):
        self.seen = state


class Positions(Net):
    """A cache that depends on the shape of what it is given, as of rotary embeddings."""

    def keep(self, x, h):
        if not hasattr(self, "angles"):
            self.register_buffer("angles", torch.arange(x.shape[1]) / 10)


class Projected(Net):
    """A weight that is kept at length 1: it follows from itself."""

    def keep(self, x, h):
        self.first.bias.data.div_(self.first.bias.data.norm())


def proven(model, plan):
    torch.manual_seed(0)
    examples = list(torch.randn(3, 4))
    losses = lambda some: model(torch.stack(some)).squeeze(1).square()
    with Engine(model, plan()) as engine:
        return preflight(engine, losses, examples, longest=torch.randn(4))


@pytest.mark.parametrize(
    "kind", [Grows, ComesLate, InitialisedByData, LateParameter, FlagInAList, Replaced, ExtraState]
)
def test_data_that_stay_in_the_model_are_refused(plan, kind):
    model = kind()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(IsolationError, match="comes out another for other examples|changes its buffer"):
        proven(model, plan)
    for name, value in model.state_dict().items():
        kept = before.pop(name)
        assert torch.equal(kept, value) if isinstance(value, torch.Tensor) else kept == value, name
    assert not before


@pytest.mark.parametrize("kind", [Net, Positions])
def test_what_is_the_same_for_all_examples_may_stay(plan, kind):
    assert proven(kind(), plan).isolated


def test_a_weight_that_follows_from_itself_may_change(plan):
    model = Projected()
    model.first.bias.requires_grad_(False)
    assert proven(model, plan).isolated


def test_whatever_does_not_train_is_watched_while_others_do():
    model = ExtraState()
    model.first.requires_grad_(False)
    state = FrozenState(model, [p for p in model.parameters() if not p.requires_grad])
    with torch.no_grad():
        model.last.weight += 1
    state.check()
    for change in (
        lambda: model.first.weight.data.add_(1e-3),
        lambda: model.register_buffer("late", torch.ones(1)),
        lambda: setattr(model, "bank", torch.ones(2, 8)),
        lambda: setattr(model, "seen", {"inputs": [torch.ones(2)]}),
    ):
        change()
        with pytest.raises(GuaranteeError, match="changed in training although it is not in the subset"):
            state.check()
        state = FrozenState(model, [p for p in model.parameters() if not p.requires_grad])
    model.register_buffer("cache", torch.ones(1))
    state.check(allowed={"cache"})
