"""Linear layers: the per-example gradient of a weight is a product of two known matrices.

Its norm and its part of the clipped sum follow from the two matrices, without materialising the product.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from dpft.gradients.precision import (
    DEVICE_TOGETHER,
    TOGETHER,
    at_least_float32,
    full_precision,
    precise,
    precise_bmm,
)
from dpft.gradients.rules.implicit import ImplicitGradient, materialize
from dpft.gradients.rules.registry import register

# To materialise a gradient (m, n), compute its norm and sum it moves about 3 numbers of each weight through memory. The
# norm alone costs 2 T² (m + n) operations. This is how many operations take as long as moving one number. It is an
# estimate and changes speed alone; benchmarks/speed.py measures both sides of the switch.
OPERATIONS_PER_NUMBER = 40
FEW_TOKENS = 24  # below it, one product in float64 is cheaper than summing the examples one by one
ROUNDING = 2.0**-21  # error of a float32 sum of products, relative to the sum of their absolute values


@dataclass(frozen=True)
class Product(ImplicitGradient):
    """Per-example gradients ``left[i].T @ right[i]`` of a weight ``(m, n)``, from ``(B, T, m)`` and ``(B, T, n)``.

    The factors may have half precision, as their layer computed them. All results are at least float32.
    """

    left: Tensor
    right: Tensor

    @classmethod
    def of(cls, left: Tensor, right: Tensor) -> "Product":
        """From tensors ``(B, ..., m)`` and ``(B, ..., n)``."""
        left, right = (_with_tokens(x) for x in (left, right))
        return cls(left, right if right.dtype == left.dtype else right.to(left.dtype))

    @property
    def shape(self) -> torch.Size:
        return torch.Size((len(self.left), self.left.shape[2], self.right.shape[2]))

    @property
    def tokens(self) -> int:
        return self.left.shape[1]

    @property
    def norm_is_cheaper(self) -> bool:
        return self.tokens <= longest_by_norm(*self.shape[1:])

    def materialize(self) -> Tensor:
        return precise_bmm(self.left.mT, self.right)

    def write(self, destination: Tensor) -> None:
        if self.left.dtype == destination.dtype:
            torch.bmm(self.left.mT, self.right, out=destination)
        else:
            destination.copy_(self.materialize())

    def squared_norms(self) -> Tensor:
        """``Σ_ts (left_t · left_s)(right_t · right_s)`` (Li, Tramèr, Liang, Hashimoto 2022, section 4).

        Cancellation could leave a number below the true one, and a norm that is too small clips too little. So the
        most that rounding may have lost, ``ROUNDING · (Σ_t ‖left_t‖ ‖right_t‖)²``, is added.
        """
        if self.tokens == 1:  # Goodfellow 2015
            return precise(self.left).square().sum((1, 2)) * precise(self.right).square().sum((1, 2))
        with full_precision():
            left, right = precise_bmm(self.left, self.left.mT), precise_bmm(self.right, self.right.mT)
        rounding = ROUNDING * _bound(left, right).square()
        return left.mul_(right).sum((1, 2)).clamp_min(0) + rounding

    def bound(self) -> Tensor:
        """``(B,)``, ``Σ_t ‖left_t‖ ‖right_t‖``: an upper bound of the norms."""
        return (precise(self.left).norm(dim=2) * precise(self.right).norm(dim=2)).sum(1)

    def add_to(self, total: Tensor, factors: Tensor) -> None:
        """See :meth:`ImplicitGradient.add_to`. One product for all examples is used in float64 only: in float32 the
        rounding of one example would depend on the others."""
        if self.tokens < FEW_TOKENS:
            left, right = self.left.to(total) * factors.view(-1, 1, 1), self.right.to(total)
            total.addmm_(left.flatten(0, 1).T, right.flatten(0, 1))
        elif self.left.is_cuda:
            some = max(1, DEVICE_TOGETHER // total.numel())
            parts = zip(self.left.split(some), self.right.split(some), factors.split(some), strict=True)
            for left, right, factor in parts:
                products = precise_bmm(left.mT, right).mul_(factor.view(-1, 1, 1))
                total.add_(products.sum(0, dtype=total.dtype))
        else:
            self._add_one_by_one(total, factors.tolist())

    def _add_one_by_one(self, total: Tensor, factors: list[float]) -> None:
        rows = max(1, TOGETHER // total.shape[1])
        product = torch.empty(total.shape, dtype=at_least_float32(self.left), device=self.left.device)
        for left, right, factor in zip(self.left, self.right, factors, strict=True):
            torch.mm(precise(left).T, precise(right), out=product)
            for start in range(0, len(total), rows):
                part = slice(start, start + rows)
                total[part].add_(product[part].to(total.device), alpha=factor)

    def with_zeroed(self, examples: Tensor) -> "Product":
        lost = examples.view(-1, 1, 1)
        return Product(self.left.masked_fill(lost, 0), self.right.masked_fill(lost, 0))

    def __add__(self, other: "Product") -> "Product":
        """The sum of two uses of one weight is the product of their tokens together."""
        return Product(torch.cat([self.left, other.left], 1), torch.cat([self.right, other.right], 1))


def _bound(left: Tensor, right: Tensor) -> Tensor:
    """:meth:`Product.bound` by the products ``(B, T, T)`` of both factors with themselves."""
    return (left.diagonal(dim1=1, dim2=2) * right.diagonal(dim1=1, dim2=2)).sqrt().sum(1)


def _with_tokens(x: Tensor) -> Tensor:
    """``(B, ..., m)`` as ``(B, T, m)``"""
    return x if x.dim() == 3 else x.flatten(1, -2) if x.dim() > 3 else x.unsqueeze(1)


def longest_by_norm(m: int, n: int) -> int:
    """The most tokens for which the norm of an ``(m, n)`` weight is cheaper than its materialised gradient."""
    return int((3 * OPERATIONS_PER_NUMBER * m * n / (2 * (m + n))) ** 0.5)


def linear(layer: nn.Linear, activations: list[Tensor], grad_output: Tensor) -> dict[Tensor, Tensor | Product]:
    """``y = x Wᵀ + b``, so ``dW = dyᵀ x`` and ``db = Σ dy`` over all but the example."""
    return _gradients(layer, grad_output, lambda: Product.of(grad_output, activations[0]))


def conv1d(layer: Conv1D, activations: list[Tensor], grad_output: Tensor) -> dict[Tensor, Tensor | Product]:
    """GPT-2's linear layer, whose weight is stored ``(in, out)``: ``y = x W + b``, so ``dW = xᵀ dy``."""
    return _gradients(layer, grad_output, lambda: Product.of(activations[0].to(grad_output.dtype), grad_output))


def _gradients(layer: Any, grad_output: Tensor, product: Callable[[], Product]) -> dict[Tensor, Tensor | Product]:
    gradients: dict[Tensor, Tensor | Product] = {}
    weight, bias = layer.weight, layer.bias
    if weight.requires_grad:
        gradients[weight] = product()
    if bias is not None and bias.requires_grad:
        gradients[bias] = _with_tokens(grad_output).sum(1, dtype=at_least_float32(grad_output))
    return gradients


@register(Conv1D)
def _conv1d_for_opacus(layer: Conv1D, activations: list[Tensor], grad_output: Tensor) -> dict[Tensor, Tensor]:
    return {parameter: materialize(g) for parameter, g in conv1d(layer, activations, grad_output).items()}
