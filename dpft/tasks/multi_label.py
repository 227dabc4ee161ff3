"""Several labels for each text, or none."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Self

import numpy as np
from pydantic import Field, model_validator
from torch import Tensor, nn

from dpft.errors import RecipeError
from dpft.recipe import Labels, TaskTable
from dpft.tasks.class_metrics import label_figures, mean_figure
from dpft.tasks.losses import pad_features, without_labels
from dpft.tasks.registry import task
from dpft.tasks.rules import several_labels
from dpft.tasks.source import Source
from dpft.tasks.task import TEXTS, Columns
from dpft.tasks.text import MAX_LENGTH, TextTask
from dpft.tasks.words import WORDS
from dpft.values import Column, class_number, plain, split_labels

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@task("multi_label")
class MultiLabel(TextTask):
    """Say which of a declared, public list of labels hold for each text: several, one or none, such as diagnoses.

    An example's loss is the binary cross-entropy of each label, averaged over all labels that are declared.

    Args:
        tokenizer: a Hugging Face tokenizer.
        labels: every label there is. It is declared and never collected from the data, because a label that only
            one person has would reveal that person.
        separator: what stands between the labels of a cell that is one text; None where each cell is a list.
        text, label: the columns to read.
        max_length: texts are cut after so many tokens.
    """

    class Settings(TaskTable):
        text: str = Field("text", description="The column with the text.")
        label: str = Field("labels", description="The column with the text's labels: a list, or one text.")
        labels: Labels = Field([], validate_default=True, description="Every label there is, declared and public.")
        separator: str | None = Field(
            None,
            min_length=1,
            description="What stands between the labels of a cell that is one text, such as ; in a CSV file; by "
            "default each cell is a list.",
        )
        max_length: int | None = Field(None, ge=4, description=MAX_LENGTH)

        @model_validator(mode="after")
        def _labels_stay_whole(self) -> Self:
            if self.separator is None:
                return self
            torn = [label for label in self.labels if split_labels(label, self.separator) != [label]]
            if torn:
                raise ValueError(
                    f"task.separator is {self.separator!r}, which does not leave the label {torn[0]!r} whole: choose "
                    "another separator, or write lists of labels"
                )
            return self

        @property
        def columns(self) -> dict[str, Column]:
            return {self.text: Column("text"), self.label: Column("labels", tuple(self.labels), self.separator)}

    headline = "micro_f1"
    groups = "per_class"
    adds_layers = True
    template: ClassVar = {"subset": "lora(rank=8) + head", "task": {"labels": ["first label", "second label"]}}

    def __init__(
        self,
        tokenizer: "PreTrainedTokenizerBase",
        labels: Sequence[str],
        *,
        separator: str | None = None,
        text: str = "text",
        label: str = "labels",
        max_length: int = 128,
    ) -> None:
        super().__init__(tokenizer, max_length)
        self.labels = [str(value) for value in labels]
        self.text, self.label, self.column = text, label, Column("labels", tuple(self.labels), separator)

    @classmethod
    def load(cls, settings: Settings, source: Source) -> tuple["MultiLabel", nn.Module]:
        tokenizer = source.processor()
        names: dict[str, Any] = dict(separator=settings.separator, text=settings.text, label=settings.label)
        model = source.labelled_model(
            "AutoModelForSequenceClassification",
            settings.labels,
            tokenizer,
            problem_type="multi_label_classification",
            ignore_mismatched_sizes=True,  # a head for other classes is exchanged for a new one
        )
        return cls(tokenizer, settings.labels, **names), model

    def examples(self) -> dict[str, list[Any]]:
        return {self.text: list(TEXTS), self.label: [self._cell(self.labels[:1]), self._cell(self.labels[:2])]}

    def _cell(self, labels: Sequence[str]) -> list[str] | str:
        """Labels as the data have them."""
        return list(labels) if self.column.separator is None else self.column.separator.join(labels)

    def encode(self, rows: Columns) -> list[dict[str, Any]]:
        """Raises RecipeError: a cell is no list, or no text, of declared labels; the row is counted among those
        given."""
        cells = plain(rows[self.label])
        self.column.check(cells, self.label)
        texts = self.tokenizer(list(rows[self.text]), truncation=True, max_length=self.max_length)["input_ids"]
        return [{"input_ids": ids, "labels": self._classes(cell)} for ids, cell in zip(texts, cells, strict=True)]

    def _classes(self, cell: Any) -> list[float]:
        """1 for each declared label that the cell names, 0 for each other one."""
        named = {class_number(one, self.column.numbers) for one in split_labels(cell, self.column.separator)}
        return [float(i in named) for i in range(len(self.labels))]

    def collate(self, features: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        return pad_features(features, self.pad, token_labels=False)

    def losses(self, model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
        """Raises RecipeError: the model has another number of outputs than labels are declared."""
        try:
            return several_labels(model, batch)
        except ValueError as error:
            raise RecipeError(
                f"The model has other outputs than one for each of {len(self.labels)} declared labels: load it with "
                f"num_labels={len(self.labels)}."
            ) from error

    def metrics(self) -> "MultiLabelMetrics":
        return MultiLabelMetrics(self.labels)

    def canary(self, random: np.random.Generator) -> dict[str, Any]:
        some = [label for label in self.labels if random.integers(2)]
        return {self.text: self.words.text(WORDS, random), self.label: self._cell(some)}


class MultiLabelMetrics:
    """F1 over all labels together and its mean over the labels that occur, where a label of probability ½ or more is
    named; the mean of their average precision, which needs no threshold; the share of rows whose every label is
    right; and each label's figures."""

    def __init__(self, labels: Sequence[str]) -> None:
        self._labels = labels
        self._wanted: list[np.ndarray[Any, Any]] = []  # of each batch, (B, K)
        self._likely: list[np.ndarray[Any, Any]] = []

    def update(self, model: nn.Module, batch: Mapping[str, Tensor]) -> None:
        likely = model(**without_labels(batch)).logits.float().sigmoid()
        self._wanted.append(batch["labels"].cpu().numpy() > 0)
        self._likely.append(np.nan_to_num(likely.cpu().numpy()))

    def compute(self) -> dict[str, Any]:
        wanted, likely = np.concatenate(self._wanted), np.concatenate(self._likely).astype(np.float64)
        found = likely >= 0.5
        each = label_figures(self._labels, wanted, found, likely)
        return {
            "micro_f1": float(2 * (wanted & found).sum() / max(wanted.sum() + found.sum(), 1)),
            "macro_f1": mean_figure(each, "f1"),
            "average_precision": mean_figure(each, "average_precision"),
            "subset_accuracy": float((wanted == found).all(1).mean()),
            "examples": len(wanted),
            "per_class": each,
        }
