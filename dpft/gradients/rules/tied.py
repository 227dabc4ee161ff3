"""One table that is both an embedding and a linear layer: most language models tie their head to their words."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce
from operator import add as plus

import torch
from torch import Tensor

from dpft.gradients.precision import full_precision, precise
from dpft.gradients.rules.embedding import Rows
from dpft.gradients.rules.implicit import ImplicitGradient
from dpft.gradients.rules.linear import ROUNDING, Product


@dataclass(frozen=True)
class Tied(ImplicitGradient):
    """Per-example gradients of a table ``(m, n)``: rows of the embedding, plus a product of the head's matrices."""

    rows: Rows
    product: Product

    @property
    def shape(self) -> torch.Size:
        return self.product.shape

    @property
    def norm_is_cheaper(self) -> bool:
        return self.product.norm_is_cheaper

    def materialize(self) -> Tensor:
        return self.rows.materialize() + self.product.materialize()

    def squared_norms(self) -> Tensor:
        """``‖R + P‖² = ‖R‖² + 2 Σ_kt (R_k · right_t) left_t[row_k] + ‖P‖²``, rounded up as that of the product is."""
        rows, bound = self.rows.squared_norms(), self.product.bound()
        rounding = ROUNDING * (rows + 2 * rows.sqrt() * bound)
        return (rows + 2 * self._inner_products() + self.product.squared_norms()).clamp_min(0) + rounding

    def _inner_products(self) -> Tensor:
        """``(B,)``, of each example's rows with its product."""
        counts = torch.bincount(self.rows.places // self.rows.height, minlength=self.rows.examples).tolist()
        places, rows = self.rows.places.split(counts), self.rows.rows.split(counts)  # places ascend
        with full_precision():
            found = [
                (precise(left[:, place % self.rows.height]) * (precise(right) @ row.T)).sum()
                for place, row, left, right in zip(places, rows, self.product.left, self.product.right, strict=True)
            ]
        return torch.stack(found)

    def add_to(self, total: Tensor, factors: Tensor) -> None:
        self.rows.add_to(total, factors)
        self.product.add_to(total, factors)

    def with_zeroed(self, examples: Tensor) -> "Tied":
        return Tied(self.rows.with_zeroed(examples), self.product.with_zeroed(examples))


def add(first: ImplicitGradient, second: ImplicitGradient) -> ImplicitGradient:
    """The sum of two uses of one weight."""
    parts = (*_parts(first), *_parts(second))
    rows = [part for part in parts if isinstance(part, Rows)]
    products = [part for part in parts if isinstance(part, Product)]
    if not rows or not products:
        return reduce(plus, rows or products)
    return Tied(reduce(plus, rows), reduce(plus, products))


def _parts(gradient: ImplicitGradient) -> Sequence[ImplicitGradient]:
    return (gradient.rows, gradient.product) if isinstance(gradient, Tied) else (gradient,)
