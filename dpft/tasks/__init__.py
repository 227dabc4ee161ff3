"""What is learned: per-example losses, collation and metrics, one file per task."""

from dpft.tasks.encoded import Encoded
from dpft.tasks.labelled import LabelledTask
from dpft.tasks.task import Metrics, Size, Task

__all__ = ["Encoded", "LabelledTask", "Metrics", "Size", "Task"]


def __getattr__(name: str) -> type[Task]:
    """A task of this package by its class's name."""
    from dpft.tasks.registry import own

    for kind in own() if name[:1].isupper() else ():
        if kind.__name__ == name:
            return kind
    raise AttributeError(f"module 'dpft.tasks' has no attribute {name!r}")
