"""Files to rows, cell by cell as the file says, and with no copy on disk.

``datasets.load_dataset`` guesses types, takes words such as NA for missing, and leaves a readable copy of the rows in
the user's cache. This module parses rows into memory instead. There they need less than the token ids that training
keeps of them, so what fits in training fits here. A folder of ``save_to_disk`` is mapped where it lies. The bytes of
pictures and sounds in Parquet are unpacked to a file without a name, which the operating system forgets when the
process ends, and mapped as well.
"""

import csv
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import islice
from mmap import ACCESS_READ, mmap
from pathlib import Path
from secrets import token_hex
from tempfile import TemporaryFile
from typing import TextIO

from dpft.errors import RecipeError
from dpft.recipe import expand, listed
from dpft.training.rows import files_undecoded
from dpft.values import kind

CHUNK = 10_000  # rows of a CSV file that exist as Python texts at a time
FILES_AT_A_TIME = 64  # rows with pictures or sounds
BUFFER = 1 << 20  # bytes that are read of a Parquet file at a time
IN_MEMORY = 1 << 26  # bytes of a Parquet file with pictures that may be in memory
LONGEST = 2**31 - 1  # characters of a cell; Python's own limit of 131,072 is below a long document


def _whole(digits: str) -> int:
    if len(digits) > 18:
        raise OverflowError
    return int(digits)


# NaN and Infinity, which JSON does not have, are missing.
JSON = json.JSONDecoder(parse_int=_whole, parse_constant=lambda word: None)


def read(paths: str | list[str]):
    """A ``datasets.Dataset`` from CSV, JSON or Parquet files, or from folders written by ``save_to_disk``.

    Every cell of a CSV or TSV file is a text, and an empty cell is the empty text. JSON (lines, or one list of objects)
    keeps its types; a column of several types is a ``datasets.Json`` column. ``ClassLabel`` columns become their names.

    Raises:
        RecipeError: a file is missing or of no known kind, or a row cannot be read; it says which, and quotes no cell.
    """
    import datasets

    datasets.disable_progress_bars()
    files = [Path(expand(path)) for path in listed(paths)]
    if not files:
        raise RecipeError("The list of data files is empty: name at least one file.")
    try:
        rows = _reader(files)(files)
        if not isinstance(rows, datasets.Dataset):
            rows = datasets.Dataset(rows, fingerprint=token_hex(8))  # or all of them would be hashed
        return _with_class_names(files_undecoded(rows))
    except RecipeError:
        raise
    except OSError as error:
        raise RecipeError(
            f"{files[0].name} cannot be read ({error.strerror or 'it is damaged'}): check the file and its permissions."
        ) from error
    except (ValueError, TypeError, KeyError, NotImplementedError) as error:
        raise RecipeError(  # which names the error's kind alone, because its text may quote a row
            f"{files[0].name} cannot be read ({type(error).__name__}): its columns may be damaged, differ from file to "
            "file, or have types that datasets lacks."
        ) from error


def _reader(files: list[Path]) -> Callable:
    for file in files:
        if not file.exists():
            raise RecipeError(f"There is no data at {file}: correct the path in the recipe.")
    readers = {_saved if file.is_dir() else READERS.get(file.suffix.lower()) for file in files}
    known = [reader for reader in readers if reader is not None]
    if len(readers) != 1 or not known:
        raise RecipeError(
            f"{files[0].name} has no known format: name files of one kind, .csv, .tsv, .json, .jsonl or .parquet, "
            "or folders saved by datasets."
        )
    return known[0]


def _csv(files: list[Path]):
    import pyarrow as pa

    tables = []
    limit = csv.field_size_limit(LONGEST)
    try:
        for file in files:
            with _text(file, newline="") as lines:
                reader = csv.reader(lines, delimiter="\t" if file.suffix.lower() == ".tsv" else ",", strict=True)
                rows = _cells(reader, file.name)
                header = next(rows, [])
                if not header:
                    raise RecipeError(f"{file.name} is empty: its first line must name the columns.")
                twice = [name for name in header if header.count(name) > 1]
                if twice:
                    raise RecipeError(f"{file.name} has two columns {twice[0]!r}: give each a name of its own.")
                schema = pa.schema([(name, pa.string()) for name in header])
                tables.append(schema.empty_table())
                while chunk := list(islice(rows, CHUNK)):
                    tables.append(pa.table(list(zip(*chunk, strict=True)), schema=schema))
    finally:
        csv.field_size_limit(limit)
    return _joined(tables, files)


