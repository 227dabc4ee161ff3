"""``nn.Embedding``, with the row of ``padding_idx`` left at zero as PyTorch does (Opacus 1.6 fills it)."""

import torch
from opacus.grad_sample import register_grad_sampler
from torch import Tensor, nn

from dpft.errors import IsolationError


@register_grad_sampler(nn.Embedding)
def embedding(layer: nn.Embedding, activations: list[Tensor], grad_output: Tensor) -> dict[nn.Parameter, Tensor]:
    """Scatter each token's output gradient ``(B, ..., H)`` to its row of a ``(B, V, H)`` table.

    Raises:
        IsolationError: the layer divides by how often a token occurs in the batch.
    """
    if layer.scale_grad_by_freq:
        raise IsolationError(
            "An embedding with scale_grad_by_freq=True divides each gradient by token counts of the whole batch, so "
            "one example rescales the others: switch the option off."
        )
    if not layer.weight.requires_grad:
        return {}
    tokens = activations[0]
    examples, rows, width = len(tokens), layer.num_embeddings, layer.embedding_dim
    offsets = torch.arange(examples, device=tokens.device).view(-1, *[1] * (tokens.dim() - 1)) * rows
    table = grad_output.new_zeros(examples * rows, width)
    table.index_add_(0, (tokens + offsets).flatten(), grad_output.reshape(-1, width))
    table = table.view(examples, rows, width)
    if layer.padding_idx is not None:
        table[:, layer.padding_idx] = 0
    return {layer.weight: table}
