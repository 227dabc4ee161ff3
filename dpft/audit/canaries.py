"""Canaries: made-up records that are planted in the training data by secret coins, and looked for afterwards.

Each is a unit of its own, made from public material alone (a tokenizer's vocabulary, a template, rows of ``data.public``) and never
by a look at the private data: what depended on a person would have to be paid for. Included or not is decided by the operating
system's entropy, once for each.

``random-tokens``  random words, with a random label where there are labels: nothing else in the data supports them
``secret``         an in-distribution sentence with a random code in it, as real data may hold one (Carlini et al. 2019)
``new-token``      random words and then a rare token that no other canary has (after Panda et al. 2025, who add one to the vocabulary)
``mislabelled``    a public row's text with a label that is not its own (Steinke, Nasr, Jagielski 2023, section 6)
"""

import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dpft.errors import RecipeError
from dpft.privacy.noise import Randomness, SecureRandomness
from dpft.recipe import Recipe
from dpft.training.data import column_of
from dpft.values import class_number

KINDS = ("random-tokens", "secret", "new-token", "mislabelled")
TEMPLATE = "The access code of patient {number} is {secret}."
WORDS = 12  # of a random text
DIGITS = 6  # of a secret
CUE = 4  # random words before a new token


@dataclass(frozen=True)
class Canary:
    """One record: its columns, and how its text begins, which is not judged."""

    text: str
    label: str | None = None
    cue: str = ""
    secret: str = ""


