"""What a task is, and the per-example losses that all tasks are made of."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, pad

from dpft.tasks.cross_entropy import cross_entropies, head_cross_entropies
from dpft.tasks.encoded import Encoded
from dpft.tasks.head import before_head

IGNORED = -100  # label of a token that has no loss, as everywhere in Hugging Face


@runtime_checkable
class Task(Protocol):
    """Per-example losses, collation and metrics: all that the trainer knows about what is learned."""

    def losses(self, model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
        """``(B,)`` losses, each from its own example alone: never divided by a count over the batch."""

    def encode(self, rows: Mapping[str, Sequence]) -> list[dict[str, Any]] | Encoded:
        """Columns of some rows to one feature a row, from that row alone; any other number as :class:`Encoded`."""

    def collate(self, features: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        """Pad features to one batch, with an attention mask."""

    def length(self, features: Mapping[str, Any]) -> int:
        """Tokens that the example costs: what the token budget counts."""

    def evaluate(self, model: nn.Module, batches) -> dict[str, Any]:
        """Metrics over an iterable of collated batches; un-noised, so private if the data are."""


def class_losses(logits: Tensor, labels: Tensor) -> Tensor:
    """``(B, C)`` logits and ``(B,)`` labels to ``(B,)`` cross-entropies."""
    return cross_entropy(logits.float(), labels, reduction="none")


def token_sums(given: Tensor, labels: Tensor, *, shift: bool, head: nn.Linear | None = None) -> tuple[Tensor, Tensor]:
    """``(B, T, V)`` logits and ``(B, T)`` labels to each example's summed loss and token count, both ``(B,)``.

    Args:
        shift: the logits at t predict the label at t + 1 (causal models) rather than at t (encoder-decoders). What a prompt tuner
            puts before the text has no labels, and its last place predicts the first one.
        head: if there is one, the logits are what it makes of ``given``, ``(B, T, D)``.
    """
    before = given.shape[1] - labels.shape[1]
    if shift and before:
        given = given[:, before - 1 : -1]
    elif shift:
        labels = pad(labels[:, 1:], (0, 1), value=IGNORED)
    else:
        given = given[:, before:]
    given = given.flatten(0, 1)
    if head is None:
        each = cross_entropies(given, labels.flatten(), IGNORED)
    else:
        each = head_cross_entropies(given, head, labels.flatten(), IGNORED)
    return each.view(labels.shape).sum(1), (labels != IGNORED).sum(1)


def token_losses(given: Tensor, labels: Tensor, *, shift: bool, head: nn.Linear | None = None) -> Tensor:
    """Each example's mean loss over its own labelled tokens, ``(B,)``; zero for one that has none. See :func:`token_sums`."""
    sums, counts = token_sums(given, labels, shift=shift, head=head)
    return sums / counts.clamp_min(1)


class LabelledTask:
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

    def length(self, features: Mapping[str, Any]) -> int:
        return max((len(value) for value in features.values() if hasattr(value, "__len__")), default=1)

    def losses(self, model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
        labels = batch["labels"]
        encoder_decoder = getattr(model.config, "is_encoder_decoder", False)
        # An encoder-decoder makes its decoder's input from the labels; every other model need not see them.
        if encoder_decoder:
            return token_losses(model(**batch).logits, labels, shift=False)
        if labels.dim() == 1:
            return class_losses(model(**_without_labels(batch)).logits, labels)
        given, head = before_head(model, _without_labels(batch))
        return token_losses(given, labels, shift=True, head=head)

    def evaluate(self, model: nn.Module, batches) -> dict[str, Any]:
        total, examples = 0.0, 0
        with torch.no_grad():
            for batch in batches:
                losses = self.losses(model, batch)
                total, examples = total + float(losses.sum()), examples + len(losses)
        return {"loss": total / max(examples, 1), "examples": examples}


def pad_features(features: Sequence[Mapping[str, Any]], pad_token_id: int, *, token_labels: bool) -> dict[str, Tensor]:
    """Right-pad ``input_ids`` (and token labels) to the longest example, with the attention mask."""
    longest = max(len(feature["input_ids"]) for feature in features)

    def padded(key: str, filler: int) -> Tensor:
        return torch.tensor([list(f[key]) + [filler] * (longest - len(f[key])) for f in features])

    batch = {"input_ids": padded("input_ids", pad_token_id)}
    batch["attention_mask"] = torch.tensor(
        [[1] * len(f["input_ids"]) + [0] * (longest - len(f["input_ids"])) for f in features]
    )
    batch["labels"] = padded("labels", IGNORED) if token_labels else torch.tensor([f["labels"] for f in features])
    return batch


def _without_labels(batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {key: value for key, value in batch.items() if key != "labels"}
