"""Cells of the data by value: what kind each is, whether one is missing, and which declared class a label is.

A cell means the text that stands in the file. The text 01 is not 1, and NA is a text like any other. A whole number means
its digits; true and false have two spellings, JSON's and Python's. A float means no text: 7.0 may have been written as 7,
so it names neither a class nor a unit.
"""

from collections.abc import Iterable, Mapping
from math import isnan
from typing import Any

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
