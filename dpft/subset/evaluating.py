"""A model in evaluation mode, for as long as it is evaluated."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode for all but quantized layers, and the modes from before afterwards.

    On a CPU bitsandbytes packs the weights of such a layer in evaluation mode, and no gradient passes them afterwards.
    """
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    for module, _ in modes:
        if any(not parameter.is_floating_point() for parameter in module.parameters(recurse=False)):
            module.training = True
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode
