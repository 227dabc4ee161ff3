"""Whose a row is: unit ids by value, and their number beside the declared one."""

from collections.abc import Iterable
from typing import Any

from dpft.errors import RecipeError
from dpft.values import kind, missing

ID_TYPES = (str, int, bytes)


def unit_ids(values: Iterable[Any], column: str, where: str = "The data's") -> list[Any]:
    """Checked ids, one for each row; equal ids are one unit.

    Ids are texts, whole numbers or bytes, all of one kind: the text 007 is not 7, and whether "7" is 7 nobody knows.

    Args:
        values: plain values (:func:`dpft.values.plain`).
        where: whose rows they are, to stand before "row 3".

    Raises:
        RecipeError: an id is missing or NaN, a float, a list, or of another kind than the ids before it.
    """
    ids = list(values)
    for i, value in enumerate(ids):
        if missing(value):
            fault = f"has no {column!r}, so it is unknown whose it is: fill it in or remove the row."
        elif type(value) is float:
            fault = (
                f"has a float in unit column {column!r}, and floats round ids or hide missing ones: write ids as text."
            )
        elif type(value) not in ID_TYPES:
            fault = f"has {kind(value)} in unit column {column!r}, but it belongs to one unit: write ids as text."
        elif type(value) is not type(ids[0]):
            fault = (
                f"has {kind(value)} in unit column {column!r}, but earlier rows have {kind(ids[0])}, "
                "and one unit may be written in both ways: write all ids as text."
            )
        else:
            continue
        raise RecipeError(f"{where} row {i + 1:,} {fault}")
    return ids


def check_count(count: int, declared: int, where: str = "the data") -> None:
    """Refuse a declared number of units that is not meant for these data.

    δ below 1/units and the sampling rate rest on the declared number. The true one is private: the message rounds it.

    Raises:
        RecipeError: one number is more than twice the other.
    """
    if not declared / 2 <= count <= declared * 2:
        about = round(count, 1 - len(str(count)))
        raise RecipeError(
            f"The plan declares {declared:,} units, but {where} has about {about:,}: "
            "declare the public number that is meant."
        )