def _cells(reader, name: str) -> Iterator[list[str]]:
    """The header and each row, all of one width; lines with nothing on them are no rows."""
    width, row = 0, 0
    try:
        for cells in reader:
            if not cells:
                continue
            width = width or len(cells)
            if len(cells) != width:
                have = "1 cell" if len(cells) == 1 else f"{len(cells)} cells"
                raise RecipeError(
                    f"{name} row {row:,} (line {reader.line_num:,}) has {have}, but the header has {width}: "
                    "correct the row, and quote cells that hold a separator."
                )
            yield cells
            row += 1
    except csv.Error as error:
        raise RecipeError(
            f"{name} {f'row {row:,}' if row else 'header'} has a quotation mark that does not end its cell: "
            "write each one inside a quoted cell twice."
        ) from error


def _json(files: list[Path]):
    import pyarrow as pa

    columns: dict[str, list] = {}
    row = 0
    for file in files:
        for cells in _objects(file):
            if not isinstance(cells, dict):
                raise RecipeError(
                    f"{file.name} row {row + 1:,} is {kind(cells)}, but a row is an object of columns: "
                    "write one per line."
                )
            for name in cells:
                if name not in columns:
                    columns[name] = [None] * row
            for name, values in columns.items():
                values.append(cells.get(name))
            row += 1
    if not columns:
        raise RecipeError(f"{files[0].name} is empty: there is nothing to learn from.")
    return pa.table({name: _typed(values, name) for name, values in columns.items()})


def _objects(file: Path) -> Iterator:
    """What one JSON list holds, or each line."""
    with _text(file, newline="\n") as lines:
        while (first := lines.read(1)).isspace():
            pass
        lines.seek(0)
        number = 0
        try:
            for line in [lines.read()] if first == "[" else lines:
                number += 1
                if line.strip():
                    yield from JSON.decode(line) if first == "[" else [JSON.decode(line.strip())]
        except json.JSONDecodeError as error:
            raise RecipeError(
                f"{file.name} line {number + error.lineno - 1:,} is not JSON ({error.msg}): "
                "write one object per line, or one list of objects."
            ) from error
        except OverflowError as error:
            raise RecipeError(
                f"{file.name}{'' if first == '[' else f' line {number:,}'} has a whole number of over 18 digits, which "
                "would be rounded: write it in quotation marks."
            ) from error


def _typed(values: list, name: str):
    """A column in Arrow; as JSON where Arrow has no one type for all that stands there."""
    import pyarrow as pa

    if len({type(value) for value in values if value is not None}) <= 1:
        try:
            return pa.array(values)
        except UnicodeEncodeError as error:
            row = next(i for i, value in enumerate(values, 1) if "\\ud" in json.dumps(value))
            raise RecipeError(
                f"Row {row:,} has half a character in column {name!r} (a lone surrogate): correct the text."
            ) from error
        except pa.ArrowException:
            pass  # lists or objects whose own values differ in type
    return pa.array([None if value is None else json.dumps(value) for value in values], pa.json_())


def _parquet(files: list[Path]):
    import pyarrow as pa
    from pyarrow.parquet import ParquetFile

    tables = []
    for file in files:
        try:
            parquet = ParquetFile(file, buffer_size=BUFFER, pre_buffer=False)
            table = _mapped(parquet) if _holds_files(parquet) else parquet.read()
        except pa.ArrowException as error:
            raise RecipeError(f"{file.name} is not a whole Parquet file: write it again.") from error
        for i, field in enumerate(table.schema):
            if pa.types.is_dictionary(field.type):  # a category of pandas
                table = table.set_column(i, field.name, table.column(i).cast(field.type.value_type))
        tables.append(table)
    return _joined(tables, files)


