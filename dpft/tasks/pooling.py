"""A text's features as the mean over its tokens, inside a model that its own class loads.

Encoders such as all-MiniLM and E5 were trained so that the mean of their last states says what a text means. Their
classes in transformers classify by the first token alone. One more block of the same kind makes the mean of it: its
queries and keys are zero, so that it attends to every token alike, its values are the states themselves, and their mean
is weighted so much more than the first token's own state that nothing of the latter is left. The block's normalisation
brings the mean to the length √d. The saved model is an ordinary one with one block more.
"""

from typing import Any

import torch
from torch import Tensor, nn

WEIGHT = 1e4  # of the mean, beside the first token's own state
SMALL = 1e-3  # by which what follows is scaled, where tanh and GELU are straight lines


def mean_pooled(model: nn.Module) -> bool:
    """Add the block to a classifier of BERT's architecture, in place; False for another, which stays as it is."""
    base: Any = getattr(model, "base_model", model)
    blocks = getattr(getattr(base, "encoder", None), "layer", None)
    config: Any = model.config
    if not isinstance(blocks, nn.ModuleList) or not len(blocks) or not _as_bert(blocks[-1]):
        return False
    dense = _before_output(model)
    if dense is None:
        return False
    kind: Any = type(blocks[-1])
    block = kind(config, layer_idx=len(blocks)).to(next(blocks[-1].parameters()))
    with torch.no_grad():
        for parameter in block.parameters():
            parameter.zero_()
        attention = block.attention
        attention.self.value.weight.copy_(_eye(attention.self.value))
        attention.output.dense.weight.copy_(WEIGHT * _eye(attention.output.dense))
        for norm in (attention.output.LayerNorm, block.output.LayerNorm):
            norm.weight.fill_(1.0)
        dense.weight.copy_(SMALL * _eye(dense))
        dense.bias.zero_()
    block.train(model.training)
    blocks.append(block)
    config.num_hidden_layers = len(blocks)
    return True


def _as_bert(block: nn.Module) -> bool:
    """Whether the block normalises after it adds, and has the names of BERT's."""
    names = {name for name, _ in block.named_modules()}
    wanted = {"attention.self.query", "attention.self.value", "attention.output.dense", "attention.output.LayerNorm"}
    return wanted | {"intermediate.dense", "output.dense", "output.LayerNorm"} <= names


def _before_output(model: nn.Module) -> nn.Linear | None:
    """The square layer between the first token's state and the output layer: a pooler's, or a classification head's."""
    for name in ("base_model.pooler.dense", "classifier.dense"):
        found: Any = model
        for part in name.split("."):
            found = getattr(found, part, None)
        if isinstance(found, nn.Linear):
            return found
    return None


def _eye(layer: nn.Linear) -> Tensor:
    return torch.eye(layer.in_features, dtype=layer.weight.dtype)
