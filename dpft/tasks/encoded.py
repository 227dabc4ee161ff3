"""Features that are not one for each row."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Encoded:
    """What :meth:`Task.encode` returns if a row has several features, or none: each feature with its row.

    All features of a row belong to the row's unit. Under the unit ``"example"`` a row is one unit of several examples.

    Args:
        features: ``n`` features, such as the windows of long texts.
        rows: ``n`` positions, from 0, among the rows that ``encode`` was given.
    """

    features: Sequence[Any]
    rows: Sequence[int]
