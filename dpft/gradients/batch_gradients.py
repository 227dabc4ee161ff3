"""The per-example gradients of one backward pass, materialised only where that is needed.

Gradients of small parameters share one flat workspace ``(B, n)``. Their norms are one reduction, and their clipped sum
is one matrix-vector product. A large parameter's gradient has a form of its own:

- a linear layer's weight stays a product of two matrices where that makes its norm cheaper
  (:mod:`dpft.gradients.rules.linear`)
- an embedding's table is the rows of the tokens that occur (:mod:`dpft.gradients.rules.embedding`)
- a table that is tied to a head is both (:mod:`dpft.gradients.rules.tied`)
- any other is a tensor ``(B, *shape)``
"""

from collections.abc import Iterable

import torch
from torch import Tensor

from dpft.gradients.capture_map import TrainableParameter
from dpft.gradients.precision import add_rows, full_precision
from dpft.gradients.rules.implicit import ImplicitGradient, materialize, write
from dpft.gradients.rules.tied import add

BLOCK = 4096  # numbers whose squares float32 adds up without losing digits


class BatchGradients:
    """The gradients of B examples, from one backward pass.

    Args:
        small_parameters: ``(B, n)``, the gradients of all small parameters. These are the first n of P scalars.
    """

    def __init__(self, small_parameters: Tensor) -> None:
        self.small_parameters, self.examples = small_parameters, len(small_parameters)
        self.large: dict[int, LargeGradient] = {}  # by the parameter's start
        self._written: set[int] = set()

    def add(self, trainable: TrainableParameter, gradient: Tensor | ImplicitGradient) -> None:
        """Add the gradient of one use of a parameter.

        Several uses are summed, so that the gradient of a shared or tied parameter is complete before its norm.
        """
        if trainable.large:
            before = self.large.get(trainable.start)
            whole = gradient if before is None else _sum(before.gradient, gradient)
            self.large[trainable.start] = LargeGradient(trainable, whole)
            return
        destination = trainable.view(self.small_parameters)
        if trainable.start in self._written:
            destination.add_(materialize(gradient))
        else:  # the workspace still holds the previous pass
            self._written.add(trainable.start)
            write(gradient, destination)

    def complete(self, trainables: Iterable[TrainableParameter]) -> None:
        """Zero the gradients of small parameters that the losses do not depend on."""
        for trainable in trainables:
            if not trainable.large and trainable.start not in self._written:
                trainable.view(self.small_parameters).zero_()

    def rows(self, size: int) -> Tensor:
        """All gradients as one matrix ``(B, P)``, every one materialised."""
        if self.small_parameters.shape[1] == size:
            return self.small_parameters
        rows = self.small_parameters.new_zeros(self.examples, size)
        rows[:, : self.small_parameters.shape[1]] = self.small_parameters
        for large in self.large.values():
            large.trainable.view(rows).copy_(materialize(large.gradient))
        return rows

    def norms(self) -> Tensor:
        """``(B,)`` norms of the whole gradients. They are at most a relative 1e-6 below the true ones."""
        norms = row_norms(self.small_parameters)
        if not self.large:
            return norms
        return torch.stack([norms.square(), *(large.squared_norms() for large in self.large.values())]).sum(0).sqrt()

    def zero_examples(self, zeroed: Tensor) -> None:
        """Zero the gradients of the examples where ``zeroed`` ``(B,)`` is true, even NaN and infinite ones."""
        self.small_parameters.masked_fill_(zeroed.unsqueeze(1), 0)
        for large in self.large.values():
            if isinstance(large.gradient, ImplicitGradient):
                large.gradient = large.gradient.with_zeroed(zeroed)
            else:
                large.gradient[zeroed] = 0

    def add_to(self, total: Tensor, factors: Tensor) -> None:
        """``total`` ``(P,)`` float64 ``+= Σ_i factors[i] · g_i``. Rounding of one example depends on no other."""
        factors = factors.to(total)
        with full_precision():
            add_rows(total[: self.small_parameters.shape[1]], self.small_parameters, factors)
            for large in self.large.values():
                large.add_to(total, factors)


class LargeGradient:
    """One large parameter's gradients, and their squared norms ``(B,)``.

    A norm is computed at once, while the gradient is in the cache. With several uses it waits until all are summed.
    """

    def __init__(self, trainable: TrainableParameter, gradient: Tensor | ImplicitGradient) -> None:
        if isinstance(gradient, ImplicitGradient) and not gradient.norm_is_cheaper:
            gradient = gradient.materialize()
        self.trainable, self.gradient = trainable, gradient
        self._squared_norms = None if len(trainable.modules) > 1 else self._computed_norms()

    def squared_norms(self) -> Tensor:
        if self._squared_norms is None:
            self._squared_norms = self._computed_norms()
        return self._squared_norms

    def add_to(self, total: Tensor, factors: Tensor) -> None:
        """``total`` ``(P,)`` float64 ``+= Σ_i factors[i] · g_i`` at this parameter's scalars."""
        if isinstance(self.gradient, ImplicitGradient):
            self.gradient.add_to(self.trainable.view(total), factors)
        else:
            add_rows(total[self.trainable.slice], self.gradient.flatten(1), factors)

    def _computed_norms(self) -> Tensor:
        if isinstance(self.gradient, ImplicitGradient):
            return self.gradient.squared_norms()
        return row_norms(self.gradient.flatten(1)).square()


def row_norms(rows: Tensor) -> Tensor:
    """``(B, n)`` to ``(B,)`` norms, computed block by block.

    On a CPU PyTorch adds float32 squares one after another. Over 38 million numbers that lost 0.26 % of the norm
    (torch 2.13). A norm that is too small clips its unit too little.
    """
    whole = rows.shape[1] - rows.shape[1] % BLOCK
    parts = [torch.linalg.vector_norm(rows[:, whole:], dim=1, keepdim=True)]
    if whole:
        parts.append(torch.linalg.vector_norm(rows[:, :whole].unflatten(1, (-1, BLOCK)), dim=2))
    return torch.linalg.vector_norm(torch.cat(parts, 1), dim=1)


def _sum(first: Tensor | ImplicitGradient, second: Tensor | ImplicitGradient) -> Tensor | ImplicitGradient:
    if isinstance(first, ImplicitGradient) and isinstance(second, ImplicitGradient):
        return add(first, second)
    return materialize(first) + materialize(second)
