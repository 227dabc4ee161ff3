"""A task's metrics on whole data sets, and by groups of their rows."""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from dpft.tasks.task import Batch, Task
from dpft.training.batches import EVALUATION_TOKENS, Examples, cut, plain_batches
from dpft.training.data import column_of


def measure(
    rows: Any, task: Task, model: nn.Module, prepare: Callable[[Batch], Batch] = lambda batch: batch
) -> dict[str, Any]:
    """The task's metrics on the rows, un-noised: private if the rows are.

    A task whose ``group`` names a column also has ``groups``: each value's accuracy, macro-F1 and count. The model sees
    each example once either way, and is in evaluation mode already.

    Args:
        prepare: what is done to each batch, such as moving it to a device.
    """
    column = getattr(task, "group", None)
    if column is None or isinstance(rows, Examples):
        examples = rows if isinstance(rows, Examples) else Examples.encode(rows, task)
        return task.evaluate(model, map(prepare, plain_batches(examples, task, EVALUATION_TOKENS)))
    values = column_of(rows, column) if hasattr(rows, "column_names") else (row[column] for row in rows)
    names = list(dict.fromkeys(map(str, values)))
    examples = Examples.encode(rows, task, column)
    whole: Any = task.metrics()  # which can add, as a task with groups promises
    parts = {}
    for name, members in sorted(zip(names, examples.members, strict=True), key=lambda one: one[0]):
        part = task.metrics()
        with torch.no_grad():
            for places in cut(examples.costs[members], range(len(members)), token_budget=EVALUATION_TOKENS):
                part.update(model, prepare(task.collate([examples.features[i] for i in members[places]])))
        whole.add(part)
        parts[name] = part.compute()
    figures = {
        name: {"accuracy": found["accuracy"], "macro_f1": found["macro_f1"], "count": found["examples"]}
        for name, found in parts.items()
    }
    return {**whole.compute(), "groups": figures}
