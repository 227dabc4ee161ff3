"""Who is whom: the identifiers by which rows are grouped to units."""

from collections.abc import Hashable, Iterable

from dpft.errors import GuaranteeError


def unit_ids(values: Iterable) -> list[Hashable]:
    """Identifiers by value: tensors, arrays and their elements become plain numbers and texts.

    A tensor is equal to no other as a dictionary's key, so each row of a person would count as another person.

    Raises:
        GuaranteeError: an identifier is missing (None, NaN), or is no single value.
    """
    ids = []
    for place, value in enumerate(_plain(values)):
        value = _plain(value)
        parts = value if isinstance(value, tuple) else (value,)
        if any(part is None or part != part for part in parts):
            raise GuaranteeError(
                f"Unit {value!r} at place {place} names nobody, and rows of nobody cannot be grouped: give every row its unit."
            )
        try:
            hash(value)
        except TypeError:
            raise GuaranteeError(
                f"The unit at place {place} is a {type(value).__name__}, and a row has one owner: give a number or a text."
            ) from None
        ids.append(value)
    return ids


def _plain(value):
    """Python's own value of what torch, numpy, pandas or Arrow hold."""
    for method in ("tolist", "as_py", "to_pylist"):
        if hasattr(value, method):
            return getattr(value, method)()
    return value
