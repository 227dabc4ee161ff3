"""One label for each text."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np
from pydantic import Field
from torch import Tensor, nn

from dpft.errors import RecipeError
from dpft.recipe import Labels, TaskTable
from dpft.tasks.class_metrics import ClassMetrics
from dpft.tasks.losses import declared_class_losses, pad_features
from dpft.tasks.pooling import mean_pooled
from dpft.tasks.registry import task
from dpft.tasks.source import Source
from dpft.tasks.task import TEXTS, Columns
from dpft.tasks.text import MAX_LENGTH, TextTask
from dpft.tasks.words import WORDS
from dpft.values import Column, class_number, label_fault, plain

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@task("sequence_classification")
class SequenceClassification(TextTask):
    """Classify texts into a declared, public list of labels.

    Args:
        tokenizer: a Hugging Face tokenizer.
        labels: every label there is. It is declared and never collected from the data, because a label that only
            one person has would reveal that person. A row's label is a text, a whole number that is declared by its
            digits, or true or false.
        text, label: the columns to read.
        max_length: texts are cut after so many tokens.
    """

    class Settings(TaskTable):
        text: str = Field("text", description="The column with the text.")
        label: str = Field("label", description="The column with the label, a text or a whole number.")
        labels: Labels = Field([], validate_default=True, description="Every label there is, declared and public.")
        max_length: int | None = Field(None, ge=4, description=MAX_LENGTH)
        group: str | None = Field(
            None,
            description="A column of the validation data, such as a clinic, whose values get figures of their own.",
        )
        pooling: Literal["auto", "mean", "model"] = Field(
            "auto",
            description="What the output layer is given: the mean over tokens (BERT's architectures), or what the "
            "model's own class makes of a text; auto is the mean where the head alone is learned.",
        )

        balance: float = Field(
            0.0,
            ge=0,
            le=1,
            description="A head by itself: 0 names each label as often as it was seen, 1 as if all were equally "
            "frequent, so that rare ones are found more often and accuracy falls. It costs nothing.",
        )
        hints: list[str] = Field(
            [],
            description="Public sentences, such as typical ones of each label. A head by itself is then learned in the "
            "span of their features alone, whose few numbers need far less noise: for data of few units.",
        )

        @property
        def columns(self) -> dict[str, Column]:
            return {self.text: Column("text"), self.label: Column("label", tuple(self.labels))}

    headline = "accuracy"
    groups = "per_class"
    adds_layers = True
    template: ClassVar = {"subset": "head", "task": {"labels": ["first label", "second label"]}}
    hints: tuple[str, ...] = ()
    balance: float = 0.0

    def __init__(
        self,
        tokenizer: "PreTrainedTokenizerBase",
        labels: Sequence[str],
        *,
        text: str = "text",
        label: str = "label",
        max_length: int = 128,
    ) -> None:
        super().__init__(tokenizer, max_length)
        self.text, self.label = text, label
        self.labels = [str(value) for value in labels]
        self._index = {value: i for i, value in enumerate(self.labels)}

    @classmethod
    def load(cls, settings: Settings, source: Source) -> tuple["SequenceClassification", nn.Module]:
        tokenizer = source.processor()
        task = cls(tokenizer, settings.labels, text=settings.text, label=settings.label)
        task.group, task.hints, task.balance = settings.group, tuple(settings.hints), settings.balance
        model = source.labelled_model("AutoModelForSequenceClassification", settings.labels, tokenizer)
        wanted = settings.pooling == "mean" or settings.pooling == "auto" and source.head_alone
        if wanted and not mean_pooled(model) and settings.pooling == "mean":
            raise RecipeError(
                f"{type(model).__name__} has another architecture than BERT, in which no block can make the mean over "
                'tokens: set task.pooling = "model".'
            )
        return task, model

    def examples(self) -> dict[str, list[str]]:
        return {self.text: list(TEXTS), self.label: self.labels[: len(TEXTS)]}

    def encode(self, rows: Columns) -> list[dict[str, Any]]:
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

    def hinted(self) -> list[dict[str, Any]]:
        """The hints, encoded; their labels mean nothing."""
        if not self.hints:
            return []  # tokenizers take no empty list
        return self.encode({self.text: list(self.hints), self.label: [self.labels[0]] * len(self.hints)})

    def collate(self, features: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        return pad_features(features, self.pad, token_labels=False)

    def losses(self, model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
        """Raises RecipeError: the model has fewer classes than the task."""
        return declared_class_losses(model, batch, len(self.labels))

    def metrics(self) -> ClassMetrics:
        return ClassMetrics(self.labels)

    def canary(self, random: np.random.Generator) -> dict[str, str]:
        label = self.labels[random.integers(len(self.labels))]
        return {self.text: self.words.text(WORDS, random), self.label: label}
