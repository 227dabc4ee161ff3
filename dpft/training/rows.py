"""Rows that are read when they are drawn, and rows that are encoded once.

Token ids are small and take long to make: they are made once and kept. Pictures are large, and a transform may crop
them at random: what they become is made when it is drawn, and forgotten after the micro-batch.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from dpft.errors import RecipeError

if TYPE_CHECKING:
    import datasets


def read_when_drawn(rows: Any) -> bool:
    """Whether rows are read whenever they are drawn, rather than encoded once.

    They are if reading computes something, as in a ``datasets.Dataset`` with a transform or in a data set of torch,
    and if cells are large: a column of pictures, sounds, videos, bytes or arrays of two and more dimensions. Lists of
    rows are in memory already.
    """
    if isinstance(rows, (list, tuple)):
        return False
    return _computed(rows) or any(map(_large, rows.features.values()))


def may_vary(rows: Any) -> bool:
    """Whether a row that is read again may be another, by a transform's chance: nothing of it can be kept."""
    return not isinstance(rows, (list, tuple)) and _computed(rows)


def as_stored(rows: Any) -> Any:
    """Rows of ``datasets`` without transform, and with files as ``{bytes, path}``, not decoded; others as they are."""
    import datasets

    if not isinstance(rows, datasets.Dataset):
        return rows
    return files_undecoded(rows.with_format(None) if _computed(rows) else rows)


def files_undecoded(rows: Any) -> Any:
    """The same without decoding pictures, sounds and videos; a transform is given what it was given before."""
    import datasets

    if not isinstance(rows, datasets.Dataset) or _computed(rows):
        return rows
    for name, feature in rows.features.items():
        if isinstance(feature, _files()) and feature.decode:
            rows = rows.cast_column(name, type(feature)(decode=False))
    return rows


class WhenDrawn(Sequence[Any]):
    """The features of rows, each made when it is asked for, and not kept.

    Args:
        make: the features of the row of a number.
        places: the row of each feature; a row's features follow each other.
    """

    def __init__(self, make: Callable[[int], Sequence[Any]], places: Sequence[int]) -> None:
        self._make, self._places = make, np.asarray(places, dtype=np.int64)
        self._firsts = np.searchsorted(self._places, self._places)

    def __len__(self) -> int:
        return len(self._places)

    def __getitem__(self, number: int | slice) -> Any:
        if isinstance(number, slice):
            return [self[i] for i in range(*number.indices(len(self)))]
        number = range(len(self))[number]
        place, part = int(self._places[number]), int(number - self._firsts[number])
        features = self._make(place)
        if part >= len(features):
            raise RecipeError(
                f"The data's row {place + 1:,} made {part + 1:,} or more features when it was counted and "
                f"{len(features):,} now, so nobody knows what is drawn: let its number of features depend on no chance."
            )
        return features[part]

    def __iter__(self) -> Iterator[Any]:
        return (self[number] for number in range(len(self)))


def _computed(rows: Any) -> bool:
    import datasets

    return not isinstance(rows, datasets.Dataset) or rows.format["type"] == "custom"


def _large(feature: Any) -> bool:
    import datasets

    if isinstance(feature, dict):
        return any(map(_large, feature.values()))
    if isinstance(feature, datasets.Value):
        return "binary" in feature.dtype
    inner = getattr(feature, "feature", None)  # of a list
    nested = inner is not None and (hasattr(inner, "feature") or _large(inner))
    return nested or isinstance(feature, _files()) or hasattr(feature, "shape")


def _files() -> "tuple[type[datasets.Image], type[datasets.Audio], type[datasets.Video]]":
    import datasets

    return datasets.Image, datasets.Audio, datasets.Video
