"""What would fail after the first charge is tried before it: the optimizer, the evaluation."""

import copy
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer
from transformers import Trainer, get_scheduler

from dpft.errors import DPFTError, RecipeError, first_line
from dpft.training.batches import Examples

FEW = 8  # rows of the evaluation data that are tried


def try_optimizer(make: Callable[[], Optimizer | None]) -> None:
    """Let a copy of the optimizer take a step.

    Args:
        make: the copy, on parameters of its own; None where it cannot be copied.

    Raises:
        RecipeError: it cannot be made, or cannot take a step.
    """
    try:
        optimizer = make()
        if optimizer is None:
            return
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
    except DPFTError:
        raise
    except Exception as error:  # whatever an optimizer says of what it needs
        raise RecipeError(
            f"The optimizer or its schedule cannot take a step ({first_line(error)}), which would have failed after a "
            "charge: choose another, one that needs no closure."
        ) from error


def copied_optimizer(trainer: Trainer) -> Optimizer | None:
    """A trainer's optimizer and schedule on a copy of what they train; None where the optimizer is built into the
    model."""
    if trainer.optimizer is not None:
        optimizer = copy.deepcopy(trainer.optimizer)
    else:
        kind, settings = trainer.get_optimizer_cls_and_kwargs(trainer.args, trainer.model)
        if {"params", "model", "optimizer_dict"} & set(settings):
            return None
        smallest = sorted((p for p in trainer.model.parameters() if p.requires_grad), key=lambda p: p.numel())[:FEW]
        optimizer = kind([nn.Parameter(p.detach().clone()) for p in smallest], **settings)
    if trainer.lr_scheduler is None:
        steps = trainer.args.max_steps
        get_scheduler(
            trainer.args.lr_scheduler_type,
            optimizer,
            num_warmup_steps=trainer.args.get_warmup_steps(steps),
            num_training_steps=steps,
            scheduler_specific_kwargs=trainer.args.lr_scheduler_kwargs,
        )
    return optimizer


def check_evaluation(evaluate: Callable[[Any], Any], rows: Any) -> None:
    """Evaluate the first of these rows, or of each data set by name; the figures are forgotten.

    Raises:
        RecipeError: they cannot be evaluated.
    """
    for part in rows.values() if isinstance(rows, Mapping) else [rows]:
        some = _first(part)
        if not some:
            continue
        try:
            evaluate(some)
        except DPFTError:
            raise
        except Exception as error:  # whatever the model, the collator or the metrics make of them
            raise RecipeError(
                f"The evaluation data cannot be evaluated ({type(error).__name__}), which would have failed after "
                "training: check their columns and labels, or leave them out."
            ) from error


def _first(rows: Any) -> Any:
    """A few rows of a data set or a list; nothing of what has no length."""
    if rows is None or isinstance(rows, Examples) or not hasattr(rows, "__len__"):
        return None
    few = min(FEW, len(rows))
    return rows.select(range(few)) if hasattr(rows, "select") else [rows[i] for i in range(few)]
