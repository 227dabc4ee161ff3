"""Whether a recipe's run can be saved, and whether what it saved is what it trained; shown on made-up rows, so that no
message tells of real ones."""

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor, nn

from dpft.recipe import Recipe
from dpft.subset import check_room, check_savable, check_saved, outputs, save_weights
from dpft.tasks.task import made_up
from dpft.training.tuning import free_memory

CHECKPOINTS = 3  # that lie side by side for a moment, where two are kept


class Saving:
    """Saves a run's weights, after a trial before the first charge.

    Args:
        load_base: makes the untouched model of a recipe.
    """

    def __init__(self, recipe: Recipe, task, load_base) -> None:
        self._task, self._batch = task, made_up(task)
        self._checkpoints = CHECKPOINTS if recipe.run.save_steps else 0
        other = recipe.run.model_copy(
            update=dict(seed=recipe.run.seed + 1)
        )  # new layers come out otherwise, as for a user
        self._load_base = lambda: load_base(recipe.model_copy(update=dict(run=other)))

    def try_it(self, model: nn.Module, output: Path) -> None:
        """Save and load a copy whose weights are moved a little; ``model`` stays as it is.

        Raises:
            RecipeError, SubsetError, GuaranteeError: the disk is too full, or the subset cannot be saved so that it
                loads.
        """
        check_room(model, output, self._checkpoints)
        free = free_memory(next(model.parameters()).device)
        check_savable(model, self._evaluate, self._load_base, free=free)

    def save(self, model: nn.Module, folder: Path) -> tuple[str, Tensor]:
        """Save the weights; returns how to load them, and what the trained model gives on the made-up rows."""
        expected = outputs(model, self._evaluate)  # saving may merge the model
        line = save_weights(model, folder)
        self._task.save(folder)
        return line, expected

    def check(self, folder: Path, line: str, expected: Tensor) -> None:
        """Raises GuaranteeError: what was saved loads to another model than the one that was trained."""
        check_saved(expected, line, folder, self._evaluate, self._load_base)

    def _evaluate(self, model: nn.Module) -> Tensor:
        device = next(model.parameters()).device
        batch: Mapping[str, Tensor] = {key: value.to(device) for key, value in self._batch.items()}
        return self._task.losses(model, batch)
