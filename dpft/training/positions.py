"""How many tokens a model has positions for."""

import re
from itertools import chain
from typing import TYPE_CHECKING, Any

from dpft.errors import RecipeError
from dpft.recipe import TaskTable

if TYPE_CHECKING:
    from transformers import PreTrainedModel

DEFAULT_LENGTH = 128
LENGTHS = ("max_length", "target_length")  # keys of tasks that cut examples, and a task's attributes
LIMITS = ("max_position_embeddings", "n_positions")
TABLE = re.compile(r"(^|\.)(wpe|(?!relative)\w*position(?!_ids$|.*bias)\w*)$")


def positions(model: "PreTrainedModel") -> int | None:
    """The longest text that a model with a table of absolute positions can read, in tokens; None for any other model.

    A table is known by its name. RoBERTa's positions begin after its padding index, OPT's and BART's after an offset:
    514 rows are then 512 tokens. Relative and rotary positions have no table; the number in their configuration is
    advice.
    What a prompt tuner puts before a text takes positions as well.
    """
    config = model.config.get_text_config()
    limits = [value for name in LIMITS if isinstance(value := getattr(config, name, None), int)]
    sizes, modules = [], dict(model.named_modules())
    for name, table in chain(model.named_parameters(), model.named_buffers()):
        name = name.removesuffix(".weight")
        if table.dim() == 2 and TABLE.search(name):
            padding = getattr(modules.get(name), "padding_idx", None)
            first = 0 if padding is None else padding + 1
            sizes.append(len(table) - getattr(modules.get(name), "offset", first))
    before = getattr(getattr(model, "active_peft_config", None), "num_virtual_tokens", None) or 0
    return min([*sizes, *limits]) - before if sizes else None


def fit(task: Any, table: TaskTable, model: "PreTrainedModel") -> None:
    """Let a task that cuts its examples cut them where the model needs it; see :func:`fitting_length`."""
    for key in LENGTHS:
        if key in type(table).model_fields:
            setattr(task, key, fitting_length(getattr(table, key), model, key))


def fitting_length(asked: int | None, model: "PreTrainedModel", key: str = "max_length") -> int:
    """What the task's key asks for, or by default 128 and no more than the model has positions.

    Raises:
        RecipeError: more tokens are asked for than the model has positions.
    """
    most = positions(model)
    if asked is None:
        return min(DEFAULT_LENGTH, most or DEFAULT_LENGTH)
    if most is not None and asked > most:
        raise RecipeError(
            f"task.{key} is {asked:,} tokens, but the model has positions for {most:,}, so longer texts would "
            f"fail: lower it to {most:,}."
        )
    return asked
