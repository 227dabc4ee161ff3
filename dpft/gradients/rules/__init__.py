"""Closed-form per-example gradients, one file per kind of layer.

A rule is an Opacus grad sampler: ``rule(layer, [input], grad_output) -> {parameter: (B, *shape)}``. Rules live in
Opacus's own registry, so that whoever uses plain Opacus beside dpft gains the ones added here, and dpft uses
every rule that Opacus ships but those for which it has a smaller form (:mod:`dpft.gradients.rules.unmade`). To add one, write a file like these, import it below and add the layer to
``tests/gradients/test_rules.py``.
"""

from collections.abc import Callable

from opacus.grad_sample.grad_sample_module import GradSampleHooks
from torch import nn
from transformers.pytorch_utils import Conv1D

from dpft.gradients.rules import embedding, linear, rms_norm  # noqa: F401  (importing registers theirs)
from dpft.gradients.rules.sparse import is_sparse_linear, sparse_linear

# These rules may return a gradient unmade, which Opacus's registry has no room for.
UNMADE = {nn.Linear: linear.linear, Conv1D: linear.conv1d, nn.Embedding: embedding.embedding}


def rule_for(layer: nn.Module) -> Callable | None:
    """The rule of exactly this class; a subclass may compute something else and gets none."""
    if is_sparse_linear(layer):  # its class is made for the one layer, so no registry can hold it
        return sparse_linear
    return UNMADE.get(type(layer)) or GradSampleHooks.GRAD_SAMPLERS.get(type(layer))
