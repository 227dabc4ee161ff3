"""``sweep.json``: every run of a sweep over subsets, budgets and seeds, with its metrics."""

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal, Self, get_args

from dpft.errors import RecipeError
from dpft.runs.record import read_json

SCHEMA = 1
Kind = Literal["untouched", "non-private", "private"]


@dataclass(frozen=True)
class Cell:
    """One run, or the model before any training.

    Attributes:
        subset: what trained; empty for the untouched model.
        epsilon: the budget of a private run; None for the others.
        seconds: wall time of the training.
        peak_memory: bytes.
        metrics: the task's, on the validation data.
        folder: the run's, relative to the sweep's.
    """

    kind: Kind
    subset: str
    epsilon: float | None
    seed: int
    trainable_parameters: int | None
    seconds: float | None
    peak_memory: int | None
    metrics: Mapping[str, Any]
    folder: str | None


@dataclass(frozen=True)
class Sweep:
    """Every cell, and what all of them share.

    Attributes:
        recipe: the tables of the recipe, as they were resolved.
        headline: the metric that stands for all.
        composed_epsilon: what all private runs cost together, at ``delta``; None if that is not known.
        selection: how the choice among the runs is paid for.
    """

    recipe: Mapping[str, Any]
    versions: Mapping[str, str]
    delta: float
    units: int
    headline: str
    composed_epsilon: float | None
    selection: str
    cells: tuple[Cell, ...]

    @classmethod
    def read(cls, path: Path | str) -> Self:
        """The sweep in a file.

        Raises:
            RecipeError: it is damaged, or of another form.
        """
        facts = read_json(Path(path))
        if facts.get("schema") != SCHEMA:
            raise RecipeError(
                f"{path} has schema {facts.get('schema')!r}, and this dpft reads the schema {SCHEMA} that `dpft sweep` "
                "writes: run the sweep again, or update dpft."
            )
        try:
            cells = tuple(Cell(**cell) for cell in facts["cells"])
            found = cls(cells=cells, **{one.name: facts[one.name] for one in fields(cls) if one.name != "cells"})
        except (KeyError, TypeError) as error:
            raise RecipeError(f"{path} is no sweep of dpft ({error}): restore it from a backup.") from error
        for cell in cells:
            if cell.kind not in get_args(Kind) or (cell.kind == "private") != (cell.epsilon is not None):
                raise RecipeError(
                    f"{path} has a cell of kind {cell.kind!r} with epsilon {cell.epsilon}: private cells have one, "
                    "untouched and non-private ones have none."
                )
        return found

    @property
    def public(self) -> Self:
        """The same without runs that no guarantee covers, and without times and memory, which follow the data."""
        covered = [cell for cell in self.cells if cell.kind != "non-private"]
        return replace(self, cells=tuple(replace(cell, seconds=None, peak_memory=None) for cell in covered))
