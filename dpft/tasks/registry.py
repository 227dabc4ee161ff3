"""Tasks by name: dpft's own, which are the files of this package, and those of other packages.

Another package names its task in the entry-point group ``dpft.tasks``::

    [project.entry-points."dpft.tasks"]
    summarisation = "my_package.summarisation:Summarisation"
"""

import pkgutil
from collections.abc import Callable
from functools import cache
from importlib import import_module
from importlib.metadata import EntryPoint, entry_points
from typing import TypeVar

from dpft.errors import RecipeError, first_line
from dpft.tasks.task import Task

GROUP = "dpft.tasks"
T = TypeVar("T", bound=Task)
_TASKS: dict[str, type[Task]] = {}


def task(name: str) -> Callable[[type[T]], type[T]]:
    """A decorator: recipes find the class by this name.

    Raises:
        RecipeError: another class has the name.
    """

    def register(kind: type[T]) -> type[T]:
        other: type[Task] = _TASKS.get(name, kind)
        if (other.__module__, other.__qualname__) != (kind.__module__, kind.__qualname__):
            raise RecipeError(
                f"The task {name} is {other.__module__}.{other.__qualname__} already, so "
                f"{kind.__module__}.{kind.__qualname__} cannot be found by that name: give it another."
            )
        kind.name = name
        _TASKS[name] = kind
        return kind

    return register


def own() -> list[type[Task]]:
    """The tasks that are registered by now, dpft's among them."""
    _scan()
    return list(_TASKS.values())


def names() -> list[str]:
    """Every name that a recipe may give, sorted; other packages' tasks are not loaded for it."""
    _scan()
    return sorted({*_TASKS, *_installed()})


def find(name: str) -> type[Task]:
    """The task of that name.

    Raises:
        RecipeError: there is none, or its package cannot be loaded.
    """
    _scan()
    entry = _installed().get(name)
    if name not in _TASKS and entry is not None:
        try:
            entry.load()
        except Exception as error:  # whatever another package raises when it is imported
            raise RecipeError(
                f"The task {name} cannot be loaded from {entry.value} ({first_line(error)}): repair that package."
            ) from error
    if name not in _TASKS:
        raise RecipeError(
            f"task.name is {name!r}, which no task is called: choose one of {', '.join(names())}, or install the "
            "package that brings it."
        )
    return _TASKS[name]


@cache
def _scan() -> None:
    """Import every file of this package: those that hold a task register it."""
    for module in pkgutil.iter_modules(import_module("dpft.tasks").__path__):
        import_module(f"dpft.tasks.{module.name}")


@cache
def _installed() -> dict[str, EntryPoint]:
    return {entry.name: entry for entry in entry_points(group=GROUP)}
