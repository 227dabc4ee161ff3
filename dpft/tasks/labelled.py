"""Data that are tokenized already: the model's batches have ``labels``."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from dpft.tasks.head import before_head
from dpft.tasks.losses import class_losses, token_losses, without_labels
from dpft.tasks.task import Task


class LabelledTask(Task):
    """The task of any Hugging Face data set that is already tokenized: features with ``labels`` and a data collator.

    Labels of one number per example are classes, labels per token are language modelling. This is what
    ``SFTTrainer`` and ``Seq2SeqTrainer`` bring along.
    """

    def __init__(self, collator: Callable[[list], Mapping[str, Tensor]]) -> None:
        self._collator = collator

    def encode(self, rows: Mapping[str, Sequence]) -> list[dict[str, Any]]:
        return [dict(zip(rows, values, strict=True)) for values in zip(*rows.values(), strict=True)]

    def collate(self, features: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        return dict(self._collator([dict(feature) for feature in features]))

    def losses(self, model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
        labels = batch["labels"]
        encoder_decoder = getattr(model.config, "is_encoder_decoder", False)
        # An encoder-decoder makes its decoder's input from the labels; every other model need not see them.
        if encoder_decoder:
            return token_losses(model(**batch).logits, labels, shift=False)
        if labels.dim() == 1:
            return class_losses(model(**without_labels(batch)).logits, labels)
        given, head = before_head(model, without_labels(batch))
        return token_losses(given, labels, shift=True, head=head)
