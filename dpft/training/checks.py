"""What would fail after the first charge is tried before it: the optimizer, the evaluation; and what is not used is refused."""

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from transformers import Trainer, get_scheduler

from dpft.errors import DPFTError, GuaranteeError, RecipeError, first_line
from dpft.gradients.determinism import evaluating
from dpft.training.batches import EVALUATION_TOKENS, Examples, plain_batches

UNUSED = {
    "compute_loss_func": "pass a task, whose losses are one number for each example",
    "compute_metrics": "pass a task with an evaluate of its own, or use what evaluate() returns",
    "preprocess_logits_for_metrics": "pass a task with an evaluate of its own",
}
LOSS_OWNERS = (
    "transformers.",
    "trl.trainer.sft_trainer",
)  # whose compute_loss is the loss of the labels, as a task's is
FEW = 8  # rows of the evaluation data that are tried


def refuse_unused(trainer: Trainer) -> None:
    """Refuse, by name, what a trainer accepts and a private step never calls.

    Raises:
        GuaranteeError: a loss or metrics of the user's own would be ignored.
    """
    for name, way_out in UNUSED.items():
        if getattr(trainer, name, None) is not None:
            raise GuaranteeError(
                f"{name} was given and would never be called, so the budget would be spent on another loss or judged by other metrics: {way_out}."
            )
    loss_type = getattr(trainer.args, "loss_type", None)
    if loss_type not in (None, "nll"):
        raise GuaranteeError(
            f"loss_type is {loss_type!r}, and a private step computes each example's own 'nll': leave it out, or pass a task with such losses."
        )
    owner = next(kind for kind in type(trainer).__mro__ if "compute_loss" in vars(kind))
    if not owner.__module__.startswith(LOSS_OWNERS):
        raise GuaranteeError(
            f"{owner.__name__} has a compute_loss of its own, which averages over the batch and is never called in a private step: pass a task whose losses "
            "are one number for each example."
        )


def check_optimizer(trainer: Trainer) -> None:
    """Let the optimizer and its schedule take a step on a copy.

    Raises:
        RecipeError: they cannot.
    """
    try:
        optimizer = _copy(trainer)
        if optimizer is None:
            return
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                parameter.grad = torch.zeros_like(parameter)
        steps = trainer.args.max_steps
        if trainer.lr_scheduler is None:
            get_scheduler(
                trainer.args.lr_scheduler_type,
                optimizer,
                num_warmup_steps=trainer.args.get_warmup_steps(steps),
                num_training_steps=steps,
                scheduler_specific_kwargs=trainer.args.lr_scheduler_kwargs,
            )
        optimizer.step()
    except DPFTError:
        raise
    except Exception as error:  # whatever an optimizer says of what it needs
        raise RecipeError(
            f"The optimizer or its schedule cannot take a step ({first_line(error)}), which would have failed after a charge: choose another, one that "
            "needs no closure."
        ) from error


def _copy(trainer: Trainer) -> torch.optim.Optimizer | None:
    """The optimizer on a copy of what it trains; None where it is built into the model."""
    if trainer.optimizer is not None:
        return copy.deepcopy(trainer.optimizer)
    kind, settings = trainer.get_optimizer_cls_and_kwargs(trainer.args, trainer.model)
    if {"params", "model", "optimizer_dict"} & set(settings):
        return None
    trainable = sorted((p for p in trainer.model.parameters() if p.requires_grad), key=lambda p: p.numel())
    return kind([nn.Parameter(p.detach().clone()) for p in trainable[:FEW]], **settings)


def check_evaluation(trainer: Trainer) -> None:
    """Evaluate the first rows of the evaluation data, if there are any; the figures are forgotten.

    Raises:
        RecipeError: they cannot be evaluated.
    """
    rows, task, model = trainer.eval_dataset, trainer.task, trainer.model
    for part in rows.values() if isinstance(rows, Mapping) else [rows]:
        some = _first(part)
        if not some:
            continue
        try:
            batches = plain_batches(Examples.encode(some, task), task, EVALUATION_TOKENS)
            with evaluating(model):
                task.evaluate(model, map(trainer._prepare_inputs, batches))
        except DPFTError:
            raise
        except Exception as error:  # whatever the model, the collator or the metrics make of them
            raise RecipeError(
                f"The evaluation data cannot be evaluated ({type(error).__name__}), which would have failed after training: "
                "check their columns and labels, or leave them out."
            ) from error


def _first(rows: Any) -> Any:
    """A few rows of a data set or a list; nothing of what has no length."""
    if rows is None or isinstance(rows, Examples) or not hasattr(rows, "__len__"):
        return None
    few = min(FEW, len(rows))
    return rows.select(range(few)) if hasattr(rows, "select") else [rows[i] for i in range(few)]
