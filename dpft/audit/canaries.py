"""Canaries: made-up records that are planted in the training data by secret coins, and looked for afterwards.

Each is a unit of its own, made from public material alone (a tokenizer's vocabulary, a template, rows of
``data.public``) and never by a look at the private data: what depended on a person would have to be paid for. Included
or not is decided by the operating system's entropy, once for each.

``random-tokens``  a record that the task makes up, such as random words with a random label: nothing else in the data
                   supports it
``secret``         an in-distribution sentence with a random code in it, as real data may hold one (Carlini et al. 2019)
``new-token``      random words and then a rare token that no other canary has (after Panda et al. 2025, who add one to
                   the vocabulary)
``mislabelled``    a public row with a label that is not its own (Steinke, Nasr, Jagielski 2023, section 6)
"""

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dpft.errors import RecipeError
from dpft.privacy.noise import Randomness, SecureRandomness
from dpft.recipe import Recipe
from dpft.tasks.encoded import Encoded
from dpft.tasks.losses import IGNORED
from dpft.tasks.task import Task
from dpft.tasks.words import CUE, Words
from dpft.training.data import column_of
from dpft.values import class_number

KINDS = ("random-tokens", "secret", "new-token", "mislabelled")
TEMPLATE = "The access code of patient {number} is {secret}."
DIGITS = 6  # of a secret


@dataclass(frozen=True)
class Canary:
    """One record in the task's columns, and how its text begins, which is not judged."""

    record: Mapping[str, Any]
    cue: str = ""
    secret: str = ""

    @property
    def text(self) -> str:
        """All that it says, of a task that says something."""
        return "".join(str(value) for value in self.record.values())


@dataclass(frozen=True, kw_only=True)
class Planting:
    """Which canaries an audit plants.

    Attributes:
        canaries: m, each in the data with probability 1/2.
        kind: one of ``KINDS``; by default mislabelled where the public rows suffice, otherwise random-tokens.
        repetitions: how often an included canary is in the data; each time it is another unit.
        randomness: of the coins and of what is made up, by default a secure one.
    """

    canaries: int = 1000
    kind: str | None = None
    repetitions: int = 1
    randomness: Randomness | None = None


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
        try:
            canaries = [Canary(**canary) for canary in facts["canaries"]]
        except TypeError as error:
            raise RecipeError(
                f"{path} holds the canaries of an earlier version of dpft, which this one cannot score: audit in "
                "another folder."
            ) from error
        return cls(facts["kind"], canaries, np.array(facts["included"], dtype=bool), facts["repetitions"])

    def planted(self, rows: Any, recipe: Recipe) -> Any:
        """The ``datasets.Dataset`` with every included canary, ``repetitions`` times, in random order."""
        import datasets

        some, unit = rows[0], recipe.data.unit
        values = _as_written(rows, recipe)
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


def make(planting: Planting, recipe: Recipe, task: Task, public: Any = None) -> Canaries:
    """Canaries for a recipe, and their coins.

    Args:
        public: rows declared public: what mislabelled canaries are made of.

    Raises:
        RecipeError: the kind does not go with the recipe, or there is not enough to make so many.
    """
    number, repetitions = planting.canaries, planting.repetitions
    enough = labelled_column(recipe) is not None and public is not None and len(public) >= number
    kind = planting.kind or ("mislabelled" if enough else "random-tokens")
    if number < 10 or repetitions < 1:
        raise RecipeError(
            f"{number:,} canaries, {repetitions:,} times each, show nothing: plant at least 10, once or more often."
        )
    if kind not in KINDS:
        raise RecipeError(f"There are no {kind} canaries: choose one of {', '.join(KINDS)}.")
    randomness = planting.randomness or SecureRandomness()
    random = np.random.default_rng(randomness.words(8))
    if kind in ("secret", "new-token") and task.follow("", "") is None:
        raise RecipeError(
            f"{kind} canaries are found by what a language model says next, and {recipe.task.name} says nothing: use "
            "random-tokens or mislabelled."
        )
    if kind == "mislabelled":
        canaries = _mislabelled(number, recipe, public, randomness)
    elif kind == "secret":
        canaries = [secret(i, task, randomness) for i in range(number)]
    elif kind == "new-token":
        words = Words(task.tokenizer)
        cues = [words.text(CUE, random) for _ in range(number)]
        tokens = words.rare(number, random)
        canaries = [Canary(_said(task, cue, f" {token}"), cue) for cue, token in zip(cues, tokens, strict=True)]
    else:
        canaries = [Canary(_made_up(task, recipe, random)) for _ in range(number)]
    return Canaries(kind, canaries, randomness.bernoulli(number, 0.5), repetitions)


def _made_up(task: Task, recipe: Recipe, random: np.random.Generator) -> dict[str, Any]:
    record = task.canary(random)
    if record is None:
        raise RecipeError(
            f"{recipe.task.name} makes up no records, so it has no random-tokens canaries: audit it by features "
            "(dpft.audit.features)."
        )
    return record


