"""Utility against privacy: the untouched model, the non-private run and private runs at several ε, side by side."""

import json
import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dpft.privacy import accounting
from dpft.privacy.events import to_dp_event
from dpft.recipe import Recipe
from dpft.runs.folder import RunFolder

if TYPE_CHECKING:
    from transformers import TrainerCallback

NON_PRIVATE = "non-private"


@dataclass(frozen=True)
class Row:
    """One line of the comparison: a setting and its headline metric over the seeds."""

    setting: str
    epsilon: float | None
    metric: str
    values: list[float]
    folders: list[str]

    @property
    def mean(self) -> float:
        return statistics.fmean(self.values)

    @property
    def spread(self) -> float:
        """Standard deviation over seeds; zero for one."""
        return statistics.stdev(self.values) if len(self.values) > 1 else 0.0


def compare(  # noqa: PLR0913  (each is what a user types, by its name)
    recipe: Recipe,
    output: Path | str,
    *,
    epsilons: Sequence[float] | None = None,
    seeds: Sequence[int] = (0,),
    non_private: bool = True,
    announce: Callable[[str], None] = lambda text: None,
    callbacks: Callable[[], "Sequence[TrainerCallback]"] = lambda: (),
) -> list[Row]:
    """Train every setting with every seed, each in a folder of its own below ``output``; writes ``sweep.json``.

    The run without privacy lies below ``private/``, and so does all of the comparison that knows of it: whoever sees a
    figure of a model that was trained without noise learns of the training data, though the validation data are public.
    Where these are not, everything is private.

    Args:
        epsilons: the budgets; by default the recipe's own.
        non_private: also train without noise and clipping, with the recipe's ``baseline`` settings.

    Raises:
        RecipeError: see :func:`dpft.train`; also if the recipe has no validation data to compare on.
    """
    from dpft.errors import RecipeError
    from dpft.workflows.record import versions
    from dpft.workflows.setup import Setup, set_up
    from dpft.workflows.train import go_on_unless_interrupted, train

    if recipe.data.validation is None:
        raise RecipeError("A comparison needs data.validation: name held-out data in the recipe.")
    if non_private and recipe.ledger.dataset is not None:
        raise RecipeError(
            f"A run without privacy would spend all of {recipe.ledger.dataset!r}, and a ledger is kept for it: "
            "compare the private runs alone (--private-only)."
        )
    sweep = RunFolder(output)
    settings: list[tuple[str, float | None, Recipe]] = []
    if non_private:
        settings.append((NON_PRIVATE, None, recipe.without_privacy()))
    budgets: Sequence[float | None] = epsilons or [recipe.privacy.epsilon]
    for epsilon in budgets:
        privacy = recipe.privacy.model_copy(
            update=dict(epsilon=epsilon, noise_multiplier=None if epsilon else recipe.privacy.noise_multiplier)
        )
        private = recipe.model_copy(update=dict(privacy=privacy))
        settings.append((f"ε = {epsilon if epsilon else private.plan().epsilon:.3g}", epsilon, private))
    rows = [_untouched(recipe, seeds, announce)]
    shared: Setup | None = None  # of heads, whose features are the same for every setting and seed
    for name, asked, setting in settings:
        metrics, folders = [], []
        for seed in seeds:
            announce(f"{name}, seed {seed}" if len(seeds) > 1 else name)
            seeded = setting.model_copy(update=dict(run=setting.run.model_copy(update=dict(seed=seed))))
            label = name.replace(" = ", "-").replace("ε", "epsilon")
            place = sweep.private if name == NON_PRIVATE else sweep.path
            folder = RunFolder(place / (f"{label}-seed-{seed}" if len(seeds) > 1 else label))
            if not _finished(folder, seeded):
                if seeded.learns_head:
                    shared = shared or set_up(seeded)
                    shared.recipe = seeded
                train(seeded, folder.path, callbacks=callbacks(), resume=folder.goes_on, setup=shared)
                go_on_unless_interrupted(folder.path)
            metrics.append(folder.metrics() or {})
            folders.append(str(folder))
        rows.append(_row(recipe, (name, asked), metrics, folders))
    found: dict[str, Any] = {"composed_epsilon": composed_epsilon(rows), "delta": recipe.privacy.delta}
    found |= {"recipe": recipe.model_dump(), "versions": versions()}
    sweep.private.mkdir(parents=True, exist_ok=True)
    _write(RunFolder(sweep.private), rows, found)
    if recipe.data.validation_is_public:
        _write(sweep, [row for row in rows if row.setting != NON_PRIVATE], found)
    sweep.round_dates()
    return rows


def _write(folder: RunFolder, rows: Sequence[Row], found: dict[str, Any]) -> None:
    text = json.dumps({"rows": [asdict(row) for row in rows], **found}, indent=2)
    folder.sweep_file.write_text(text, encoding="utf-8")


def composed_epsilon(rows: Sequence[Row]) -> float | None:
    """ε of all private runs of the comparison together: they used the same data, so they compose."""
    runs = [RunFolder(folder).record() for row in rows for folder in row.folders]
    private = [run for run in runs if run.private]
    if not private:
        return None
    event = to_dp_event(event for run in private for event in run.events)
    return accounting.epsilon(event, private[0].delta, private[0].adjacency, grid=1e-3)


def _finished(folder: RunFolder, recipe: Recipe) -> bool:
    """Whether an earlier comparison left this very run; one that was stopped goes on from its checkpoints
    (``run.save_steps``)."""
    return folder.finished and not folder.record().interrupted and folder.is_of(recipe)


def _untouched(recipe: Recipe, seeds: Sequence[int], announce: Callable[[str], None]) -> Row:
    """The model before training; a classifier's new head is random, so each seed has its own."""
    import torch

    from dpft.tasks.registry import find
    from dpft.training.data import load
    from dpft.training.measuring import measure
    from dpft.workflows.setup import load_model

    announce("untouched model")
    _, validation = load(recipe)
    metrics = []
    heads = seeds if find(recipe.task.name).adds_layers else seeds[:1]
    for seed in heads:
        task, model = load_model(recipe.model_copy(update=dict(run=recipe.run.model_copy(update=dict(seed=seed)))))
        model.eval()
        with torch.no_grad():
            metrics.append(measure(validation, task, model))
    return _row(recipe, ("untouched", None), metrics, [])


def _row(recipe: Recipe, setting: tuple[str, float | None], metrics: list[dict[str, Any]], folders: list[str]) -> Row:
    from dpft.tasks.registry import find

    name = find(recipe.task.name).headline
    return Row(*setting, name, [found[name] for found in metrics], folders)
