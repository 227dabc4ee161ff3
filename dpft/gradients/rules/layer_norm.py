"""``nn.LayerNorm``: the formula of Opacus, which also serves a layer without a bias here."""

import torch
from torch import Tensor, nn

from dpft.gradients.rules.registry import register


@register(nn.LayerNorm)
def layer_norm(layer: nn.LayerNorm, activations: list[Tensor], grad_output: Tensor) -> dict[Tensor, Tensor]:
    """``y = w · x̂ + b``, so ``dw = Σ dy · x̂`` and ``db = Σ dy`` over all but the example and the weight's
    dimensions."""
    x = activations[0]
    gradients: dict[Tensor, Tensor] = {}
    if layer.weight.requires_grad:
        normal = torch.nn.functional.layer_norm(x, layer.normalized_shape, eps=layer.eps)
        gradients[layer.weight] = _summed(normal * grad_output, layer.weight)
    if layer.bias is not None and layer.bias.requires_grad:
        gradients[layer.bias] = _summed(grad_output, layer.bias)
    return gradients


def _summed(each: Tensor, parameter: nn.Parameter) -> Tensor:
    over = tuple(range(1, each.dim() - parameter.dim()))
    return each.sum(over) if over else each
