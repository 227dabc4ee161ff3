"""Who is whom: the identifiers by which rows are grouped to units."""

from collections.abc import Hashable, Iterable

from dpft.errors import GuaranteeError
from dpft.values import kind, plain


def unit_ids(values: Iterable) -> list[Hashable]:
    """Identifiers by value: tensors, arrays and their elements become plain numbers and texts.

    A tensor is equal to no other as a dictionary's key, so each row of a person would count as another person.

    Raises:
        GuaranteeError: an identifier is missing (None, NaN), or is no single value.
    """
    ids = plain(values)
    for place, value in enumerate(ids):
        if any(part is None or part != part for part in (value if isinstance(value, tuple) else (value,))):
            raise GuaranteeError(
                f"Unit {value!r} at place {place} names nobody, and rows of nobody cannot be grouped: give every row its unit."
            )
        if not isinstance(value, Hashable):
            raise GuaranteeError(
                f"The unit at place {place} is {kind(value)}, and a row has one owner: give a number or a text."
            )
    return ids
