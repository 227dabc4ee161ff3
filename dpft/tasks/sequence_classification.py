"""One label for each text."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from dpft.errors import RecipeError
from dpft.tasks.task import _without_labels, class_losses, pad_features
from dpft.values import class_number, label_fault, plain


class SequenceClassification:
    """Classify texts into a declared, public list of labels.

    Args:
        tokenizer: a Hugging Face tokenizer.
        labels: every label there is. It is declared and never collected from the data, because a label that only
            one person has would reveal that person. A row's label is a text, a whole number that is declared by its
            digits, or true or false.
        text, label: the columns to read.
        max_length: texts are cut after so many tokens.
    """

    def __init__(
        self, tokenizer, labels: Sequence[str], *, text: str = "text", label: str = "label", max_length: int = 128
    ) -> None:
        self.tokenizer, self.text, self.label, self.max_length = tokenizer, text, label, max_length
        self.labels = [str(value) for value in labels]
        self._index = {value: i for i, value in enumerate(self.labels)}

    def encode(self, rows: Mapping[str, Sequence]) -> list[dict[str, Any]]:
        """Raises RecipeError: a label is missing, a float, or not declared; the row is counted among those given."""
        values = plain(rows[self.label])
        labels = [class_number(value, self._index) for value in values]
        if None in labels:
            row = labels.index(None)
            raise RecipeError(
                f"Row {row + 1:,} of {len(values):,} {label_fault(values[row], self.label, len(self.labels))}"
            )
        texts = self.tokenizer(list(rows[self.text]), truncation=True, max_length=self.max_length)["input_ids"]
        return [{"input_ids": ids, "labels": label} for ids, label in zip(texts, labels, strict=True)]

    def collate(self, features: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        return pad_features(features, self.tokenizer.pad_token_id or 0, token_labels=False)

    def length(self, features: Mapping[str, Any]) -> int:
        return len(features["input_ids"])

    def losses(self, model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
        """Raises RecipeError: the model has fewer classes than the task."""
        logits = model(**_without_labels(batch)).logits
        if logits.shape[-1] < len(self.labels):
            raise RecipeError(
                f"The model tells {logits.shape[-1]} classes apart, but {len(self.labels)} labels are declared: "
                f"load the model with num_labels={len(self.labels)}."
            )
        return class_losses(logits, batch["labels"])

    def evaluate(self, model: nn.Module, batches) -> dict[str, Any]:
        """Accuracy, macro-F1 over the labels that occur, and each label's F1 and count."""
        from sklearn.metrics import accuracy_score, precision_recall_fscore_support

        wanted, found = [], []
        with torch.no_grad():
            for batch in batches:
                wanted += batch["labels"].tolist()
                found += model(**_without_labels(batch)).logits.argmax(-1).tolist()
        present = sorted(set(wanted))
        precision, recall, f1, count = precision_recall_fscore_support(wanted, found, labels=present, zero_division=0)
        rows = zip(present, precision, recall, f1, count, strict=True)
        return {
            "accuracy": float(accuracy_score(wanted, found)),
            "macro_f1": float(f1.mean()),
            "examples": len(wanted),
            "per_class": {
                self.labels[i]: {"precision": float(p), "recall": float(r), "f1": float(f), "count": int(n)}
                for i, p, r, f, n in rows
            },
        }
