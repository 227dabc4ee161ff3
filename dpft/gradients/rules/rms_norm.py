"""RMS normalisation with a multiplicative weight, as Llama-like models and T5 define it."""

from typing import Any

import torch
from torch import Tensor
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.mistral.modeling_mistral import MistralRMSNorm
from transformers.models.qwen2.modeling_qwen2 import Qwen2RMSNorm
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm
from transformers.models.t5.modeling_t5 import T5LayerNorm

from dpft.gradients.rules.registry import register


@register(LlamaRMSNorm, MistralRMSNorm, Qwen2RMSNorm, Qwen3RMSNorm, T5LayerNorm)
def rms_norm(layer: Any, activations: list[Tensor], grad_output: Tensor) -> dict[Tensor, Tensor]:
    """``y = w · x / rms(x)``, so ``dw = Σ dy · x / rms(x)`` over all but the example and the last dimension."""
    if not layer.weight.requires_grad:
        return {}
    x = activations[0].float()
    normal = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + layer.variance_epsilon)
    return {layer.weight: torch.einsum("b...h->bh", grad_output * normal.to(grad_output.dtype))}
