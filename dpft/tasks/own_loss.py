"""Whether what is learned is what the model itself would learn: ε that is spent on another loss is spent for
nothing."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from dpft.errors import RecipeError
from dpft.subset.evaluating import evaluating
from dpft.tasks.labelled import LabelledTask
from dpft.tasks.rules import RULES, Rule, likeliest, unwrapped
from dpft.tasks.task import Batch, Features

Collate = Callable[[list[Features]], Batch]

OURS = "dpft.tasks."  # modules whose losses are dpft's own
TOLERANCE = 1e-3  # relative difference that float32 arithmetic explains
HALF_TOLERANCE = 3e-2
# What a rule raises that is another model's.
UNFIT = (RuntimeError, ValueError, TypeError, AttributeError, IndexError, KeyError)


def check_own_loss(task: Any, model: nn.Module, collate: Collate, examples: Sequence[Features]) -> None:
    """On each example by itself, the task's loss must be the one that ``model(**batch)`` returns.

    A :class:`LabelledTask` learns here which rule the model follows. A task of the user's own, or a loss that it
    overrides, is meant as it is and not compared; nor is a model's loss that it does not return. A guess about labels
    is refused where nothing confirms it.

    Args:
        collate: features to a batch on the model's device.
        examples: features, preferably of different lengths.

    Raises:
        RecipeError: with both numbers; or a loss of the user's own is not one number for each example.
    """
    if not type(task).losses.__module__.startswith(OURS):
        return
    with evaluating(model), torch.no_grad():
        if isinstance(task, LabelledTask) and task.own is not None:
            return _check_shape(task, model, collate(list(examples)), len(examples))
        batches = [collate([example]) for example in examples]
        for batch in batches:
            if "labels" not in batch and "start_positions" not in batch:
                raise RecipeError(
                    f"The batches for {_kind(model)} have no labels but {', '.join(sorted(batch))}, so there is no "
                    "loss that dpft knows: pass a task whose losses are one number for each example."
                )
        named = [_own_loss(model, batch) for batch in batches]
        known = [(batch, own) for batch, own in zip(batches, named, strict=True) if own is not None]
        if isinstance(task, LabelledTask):
            task.rule = _own_rule(model, batches, known)
        else:
            for batch, own in known:
                if not _agree(task.losses, model, batch, own):
                    raise _refusal(task.losses, model, batch, own)


def _check_shape(task: LabelledTask, model: nn.Module, batch: Mapping[str, Tensor], examples: int) -> None:
    losses = task.losses(model, batch)
    shape = tuple(losses.shape) if isinstance(losses, Tensor) else type(losses).__name__
    if shape != (examples,):
        raise RecipeError(
            f"{task.own} gave {shape} for {examples} examples, and a mean over the batch lets one record rescale the "
            "others before clipping: return (B,) losses, one for each example, or pass a task."
        )


def _own_rule(model: nn.Module, batches: Sequence[Batch], known: Sequence[tuple[Batch, float]]) -> Rule:
    """The rule by which the model computes its own loss, of all that agree on every example the likeliest."""
    guess = likeliest(model, batches[0])
    if not known and batches[0]["labels"].dim() > 1:
        raise RecipeError(
            f"{_kind(model)} returns no loss of its own, so nothing tells how its labels of shape "
            f"{_shape(batches[0])} belong to its outputs: pass a task whose losses are one number for each example."
        )
    telling = [(batch, own) for batch, own in known if own == own]  # the others have no labels
    if known and not telling:
        raise RecipeError(
            f"None of {len(known)} examples that were tried has a label, so nothing tells how {_kind(model)} uses "
            "labels: give examples with labels."
        )
    for rule in dict.fromkeys((guess, *RULES)):
        if all(_agree(rule, model, batch, own) for batch, own in telling):
            return rule
    raise _refusal(guess, model, *telling[0])


def _own_loss(model: nn.Module, batch: Mapping[str, Tensor]) -> float | None:
    """What ``model(**batch).loss`` is for one example; None where the model gives none."""
    try:
        loss = getattr(model(**batch), "loss", None)
    except TypeError:  # it takes no labels
        return None
    except (RuntimeError, ValueError, IndexError) as error:
        raise RecipeError(
            f"{_kind(model)} cannot compute its own loss on an example ({type(error).__name__}), so its labels do not "
            f"fit: labels of type {_labels(batch).dtype} and shape {_shape(batch)} were given."
        ) from error
    return None if loss is None or loss.numel() != 1 else float(loss)


def _agree(rule: Rule, model: nn.Module, batch: Mapping[str, Tensor], own: float) -> bool:
    """Whether the rule gives the model's own loss but for rounding; an example without labels has the mean of
    nothing."""
    try:
        losses = rule(model, batch)
    except RecipeError:
        raise
    except UNFIT:
        return False
    if losses.shape != (1,):
        return False
    ours = float(losses[0])
    if own != own:
        return ours == 0
    half = any(p.dtype in (torch.float16, torch.bfloat16) for p in model.parameters())
    allowed = HALF_TOLERANCE if half or torch.is_autocast_enabled(losses.device.type) else TOLERANCE
    return abs(ours - own) <= allowed * max(abs(own), 1e-2)


def _refusal(rule: Rule, model: nn.Module, batch: Mapping[str, Tensor], own: float) -> RecipeError:
    try:
        ours = float(rule(model, batch)[0])
    except UNFIT as error:
        return RecipeError(
            f"dpft's loss cannot be computed on the outputs of {_kind(model)} and labels of type "
            f"{_labels(batch).dtype} and shape {_shape(batch)} ({type(error).__name__}): pass a task whose losses are "
            "one number for each example."
        )
    return RecipeError(
        f"On one example dpft's loss is {ours:.4g} and the loss of {_kind(model)} itself is {own:.4g}, so the budget "
        "would be spent on something else than what the model is for: pass a task whose losses are one number for "
        f"each example."
    )


def _kind(model: nn.Module) -> str:
    """The class of a model, or of the one that an adapter wraps."""
    return type(unwrapped(model)).__name__


def _labels(batch: Mapping[str, Tensor]) -> Tensor:
    return batch["labels"] if "labels" in batch else batch["start_positions"]


def _shape(batch: Mapping[str, Tensor]) -> tuple[int, ...]:
    return tuple(_labels(batch).shape)
