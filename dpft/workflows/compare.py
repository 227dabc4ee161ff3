"""``dpft compare``: a sweep of the recipe as it is written, one run after another in this process."""

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from dpft.recipe import Recipe
from dpft.runs.sweep import Sweep
from dpft.workflows.grid import Planned
from dpft.workflows.sweep import sweep

if TYPE_CHECKING:
    from transformers import TrainerCallback


def compare(  # noqa: PLR0913  (each is what a user types, by its name)
    recipe: Recipe,
    output: Path | str,
    *,
    epsilons: Sequence[float] | None = None,
    seeds: Sequence[int] = (0,),
    non_private: bool = True,
    watch: Callable[[Sequence[Planned]], None] = lambda cells: None,
    announce: Callable[[str], None] = lambda title: None,
    callbacks: Callable[[], "Sequence[TrainerCallback]"] = lambda: (),
) -> Sweep:
    """Compare the untouched model, the run without privacy and private runs: :func:`dpft.sweep` of one subset.

    Args:
        epsilons: the budgets; by default the recipe's own.
        non_private: also train without noise and clipping, with the recipe's ``baseline`` settings.

    Raises:
        DPFTError: see :func:`dpft.sweep`.
    """
    budgets: Sequence[float | None] = epsilons or [None]
    return sweep(
        recipe,
        output,
        epsilons=[math.inf, *budgets] if non_private else [*budgets],
        seeds=seeds,
        jobs=1,
        watch=watch,
        announce=announce,
        callbacks=callbacks,
    )
