"""The sum of one step over all processes. No other file knows of ranks."""

from collections.abc import Callable
from typing import Protocol, TypeVar

from torch import Tensor

T = TypeVar("T")


class World(Protocol):
    """The processes that compute one step together.

    Attributes:
        rank: this process, from 0.
        size: the number of processes.
    """

    rank: int
    size: int

    def sum_(self, total: Tensor) -> Tensor:
        """Add up the clipped sums of all ranks in place on rank 0, which adds the noise."""

    def first(self, action: Callable[[], T]) -> T:
        """Run on rank 0 alone what must happen once, such as charging, and give its result to all."""


class Alone:
    """One process."""

    rank, size = 0, 1

    def sum_(self, total: Tensor) -> Tensor:
        """Returns ``total`` itself."""
        return total

    def first(self, action: Callable[[], T]) -> T:
        """Returns what ``action`` returns."""
        return action()
