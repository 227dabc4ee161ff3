"""One contract for every rule: per-example gradients equal those of a plain backward pass."""

import pytest
import torch
from torch import nn
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.mistral.modeling_mistral import MistralRMSNorm
from transformers.models.qwen2.modeling_qwen2 import Qwen2RMSNorm
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm
from transformers.models.t5.modeling_t5 import T5LayerNorm
from transformers.pytorch_utils import Conv1D

from dpft.errors import IsolationError
from dpft.gradients.rules import rule_for
from dpft.gradients.rules.implicit import materialize

TOKENS = torch.tensor([[1, 2, 1, 0], [3, 3, 3, 3], [0, 4, 5, 6]])
LAYERS = {
    "linear": (lambda: nn.Linear(5, 4), (3, 6, 5)),
    "linear without bias": (lambda: nn.Linear(5, 4, bias=False), (3, 5)),
    "conv1d": (lambda: Conv1D(4, 5), (3, 6, 5)),
    "embedding": (lambda: nn.Embedding(7, 4), TOKENS),
    "embedding with padding": (lambda: nn.Embedding(7, 4, padding_idx=0), TOKENS),
    "layer norm": (lambda: nn.LayerNorm(5), (3, 6, 5)),
    "group norm": (lambda: nn.GroupNorm(2, 4), (3, 4, 6)),
    "conv2d": (lambda: nn.Conv2d(2, 4, 2, stride=2), (3, 2, 6, 6)),
    **{
        norm.__name__: (lambda norm=norm: norm(5), (3, 6, 5))
        for norm in (LlamaRMSNorm, MistralRMSNorm, Qwen2RMSNorm, Qwen3RMSNorm, T5LayerNorm)
    },
}


@pytest.mark.parametrize("name", LAYERS)
def test_rule_equals_a_backward_pass_for_each_example(name):
    torch.manual_seed(0)
    make, inputs = LAYERS[name]
    layer = make()
    for parameter in layer.parameters():
        nn.init.normal_(parameter)
    x = inputs if isinstance(inputs, torch.Tensor) else torch.randn(inputs)
    output = layer(x)
    cotangent = torch.randn_like(output)
    found = rule_for(layer)(layer, [x], cotangent)
    assert set(found) == set(layer.parameters())
    for i in range(len(x)):
        gradients = torch.autograd.grad((layer(x[i : i + 1]) * cotangent[i : i + 1]).sum(), list(layer.parameters()))
        for parameter, expected in zip(layer.parameters(), gradients, strict=True):
            torch.testing.assert_close(materialize(found[parameter])[i], expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("frozen", ["weight", "bias"])
def test_conv1d_leaves_frozen_parameters_out(frozen):
    layer = Conv1D(4, 5)
    getattr(layer, frozen).requires_grad_(False)
    found = rule_for(layer)(layer, [torch.randn(3, 2, 5)], torch.randn(3, 2, 4))
    assert [id(p) for p in found] == [id(p) for p in layer.parameters() if p.requires_grad]


def test_an_embedding_scaled_by_batch_counts_is_refused():
    layer = nn.Embedding(7, 4, scale_grad_by_freq=True)
    with pytest.raises(IsolationError, match="scale_grad_by_freq"):
        rule_for(layer)(layer, [TOKENS], torch.randn(3, 4, 4))


def test_a_subclass_has_no_rule():
    class Scaled(nn.Linear):
        pass

    assert rule_for(Scaled(2, 2)) is None
