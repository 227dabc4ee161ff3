"""GPT-2's ``Conv1D``: a linear layer whose weight is stored ``(in, out)``."""

import torch
from opacus.grad_sample import register_grad_sampler
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D


@register_grad_sampler(Conv1D)
def conv1d(layer: Conv1D, activations: list[Tensor], grad_output: Tensor) -> dict[nn.Parameter, Tensor]:
    """``y = x W + b``, so ``dW = xᵀ dy`` and ``db = Σ dy`` over all but the example."""
    gradients = {}
    if layer.weight.requires_grad:
        gradients[layer.weight] = torch.einsum("b...i,b...o->bio", activations[0].to(grad_output.dtype), grad_output)
    if layer.bias.requires_grad:
        gradients[layer.bias] = torch.einsum("b...o->bo", grad_output)
    return gradients
