"""Who is whom: the identifiers by which rows are grouped to units."""

from collections.abc import Hashable, Iterable
from datetime import date
from numbers import Number
from typing import Any
from uuid import UUID

from dpft.errors import GuaranteeError
from dpft.values import kind, plain

ID_TYPES = (str, bytes, Number, date, UUID)  # of which equal ones are known to have equal hashes


def unit_ids(values: Iterable[object]) -> list[Hashable]:
    """Identifiers by value: tensors, arrays and their elements become plain numbers and texts.

    A tensor, as any object without a value, is equal to no other: each row of a person would count as another person.

    Raises:
        GuaranteeError: an identifier is missing (None, NaN), is no single value, or is a text beside numbers.
    """
    ids = [_checked(value, place) for place, value in enumerate(plain(values))]
    texts = [isinstance(value, str) for value in ids]
    if any(texts) and not all(texts):
        raise GuaranteeError(
            f"The unit at place {texts.index(not texts[0])} is {kind(ids[texts.index(not texts[0])])}, the one at "
            f"place 0 is {kind(ids[0])}, and one unit may be written in both ways: give all ids as text."
        )
    return ids


def _checked(value: Any, place: int) -> Hashable:
    if isinstance(value, tuple):
        return tuple(_checked(part, place) for part in plain(value))
    if value is None or (isinstance(value, ID_TYPES) and value != value):
        raise GuaranteeError(
            f"Unit {value!r} at place {place} names nobody, and rows of nobody cannot be grouped: give every row its "
            "unit."
        )
    if not isinstance(value, ID_TYPES):
        raise GuaranteeError(
            f"The unit at place {place} is {kind(value)}, and units are told apart by value: give each row one number "
            "or one text."
        )
    return value
