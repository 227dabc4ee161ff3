"""Closed-form per-example gradients, one file per kind of layer.

A rule is an Opacus grad sampler: ``rule(layer, [input], grad_output) -> {parameter: (B, *shape)}``. A class of layer
without a rule here uses that of Opacus, if there is one (:mod:`dpft.gradients.rules.registry`). To add a rule, write a
file like these, import it below and add the layer to ``tests/gradients/test_rules.py``.
"""

from torch import nn
from transformers.pytorch_utils import Conv1D

from dpft.gradients.rules import embedding, layer_norm, linear, rms_norm  # noqa: F401  (importing registers theirs)
from dpft.gradients.rules.registry import Rule as Rule
from dpft.gradients.rules.registry import registered
from dpft.gradients.rules.sparse import is_sparse_linear, sparse_linear

# These rules may return an implicit gradient. A registered rule may not.
IMPLICIT: dict[type[nn.Module], Rule] = {
    nn.Linear: linear.linear,
    Conv1D: linear.conv1d,
    nn.Embedding: embedding.embedding,
}


def rule_for(layer: nn.Module) -> Rule | None:
    """The rule of exactly this class. A subclass may compute something else and gets none."""
    if is_sparse_linear(layer):  # PyTorch creates its class for this one layer, so no registry has it
        return sparse_linear
    return IMPLICIT.get(type(layer)) or registered(type(layer))
