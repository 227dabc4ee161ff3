"""What a trainer learns and how it judges, if it was given no task: as ``transformers.Trainer`` does, example by
example."""

from collections.abc import Callable, Mapping
from functools import wraps
from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.utils.data import IterableDataset
from transformers import DataCollatorForLanguageModeling, Trainer

from dpft.errors import GuaranteeError
from dpft.tasks.labelled import LabelledTask, MaskedTask
from dpft.tasks.task import Task

# Whose compute_loss is the loss of the labels, as a task's is.
LIBRARIES = ("transformers.", "trl.trainer.sft_trainer")
OTHER_LIBRARIES = ("trl.",)  # whose losses are other things than the labels', and batches of them
UNUSED = ("compute_loss_func", "compute_metrics", "preprocess_logits_for_metrics")  # where there is a task


def default_task(trainer: Trainer, unit: str) -> Task:
    """The task of the trainer's data collator, with the trainer's own loss function if it has one.

    Columns that the model does not take, and the one that names units, do not reach the collator.

    Raises:
        GuaranteeError: the trainer's loss, or its collator's chance, cannot be private; named.
    """
    taken = None
    if trainer.args.remove_unused_columns:
        trainer._set_signature_columns_if_needed()
        taken = set(trainer._signature_columns)

    def reaches(column: str) -> bool:
        return (unit == "example" or column != unit) and (taken is None or column in taken)

    collator, own = trainer.data_collator, own_loss_of(trainer)
    kind = LabelledTask
    if isinstance(collator, DataCollatorForLanguageModeling) and collator.mlm:
        if collator.seed is not None:
            raise GuaranteeError(
                f"The data collator masks by the seed {collator.seed}, and masks that follow from a known seed are no "
                "secret: leave its seed out."
            )
        kind = MaskedTask
    if own is None:
        return kind(collator, reaches=reaches)

    @wraps(own.function)  # so that its code is seen to be the user's, which no version tells
    def losses(model: nn.Module, batch: Mapping[str, Tensor]) -> Any:
        return trainer.compute_loss(model, dict(batch))

    return kind(collator, reaches=reaches, loss=losses, own=own.name)


class OwnLoss(NamedTuple):
    """A loss of the user's own: what a message calls it, and its code."""

    name: str
    function: Callable


def own_loss_of(trainer: Trainer) -> OwnLoss | None:
    """A loss of the user's own: a compute_loss_func, or a compute_loss.

    Raises:
        GuaranteeError: it is a library's loss that is not one of its examples' labels.
    """
    loss_type = getattr(trainer.args, "loss_type", None)
    if loss_type not in (None, "nll"):
        raise GuaranteeError(
            f"loss_type is {loss_type!r}, and a private step computes each example's own 'nll': leave it out, or pass "
            "a task with such losses."
        )
    owner: type[Trainer] = next(kind for kind in type(trainer).__mro__ if "compute_loss" in vars(kind))
    if owner.__module__.startswith(LIBRARIES):
        function = trainer.compute_loss_func
        return None if function is None else OwnLoss("compute_loss_func", function)
    if owner.__module__.startswith(OTHER_LIBRARIES):
        raise GuaranteeError(
            f"{owner.__name__} has a loss of its own, which averages over the batch: pass a task whose losses are one "
            "number for each example."
        )
    return OwnLoss(f"{owner.__name__}.compute_loss", owner.compute_loss)


def refuse_unused(trainer: Trainer) -> None:
    """Refuse, by name, what a trainer with a task accepts and a private step never calls.

    Raises:
        GuaranteeError: a loss or metrics of the user's own would be ignored.
    """
    own = own_loss_of(trainer)
    for name in UNUSED:
        if getattr(trainer, name, None) is not None:
            raise GuaranteeError(
                f"{name} was given beside a task and would never be called, so the budget would be spent on another "
                "loss or judged by other metrics: leave one of them out."
            )
    if own is not None:
        raise GuaranteeError(
            f"{own.name} would never be called, because a task was given, and the budget would be spent on another "
            "loss: leave one of them out."
        )


def refuse_data(rows: Any) -> None:
    """Raises GuaranteeError: rows cannot be drawn one by one, as Poisson sampling must."""
    if isinstance(rows, IterableDataset) or (rows is not None and not hasattr(rows, "__len__")):
        raise GuaranteeError(
            f"The training data are of type {type(rows).__name__}, of which no single row can be asked for, and "
            "private sampling draws rows one by one: give a data set with a length, such as datasets.Dataset."
        )
