"""What a trainer learns and how it judges, if it was given no task: as ``transformers.Trainer`` does, example by
example."""

from collections.abc import Mapping
from typing import Any

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
    columns = None
    if trainer.args.remove_unused_columns:
        trainer._set_signature_columns_if_needed()
        columns = set(trainer._signature_columns) - {unit}
    elif unit != "example":
        columns = _AllBut(unit)
    collator = trainer.data_collator
    if isinstance(collator, DataCollatorForLanguageModeling) and collator.mlm:
        if collator.seed is not None:
            raise GuaranteeError(
                f"The data collator masks by the seed {collator.seed}, and masks that follow from a known seed are no "
                "secret: leave its seed out."
            )
        return MaskedTask(collator, columns=columns)
    own = own_loss_of(trainer)
    if own is None:
        return LabelledTask(collator, columns=columns)

    def losses(model: nn.Module, batch: Mapping[str, Tensor]) -> Any:
        return trainer.compute_loss(model, dict(batch))

    return LabelledTask(collator, columns=columns, loss=losses, own=own)


def own_loss_of(trainer: Trainer) -> str | None:
    """The name of a loss of the user's own: a compute_loss_func, or the class whose compute_loss it is.

    Raises:
        GuaranteeError: it is a library's loss that is not one of its examples' labels.
    """
    loss_type = getattr(trainer.args, "loss_type", None)
    if loss_type not in (None, "nll"):
        raise GuaranteeError(
            f"loss_type is {loss_type!r}, and a private step computes each example's own 'nll': leave it out, or pass "
            "a task with such losses."
        )
    owner = next(kind for kind in type(trainer).__mro__ if "compute_loss" in vars(kind))
    if owner.__module__.startswith(LIBRARIES):
        return None if trainer.compute_loss_func is None else "compute_loss_func"
    if owner.__module__.startswith(OTHER_LIBRARIES):
        raise GuaranteeError(
            f"{owner.__name__} has a loss of its own, which averages over the batch: pass a task whose losses are one "
            "number for each example."
        )
    return f"{owner.__name__}.compute_loss"


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
            f"{own} would never be called, because a task was given, and the budget would be spent on another loss: "
            "leave one of them out."
        )


def refuse_data(rows: Any) -> None:
    """Raises GuaranteeError: rows cannot be drawn one by one, as Poisson sampling must."""
    if isinstance(rows, IterableDataset) or (rows is not None and not hasattr(rows, "__len__")):
        raise GuaranteeError(
            f"The training data are of type {type(rows).__name__}, of which no single row can be asked for, and "
            "private sampling draws rows one by one: give a data set with a length, such as datasets.Dataset."
        )


class _AllBut:
    """A collection of every name but one."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __contains__(self, name: object) -> bool:
        return name != self._name
