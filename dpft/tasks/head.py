"""A language model up to its head, whose output, the logits, is the largest tensor of a micro-batch.

Where the head is a frozen linear layer, the loss looks at a few tokens' logits at a time
(:func:`dpft.tasks.cross_entropy.head_cross_entropies`) and never at those of a token without a label.
"""

from collections.abc import Mapping
from weakref import WeakSet

import torch
from torch import Tensor, nn

_CHANGED: WeakSet[nn.Module] = WeakSet()  # models seen to return other logits than their head's: scaled, capped, masked


def before_head(model: nn.Module, inputs: Mapping[str, Tensor]) -> tuple[Tensor, nn.Linear | None]:
    """What ``model(**inputs)`` gives its head, ``(B, T, D)``, and the head; or its logits, ``(B, T, V)``, and None.

    Zeros that need no memory stand in for the logits. Only if the model returns these very zeros, untouched, would it
    have returned the head's logits as they are; that is looked at in every pass.
    """
    head = None if model in _CHANGED else _frozen_head(model)
    if head is None:
        return model(**inputs).logits, None
    calls: list[tuple[Tensor, Tensor]] = []

    def forward(states: Tensor) -> Tensor:
        calls.append((states, states.new_zeros(1).expand(*states.shape[:-1], head.out_features)))
        return calls[-1][1]

    vars(head)["forward"] = forward
    try:
        found = model(**inputs).logits
    except torch.OutOfMemoryError:
        raise
    except RuntimeError:  # such zeros cannot be written to; whatever else it was comes again below
        found = None
    finally:
        del head.forward
    if len(calls) == 1 and found is calls[0][1] and found._version == 0:
        return calls[0][0], head
    logits = model(**inputs).logits
    _CHANGED.add(model)
    return logits, None


def _frozen_head(model: nn.Module) -> nn.Linear | None:
    """The model's head, if nothing trains there and nobody watches or replaces what it does."""
    head = getattr(model, "get_output_embeddings", lambda: None)()
    if type(head) is not nn.Linear or type(head.weight) is not nn.Parameter or "forward" in vars(head):
        return None
    hooks = (head._forward_pre_hooks, head._forward_hooks, head._backward_pre_hooks, head._backward_hooks)
    return None if any(hooks) or any(parameter.requires_grad for parameter in head.parameters()) else head
