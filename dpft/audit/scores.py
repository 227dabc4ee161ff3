"""What a released model says of a record: its loss, beside that of the model before training."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn

from dpft.errors import RecipeError
from dpft.recipe import Recipe
from dpft.subset import load_weights
from dpft.subset.weights import DELTA
from dpft.tasks.task import Batch, Features, Task, size_of
from dpft.training.batches import EVALUATION_TOKENS, cut
from dpft.workflows.setup import load_model

if TYPE_CHECKING:
    from transformers import PreTrainedModel

LEAST = 0.2  # share of a text's tokens that Min-K% looks at


def trained(before: nn.Module, recipe: Recipe, weights: Path | str) -> "PreTrainedModel":
    """The model that a training of ``before`` with this recipe left: an adapter or sparse weights, which are put on
    ``before`` itself, or a whole model.

    Raises:
        RecipeError: the folder holds none of these.
    """
    weights = Path(weights)
    if (weights / DELTA).exists() or (weights / "adapter_config.json").exists():
        return load_weights(before, weights)
    if (weights / "config.json").exists():
        _check_labels(recipe, weights)
        whole = recipe.model_copy(
            update=dict(model=recipe.model.model_copy(update=dict(path=str(weights), revision=None)))
        )
        return load_model(whole)[1]
    raise RecipeError(
        f"{weights} holds no model (no config.json, adapter_config.json or {DELTA}): save the trained model there "
        "with save_pretrained."
    )


def _check_labels(recipe: Recipe, weights: Path) -> None:
    """Raises RecipeError: the model numbers the recipe's labels in another order, so that its losses would be of wrong
    classes."""
    known: dict[str, int] = json.loads((weights / "config.json").read_text(encoding="utf-8")).get("label2id") or {}
    ordered = sorted(known, key=known.__getitem__)
    for column in recipe.task.columns.values():
        if set(ordered) == set(column.labels) and ordered != list(column.labels):
            raise RecipeError(
                f"The model in {weights} numbers its labels {', '.join(ordered[:3])} ..., and task.labels names "
                f"{', '.join(column.labels[:3])} ... first: give them in the model's order."
            )


def losses(model: "PreTrainedModel", task: Task, features: Sequence[Features]) -> np.ndarray:
    """``(n,)`` losses, each the mean over the record's own labels."""
    return _for_each(model, task, features, lambda batch: task.losses(model, batch))


def least_likely(model: "PreTrainedModel", task: Task, features: Sequence[Features]) -> np.ndarray:
    """``(n,)`` Min-K% scores: the mean log-probability of each text's least likely fifth of tokens
    (Shi et al. 2024)."""

    likelihoods = task.likelihoods
    if likelihoods is None:
        raise RecipeError(f"{type(task).__name__} gives no likelihoods of tokens, so there is no Min-K% of them.")

    def scored(batch: Batch) -> Tensor:
        found = []
        for one in likelihoods(model, batch):
            least = one.sort().values[: max(1, round(LEAST * len(one)))]
            found.append(least.mean() if len(one) else one.new_zeros(()))
        return torch.stack(found)

    return _for_each(model, task, features, scored)


def _for_each(
    model: "PreTrainedModel", task: Task, features: Sequence[Features], score: Callable[[Batch], Tensor]
) -> np.ndarray:
    was_training = model.training
    model.eval()
    found = np.empty(len(features))
    costs = [size_of(task, feature).cost for feature in features]
    with torch.no_grad():
        for group in cut(costs, range(len(features)), token_budget=EVALUATION_TOKENS):
            batch = task.collate([features[place] for place in group])
            found[group] = score({name: value.to(model.device) for name, value in batch.items()}).float().cpu().numpy()
    model.train(was_training)
    return found
