"""What a forward pass leaves behind in the model: nothing that data could be read from."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from dpft.errors import GuaranteeError, IsolationError
from dpft.gradients.capture import Capture

START = 1e-3  # of weights that a forward pass changes, to see whether they come out alike whatever it was given


def without_side_effects(model: nn.Module, forward: Callable[[], Tensor]) -> Tensor:
    """The losses, if making them changed no buffer."""
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    result = forward()
    if result.dim() != 1:
        raise GuaranteeError(
            f"The task returned losses of shape {tuple(result.shape)}: return one loss per example, (B,)."
        )
    for name, buffer in model.named_buffers():
        if name in before and before[name].shape == buffer.shape and not torch.equal(before[name], buffer):
            layer = model.get_submodule(name.rpartition(".")[0])
            raise IsolationError(
                f"Layer {name.rpartition('.')[0]} ({type(layer).__name__}) changes its buffer {name} in the forward pass, where data "
                "would stay un-noised: put it in eval mode, or replace it (subset.replace_batchnorm puts GroupNorm for BatchNorm)."
            )
    return result


def keeps_its_weights(capture: Capture, losses: Callable, examples: list) -> None:
    """Raises IsolationError: a forward pass writes data into a weight. A projection, which follows from the weight alone, may."""
    model = capture.model
    for name, module in model.named_modules():
        if getattr(module, "max_norm", None) is not None and isinstance(module, (nn.Embedding, nn.EmbeddingBag)):
            raise IsolationError(
                f"Layer {name} ({type(module).__name__}) has max_norm={module.max_norm:g}, which shrinks the rows of the words that occur in "
                "each forward pass, so its weights would say un-noised which do: set max_norm to None."
            )
    weights = lambda: dict(model.named_parameters())
    with capture.paused(), torch.no_grad():
        before = {name: _sum(weight) for name, weight in weights().items()}
        without_side_effects(model, lambda: losses(examples))
        changed = {name: w.detach().clone() for name, w in weights().items() if before.get(name) != _sum(w)}
        outcomes = []
        for example in examples if changed else []:
            for name in changed:
                weights()[name].fill_(START)
            losses([example])
            outcomes.append({name: weights()[name].detach().clone() for name in changed})
        for name, value in changed.items():
            weights()[name].copy_(value)
    for name in changed:
        if not all(torch.equal(outcomes[0][name], outcome[name]) for outcome in outcomes):
            raise IsolationError(
                f"The forward pass changes the parameter {name}, where data would stay un-noised: train weights by their gradients alone."
            )


def _sum(weight: Tensor) -> str:
    """By which a change shows; of a quantised weight, which may know no sum, nothing."""
    return repr(weight.detach().sum(dtype=torch.float64).item()) if type(weight) is nn.Parameter else ""
