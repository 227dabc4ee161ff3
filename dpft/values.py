"""Cells of the data by value: what kind each is, whether one is missing, and which declared class a label is.

A cell means the text that stands in the file. The text 01 is not 1, and NA is a text like any other. A whole number
means its digits; true and false have two spellings, JSON's and Python's. A float means no text: 7.0 may have been
written as 7, so it names neither a class nor a unit.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import isfinite, isnan
from pathlib import Path
from typing import Any

from dpft.errors import RecipeError

KINDS = {
    bool: "true or false",
    int: "a whole number",
    float: "a float",
    str: "a text",
    list: "a list",
    dict: "an object",
}


def plain(values: Iterable[Any]) -> list[Any]:
    """Python values of a column: a list, an array or a tensor, or a list of their scalars."""
    if hasattr(values, "tolist"):
        values = values.tolist()
    return [value.tolist() if hasattr(value, "tolist") else value for value in values]


def kind(value: Any) -> str:
    """What a plain value is, for a message that does not quote it."""
    return KINDS.get(type(value), f"a value of type {type(value).__name__}")


def missing(value: Any) -> bool:
    """Whether a plain value is None, NaN or a text of spaces alone."""
    if isinstance(value, float):
        return isnan(value)
    return value is None or (isinstance(value, str) and not value.strip())


def class_number(value: Any, numbers: Mapping[str, int]) -> int | None:
    """The class that a plain label names, or None; ``numbers`` maps each declared label to its class, from 0."""
    if isinstance(value, bool):  # which is an int as well
        return numbers.get(str(value).lower(), numbers.get(str(value)))
    return numbers.get(str(value)) if isinstance(value, (int, str)) and not missing(value) else None


def label_fault(value: Any, column: str, declared: int) -> str:
    """Why a plain label names no class, to follow "row 3"; the label is not quoted, because it is somebody's."""
    if missing(value):
        return f"has no label in column {column!r}: fill it in or remove the row."
    if not isinstance(value, (int, str)):
        return f"has {kind(value)} in column {column!r}, which is no label: write labels as text or whole numbers."
    return (
        f"has a label in column {column!r} ({kind(value)}) that is not among the {declared} declared ones: "
        "add it to task.labels or correct the row."
    )


@dataclass(frozen=True)
class Column:
    """What a column of the data must hold in every row.

    Args:
        kind: one of ``COLUMNS``.
        labels: of ``label``, ``labels`` and ``tags``: all that are declared, which are public.
        separator: of ``labels``: what stands between those of one text; None for lists.
    """

    kind: str
    labels: tuple[str, ...] = ()
    separator: str | None = None

    @cached_property
    def numbers(self) -> dict[str, int]:
        """Each declared label's class, from 0."""
        return {label: i for i, label in enumerate(self.labels)}

    def fault(self, value: Any, name: str) -> str | None:
        """What is wrong with a plain value of the column ``name``, to follow "row 3"; the value is not quoted."""
        return COLUMNS[self.kind](value, name, self)

    def check(self, values: Sequence[Any], name: str) -> None:
        """Raises RecipeError: a plain value has a fault; its row is counted among those given."""
        for row, value in enumerate(values, 1):
            if (fault := self.fault(value, name)) is not None:
                raise RecipeError(f"Row {row:,} of {len(values):,} {fault}")


def _text(value: Any, name: str, column: Column) -> str | None:
    if missing(value):
        return f"has no text in column {name!r}: remove such rows or fill them in."
    if isinstance(value, (list, dict)):
        way_out = "write it as one text, a chat by the tokenizer's apply_chat_template"
    else:
        way_out = "write it in quotation marks if it is meant as one"
    return None if isinstance(value, str) else f"has {kind(value)} in column {name!r}, not a text: {way_out}."


def _label(value: Any, name: str, column: Column) -> str | None:
    return label_fault(value, name, len(column.labels)) if class_number(value, column.numbers) is None else None


def _listed(value: Any, name: str, of: str) -> str | None:
    if isinstance(value, list):
        return None
    return f"has {kind(value)} in column {name!r}, not a list of {of}: write one in JSON lines or Parquet."


def _tags(value: Any, name: str, column: Column) -> str | None:
    if not isinstance(value, list):
        return _listed(value, name, "labels")
    return next(filter(None, (_label(one, name, column) for one in value)), None)


def _labels(value: Any, name: str, column: Column) -> str | None:
    if column.separator is None:
        if isinstance(value, str):
            return (
                f"has a text in column {name!r}, not a list of labels: declare what stands between its labels in "
                "task.separator, or write lists in JSON lines or Parquet."
            )
        return _tags(value, name, column)
    if not isinstance(value, str):
        return (
            f"has {kind(value)} in column {name!r}, not a text of labels with {column.separator!r} between them: "
            f"write one, or remove task.separator where each cell is a list."
        )
    return _tags(split_labels(value, column.separator), name, column)


def split_labels(value: Any, separator: str | None) -> list[Any]:
    """The labels of one cell: a list as it stands, or the parts of a text, none if it is empty."""
    if separator is None:
        return list(value)
    return [part for part in map(str.strip, value.split(separator)) if part]


def _words(value: Any, name: str, column: Column) -> str | None:
    if not isinstance(value, list):
        return _listed(value, name, "texts")
    if not value:
        return f"has an empty list in column {name!r}: remove such rows."
    return next(filter(None, (_text(one, name, column) for one in value)), None)


def _number(value: Any, name: str, column: Column) -> str | None:
    if missing(value):
        return f"has no number in column {name!r}: remove such rows or fill them in."
    try:
        good = not isinstance(value, bool) and isfinite(float(value))
    except (TypeError, ValueError, OverflowError):
        good = False
    return None if good else f"has {kind(value)} in column {name!r} that is no finite number: correct it."


def _file(value: Any, name: str, column: Column) -> str | None:
    """A path, a file's bytes, or an object of ``datasets`` with a path, bytes or an array."""
    if (
        missing(value)
        or value == b""
        or (isinstance(value, dict) and not any(value.get(key) is not None for key in FILES))
    ):
        return f"has no {column.kind} in column {name!r}: remove such rows."
    if isinstance(value, (bool, int, float, list)):
        return f"has {kind(value)} in column {name!r}, not an {column.kind}: name its file."
    path = value.get("path") if isinstance(value, dict) and not any(map(value.get, FILES[1:])) else value
    if isinstance(path, str) and not path.startswith(INLINE) and not Path(path).is_file():
        return f"names a file in column {name!r} that is not there: correct the path, from the data file's folder on."
    return None


def _messages(value: Any, name: str, column: Column) -> str | None:
    if not isinstance(value, list):
        return _listed(value, name, "messages")
    good = value and all(
        isinstance(one, dict) and isinstance(one.get("role"), str) and isinstance(one.get("content"), str)
        for one in value
    )
    if not good:
        return f"has no chat in column {name!r}: write a list of objects with a role and a content, both texts."
    if all(one["role"] != ASSISTANT for one in value):
        return (
            f"has a chat of {len(value):,} messages in column {name!r} with none of the role {ASSISTANT}, so there is "
            "nothing to learn: remove the row or correct its roles."
        )
    return None


ASSISTANT = "assistant"  # the role whose turns are learned
INLINE = "data:"  # how a URI begins that is the file itself, in base64
FILES = ("path", "bytes", "array")
COLUMNS: dict[str, Callable[[Any, str, Column], str | None]] = {
    "text": _text,
    "words": _words,
    "label": _label,
    "labels": _labels,
    "tags": _tags,
    "number": _number,
    "image": _file,
    "audio": _file,
    "messages": _messages,
}
