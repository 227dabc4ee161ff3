"""The cross-entropy of many tokens over a large vocabulary, a few tokens at a time.

PyTorch's own keeps the logarithm of every probability: for a thousand tokens of a vocabulary of 50,000 that is 200 MB,
beside logits and a gradient that are as large. Here one number is kept for each token, and the exponentials never leave
the processor's cache: half the time and two thirds of the memory. Where the logits come from a frozen layer they are
not kept either:
the gradient of what went in is made at once and is as small as that (benchmarks/results/README.md).
"""

from collections.abc import Iterator
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from dpft.gradients.precision import at_least_float32, precise

PIECE = 1 << 19  # logits looked at together: 2 MB
DEVICE_PIECE = 1 << 26  # on a GPU, where each operation should have much to do
MADE = 1 << 24  # logits made together: 64 MB, and enough tokens that to read the layer's weights for them costs little


def cross_entropies(logits: Tensor, labels: Tensor, ignored: int) -> Tensor:
    """``(N, V)`` logits and ``(N,)`` labels to ``(N,)`` cross-entropies in at least float32, zero for ``ignored``
    labels."""
    losses: Tensor = _CrossEntropy.apply(  # type: ignore[no-untyped-call]  # PyTorch has no type for it
        logits, labels, ignored
    )
    return losses


def head_cross_entropies(states: Tensor, head: nn.Linear, labels: Tensor, ignored: int) -> Tensor:
    """:func:`cross_entropies` of ``head(states)``, ``states`` ``(N, D)``, for a head that does not train."""
    losses: Tensor = _HeadCrossEntropy.apply(  # type: ignore[no-untyped-call]  # likewise
        states, head.weight, head.bias, labels, ignored
    )
    return losses


class _Context(Protocol):
    """What PyTorch carries from one pass to the other, and what is put on it here."""

    pieces: list[tuple[slice, bool]]

    @property
    def saved_tensors(self) -> tuple[Tensor, Tensor, Tensor]: ...

    def save_for_backward(self, *tensors: Tensor) -> None: ...


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: _Context, logits: Tensor, labels: Tensor, ignored: int) -> Tensor:
        losses = logits.new_zeros(len(logits), dtype=at_least_float32(logits))
        logsums = torch.empty_like(losses)
        ctx.pieces = list(_pieces(logits, labels != ignored))
        for rows, wanted in ctx.pieces:
            if wanted:
                piece = logits[rows].to(losses.dtype)
                torch.logsumexp(piece, 1, out=logsums[rows])
                losses[rows] = logsums[rows] - piece.gather(1, labels[rows].unsqueeze(1)).squeeze(1)
        ctx.save_for_backward(logits, labels, logsums)
        return losses

    @staticmethod
    @once_differentiable
    def backward(ctx: _Context, grad_losses: Tensor) -> tuple[Tensor, None, None]:
        logits, labels, logsums = ctx.saved_tensors
        gradient = torch.empty_like(logits)
        for rows, wanted in ctx.pieces:
            if not wanted:  # whatever its logits are: a padded token may have no finite ones
                gradient[rows] = 0
                continue
            piece = torch.sub(logits[rows], logsums[rows].unsqueeze(1)).exp_()
            piece.scatter_add_(1, labels[rows].unsqueeze(1), piece.new_full((len(piece), 1), -1))
            torch.mul(piece, grad_losses[rows].unsqueeze(1), out=gradient[rows])
        return gradient, None, None


class _HeadContext(Protocol):
    shape: torch.Size
    dtype: torch.dtype

    @property
    def needs_input_grad(self) -> tuple[bool, ...]: ...

    @property
    def saved_tensors(self) -> tuple[Tensor, Tensor]: ...

    def save_for_backward(self, *tensors: Tensor | None) -> None: ...


class _HeadCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: _HeadContext, states: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, ignored: int
    ) -> Tensor:
        device = states.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else states.dtype
        places = torch.nonzero(labels != ignored).squeeze(1)  # what else a state is, padding perhaps, is not looked at
        inputs, labels, weight = states[places].to(dtype), labels[places].unsqueeze(1), weight.to(dtype)
        losses = inputs.new_empty(len(places), 1, dtype=at_least_float32(inputs))
        gradient = torch.empty_like(inputs) if ctx.needs_input_grad[0] else None
        few = _few(inputs, len(weight), MADE)
        scratch = inputs.new_empty(min(few, len(places)), len(weight))
        for start in range(0, len(places), few):
            rows = slice(start, min(start + few, len(places)))
            logits = torch.mm(inputs[rows], weight.T, out=scratch[: rows.stop - start])
            if bias is not None:
                logits += bias.to(dtype)
            _loss_and_slope(logits, labels[rows], losses[rows])
            if gradient is not None:
                torch.mm(logits, weight, out=gradient[rows])
        ctx.save_for_backward(places, gradient)
        ctx.shape, ctx.dtype = states.shape, states.dtype
        return losses.new_zeros(len(states)).index_copy_(0, places, losses.squeeze(1))

    @staticmethod
    @once_differentiable
    def backward(ctx: _HeadContext, grad_losses: Tensor) -> tuple[Tensor, None, None, None, None]:
        places, gradient = ctx.saved_tensors
        made = (gradient * grad_losses[places].unsqueeze(1)).to(ctx.dtype)
        return made.new_zeros(ctx.shape).index_copy_(0, places, made), None, None, None, None


def _loss_and_slope(logits: Tensor, labels: Tensor, losses: Tensor) -> None:
    """Write each row's loss and turn its logits into the loss's derivative: every word's probability, less one for the
    label."""
    few = _few(logits, logits.shape[1], PIECE)
    for piece, label, loss in zip(logits.split(few), labels.split(few), losses.split(few), strict=True):
        found = precise(piece)
        largest, of_label = found.amax(1, keepdim=True), found.gather(1, label)
        total = found.sub_(largest).exp_().sum(1, keepdim=True)
        loss.copy_(total.log().add_(largest).sub_(of_label))
        torch.div(found.scatter_add_(1, label, -total), total, out=piece)


def _few(like: Tensor, words: int, numbers: int) -> int:
    """How many rows of so many words to look at together."""
    return max(1, (DEVICE_PIECE if like.is_cuda else numbers) // max(1, words))


def _pieces(logits: Tensor, wanted: Tensor) -> Iterator[tuple[slice, bool]]:
    """Rows that are all wanted or all not, a few at a time if they are."""
    few = _few(logits, logits.shape[1], PIECE)
    edges = [0, *(torch.nonzero(wanted[1:] != wanted[:-1]).flatten() + 1).tolist(), len(wanted)]
    now = bool(wanted[0])
    for first, end in zip(edges, edges[1:], strict=False):
        for start in range(first, end, few):
            yield slice(start, min(start + few, end)), now
        now = not now