def _holds_files(parquet) -> bool:
    """Whether there are enough bytes in its columns of bytes that they had better not be in memory."""
    import pyarrow as pa

    schema, groups = parquet.schema_arrow, map(parquet.metadata.row_group, range(parquet.metadata.num_row_groups))
    inner = lambda kind: [kind.field(i).type for i in range(kind.num_fields)] if pa.types.is_struct(kind) else [kind]
    binary = any(pa.types.is_binary(k) or pa.types.is_large_binary(k) for kind in schema.types for k in inner(kind))
    return binary and sum(group.total_byte_size for group in groups) > IN_MEMORY


def _mapped(parquet):
    """The table, in a file without a name that is mapped into memory: rows that are not read take none."""
    import pyarrow as pa

    file = TemporaryFile()  # noqa: SIM115  (lives as long as the table, which is mapped from it)
    with pa.ipc.new_file(file, parquet.schema_arrow) as writer:
        for batch in parquet.iter_batches(batch_size=FILES_AT_A_TIME):
            writer.write_batch(batch)
    file.flush()
    return pa.ipc.open_file(pa.py_buffer(mmap(file.fileno(), 0, access=ACCESS_READ))).read_all()


def _joined(tables: list, files: list[Path]):
    """All rows in one table; only the files' own types, never a common one, which would write 7 as 7.0."""
    import pyarrow as pa

    for table in tables:
        if set(table.column_names) != set(tables[0].column_names):
            raise RecipeError(
                f"The files have different columns, {', '.join(tables[0].column_names)} and "
                f"{', '.join(table.column_names)}: give them the same."
            )
    return pa.concat_tables([table.select(tables[0].column_names) for table in tables], promote_options="default")


def _saved(folders: list[Path]):
    import datasets

    parts = [datasets.load_from_disk(str(_split(folder))).with_format(None) for folder in folders]
    return datasets.concatenate_datasets(parts)


def _split(folder: Path) -> Path:
    """The folder of one saved data set: itself, or its only split."""
    if (folder / "state.json").exists():
        return folder
    splits = sorted(path.parent.name for path in folder.glob("*/state.json"))
    if len(splits) == 1:
        return folder / splits[0]
    if splits:
        one = "train" if "train" in splits else splits[0]
        raise RecipeError(
            f"{folder} holds the splits {', '.join(splits)}: name the one that is meant, such as {folder / one}."
        )
    files = sorted(path.name for path in folder.iterdir() if path.suffix.lower() in READERS)
    if files:
        raise RecipeError(
            f"{folder} is a folder with {len(files):,} data files: name the files, such as {folder / files[0]}."
        )
    raise RecipeError(f"{folder} is a folder without data: name a file, or a folder written by save_to_disk.")


def _with_class_names(rows):
    """Class numbers of ``datasets.ClassLabel`` columns, or lists of them, as their names; -1, its word for no class, is
    missing."""
    import datasets

    order, text = rows.column_names, datasets.Value("string")
    for name, feature in rows.features.items():
        inner = getattr(feature, "feature", None)
        classes = inner if isinstance(inner, datasets.ClassLabel) else feature
        if isinstance(classes, datasets.ClassLabel):
            named = lambda n, names=classes.names: None if n is None or n < 0 else names[n]
            cells = (cell for part in rows.select_columns([name]).iter(1000) for cell in part[name])
            names = [[*map(named, cell)] if isinstance(cell, list) else named(cell) for cell in cells]
            kind = text if classes is feature else datasets.List(text)
            rows = rows.remove_columns(name).add_column(name, names, feature=kind)
    return rows if rows.column_names == order else rows.select_columns(order)


@contextmanager
def _text(file: Path, newline: str) -> Iterator[TextIO]:
    """A UTF-8 file, with or without the mark that Excel and PowerShell put first."""
    with open(file, encoding="utf-8-sig", newline=newline) as lines:
        try:
            yield lines
        except UnicodeDecodeError as error:
            with open(file, "rb") as raw:
                line = next((i for i, line in enumerate(raw, 1) if "\ufffd" in line.decode("utf-8", "replace")), 1)
            raise RecipeError(f"{file.name} line {line:,} is not UTF-8: save the file as UTF-8.") from error


READERS: dict[str, Callable] = {".csv": _csv, ".tsv": _csv, ".json": _json, ".jsonl": _json, ".parquet": _parquet}
