"""The cross-entropy of many tokens over a large vocabulary, a few tokens at a time.

PyTorch's own keeps the logarithm of every probability: for a thousand tokens of a vocabulary of 50,000 that is 200 MB, beside
logits and a gradient that are as large. Here one number is kept for each token, and the exponentials never leave the
processor's cache: half the time and two thirds of the memory (benchmarks/results/README.md).
"""

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from dpft.gradients.precision import at_least_float32

PIECE = 1 << 19  # logits looked at together: 2 MB
DEVICE_PIECE = 1 << 26  # on a GPU, where each operation should have much to do


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits, labels, ignored):
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
    def backward(ctx, grad_losses):
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


def cross_entropies(logits: Tensor, labels: Tensor, ignored: int) -> Tensor:
    """``(N, V)`` logits and ``(N,)`` labels to ``(N,)`` cross-entropies in at least float32, zero for ``ignored`` labels."""
    return _CrossEntropy.apply(logits, labels, ignored)


def _pieces(logits: Tensor, wanted: Tensor) -> Iterator[tuple[slice, bool]]:
    """Rows that are all wanted or all not, a few at a time if they are."""
    most = max(1, (DEVICE_PIECE if logits.is_cuda else PIECE) // max(1, logits.shape[1]))
    edges = [0, *(torch.nonzero(wanted[1:] != wanted[:-1]).flatten() + 1).tolist(), len(wanted)]
    now = bool(wanted[0])
    for first, end in zip(edges, edges[1:], strict=False):
        for start in range(first, end, most):
            yield slice(start, min(start + most, end)), now
        now = not now
