"""Reading the recipe's data through Hugging Face ``datasets``, with every complaint before the first charge."""

from collections.abc import Iterator
from pathlib import Path

from dpft.errors import RecipeError
from dpft.recipe import DataTable, Recipe, TaskTable, expand, listed

FORMATS = {".csv": "csv", ".tsv": "csv", ".json": "json", ".jsonl": "json", ".parquet": "parquet"}


def load(recipe: Recipe, *, validation: bool = True):
    """The training rows and, if there are any and they are wanted, the validation rows.

    Raises:
        RecipeError: a file or column is missing, a text is empty, a label is not declared, or the number of units is
            far from the declared one.
    """
    train = read(recipe.data.train)
    check(train, recipe.task, recipe.data, "data.train")
    count = len(set(column_of(train, recipe.data.unit))) if recipe.data.unit != "example" else len(train)
    if not recipe.data.units / 2 <= count <= recipe.data.units * 2:
        raise RecipeError(
            f"data.units declares {recipe.data.units:,} units, but data.train has about {count:,}: declare the public number that is meant."
        )
    if recipe.data.validation is None or not validation:
        return train, None
    held_out = _row_by_row(recipe, recipe.data.validation, "data.validation")
    if recipe.data.validation_rows is not None and recipe.data.validation_rows < len(held_out):
        held_out = held_out.shuffle(seed=0).select(range(recipe.data.validation_rows))
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
    rows = read(paths)
    check(rows, recipe.task, recipe.data.model_copy(update=dict(unit="example")), where)
    return rows


def read(paths: str | list[str]):
    """A ``datasets.Dataset`` from CSV, JSON lines or Parquet files, or from a folder written by ``save_to_disk``."""
    import datasets

    datasets.disable_progress_bars()
    files = [Path(expand(path)) for path in listed(paths)]
    for file in files:
        if not file.exists():
            raise RecipeError(f"There is no data at {file}: mend the path in the recipe.")
    if files[0].is_dir():
        return datasets.concatenate_datasets([datasets.load_from_disk(str(file)) for file in files])
    kinds = {FORMATS.get(file.suffix.lower()) for file in files}
    if len(kinds) != 1 or None in kinds:
        raise RecipeError(
            f"{files[0].name} has no known format: name files of one kind, .csv, .tsv, .json, .jsonl or .parquet, or a folder saved by datasets."
        )
    options = {"sep": "\t"} if files[0].suffix.lower() == ".tsv" else {}
    try:
        return datasets.load_dataset(kinds.pop(), data_files=[str(file) for file in files], split="train", **options)
    except (datasets.exceptions.DatasetsError, ValueError) as error:  # which may quote a row: only its kind is told
        kind = type(error.__cause__ or error).__name__
        raise RecipeError(
            f"{files[0].name} cannot be read ({kind}): it may be empty, not UTF-8, or have rows of different lengths."
        ) from error


def column_of(rows, name: str) -> Iterator:
    """A column's values, a thousand rows at a time: one by one takes fifty times as long, and all at once may not fit in memory."""
    for part in rows.select_columns([name]).iter(1000):
        yield from part[name]


def check(rows, task: TaskTable, data: DataTable, where: str) -> None:
    """Refuse missing columns, empty texts and undeclared labels, naming the first row concerned."""
    wanted = task.columns + ([data.unit] if data.unit != "example" else [])
    missing = [column for column in wanted if column not in rows.column_names]
    if missing:
        raise RecipeError(f"{where} has no column {missing[0]!r}: it has {', '.join(rows.column_names)}.")
    if len(rows) == 0:
        raise RecipeError(f"{where} is empty: there is nothing to learn from.")
    texts = [column for column in task.columns if not (task.name == "sequence_classification" and column == task.label)]
    for column in texts:
        for i, value in enumerate(column_of(rows, column)):
            if not isinstance(value, str) or not value.strip():
                raise RecipeError(
                    f"{where} row {i + 1} has no text in column {column!r}: remove such rows or fill them in."
                )
    if data.unit != "example":
        for i, value in enumerate(column_of(rows, data.unit)):
            if value is None:
                raise RecipeError(
                    f"{where} row {i + 1} has no {data.unit!r}, so it is unknown whose it is: fill it in or remove the row."
                )
    if task.name == "sequence_classification":
        declared = set(task.labels)
        for i, value in enumerate(column_of(rows, task.label)):
            if str(value) not in declared:
                raise RecipeError(
                    f"{where} row {i + 1} has the label {value!r}, which task.labels does not declare: add it there or mend the row."
                )
