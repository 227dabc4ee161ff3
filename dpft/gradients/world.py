"""Where a step's sum comes together: the only place that knows of ranks."""

from collections.abc import Callable
from typing import Protocol, TypeVar

from torch import Tensor

T = TypeVar("T")


class World(Protocol):
    """The processes that make one step together.

    Attributes:
        rank: this process, from 0.
        size: how many there are.
    """

    rank: int
    size: int

    def sum_(self, total: Tensor) -> Tensor:
        """The clipped sums of all ranks, added up in place on rank 0, where noise is added once."""

    def first(self, action: Callable[[], T]) -> T:
        """Do on rank 0 alone what one voice does, such as charging, and tell its result to all."""


class Alone:
    """One process."""

    rank, size = 0, 1

    def sum_(self, total: Tensor) -> Tensor:
        """``total`` itself."""
        return total

    def first(self, action: Callable[[], T]) -> T:
        """What ``action`` returns."""
        return action()
