"""Norms and sums of gradients that are clipped by groups of parameters, such as layers."""

from collections.abc import Sequence
from functools import cached_property

from torch import Tensor

from dpft.gradients.batch_gradients import BatchGradients, row_norms
from dpft.gradients.capture_map import TrainableParameter
from dpft.gradients.precision import add_rows, full_precision


class Layout:
    """The position of each group's parameters among all scalars.

    Args:
        trainables: the trainable parameters.
        groups: for each of them, the number of its group.
    """

    def __init__(self, trainables: Sequence[TrainableParameter], groups: Sequence[int]) -> None:
        self._trainables = sorted(zip(trainables, groups, strict=True), key=lambda pair: pair[0].start)
        self._count = max(groups) + 1
        self._group = {trainable.start: group for trainable, group in self._trainables}

    def norms(self, gradients: BatchGradients) -> Tensor:
        """``(B, G)``, norms of each group's part of each gradient, at most a relative 1e-6 below the true ones."""
        squares = gradients.small_parameters.new_zeros(gradients.examples, self._count)
        for place, group in self._runs(gradients):
            squares[:, group] += row_norms(gradients.small_parameters[:, place]).square()
        for start, one in gradients.large.items():
            squares[:, self._group[start]] += one.squared_norms()
        return squares.sqrt()

    def add_to(self, total: Tensor, gradients: BatchGradients, factors: Tensor) -> None:
        """``total`` ``(P,)`` float64 ``+= Σ_i factors[i, group] · g_i`` for ``(B, G)`` factors.

        Rounding of one example depends on no other.
        """
        factors = factors.to(total)
        with full_precision():
            for place, group in self._runs(gradients):
                add_rows(total[place], gradients.small_parameters[:, place], factors[:, group])
            for start, one in gradients.large.items():
                one.add_to(total, factors[:, self._group[start]])

    def _runs(self, gradients: BatchGradients) -> list[tuple[slice, int]]:
        """Slices of the flat workspace, each with its group; neighbours of one group are one slice.

        The workspace holds the small parameters, or all if every gradient is materialised.
        """
        return self._whole if gradients.small_parameters.shape[1] == self._whole[-1][0].stop else self._small

    @cached_property
    def _whole(self) -> list[tuple[slice, int]]:
        return _joined(self._trainables)

    @cached_property
    def _small(self) -> list[tuple[slice, int]]:
        return _joined([(trainable, group) for trainable, group in self._trainables if not trainable.large])


def _joined(trainables: list[tuple[TrainableParameter, int]]) -> list[tuple[slice, int]]:
    runs: list[tuple[slice, int]] = []
    for trainable, group in trainables:
        if runs and runs[-1][1] == group and runs[-1][0].stop == trainable.start:
            runs[-1] = slice(runs[-1][0].start, trainable.slice.stop), group
        else:
            runs.append((trainable.slice, group))
    return runs
