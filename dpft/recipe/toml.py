"""TOML files as people's editors, shells and systems leave them."""

import codecs
import json
import re
import tomllib
from pathlib import Path
from typing import Any

from dpft.errors import RecipeError

WINDOWS_PATHS = "a backslash in \"...\" starts an escape, so write Windows paths in '...' or with /."


def read(path: Path | str, overrides: tuple[str, ...] = ()) -> dict[str, Any]:
    """The file's tables, with ``overrides``: ``"table.key=value"`` with a TOML value or a bare string.

    UTF-8 is read with a byte-order mark or without, and UTF-16 with one, as Windows PowerShell 5 writes it.

    Raises:
        RecipeError: there is no such file, or it is not TOML.
    """
    text = _text(path)
    try:
        tables = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise RecipeError(f"{path} is not TOML ({error}): {_way_out(text, error)}") from error
    for assignment in overrides:
        override(tables, assignment)
    return tables


def dumps(value: object) -> str:
    """A truth value, number, string or list as TOML."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, (int, float)):
        return repr(value)
    if isinstance(value, list):
        return "[" + ", ".join(map(dumps, value)) + "]"
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")


def _text(path: Path | str) -> str:
    try:
        raw = Path(path).read_bytes()
    except FileNotFoundError as error:
        raise RecipeError(f"There is no recipe {path}: write one with `dpft init`.") from error
    except OSError as error:  # a folder is "permission denied" on Windows
        reason = "it is a folder" if Path(path).is_dir() else error.strerror
        raise RecipeError(f"{path} cannot be read as a recipe ({reason}): name a TOML file.") from error
    try:
        text = raw.decode("utf-16" if raw.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) else "utf-8-sig")
    except UnicodeDecodeError as error:
        raise RecipeError(f"{path} is not UTF-8, as TOML must be: save it as UTF-8.") from error
    if "\0" in text:
        raise RecipeError(
            f"{path} holds NUL bytes, as UTF-16 without its mark or a binary file does: save it as UTF-8."
        )
    return text


def _way_out(text: str, error: tomllib.TOMLDecodeError) -> str:
    place = re.search(r"at line (\d+)", str(error))
    line = text.split("\n")[int(place[1]) - 1] if place else ""
    return WINDOWS_PATHS if "\\" in line else "fix that line."


def override(tables: dict[str, Any], assignment: str) -> None:
    """Set one key of ``tables`` in place: ``"table.key=value"``; an empty value removes the key.

    Raises:
        RecipeError: it is no assignment, or what it goes through is no table.
    """
    key, equals, value = assignment.partition("=")
    if not equals or not key.strip():
        raise RecipeError(f"{assignment!r} is not of the form table.key=value: write for example privacy.epsilon=3.")
    try:
        parsed = tomllib.loads(f"value = {value}")["value"]
    except tomllib.TOMLDecodeError:
        parsed = value
    *parents, last = key.strip().split(".")
    for parent in parents:
        tables = tables.setdefault(parent, {})
        if not isinstance(tables, dict):
            raise RecipeError(f"{assignment!r} goes through {parent}, which is no table.")
    if parsed == "":
        tables.pop(last, None)
    else:
        tables[last] = parsed
