"""What a model's output layer is given: the features of an example, made once by layers that do not train."""

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from dpft.errors import IsolationError, SubsetError
from dpft.tasks.losses import without_labels

TOLERANCE = 1e-4  # relative, of float32 arithmetic in other batches


class OutputLayer(NamedTuple):
    """The linear layer whose output is the model's logits, and its name."""

    name: str
    layer: nn.Linear


def output_layer(model: nn.Module, batch: Mapping[str, Tensor]) -> OutputLayer:
    """The layer that makes the logits of a collated batch; call it in evaluation mode, without gradients.

    Raises:
        SubsetError: the logits are no linear layer's output: scaled, capped, or of several layers.
    """
    seen: dict[str, Tensor] = {}
    layers = {name: module for name, module in model.named_modules() if type(module) is nn.Linear}
    hooks = [
        layer.register_forward_hook(lambda module, args, output, name=name: seen.__setitem__(name, output))
        for name, layer in layers.items()
    ]
    try:
        logits = model(**without_labels(batch)).logits
    finally:
        for hook in hooks:
            hook.remove()
    for name in reversed(seen):
        output = seen[name]
        if output.shape[-1] == logits.shape[-1] and _places(output, logits) is not None:
            return OutputLayer(name, layers[name])
    raise SubsetError(
        f"The logits of {type(model).__name__} are not what one linear layer gives, so there is no head to learn by "
        'itself: choose privacy.method = "dp-sgd".'
    )


def features_of(model: nn.Module, head: OutputLayer, batch: Mapping[str, Tensor]) -> Tensor:
    """``(B, d)`` float32 on the processor: what the head is given for each example of a collated batch."""
    seen: list[tuple[Tensor, Tensor]] = []
    hook = head.layer.register_forward_hook(lambda module, args, output: seen.append((args[0], output)))
    try:
        logits = model(**without_labels(batch)).logits
    finally:
        hook.remove()
    ((given, output),) = seen
    places = _places(output, logits)
    if places is None:
        raise SubsetError(f'{head.name} does not make the logits of every example: choose privacy.method = "dp-sgd".')
    if given.dim() == 3:
        given = given[torch.arange(len(given), device=given.device), places]
    return given.float().cpu()


def _places(output: Tensor, logits: Tensor) -> Tensor | None:
    """At which position ``(B,)`` of the layer's output each example's logits stand; zeros where it has no positions,
    None where they stand nowhere."""
    if output.shape == logits.shape and torch.equal(output, logits):
        return torch.zeros(len(logits), dtype=torch.long)
    if output.dim() != 3 or logits.dim() != 2 or len(output) != len(logits):
        return None
    same = (output == logits.unsqueeze(1)).all(-1)
    return same.int().argmax(1) if bool(same.any(1).all()) else None


def check_isolated(make: Callable[[Sequence], Tensor], examples: Sequence) -> None:
    """Raises IsolationError: an example's features depend on which others share its batch."""
    together = make(examples)
    alone = torch.cat([make([example]) for example in examples])
    worst = float((together - alone).abs().max()) if len(examples) else 0.0
    if not worst <= TOLERANCE * max(1e-3, float(together.abs().max())):
        raise IsolationError(
            f"The features of an example change by {worst:.1e} with the others of its batch, so its bound would not "
            "hold: use a model without batch statistics."
        )
