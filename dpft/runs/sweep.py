"""``sweep.json``: what a sweep found, cell by cell.

The one in ``private/`` says all. The public one leaves out what follows the data: runs without privacy, times and
memory.
"""

import json
import statistics
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from pydantic import ConfigDict, TypeAdapter, ValidationError

from dpft.errors import RecipeError
from dpft.privacy.rounding import rounded_up
from dpft.runs.record import write_whole

Kind = Literal["untouched", "non-private", "private"]
UNTOUCHED: Kind = "untouched"
NON_PRIVATE: Kind = "non-private"
PRIVATE: Kind = "private"


@dataclass(frozen=True)
class Cell:
    """One run of a sweep, or the model before any.

    Attributes:
        subset: what trained; empty for the untouched model.
        epsilon: what was asked for, or what the recipe's noise gives; None without privacy.
        seconds: wall time of the training, from its last start on where it was killed and went on.
        peak_memory: bytes that the cell's process had in memory at most; None where it had none of its own.
        metrics: on the validation data, without noise.
        folder: the run's, relative to the sweep's; None for the untouched model.
    """

    kind: Kind
    subset: str
    epsilon: float | None
    seed: int
    trainable_parameters: int | None
    seconds: float | None
    peak_memory: int | None
    metrics: dict[str, Any]
    folder: str | None

    __pydantic_config__ = ConfigDict(extra="forbid", strict=True)


class OverSeeds:
    """Mean and spread of ``values``, one for each seed."""

    values: tuple[float, ...]

    @property
    def mean(self) -> float:
        """Over the seeds."""
        return statistics.fmean(self.values)

    @property
    def spread(self) -> float:
        """Standard deviation over seeds; zero for one."""
        return statistics.stdev(self.values) if len(self.values) > 1 else 0.0


@dataclass(frozen=True)
class Row(OverSeeds):
    """Cells that differ in their seed alone, and their headline metric."""

    kind: Kind
    subset: str
    epsilon: float | None
    metric: str
    values: tuple[float, ...]
    folders: tuple[str, ...]

    @property
    def setting(self) -> str:
        """``ε = 3``, or the kind of a row without privacy."""
        return f"ε = {rounded_up(self.epsilon)}" if self.epsilon is not None else self.kind


@dataclass(frozen=True)
class Sweep:
    """All cells of a sweep, and what its private runs cost together.

    Attributes:
        recipe: as given; a cell's own is in its folder.
        headline: the metric that stands for all in the table.
        composed_epsilon: at ``delta``; None if no run is private.
        selection: how the runs are charged. ``composition``: each by itself, and all of them together as one
            composition.
    """

    recipe: dict[str, Any]
    versions: dict[str, str]
    delta: float
    units: int
    headline: str
    composed_epsilon: float | None
    cells: tuple[Cell, ...]
    selection: Literal["composition"] = "composition"
    schema: Literal[1] = field(default=1, kw_only=True)

    __pydantic_config__ = ConfigDict(extra="forbid", strict=True)

    @property
    def public(self) -> "Sweep":
        """The same without runs that no guarantee covers, and without times and memory, which follow the data."""
        covered = [cell for cell in self.cells if cell.kind != NON_PRIVATE]
        return replace(self, cells=tuple(replace(cell, seconds=None, peak_memory=None) for cell in covered))

    def rows(self) -> tuple[Row, ...]:
        """The table: one row for all seeds of a setting, in the order of the cells."""
        settings: dict[tuple[Kind, str, float | None], list[Cell]] = {}
        for cell in self.cells:
            settings.setdefault((cell.kind, cell.subset, cell.epsilon), []).append(cell)
        return tuple(
            Row(
                *setting,
                self.headline,
                tuple(cell.metrics[self.headline] for cell in cells),
                tuple(cell.folder for cell in cells if cell.folder is not None),
            )
            for setting, cells in settings.items()
        )

    def to_dict(self) -> dict[str, Any]:
        """As it is written."""
        facts = asdict(self)
        return {"schema": facts.pop("schema"), **facts}

    def write(self, path: Path) -> None:
        """Make the file, whole or not at all."""
        write_whole(path, json.dumps(self.to_dict(), indent=2))

    @classmethod
    def read(cls, path: Path | str) -> "Sweep":
        """What :meth:`write` wrote.

        Raises:
            RecipeError: there is none, it is damaged, or another version's.
        """
        try:
            return _reader.validate_json(Path(path).read_bytes())
        except FileNotFoundError as error:
            raise RecipeError(f"There is no {path}: run `dpft sweep`, and give the file that it leaves.") from error
        except ValidationError as error:
            first: Mapping[str, Any] = error.errors()[0]
            place = ".".join(map(str, first["loc"])) or "the file"
            raise RecipeError(
                f"{path} is not the record of a sweep of this version ({place}: {first['msg']}): run the sweep's "
                "command again, which computes nothing anew and writes it."
            ) from error


_reader = TypeAdapter(Sweep)
