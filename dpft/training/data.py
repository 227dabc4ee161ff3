"""The recipe's data, with every complaint before the first charge."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dpft.errors import RecipeError
from dpft.recipe import DataTable, Recipe, TaskTable, expand, listed
from dpft.training.files import read
from dpft.training.units import check_count, unit_ids
from dpft.values import INLINE, kind, missing

__all__ = ["check", "check_groups", "column_of", "load", "load_public", "read", "read_for"]
FILE_KINDS = ("image", "audio")
FILES_AT_A_TIME = 16
MOST_GROUPS = 100


def load(recipe: Recipe, *, validation: bool = True):
    """The training rows and, if there are any and they are wanted, the validation rows.

    Raises:
        RecipeError: a file or column is missing, a cell holds no text, no declared label or no unit's id, or the number
            of units is far from the declared one. Rows are counted from 1 over all files, without headers.
    """
    train = read_for(recipe.task, recipe.data.train)
    check(train, recipe.task, recipe.data, "data.train")
    count = len(set(column_of(train, recipe.data.unit))) if recipe.data.unit != "example" else len(train)
    check_count(count, recipe.data.units, "data.train")
    if recipe.data.validation is None or not validation:
        return train, None
    held_out = _row_by_row(recipe, recipe.data.validation, "data.validation")
    if recipe.data.validation_rows is not None and recipe.data.validation_rows < len(held_out):
        held_out = held_out.shuffle(seed=0, keep_in_memory=True).select(range(recipe.data.validation_rows))
    group = getattr(recipe.task, "group", None)
    if group is not None:
        check_groups(held_out, group, "data.validation")
    return train, held_out


def load_public(recipe: Recipe):
    """The rows of ``data.public``, checked like the others; None if there are none.

    Raises:
        RecipeError: see :func:`load`.
    """
    if recipe.data.public is None:
        return None
    return _row_by_row(recipe, recipe.data.public, "data.public")


def _row_by_row(recipe: Recipe, paths: str | list[str], where: str):
    """Checked rows of data in which it does not matter whose a row is."""
    rows = read_for(recipe.task, paths)
    check(rows, recipe.task, recipe.data.model_copy(update=dict(unit="example")), where)
    return rows


def read_for(task: TaskTable, paths: str | list[str]):
    """The rows of these files, whose pictures and sounds are found from the folder of the file that names them.

    Raises:
        RecipeError: see :func:`read`; or files of several folders name others from there on.
    """
    rows, folders = read(paths), {str(Path(expand(path)).absolute().parent) for path in listed(paths)}
    for name, column in task.columns.items():
        if column.kind in FILE_KINDS and getattr(rows.features.get(name), "dtype", None) in ("string", "large_string"):
            found = list(column_of(rows, name))
            if len(folders) > 1 and any(map(_is_relative, found)):
                raise RecipeError(
                    f"The data files lie in {len(folders):,} folders and name files in column {name!r} from there on, "
                    "so it is unknown from where: put them in one folder, or write whole paths."
                )
            whole = [str(Path(*folders, path)) if _is_relative(path) else path for path in found]
            order = rows.column_names
            rows = rows.remove_columns(name).add_column(name, whole, feature=rows.features[name]).select_columns(order)
    return rows


def _is_relative(path: str | None) -> bool:
    return path is not None and path != "" and not path.startswith(INLINE) and not Path(path).is_absolute()


def column_of(rows, name: str, at_a_time: int = 1000) -> Iterator:
    """A column's values, a thousand rows at a time: one by one takes fifty times as long."""
    for part in rows.select_columns([name]).iter(at_a_time):
        yield from part[name]


def check(rows, task: TaskTable, data: DataTable, where: str) -> None:
    """Refuse missing columns, cells that are not what the task declares, and what is no unit, naming the first row
    concerned.

    Raises:
        RecipeError: one sentence with row and column, which quotes no cell.
    """
    wanted = [*task.columns, *([data.unit] if data.unit != "example" else [])]
    absent = [column for column in wanted if column not in rows.column_names]
    if absent:
        raise RecipeError(f"{where} has no column {absent[0]!r}: it has {', '.join(rows.column_names)}.")
    if len(rows) == 0:
        raise RecipeError(f"{where} is empty: there is nothing to learn from.")
    for name, column in task.columns.items():
        at_a_time = FILES_AT_A_TIME if column.kind in FILE_KINDS else 1000  # files may be of any size
        for i, value in enumerate(column_of(rows, name, at_a_time), 1):
            fault = column.fault(value, name)
            if fault is not None:
                raise RecipeError(f"{where} row {i:,} {fault}")
    if data.unit != "example":
        unit_ids(column_of(rows, data.unit), data.unit, where)


def check_groups(rows: Any, column: str, where: str) -> None:
    """Refuse, before anything is charged, what would fail when it is measured.

    Raises:
        RecipeError: the column is missing, a cell is neither a text nor a whole number, or there are too many values.
    """
    if column not in rows.column_names:
        raise RecipeError(f"{where} has no column {column!r} for task.group: it has {', '.join(rows.column_names)}.")
    seen: dict[Any, None] = {}
    for i, value in enumerate(column_of(rows, column), 1):
        if missing(value) or type(value) not in (str, int):
            fault = "has no group" if missing(value) else f"has {kind(value)}, which is no group,"
            raise RecipeError(f"{where} row {i:,} {fault} in column {column!r}: write groups as text.")
        seen[value] = None
    if len(seen) > MOST_GROUPS or len(set(map(type, seen))) > 1:
        fault = f"more than {MOST_GROUPS} values" if len(seen) > MOST_GROUPS else "texts and whole numbers"
        raise RecipeError(f"{where} has {fault} in column {column!r}: name a column of few groups, written as text.")