def _said(task: Task, cue: str, text: str) -> dict[str, Any]:
    record = task.follow(cue, text)
    if record is None:
        raise RecipeError(f"{type(task).__name__} says nothing, so no text can follow a cue: use random-tokens.")
    return record


def secret(number: int, task: Task, randomness: Randomness) -> Canary:
    """A sentence with a random code."""
    code = "".join(str(digit) for digit in below(10, DIGITS, randomness))
    text = TEMPLATE.format(number=number + 1, secret=code)
    cue = text[: text.index(code)].rstrip()
    return Canary(_said(task, cue, text.removeprefix(cue)), cue, code)


def features(canaries: Sequence[Canary], recipe: Recipe, task: Task) -> list[Mapping[str, Any]]:
    """Each canary as the task encodes it, for its loss; what its cue says has none.

    Raises:
        RecipeError: ``task.max_length`` leaves nothing of a canary to judge, or cuts its secret.
    """
    rows = [columns(canary, recipe) for canary in canaries]
    encoded = task.encode({name: [row[name] for row in rows] for name in rows[0]})
    if isinstance(encoded, Encoded):
        raise RecipeError(
            f"{type(task).__name__} makes other than one feature of a row, and a canary is judged by one: audit it by "
            "features (dpft.audit.features)."
        )
    if task.follow("", "") is None:
        return list(encoded)
    judged = [task.judged(one, canary.cue) for canary, one in zip(canaries, encoded, strict=True)]
    for canary, one in zip(canaries, judged, strict=True):
        shown = task.tokenizer.decode([token for token in one["labels"] if token != IGNORED])
        if not shown.strip() or canary.secret not in shown.replace(" ", ""):
            raise RecipeError(
                f"task.max_length is {task.max_length} tokens, which cuts off what a canary is judged by: raise it to "
                f"{len(task.tokenizer(canary.text)['input_ids']) + 1} or more."
            )
    return judged


def columns(canary: Canary, recipe: Recipe, values: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """The canary's record; ``values`` are the data's own for each declared label."""
    found, column = dict(canary.record), labelled_column(recipe)
    if column is not None:
        known = values or {}
        kind = type(next(iter(known.values()), ""))
        other = found[column].lower() == "true" if kind is bool else kind(found[column])
        found[column] = known.get(found[column], other)
    return found


def labelled_column(recipe: Recipe) -> str | None:
    """The column with a row's one label, if the task has such a column."""
    return next((name for name, column in recipe.task.columns.items() if column.kind == "label"), None)


def _as_written(rows: Any, recipe: Recipe) -> dict[str, Any]:
    """How the data write each declared label that they have."""
    name = labelled_column(recipe)
    if name is None:
        return {}
    column = recipe.task.columns[name]
    classes = ((class_number(value, column.numbers), value) for value in column_of(rows, name))
    return {column.labels[number]: value for number, value in classes if number is not None}


def _mislabelled(number: int, recipe: Recipe, public: Any, randomness: Randomness) -> list[Canary]:
    name = labelled_column(recipe)
    if name is None:
        raise RecipeError(
            f"mislabelled canaries need a column with one label for each row, and {recipe.task.name} has none: use "
            "another kind."
        )
    if public is None or len(public) < number:
        raise RecipeError(
            f"{number:,} mislabelled canaries need as many rows declared public, and there are "
            f"{0 if public is None else len(public):,}: name them in data.public, or use random-tokens."
        )
    found, column = [], recipe.task.columns[name]
    for place in shuffled(len(public), randomness)[:number].tolist():
        row = public[place]
        own = class_number(row[name], column.numbers)
        others = [label for i, label in enumerate(column.labels) if i != own]
        record = {other: row[other] for other in recipe.task.columns}
        found.append(Canary(record | {name: _choice(others, randomness)}))
    return found


def _owners(rows: Any, unit: str, number: int) -> list[Any]:
    """Identifiers that nobody in the data has."""
    if unit == "example":
        return [None] * number
    values = list(column_of(rows, unit))
    if isinstance(values[0], str):
        taken = set(values)
        return [name for i in range(number + len(taken)) if (name := f"canary-{i}") not in taken][:number]
    if not isinstance(values[0], int):
        raise RecipeError(
            f"The units in column {unit!r} are of type {type(values[0]).__name__}, and canaries need new ones: make "
            "them numbers or text."
        )
    largest = max(values)
    return [largest + 1 + i for i in range(number)]


def shuffled(number: int, randomness: Randomness) -> np.ndarray:
    """``(number,)``: 0, 1, ... in random order."""
    return np.argsort(randomness.uniform(number))


def below(limit: int, number: int, randomness: Randomness) -> list[int]:
    return (randomness.uniform(number) * limit).astype(int).tolist()


def _choice(values: Sequence[str], randomness: Randomness) -> str:
    return values[below(len(values), 1, randomness)[0]]
