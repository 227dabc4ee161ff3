"""The per-example losses that tasks are made of, and the padding of a batch."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, pad

from dpft.errors import RecipeError
from dpft.tasks.cross_entropy import cross_entropies, head_cross_entropies

IGNORED = -100  # label of a token that has no loss, as everywhere in Hugging Face


def class_losses(logits: Tensor, labels: Tensor) -> Tensor:
    """``(B, C)`` logits and ``(B,)`` labels to ``(B,)`` cross-entropies."""
    return cross_entropy(logits.float(), labels, reduction="none")


def declared_class_losses(model: nn.Module, batch: Mapping[str, Tensor], declared: int) -> Tensor:
    """``(B,)`` cross-entropies of a batch with ``labels`` ``(B,)``.

    Raises:
        RecipeError: the model has fewer classes than are ``declared``.
    """
    logits = model(**without_labels(batch)).logits
    if logits.shape[-1] < declared:
        raise RecipeError(
            f"The model tells {logits.shape[-1]} classes apart, but {declared} labels are declared: "
            f"load the model with num_labels={declared}."
        )
    return class_losses(logits, batch["labels"])


def token_sums(given: Tensor, labels: Tensor, *, shift: bool, head: nn.Linear | None = None) -> tuple[Tensor, Tensor]:
    """``(B, T, V)`` logits and ``(B, T)`` labels to each example's summed loss and token count, both ``(B,)``.

    Args:
        shift: the logits at t predict the label at t + 1 (causal models) rather than at t (encoder-decoders). What a
            prompt tuner puts before the text has no labels, and its last place predicts the first one.
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
    """Each example's mean loss over its own labelled tokens, ``(B,)``; zero for one that has none. See
    :func:`token_sums`."""
    sums, counts = token_sums(given, labels, shift=shift, head=head)
    return sums / counts.clamp_min(1)


def pad_features(features: Sequence[Mapping[str, Any]], pad_token_id: int, *, token_labels: bool) -> dict[str, Tensor]:
    """Right-pad ``input_ids``, and token labels, each to its longest, with the attention mask of the former."""
    longest = max(len(feature["input_ids"]) for feature in features)
    batch = {"input_ids": _padded(features, "input_ids", pad_token_id)}
    batch["attention_mask"] = torch.tensor(
        [[1] * len(f["input_ids"]) + [0] * (longest - len(f["input_ids"])) for f in features]
    )
    if token_labels:
        return batch | {"labels": _padded(features, "labels", IGNORED)}
    return batch | {"labels": torch.tensor([f["labels"] for f in features])}


def _padded(features: Sequence[Mapping[str, Any]], key: str, filler: int) -> Tensor:
    longest = max(len(feature[key]) for feature in features)
    return torch.tensor([list(f[key]) + [filler] * (longest - len(f[key])) for f in features])


def without_labels(batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What the model is given where the task computes the loss itself."""
    return {key: value for key, value in batch.items() if key != "labels"}
