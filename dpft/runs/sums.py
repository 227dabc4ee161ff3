"""``sums.npy``: the sums that a run of a head has released, one after another. Public, as all that was released."""

import os
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np

from dpft.errors import GuaranteeError
from dpft.runs.folder import RunFolder

if TYPE_CHECKING:
    from torch import Tensor


class KeptSums:
    """Reads what was released, and appends what is; each value is on disk when :meth:`keep` returns."""

    def __init__(self, folder: Path | str) -> None:
        self.path = RunFolder(folder).sums_file
        self._file: BinaryIO | None = None

    def __enter__(self) -> "KeptSums":
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._file = self.path.open("ab")
        return self

    def __exit__(self, *error: object) -> None:
        assert self._file is not None
        self._file.close()

    def known(self, sums: Sequence[int], counted: int) -> "list[Tensor | None]":
        """The values of all releases that were counted, in order.

        None stands for one that was counted and never kept: the process was killed in between. It stays lost, because
        releasing it again would be one release more than was counted.

        Args:
            sums: as how many steps each release of the run counts.
            counted: steps that were counted.

        Raises:
            GuaranteeError: more was kept than was counted.
        """
        import torch

        values, end = self._read()
        releases = sum(1 for last in accumulate(sums) if last <= counted)
        if len(values) > releases:
            raise GuaranteeError(
                f"{self.path} holds {len(values):,} sums, and {releases:,} were counted: restore the folder's "
                "releases.json, or start another run."
            )
        assert self._file is not None
        os.truncate(self.path, end)  # what was written in part is lost as well
        found: list[Tensor | None] = [torch.from_numpy(value) for value in values]
        for _ in range(releases - len(values)):
            self._append(np.zeros(0))
            found.append(None)
        return [None if value is not None and not value.numel() else value for value in found]

    def keep(self, value: "Tensor") -> None:
        """Append a released sum."""
        self._append(value.numpy())

    def _append(self, value: np.ndarray[Any, Any]) -> None:
        assert self._file is not None
        np.save(self._file, value, allow_pickle=False)
        self._file.flush()
        os.fsync(self._file.fileno())

    def _read(self) -> tuple[list[np.ndarray[Any, Any]], int]:
        """Every whole array of the file, and where the last one ends."""
        values, end = [], 0
        with open(self.path, "rb") as file:
            while True:
                try:
                    values.append(np.load(file, allow_pickle=False))
                except (EOFError, ValueError):
                    return values, end
                end = file.tell()
