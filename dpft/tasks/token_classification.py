"""A tag for each word, such as the names in a text."""

from collections.abc import Mapping, Sequence
from itertools import chain, pairwise
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from pydantic import Field
from torch import Tensor, nn

from dpft.errors import RecipeError
from dpft.recipe import Labels, TaskTable
from dpft.tasks.losses import IGNORED, pad_features, token_losses, without_labels
from dpft.tasks.registry import task
from dpft.tasks.source import Source
from dpft.tasks.task import TEXTS, Columns
from dpft.tasks.text import MAX_LENGTH, TextTask
from dpft.tasks.words import WORDS
from dpft.values import Column, class_number, label_fault

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Entity = tuple[str, int, int]  # kind, first word and end
OUTSIDE = "O"  # the tag of a word in no entity


@task("token_classification")
class TokenClassification(TextTask):
    """Tag each word of a text with one of a declared, public list of tags.

    A word's tag is learned at its first token. An example's loss is the mean over its own words that ``max_length``
    leaves.

    Args:
        tokenizer: a fast Hugging Face tokenizer.
        labels: every tag there is, declared and never collected from the data; for entities as ``O``, ``B-name`` and
            ``I-name``.
        tokens, tags: the columns with each row's list of words and list of tags.
        max_length: examples are cut after so many tokens.
    """

    class Settings(TaskTable):
        tokens: str = Field("tokens", description="The column with the list of words.")
        tags: str = Field("tags", description="The column with the list of tags, one for each word.")
        labels: Labels = Field(
            [],
            validate_default=True,
            description="Every tag there is, declared and public; entities as O, B-x and I-x.",
        )
        max_length: int | None = Field(None, ge=4, description=MAX_LENGTH)

        @property
        def columns(self) -> dict[str, Column]:
            return {self.tokens: Column("words"), self.tags: Column("tags", tuple(self.labels))}

    headline = "entity_f1"
    groups = "per_entity"
    adds_layers = True
    template: ClassVar = {"subset": "lora(rank=8) + head", "task": {"labels": ["O", "B-first", "I-first"]}}

    def __init__(
        self,
        tokenizer: "PreTrainedTokenizerBase",
        labels: Sequence[str],
        *,
        tokens: str = "tokens",
        tags: str = "tags",
        max_length: int = 128,
    ) -> None:
        super().__init__(tokenizer, max_length)
        self.tokens, self.tags = tokens, tags
        self.labels = [str(value) for value in labels]
        self._index = {value: i for i, value in enumerate(self.labels)}

    @classmethod
    def load(cls, settings: Settings, source: Source) -> tuple["TokenClassification", nn.Module]:
        tokenizer = source.processor(add_prefix_space=True)  # byte-level tokenizers need it where words are given
        if not tokenizer.is_fast:
            raise RecipeError(
                f"The tokenizer {type(tokenizer).__name__} does not tell which word a token is of: choose a model "
                "with a fast tokenizer."
            )
        task = cls(tokenizer, settings.labels, tokens=settings.tokens, tags=settings.tags)
        return task, source.labelled_model("AutoModelForTokenClassification", settings.labels, tokenizer)

    def examples(self) -> dict[str, list[list[str]]]:
        words = [text.split() for text in TEXTS]
        tags = [[self.labels[i % len(self.labels)] for i in range(len(some))] for some in words]
        return {self.tokens: words, self.tags: tags}

    def encode(self, rows: Columns) -> list[dict[str, Any]]:
        """Raises RecipeError: a row has other than one declared tag for each word; it is counted among those given."""
        texts = [list(words) for words in rows[self.tokens]]
        tags = [self._classes(row, words, i) for i, (row, words) in enumerate(zip(rows[self.tags], texts, strict=True))]
        encoded = self.tokenizer(texts, is_split_into_words=True, truncation=True, max_length=self.max_length)
        features = []
        for i, (ids, row) in enumerate(zip(encoded["input_ids"], tags, strict=True)):
            owners = encoded.word_ids(i)
            first = [word is not None and word != before for before, word in pairwise([None, *owners])]
            labels = [row[word] if new else IGNORED for word, new in zip(owners, first, strict=True)]
            features.append({"input_ids": ids, "labels": labels})
        return features

    def _classes(self, tags: Sequence[object], words: Sequence[str], row: int) -> list[int]:
        classes = []
        for value in tags:
            found = class_number(value, self._index)
            if found is None:
                raise RecipeError(f"Row {row + 1:,} {label_fault(value, self.tags, len(self.labels))}")
            classes.append(found)
        if len(classes) != len(words):
            raise RecipeError(
                f"Row {row + 1:,} has {len(words):,} words in column {self.tokens!r} and {len(classes):,} tags in "
                f"column {self.tags!r}: write one tag for each word."
            )
        return classes

    def collate(self, features: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        return pad_features(features, self.pad, token_labels=True)

    def losses(self, model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
        return token_losses(model(**without_labels(batch)).logits, batch["labels"], shift=False)

    def metrics(self) -> "EntityMetrics":
        return EntityMetrics(self.labels)

    def canary(self, random: np.random.Generator) -> dict[str, list[str]]:
        tags = [self.labels[i] for i in random.integers(len(self.labels), size=WORDS)]
        return {self.tokens: self.words.text(WORDS, random).split(), self.tags: tags}


class EntityMetrics:
    """Precision, recall and F1 of whole entities, over all and for each kind, and the share of words with the right
    tag.

    An entity is right if its first and last word and its kind are. Words that ``max_length`` cuts off are not counted.
    """

    def __init__(self, labels: Sequence[str]) -> None:
        self._labels = labels
        self._counts: dict[str, list[int]] = {}  # of each kind: right, found, wanted
        self._right, self._words, self._examples = 0, 0, 0

    def update(self, model: nn.Module, batch: Mapping[str, Tensor]) -> None:
        logits = model(**without_labels(batch)).logits
        guesses = logits[:, logits.shape[1] - batch["labels"].shape[1] :].argmax(-1)  # behind a prompt tuner's tokens
        for guess, label in zip(guesses, batch["labels"], strict=True):
            kept = label != IGNORED
            found, wanted = (
                [self._labels[i] if i < len(self._labels) else OUTSIDE for i in tags[kept].tolist()]
                for tags in (guess, label)
            )
            self._right += sum(a == b for a, b in zip(found, wanted, strict=True))
            self._words, self._examples = self._words + len(wanted), self._examples + 1
            self._count(set(entities(found)), set(entities(wanted)))

    def _count(self, found: set[Entity], wanted: set[Entity]) -> None:
        for place, some in enumerate((found & wanted, found, wanted)):
            for kind, *_ in some:
                self._counts.setdefault(kind, [0, 0, 0])[place] += 1

    def compute(self) -> dict[str, Any]:
        total = _figures(*map(sum, zip(*self._counts.values(), strict=True))) if self._counts else _figures(0, 0, 0)
        return {
            "entity_f1": total["f1"],
            "entity_precision": total["precision"],
            "entity_recall": total["recall"],
            "token_accuracy": self._right / max(self._words, 1),
            "words": self._words,
            "examples": self._examples,
            "per_entity": {kind: _figures(*counts) for kind, counts in sorted(self._counts.items())},
        }


def _figures(right: int, found: int, wanted: int) -> dict[str, float]:
    figures = {"precision": right / max(found, 1), "recall": right / max(wanted, 1)}
    return figures | {"f1": 2 * right / max(found + wanted, 1), "count": wanted}


def entities(tags: Sequence[str]) -> list[Entity]:
    """Kind, first word and end of each entity, by the rule of CoNLL-2000's evaluation: an I- of another kind begins one
    as well.

    A tag other than ``O`` without a prefix is of the kind that it names, and a run of it is one entity.

    >>> entities(["B-drug", "I-drug", "O", "I-dose", "B-dose"])
    [('drug', 0, 2), ('dose', 3, 4), ('dose', 4, 5)]
    """
    found: list[Entity] = []
    start, inside = 0, None
    for i, tag in enumerate(chain(tags, [OUTSIDE])):
        prefix, dash, name = tag.partition("-")
        if not dash or prefix not in ("B", "I"):
            prefix, name = "I", tag
        kind = None if tag == OUTSIDE else name
        if inside is not None and (kind != inside or prefix == "B"):
            found.append((inside, start, i))
        if kind is not None and (kind != inside or prefix == "B"):
            start = i
        inside = kind
    return found
