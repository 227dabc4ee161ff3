"""Whether what is learned is what the model itself would learn: ε that is spent on another loss is spent for nothing."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from dpft.errors import RecipeError
from dpft.gradients.determinism import evaluating
from dpft.tasks.labelled import LabelledTask

OURS = "dpft.tasks."  # modules whose losses are dpft's own
TOLERANCE = 1e-3  # relative difference that float32 arithmetic explains
HALF_TOLERANCE = 3e-2


def check_own_loss(task: Any, model: nn.Module, collate: Callable[[list], Mapping], examples: Sequence) -> None:
    """On each example by itself, the task's loss must be the one that ``model(**batch)`` returns.

    A task of the user's own, or a loss that it overrides, is meant as it is and not compared; nor is a model's loss that it
    does not return. A guess about labels per token is refused where nothing confirms it.

    Args:
        collate: features to a batch on the model's device.
        examples: features, preferably of different lengths.

    Raises:
        RecipeError: with both numbers.
    """
    if not type(task).losses.__module__.startswith(OURS):
        return
    with evaluating(model), torch.no_grad():
        for example in examples:
            _compare(task, model, collate([example]))


def _compare(task: Any, model: nn.Module, batch: Mapping[str, Any]) -> None:
    kind = type(model.get_base_model() if hasattr(model, "get_base_model") else model).__name__
    if "labels" not in batch:
        raise RecipeError(
            f"The batches for {kind} have no labels but {', '.join(sorted(batch))}, so there is no loss that dpft knows: pass a task whose losses are "
            "one number for each example."
        )
    labels = batch["labels"]
    own = _own_loss(model, batch)
    if own is None:
        if isinstance(task, LabelledTask) and labels.dim() > 1:
            raise RecipeError(
                f"{kind} returns no loss of its own, so nothing tells how its labels of shape {tuple(labels.shape[1:])} belong to its outputs: pass "
                "a task whose losses are one number for each example."
            )
        return
    try:
        ours = float(task.losses(model, batch)[0])
    except (RuntimeError, ValueError, TypeError, AttributeError, IndexError) as error:
        raise RecipeError(
            f"dpft's loss cannot be computed on the outputs of {kind} and labels of type {labels.dtype} and shape {tuple(labels.shape)} "
            f"({type(error).__name__}): pass a task whose losses are one number for each example."
        ) from error
    half = any(p.dtype in (torch.float16, torch.bfloat16) for p in model.parameters())
    allowed = HALF_TOLERANCE if half or torch.is_autocast_enabled(labels.device.type) else TOLERANCE
    nothing = own != own and ours == 0  # an example without a label: its mean is of nothing
    if not nothing and not abs(ours - own) <= allowed * max(abs(own), 1e-2):
        raise RecipeError(
            f"On one example dpft's loss is {ours:.4g} and the loss of {kind} itself is {own:.4g}, so the budget would be spent on something else "
            "than what the model is for: pass a task whose losses are one number for each example."
        )


def _own_loss(model: nn.Module, batch: Mapping[str, Tensor]) -> float | None:
    try:
        loss = getattr(model(**batch), "loss", None)
    except TypeError:  # it takes no labels
        return None
    except (RuntimeError, ValueError, IndexError) as error:
        raise RecipeError(
            f"{type(model).__name__} cannot compute its own loss on an example ({type(error).__name__}), so its labels do not fit: labels of type "
            f"{batch['labels'].dtype} and shape {tuple(batch['labels'].shape)} were given."
        ) from error
    return None if loss is None or loss.numel() != 1 else float(loss)
