"""Data that are tokenized already: what ``transformers.Trainer`` and its subclasses bring along."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from torch import Tensor, nn
from transformers import DataCollatorForTokenClassification

from dpft.errors import RecipeError
from dpft.tasks.rules import Rule, likeliest
from dpft.tasks.task import Columns, Features, Task


class LabelledTask(Task):
    """The task of any Hugging Face data set that is already tokenized: features with labels, and a data collator.

    Which loss it is follows from the model's own, which a session compares on examples (:mod:`dpft.tasks.rules`): one
    class, several labels, regression, a label for each token at its place or for the next, an encoder-decoder's, CTC,
    spans. Without a session it follows from the model's class and the labels' shape.

    Args:
        collator: features to a batch.
        reaches: whether a column reaches the collator; by default all do.
        loss: a function of the user's own, ``(model, batch)`` to ``(B,)``.
        own: what the user calls it, for messages.

    Attributes:
        rule: by which losses are computed, once it is known.
    """

    def __init__(
        self,
        collator: Callable[[list[dict[str, Any]]], Mapping[str, Tensor]],
        *,
        reaches: Callable[[str], bool] = lambda column: True,
        loss: Rule | None = None,
        own: str = "loss",
    ) -> None:
        self._collator, self._reaches = collator, reaches
        self.rule, self.own = loss, (own if loss else None)

    def encode(self, rows: Columns) -> list[dict[str, Any]]:
        """Raises RecipeError: no column is left that the model takes."""
        taken = list(filter(self._reaches, rows))
        if not taken:
            raise RecipeError(
                f"The data have the columns {', '.join(rows)}, and the model takes none of them: tokenize the data, "
                "or pass a task that does."
            )
        columns = [rows[column] for column in taken]
        return [dict(zip(taken, values, strict=True)) for values in zip(*columns, strict=True)]

    def collate(self, features: Sequence[Features]) -> dict[str, Tensor]:
        return dict(self._collator([dict(feature) for feature in features]))

    def losses(self, model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
        return (self.rule or likeliest(model, batch))(model, batch)


class MaskedTask(LabelledTask):
    """Masked language modelling with masks that a collator draws, such as ``DataCollatorForLanguageModeling``.

    Each draw of an example masks it anew and by itself, from the secret chance of the step.
    """

    def __init__(self, collator: Any, **more: Any) -> None:
        super().__init__(collator, **more)
        self._pad = DataCollatorForTokenClassification(
            collator.tokenizer, pad_to_multiple_of=getattr(collator, "pad_to_multiple_of", None)
        )

    def draw(self, features: Features, random: np.random.Generator) -> dict[str, Any]:
        batch = self._collator([dict(features)])
        return {name: values[0].tolist() for name, values in batch.items()}

    def collate(self, features: Sequence[Features]) -> dict[str, Tensor]:
        drawn = all("labels" in feature for feature in features)
        return dict(self._pad([dict(f) for f in features])) if drawn else super().collate(features)
