"""The cross-entropy in pieces is PyTorch's, and what has no label does not exist for it."""

import pytest
import torch
from torch.nn.functional import cross_entropy

from dpft.tasks import cross_entropy as module
from dpft.tasks.cross_entropy import cross_entropies
from dpft.tasks.losses import IGNORED, token_losses


@pytest.fixture(params=[7, 40, 1 << 19])
def pieces(request, monkeypatch):
    monkeypatch.setattr(module, "PIECE", request.param)


def some(dtype=torch.float32):
    torch.manual_seed(0)
    labels = torch.randint(11, (30,))
    labels[torch.tensor([0, 1, 2, 9, 17, 18, 29])] = IGNORED
    return torch.randn(30, 11, dtype=dtype) * 3, labels, torch.randn(30)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_losses_and_gradients_are_those_of_pytorch(pieces, dtype):
    logits, labels, weights = some(dtype)
    found = []
    for function in (
        lambda x: cross_entropies(x, labels, IGNORED),
        lambda x: cross_entropy(x.to(torch.promote_types(dtype, torch.float32)), labels, reduction="none"),
    ):
        leaf = logits.clone().requires_grad_()
        losses = function(leaf)
        (losses * weights).sum().backward()
        found.append((losses.detach(), leaf.grad))
    assert found[0][0].dtype == found[1][0].dtype and found[0][1].dtype == dtype
    torch.testing.assert_close(*found)


def test_logits_without_a_label_may_be_anything(pieces):
    """T2, T12: what a padded token's logits are reaches neither losses nor gradients."""
    logits, labels, _ = some()
    clean = cross_entropies(logits, labels, IGNORED)
    logits[labels == IGNORED] = torch.nan
    leaf = logits.requires_grad_()
    losses = cross_entropies(leaf, labels, IGNORED)
    losses.sum().backward()
    assert torch.equal(losses, clean)
    assert (leaf.grad[labels == IGNORED] == 0).all() and torch.isfinite(leaf.grad).all()


def test_large_logits_do_not_overflow(pieces):
    logits = torch.tensor([[1e4, 0.0, -1e4], [88.0, 89.0, 90.0]], requires_grad=True)
    labels = torch.tensor([0, 2])
    losses = cross_entropies(logits, labels, IGNORED)
    losses.sum().backward()
    torch.testing.assert_close(losses, cross_entropy(logits, labels, reduction="none"))
    assert torch.isfinite(logits.grad).all()


def test_a_second_derivative_is_refused():
    logits, labels, _ = some()
    losses = cross_entropies(logits.requires_grad_(), labels, IGNORED)
    (first,) = torch.autograd.grad(losses.sum(), logits, create_graph=True)
    with pytest.raises(RuntimeError):
        first.sum().backward()


def test_each_example_is_normalised_by_its_own_tokens():
    """T1."""
    torch.manual_seed(0)
    logits, labels = torch.randn(3, 6, 11), torch.randint(11, (3, 6))
    labels[0, 3:] = labels[1, :4] = IGNORED
    found = token_losses(logits, labels, shift=True)
    for i in range(3):
        expected = cross_entropy(logits[i, :-1], labels[i, 1:], reduction="none", ignore_index=IGNORED)
        torch.testing.assert_close(found[i], expected.sum() / (labels[i, 1:] != IGNORED).sum())
