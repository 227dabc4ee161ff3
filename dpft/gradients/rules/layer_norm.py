"""``nn.LayerNorm``, by the formula of Opacus, and also for a layer without a bias."""

import torch
from torch import Tensor, nn

from dpft.gradients.rules.registry import register


@register(nn.LayerNorm)
def layer_norm(layer: nn.LayerNorm, activations: list[Tensor], grad_output: Tensor) -> dict[nn.Parameter, Tensor]:
    """``y = w · x̂ + b``, so ``dw = Σ dy · x̂`` and ``db = Σ dy`` over all but the example and the weight's
    dimensions."""
    x, gradients = activations[0], {}
    if layer.weight.requires_grad:
        normal = torch.nn.functional.layer_norm(x, layer.normalized_shape, eps=layer.eps)
        gradients[layer.weight] = _summed(normal * grad_output, layer.weight)
    if layer.bias is not None and layer.bias.requires_grad:
        gradients[layer.bias] = _summed(grad_output, layer.bias)
    return gradients


def _summed(each: Tensor, parameter: nn.Parameter) -> Tensor:
    over = tuple(range(1, each.dim() - parameter.dim()))
    return each.sum(over) if over else each
