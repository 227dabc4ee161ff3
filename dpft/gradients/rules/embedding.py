"""``nn.Embedding``: only the rows of tokens that occur have a gradient, so an example's is a few rows and no table.

The row of ``padding_idx`` stays zero, as in PyTorch. Opacus 1.6 fills it.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from dpft.errors import IsolationError
from dpft.gradients.rules.implicit import ImplicitGradient, materialize
from dpft.gradients.rules.registry import register


@dataclass(frozen=True)
class Rows(ImplicitGradient):
    """Per-example gradients of a table ``(height, n)``, zero but for some rows.

    Attributes:
        places: ``(K,)``, example · height + row. Each pair occurs once, so that a row is complete before its norm.
        rows: ``(K, n)``.
        examples: B.
        height: how many rows the table has.
    """

    places: Tensor
    rows: Tensor
    examples: int
    height: int

    @classmethod
    def of(cls, places: Tensor, values: Tensor, examples: int, height: int) -> "Rows":
        """From ``(N,)`` places that may repeat and their values ``(N, n)``."""
        places, index = places.unique(return_inverse=True)
        rows = values.new_zeros(len(places), values.shape[1]).index_add_(0, index, values)
        return cls(places, rows, examples, height)

    @property
    def shape(self) -> torch.Size:
        return torch.Size((self.examples, self.height, self.rows.shape[1]))

    @property
    def norm_is_cheaper(self) -> bool:
        return True

    def materialize(self) -> Tensor:
        table = self.rows.new_zeros(self.examples * self.height, self.rows.shape[1])
        return table.index_copy_(0, self.places, self.rows).view(self.shape)

    def squared_norms(self) -> Tensor:
        # A float32 sum over many rows would lose digits.
        squares = torch.linalg.vector_norm(self.rows, dim=1)
        squares = (squares if squares.device.type == "mps" else squares.double()).square()  # no float64 there
        return squares.new_zeros(self.examples).index_add_(0, self._example(), squares).to(self.rows.dtype)

    def add_to(self, total: Tensor, factors: Tensor) -> None:
        places = (self.places % self.height).to(total.device)
        total.index_add_(0, places, self.rows.to(total) * factors[self._example().to(total.device)].unsqueeze(1))

    def with_zeroed(self, examples: Tensor) -> "Rows":
        rows = self.rows.masked_fill(examples[self._example()].unsqueeze(1), 0)
        return Rows(self.places, rows, self.examples, self.height)

    def __add__(self, other: "Rows") -> "Rows":
        """The sum of two uses of one table."""
        places, rows = torch.cat([self.places, other.places]), torch.cat([self.rows, other.rows])
        return Rows.of(places, rows, self.examples, self.height)

    def _example(self) -> Tensor:
        """``(K,)``, the example that each row belongs to."""
        return self.places // self.height


def embedding(layer: nn.Embedding, activations: list[Tensor], grad_output: Tensor) -> dict[Tensor, Rows]:
    """Each token's output gradient ``(B, ..., n)`` belongs to its row.

    Raises:
        IsolationError: the layer divides by how often a token occurs in the batch, or its forward pass changes its
            table.
    """
    if layer.scale_grad_by_freq:
        raise IsolationError(
            "An embedding with scale_grad_by_freq=True divides each gradient by token counts of the whole batch, so "
            "one example rescales the others: switch the option off."
        )
    if layer.max_norm is not None:
        raise IsolationError(
            f"An embedding with max_norm={layer.max_norm:g} shrinks the rows of the words that occur, un-noised: set "
            "it to None."
        )
    if not layer.weight.requires_grad:
        return {}
    tokens = activations[0]
    examples, height = len(tokens), layer.num_embeddings
    first = torch.arange(examples, device=tokens.device).view(-1, *[1] * (tokens.dim() - 1)) * height
    values = grad_output
    if layer.padding_idx is not None:
        values = values.masked_fill((tokens == layer.padding_idx).unsqueeze(-1), 0)
    return {layer.weight: Rows.of((tokens + first).flatten(), values.reshape(-1, values.shape[-1]), examples, height)}


@register(nn.Embedding)
def _embedding_for_opacus(layer: nn.Embedding, activations: list[Tensor], grad_output: Tensor) -> dict[Tensor, Tensor]:
    return {parameter: materialize(g) for parameter, g in embedding(layer, activations, grad_output).items()}
