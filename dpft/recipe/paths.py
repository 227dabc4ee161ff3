"""Paths in a recipe: variables, lists, and what is meant to be a path."""

import os
import re
from collections.abc import Mapping
from typing import Any

from dpft.errors import RecipeError
from dpft.recipe import toml

PATHS = ("model.path", "data.train", "data.validation", "data.public", "ledger.url")


def listed(paths: str | list[str] | None) -> list[str]:
    """One path, several or none, as a list."""
    return [paths] if isinstance(paths, str) else list(paths or ())


def expanded_path(path: str) -> str:
    return os.path.expanduser(os.path.expandvars(path))


def expand(path: str) -> str:
    """``$VARIABLES`` and ``~`` in a path.

    Raises:
        RecipeError: a variable is not set.
    """
    expanded = expanded_path(path)
    unset = re.search(r"\$\{?(\w+)", expanded)
    if unset:
        raise RecipeError(
            f"The path {path} needs the environment variable {unset[1]}, which is not set: export it or write the "
            "path out."
        )
    return expanded


def check_path(tables: Mapping[str, Any], key: str) -> None:
    """Raises RecipeError: an escape such as \\t made a control character of a path's backslash."""
    table, name = key.split(".")
    found = tables.get(table)
    values = found.get(name) if isinstance(found, dict) else None
    for value in values if isinstance(values, list) else [values]:
        if isinstance(value, str) and re.search(r"[\x00-\x1f]", value):
            raise RecipeError(f"The recipe's {key} is {value!r}, with a control character: {toml.WINDOWS_PATHS}")
