"""A number for each text, within a declared range."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Self

import numpy as np
from pydantic import Field, model_validator
from torch import Tensor, nn

from dpft.errors import RecipeError
from dpft.recipe import TaskTable
from dpft.tasks.losses import pad_features, without_labels
from dpft.tasks.registry import task
from dpft.tasks.rules import numbers
from dpft.tasks.source import Source
from dpft.tasks.task import TEXTS, Columns
from dpft.tasks.text import MAX_LENGTH, TextTask
from dpft.tasks.words import WORDS
from dpft.values import Column, plain

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@task("regression")
class Regression(TextTask):
    """Predict a number from each text, such as the length of a stay from a note on admission.

    The model learns the number on a scale from -1 (``low``) to 1 (``high``), so that an output of 0 is the middle; an
    example's loss is its squared error there. A number beyond the range counts as the range's end, in training and in
    figures.

    Args:
        tokenizer: a Hugging Face tokenizer.
        low, high: the range of the numbers. It is declared and never computed from the data, because the largest
            number of the data is somebody's.
        text, target: the columns to read.
        max_length: texts are cut after so many tokens.
    """

    class Settings(TaskTable):
        text: str = Field("text", description="The column with the text.")
        target: str = Field("target", description="The column with the number.")
        low: float = Field(
            allow_inf_nan=False,
            description="The least number that is told apart, declared and public; lower ones count as this one.",
        )
        high: float = Field(
            allow_inf_nan=False,
            description="The largest number that is told apart, declared and public; higher ones count as this one.",
        )
        max_length: int | None = Field(None, ge=4, description=MAX_LENGTH)

        @model_validator(mode="after")
        def _is_a_range(self) -> Self:
            if not self.low < self.high:
                raise ValueError(
                    f"task.low is {self.low:g} and task.high is {self.high:g}, between which there is no number: "
                    "give the least and the largest number that the data may hold"
                )
            return self

        @property
        def columns(self) -> dict[str, Column]:
            return {self.text: Column("text"), self.target: Column("number")}

    headline = "mae"
    adds_layers = True
    template: ClassVar = {"subset": "lora(rank=8) + head", "task": {"low": 0.0, "high": 100.0}}

    def __init__(
        self,
        tokenizer: "PreTrainedTokenizerBase",
        low: float,
        high: float,
        *,
        text: str = "text",
        target: str = "target",
        max_length: int = 128,
    ) -> None:
        super().__init__(tokenizer, max_length)
        self.low, self.high, self.text, self.target = low, high, text, target

    @classmethod
    def load(cls, settings: Settings, source: Source) -> tuple["Regression", nn.Module]:
        tokenizer = source.processor()
        model = source.labelled_model(
            "AutoModelForSequenceClassification",
            [settings.target],
            tokenizer,
            problem_type="regression",
            ignore_mismatched_sizes=True,  # a head for classes is exchanged for a new one
        )
        return cls(tokenizer, settings.low, settings.high, text=settings.text, target=settings.target), model

    def examples(self) -> dict[str, list[Any]]:
        third = (self.high - self.low) / 3
        return {self.text: list(TEXTS), self.target: [self.low + third, self.high - third / 2]}

    def encode(self, rows: Columns) -> list[dict[str, Any]]:
        """Raises RecipeError: a row has no finite number; it is counted among those given."""
        targets = plain(rows[self.target])
        Column("number").check(targets, self.target)
        texts = self.tokenizer(list(rows[self.text]), truncation=True, max_length=self.max_length)["input_ids"]
        return [
            {"input_ids": ids, "labels": self.scaled(float(value))} for ids, value in zip(texts, targets, strict=True)
        ]

    def scaled(self, number: float) -> float:
        """A number as the model learns it, from -1 to 1."""
        kept = min(max(number, self.low), self.high)
        return 2 * (kept - self.low) / (self.high - self.low) - 1

    def unscaled(self, outputs: "np.ndarray[Any, Any]") -> "np.ndarray[Any, Any]":
        """What the model's outputs say, within the range; one that is no number says its middle."""
        kept = np.clip(np.nan_to_num(outputs.astype(np.float64), posinf=1, neginf=-1), -1, 1)
        found: np.ndarray[Any, Any] = self.low + (kept + 1) / 2 * (self.high - self.low)
        return found

    def collate(self, features: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        return pad_features(features, self.pad, token_labels=False)

    def losses(self, model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
        """Raises RecipeError: the model has several outputs."""
        try:
            return numbers(model, batch)
        except ValueError as error:
            raise RecipeError(
                "The model has several outputs for a text, and a regression has one number: load it with num_labels=1."
            ) from error

    def metrics(self) -> "RegressionMetrics":
        return RegressionMetrics(self)

    def canary(self, random: np.random.Generator) -> dict[str, Any]:
        return {self.text: self.words.text(WORDS, random), self.target: float(random.uniform(self.low, self.high))}


class RegressionMetrics:
    """Errors in the target's own units: the mean absolute one, the root of the mean squared one, R² and Pearson's
    correlation, the latter two zero where nothing varies.

    ``at_an_end`` is the share of targets at an end of the declared range or beyond: a large one tells of a range that
    is too narrow.
    """

    def __init__(self, task: Regression) -> None:
        self._task = task
        self._found: list[float] = []
        self._wanted: list[float] = []  # both scaled

    def update(self, model: nn.Module, batch: Mapping[str, Tensor]) -> None:
        self._found += model(**without_labels(batch)).logits.float().flatten().tolist()
        self._wanted += batch["labels"].tolist()

    def compute(self) -> dict[str, Any]:
        found, wanted = (self._task.unscaled(np.array(values)) for values in (self._found, self._wanted))
        errors = found - wanted
        spread = float(wanted.std())
        varies = spread > 0 and float(found.std()) > 0
        return {
            "mae": float(np.abs(errors).mean()),
            "rmse": float(np.sqrt(np.square(errors).mean())),
            "r2": 1 - float(np.square(errors).mean()) / spread**2 if spread > 0 else 0.0,
            "pearson": float(np.corrcoef(found, wanted)[0, 1]) if varies else 0.0,
            "at_an_end": float((np.abs(self._wanted) == 1).mean()),
            "examples": len(wanted),
        }
