"""Canaries: made-up records that are planted in the training data by secret coins, and looked for afterwards.

Each is a unit of its own, made from public material alone (a tokenizer's vocabulary, a template, rows declared public), so that
looking for it reveals nothing of a person. Included or not is decided by the operating system's entropy, once for each.

``random-tokens``  random words, with a random label where there are labels: nothing else in the data supports them
``secret``         an in-distribution sentence with a random code in it, as real data may hold one (Carlini et al. 2019)
``new-token``      random words and then a token that occurs nowhere in the data (Panda et al. 2025)
``mislabelled``    a public row's text with a label that is not its own (Steinke, Nasr, Jagielski 2023, section 6)
"""

import json
import os
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dpft.errors import RecipeError
from dpft.privacy.noise import Randomness, SecureRandomness
from dpft.recipe import Recipe

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
        with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as file:
            json.dump({**facts, "canaries": [asdict(canary) for canary in self.canaries]}, file)

    @classmethod
    def load(cls, path: Path) -> "Canaries":
        facts = json.loads(path.read_text())
        canaries = [Canary(**canary) for canary in facts["canaries"]]
        return cls(facts["kind"], canaries, np.array(facts["included"], dtype=bool), facts["repetitions"])

    def planted(self, rows, recipe: Recipe):
        """The ``datasets.Dataset`` with every included canary, ``repetitions`` times, in random order."""
        import datasets

        some, unit = rows[0], recipe.data.unit
        owners = iter(_owners(rows, unit, self.repetitions * len(self)))
        found = []
        for canary, inside in zip(self.canaries, self.included, strict=True):
            for _ in range(self.repetitions):
                owner = next(owners)
                if inside:
                    row = dict.fromkeys(some) | columns(canary, recipe, some)
                    found.append(row | ({unit: owner} if unit != "example" else {}))
        if not found:
            return rows
        whole = datasets.concatenate_datasets([rows, datasets.Dataset.from_list(found, features=rows.features)])
        order = np.random.default_rng(int.from_bytes(os.urandom(16))).permutation(len(whole))
        return whole.select(order)


def make(
    kind: str,
    number: int,
    recipe: Recipe,
    tokenizer,
    rows,
    *,
    public=None,
    repetitions: int = 1,
    randomness: Randomness | None = None,
) -> Canaries:
    """Canaries for a recipe, and their coins.

    Args:
        kind: one of ``KINDS``.
        number: m.
        rows: the training data, in which a new token must not occur.
        public: rows declared public: what mislabelled canaries are made of.
        repetitions: how often an included canary is in the data; each time it is another unit.

    Raises:
        RecipeError: the kind does not go with the recipe, or there is not enough to make so many.
    """
    if number < 10 or repetitions < 1:
        raise RecipeError(
            f"{number:,} canaries, {repetitions:,} times each, show nothing: plant at least 10, once or more often."
        )
    randomness = randomness or SecureRandomness()
    classes = recipe.task.name == "sequence_classification"
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
            canaries = [Canary(words.text(WORDS), _choice(labels, randomness)) for _ in range(number)]
        else:
            cues = [words.text(CUE) for _ in range(number)]
            unseen = _unseen(number, recipe, tokenizer, rows, words)
            canaries = [Canary(f"{cue} {token}", cue=cue) for cue, token in zip(cues, unseen, strict=True)]
    return Canaries(kind, canaries, randomness.bernoulli(number, 0.5), repetitions)


def secret(number: int, randomness: Randomness) -> Canary:
    """A sentence with a random code."""
    code = "".join(str(digit) for digit in _below(10, DIGITS, randomness))
    text = TEMPLATE.format(number=number + 1, secret=code)
    return Canary(text, cue=text[: text.index(code)].rstrip(), secret=code)


def features(canaries: Sequence[Canary], recipe: Recipe, task) -> list[dict[str, Any]]:
    """Each canary as the task encodes it, for its loss; what its cue says has none."""
    from dpft.tasks.task import IGNORED

    rows = [columns(canary, recipe, {}) for canary in canaries]
    encoded = task.encode({name: [row[name] for row in rows] for name in rows[0]})
    if recipe.task.name == "causal_lm":
        for canary, one in zip(canaries, encoded, strict=True):
            hidden = len(task.tokenizer(canary.cue)["input_ids"]) if canary.cue else 0
            end = len(one["labels"]) - 1 if one["labels"][-1] == task.tokenizer.eos_token_id else len(one["labels"])
            place = range(len(one["labels"]))
            one["labels"] = [v if (hidden <= i < end) else IGNORED for i, v in zip(place, one["labels"], strict=True)]
    return encoded


def columns(canary: Canary, recipe: Recipe, like: dict) -> dict[str, Any]:
    """The canary in the task's columns; ``like`` is a row whose types its values take."""
    task = recipe.task
    if task.prompt:
        return {task.prompt: canary.cue, task.response: canary.text.removeprefix(canary.cue)}
    found = {task.text: canary.text}
    if task.name == "sequence_classification":
        kind = type(like.get(task.label, ""))
        found[task.label] = kind(canary.label)
    return found


class _Words:
    """Whole words of a vocabulary that a tokenizer gives back as they are."""

    def __init__(self, tokenizer, randomness: Randomness) -> None:
        self._randomness = randomness
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
        return " ".join(self.words[i] for i in _below(len(self.words), number, self._randomness))


def _unseen(number: int, recipe: Recipe, tokenizer, rows, words: _Words) -> list[str]:
    """Words of one token each that occur nowhere in the data."""
    texts = [
        text
        for name in (recipe.task.text, recipe.task.prompt, recipe.task.response)
        if name
        for text in _column(rows, name)
    ]
    seen = {token for ids in tokenizer(texts, add_special_tokens=False)["input_ids"] for token in ids}
    found = []
    for word in words.words:
        ids = tokenizer(f"a {word}", add_special_tokens=False)["input_ids"]
        if len(ids) == 2 and ids[1] not in seen:
            found.append(word)
    if len(found) < number:
        raise RecipeError(
            f"Only {len(found):,} words of the vocabulary do not occur in the data, and {number:,} canaries need one each: plant fewer, or another kind."
        )
    return [found[i] for i in np.argsort(words._randomness.uniform(len(found)))[:number]]


def _mislabelled(number: int, recipe: Recipe, public, randomness: Randomness) -> list[Canary]:
    if public is None or len(public) < number:
        raise RecipeError(
            f"{number:,} mislabelled canaries need as many rows declared public, and there are {0 if public is None else len(public):,}: "
            "name data.public, declare the validation data public, or use random-tokens."
        )
    found = []
    for place in np.argsort(randomness.uniform(len(public)))[:number].tolist():
        row = public[place]
        others = [label for label in recipe.task.labels if label != str(row[recipe.task.label])]
        found.append(Canary(row[recipe.task.text], _choice(others, randomness)))
    return found


def _owners(rows, unit: str, number: int) -> list:
    """Identifiers that nobody in the data has."""
    if unit == "example":
        return [None] * number
    values = _column(rows, unit)
    if isinstance(values[0], str):
        taken = set(values)
        return [name for i in range(number + len(taken)) if (name := f"canary-{i}") not in taken][:number]
    largest = max(values)
    return [largest + 1 + i for i in range(number)]


def _column(rows, name: str) -> list:
    return list(rows[name]) if name in rows.column_names else []


def _below(limit: int, number: int, randomness: Randomness) -> list[int]:
    return (randomness.uniform(number) * limit).astype(int).tolist()


def _choice(values: Sequence, randomness: Randomness):
    return values[_below(len(values), 1, randomness)[0]]