@dataclass(frozen=True)
class Canaries:
    """``m`` canaries and ``(m,)`` coins. Whoever has the coins must not have a hand in the training."""

    kind: str
    canaries: Sequence[Canary]
    included: np.ndarray
    repetitions: int = 1

    def __len__(self) -> int:
        return len(self.canaries)

    @property
    def units(self) -> int:
        """How many units are added on average: a public number."""
        return max(1, self.repetitions * len(self) // 2)

    def save(self, path: Path) -> None:
        """For the scoring alone: readable by the user who audits, and by nobody else."""
        path.parent.mkdir(parents=True, exist_ok=True)
        facts = {"kind": self.kind, "repetitions": self.repetitions, "included": self.included.tolist()}
        with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w", encoding="utf-8") as file:
            json.dump({**facts, "canaries": [asdict(canary) for canary in self.canaries]}, file)

    @classmethod
    def load(cls, path: Path) -> "Canaries":
        facts = json.loads(path.read_text(encoding="utf-8"))
        canaries = [Canary(**canary) for canary in facts["canaries"]]
        return cls(facts["kind"], canaries, np.array(facts["included"], dtype=bool), facts["repetitions"])

    def planted(self, rows, recipe: Recipe):
        """The ``datasets.Dataset`` with every included canary, ``repetitions`` times, in random order."""
        import datasets

        some, unit = rows[0], recipe.data.unit
        values = _as_written(rows, recipe) if _labelled(recipe) else {}
        owners = iter(_owners(rows, unit, self.repetitions * len(self)))
        found = []
        for canary, inside in zip(self.canaries, self.included, strict=True):
            for _ in range(self.repetitions):
                owner = next(owners)
                if inside:
                    row = dict.fromkeys(some) | columns(canary, recipe, values)
                    found.append(row | ({unit: owner} if unit != "example" else {}))
        if not found:
            return rows
        whole = datasets.concatenate_datasets([rows, datasets.Dataset.from_list(found, features=rows.features)])
        return whole.select(shuffled(len(whole), SecureRandomness()))


def make(
    kind: str,
    number: int,
    recipe: Recipe,
    tokenizer,
    *,
    public=None,
    repetitions: int = 1,
    randomness: Randomness | None = None,
) -> Canaries:
    """Canaries for a recipe, and their coins.

    Args:
        kind: one of ``KINDS``.
        number: m.
        public: rows declared public: what mislabelled canaries are made of.
        repetitions: how often an included canary is in the data; each time it is another unit.

    Raises:
        RecipeError: the kind does not go with the recipe, or there is not enough to make so many.
    """
    if number < 10 or repetitions < 1:
        raise RecipeError(
            f"{number:,} canaries, {repetitions:,} times each, show nothing: plant at least 10, once or more often."
        )
    if kind not in KINDS:
        raise RecipeError(f"There are no {kind} canaries: choose one of {', '.join(KINDS)}.")
    randomness = randomness or SecureRandomness()
    classes = _labelled(recipe)
    if kind in ("secret", "new-token") and classes:
        raise RecipeError(
            f"{kind} canaries are found by what a language model says next, and {recipe.task.name} says nothing: use random-tokens or mislabelled."
        )
    if kind == "mislabelled" and not classes:
        raise RecipeError(
            "mislabelled canaries need labels, and a language model has none: use random-tokens, secret or new-token."
        )
    if kind == "secret":
        canaries = [secret(i, randomness) for i in range(number)]
    elif kind == "mislabelled":
        canaries = _mislabelled(number, recipe, public, randomness)
    else:
        words = _Words(tokenizer, randomness)
        labels = recipe.task.labels if classes else [None]
        if kind == "random-tokens":
            cues = [words.text(CUE) if recipe.task.prompt else "" for _ in range(number)]
            texts = [f"{cue} {words.text(WORDS)}".strip() for cue in cues]
            canaries = [Canary(text, _choice(labels, randomness), cue) for text, cue in zip(texts, cues, strict=True)]
        else:
            cues = [words.text(CUE) for _ in range(number)]
            canaries = [Canary(f"{cue} {token}", cue=cue) for cue, token in zip(cues, words.rare(number), strict=True)]
    return Canaries(kind, canaries, randomness.bernoulli(number, 0.5), repetitions)


def secret(number: int, randomness: Randomness) -> Canary:
    """A sentence with a random code."""
    code = "".join(str(digit) for digit in below(10, DIGITS, randomness))
    text = TEMPLATE.format(number=number + 1, secret=code)
    return Canary(text, cue=text[: text.index(code)].rstrip(), secret=code)


def features(canaries: Sequence[Canary], recipe: Recipe, task) -> list[dict[str, Any]]:
    """Each canary as the task encodes it, for its loss; what its cue says has none.

    Raises:
        RecipeError: ``task.max_length`` leaves nothing of a canary to judge, or cuts its secret.
    """
    from dpft.tasks.task import IGNORED

    rows = [columns(canary, recipe) for canary in canaries]
    encoded = task.encode({name: [row[name] for row in rows] for name in rows[0]})
    if recipe.task.name == "causal_lm":
        for canary, one in zip(canaries, encoded, strict=True):
            cue = task.tokenizer(canary.cue)["input_ids"] if canary.cue else []
            hidden = len(os.path.commonprefix([cue, list(one["input_ids"])]))
            end = len(one["labels"]) - 1 if one["labels"][-1] == task.tokenizer.eos_token_id else len(one["labels"])
            place = range(len(one["labels"]))
            one["labels"] = [v if (hidden <= i < end) else IGNORED for i, v in zip(place, one["labels"], strict=True)]
            shown = task.tokenizer.decode([token for token in one["labels"] if token != IGNORED])
            if not shown.strip() or canary.secret not in shown.replace(" ", ""):
                raise RecipeError(
                    f"task.max_length is {task.max_length} tokens, which cuts off what a canary is judged by: raise it to {len(task.tokenizer(canary.text)['input_ids']) + 1} or more."
                )
    return encoded


def columns(canary: Canary, recipe: Recipe, values: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """The canary in the task's columns; ``values`` are the data's own for each declared label."""
    task = recipe.task
    if task.prompt:
        return {task.prompt: canary.cue, task.response: canary.text.removeprefix(canary.cue)}
    found = {task.text: canary.text}
    if _labelled(recipe):
        known = values or {}
        kind = type(next(iter(known.values()), ""))
        other = canary.label.lower() == "true" if kind is bool else kind(canary.label)
        found[task.label] = known.get(canary.label, other)
    return found


def _as_written(rows, recipe: Recipe) -> dict[str, Any]:
    """How the data write each declared label that they have."""
    return {recipe.task.labels[_class_of(value, recipe)]: value for value in column_of(rows, recipe.task.label)}


def _class_of(value: Any, recipe: Recipe) -> int | None:
    return class_number(value, {label: i for i, label in enumerate(recipe.task.labels)})


def _labelled(recipe: Recipe) -> bool:
    return recipe.task.name == "sequence_classification"


class _Words:
    """Words of a vocabulary, the common ones first."""

    def __init__(self, tokenizer, randomness: Randomness) -> None:
        self._tokenizer, self._randomness = tokenizer, randomness
        special = set(tokenizer.all_special_ids)
        found = {}
        for token in range(len(tokenizer)):
            if token not in special:
                word = tokenizer.decode([token]).strip()
                if re.fullmatch(r"\w{2,}", word):
                    found.setdefault(word, token)
        if not found:
            raise RecipeError("The tokenizer has no whole words to make canaries of: use another kind of canary.")
        self.words = list(found)

    def text(self, number: int) -> str:
        return " ".join(self.words[i] for i in below(len(self.words), number, self._randomness))

    def rare(self, number: int) -> list[str]:
        """Different words of one token each, from the later half of the vocabulary: merges that a tokenizer learned last."""
        found = []
        for word in self.words[len(self.words) // 2 :]:
            if len(self._tokenizer(f"a {word}", add_special_tokens=False)["input_ids"]) == 2:
                found.append(word)
        if len(found) < number:
            raise RecipeError(
                f"The vocabulary has {len(found):,} rare words of one token, and {number:,} canaries need one each: plant fewer, or another kind."
            )
        return [found[i] for i in shuffled(len(found), self._randomness)[:number]]


def _mislabelled(number: int, recipe: Recipe, public, randomness: Randomness) -> list[Canary]:
    if public is None or len(public) < number:
        raise RecipeError(
            f"{number:,} mislabelled canaries need as many rows declared public, and there are {0 if public is None else len(public):,}: "
            "name them in data.public, or use random-tokens."
        )
    found = []
    for place in shuffled(len(public), randomness)[:number].tolist():
        row = public[place]
        others = [label for i, label in enumerate(recipe.task.labels) if i != _class_of(row[recipe.task.label], recipe)]
        found.append(Canary(row[recipe.task.text], _choice(others, randomness)))
    return found


def _owners(rows, unit: str, number: int) -> list:
    """Identifiers that nobody in the data has."""
    if unit == "example":
        return [None] * number
    values = list(column_of(rows, unit))
    if isinstance(values[0], str):
        taken = set(values)
        return [name for i in range(number + len(taken)) if (name := f"canary-{i}") not in taken][:number]
    if not isinstance(values[0], int):
        raise RecipeError(
            f"The units in column {unit!r} are of type {type(values[0]).__name__}, and canaries need new ones: make them numbers or text."
        )
    largest = max(values)
    return [largest + 1 + i for i in range(number)]


def shuffled(number: int, randomness: Randomness) -> np.ndarray:
    """``(number,)``: 0, 1, ... in random order."""
    return np.argsort(randomness.uniform(number))


def below(limit: int, number: int, randomness: Randomness) -> list[int]:
    return (randomness.uniform(number) * limit).astype(int).tolist()


def _choice(values: Sequence, randomness: Randomness):
    return values[below(len(values), 1, randomness)[0]]
