"""Linear layers of which single weights train. ``parametrizations.weight`` holds their flat positions and values."""

import warnings
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad
from torch.nn.utils import parametrize
from transformers.pytorch_utils import Conv1D

DENSE = 1 / 40  # above this share of the weights, the whole product is cheaper than the chosen entries


def is_sparse_linear(layer: nn.Module) -> bool:
    """Whether the layer is linear and its one parametrization is a :class:`~dpft.subset.sparse.SparseDelta`."""
    parametrizations: Any = layer.parametrizations if parametrize.is_parametrized(layer) else {}
    if list(parametrizations) != ["weight"]:
        return False
    steps = parametrizations["weight"]
    return type(layer).__bases__[0] in (nn.Linear, Conv1D) and len(steps) == 1 and hasattr(steps[0], "indices")


def sparse_linear(layer: Any, activations: list[Tensor], grad_output: Tensor) -> dict[Tensor, Tensor]:
    """``dW = dyᵀ x`` at the chosen entries alone: ``dv_k = Σ_t dy[t, row_k] · x[t, column_k]`` for each example."""
    delta = layer.parametrizations["weight"][0]
    gradients: dict[Tensor, Tensor] = {}
    if delta.values.requires_grad:
        x = activations[0].flatten(1, -2) if activations[0].dim() > 2 else activations[0].unsqueeze(1)
        dy = grad_output.flatten(1, -2) if grad_output.dim() > 2 else grad_output.unsqueeze(1)
        # nn.Linear stores (out, in), Conv1D (in, out)
        first, second = (x, dy) if isinstance(layer, Conv1D) else (dy, x)
        gradients[delta.values] = _at(first, second.to(first.dtype), delta.indices)
    if layer.bias is not None and layer.bias.requires_grad:
        gradients[layer.bias] = torch.einsum("b...o->bo", grad_output)
    return gradients


def _at(first: Tensor, second: Tensor, indices: Tensor) -> Tensor:
    """``(B, T, m)`` and ``(B, T, n)`` to the entries of each ``(m, n)`` product at flat ``indices`` ``(k,)``:
    ``(B, k)``."""
    height, width = first.shape[2], second.shape[2]
    if len(indices) > DENSE * height * width:
        return torch.stack([(a.T @ b).flatten()[indices] for a, b in zip(first, second, strict=True)])
    ends = torch.bincount(indices // width, minlength=height).cumsum(0)  # indices ascend
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PyTorch warns that this layout is in beta
        places = torch.sparse_csr_tensor(
            pad(ends, (1, 0)), indices % width, first.new_zeros(len(indices)), (height, width)
        )
    return torch.stack(
        [torch.sparse.sampled_addmm(places, a.T, b, beta=0).values() for a, b in zip(first, second, strict=True)]
    )
