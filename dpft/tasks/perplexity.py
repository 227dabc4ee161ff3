"""How well tokens are predicted, over all of them."""

import math
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn
from torch.nn.functional import log_softmax

from dpft.tasks.head import before_head
from dpft.tasks.losses import IGNORED, token_sums, without_labels

Sums = Callable[[nn.Module, Mapping[str, Tensor]], tuple[Tensor, Tensor]]


def label_sums(model: nn.Module, batch: Mapping[str, Tensor], *, shift: bool) -> tuple[Tensor, Tensor]:
    """Each example's summed loss over its labelled tokens and their number, both ``(B,)``; see :func:`token_sums`."""
    given, head = before_head(model, without_labels(batch))
    return token_sums(given, batch["labels"], shift=shift, head=head)


def label_likelihoods(logits: Tensor, labels: Tensor) -> list[Tensor]:
    """For each example the log-probabilities of its own labelled tokens, of ``(B, T, V)`` logits and ``(B, T)``
    labels."""
    likely = log_softmax(logits.float(), -1).gather(-1, labels.clamp_min(0).unsqueeze(-1)).squeeze(-1)
    return [row[kept] for row, kept in zip(likely, labels != IGNORED, strict=True)]


class Perplexity:
    """Loss per token over all labelled tokens (nats), and its exponential, the perplexity."""

    def __init__(self, sums: Sums) -> None:
        self._sums = sums
        self._total, self._tokens, self._examples = 0.0, 0, 0

    def update(self, model: nn.Module, batch: Mapping[str, Tensor]) -> None:
        sums, counts = self._sums(model, batch)
        self._total, self._tokens = self._total + float(sums.sum()), self._tokens + int(counts.sum())
        self._examples += len(counts)

    def compute(self) -> dict[str, Any]:
        loss = self._total / max(self._tokens, 1)
        figures = {"loss_per_token": loss, "perplexity": math.exp(min(loss, 700))}
        return figures | {"tokens": self._tokens, "examples": self._examples}
