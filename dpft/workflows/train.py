"""``dpft train``: from a recipe to a folder that can be signed, published in part, and re-read
(:mod:`dpft.runs.folder` names its files)."""

from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

from dpft.errors import BudgetError, RecipeError
from dpft.privacy.noise import Randomness
from dpft.privacy.plan import Plan
from dpft.recipe import Recipe
from dpft.runs.folder import RunFolder
from dpft.workflows.record import write, write_private
from dpft.workflows.setup import Setup, load_model, make_trainer, set_up

if TYPE_CHECKING:
    from transformers import TrainerCallback

    from dpft.training.trainer import DPTrainer


def train(  # noqa: PLR0913  (each is what a user types, by its name)
    recipe: Recipe,
    output: Path | str,
    *,
    randomness: Randomness | None = None,
    callbacks: "Sequence[TrainerCallback]" = (),
    resume: bool = False,
    evaluate: bool = True,
    setup: Setup | None = None,
    plan: Plan | None = None,
) -> Path:
    """Train and leave a run folder; what the interrupt key ends early is a complete, smaller run.

    A folder whose run failed before its first release can be used again. One that failed later goes on with ``resume``:
    from its last checkpoint, or, if it left none, with new weights; what was released stays counted either way. A head
    goes on to the very weights that it would have had.

    Args:
        setup, plan: what the recipe names, where it is loaded or planned already, or with an audit's canaries.

    Returns:
        The folder.

    Raises:
        RecipeError: the folder holds another run.
        DPFTError: see :mod:`dpft.errors`; nothing is charged by an error before the first step.
    """
    output = Path(output)
    folder = RunFolder(output)
    if folder.releases_file.exists() and not resume:
        raise RecipeError(f"{output} holds a run already: choose another folder, or resume that run.")
    if resume and not folder.releases_file.exists():
        raise RecipeError(
            f"{output} holds no run that has released anything, so there is nothing to resume: start it without "
            "--resume."
        )
    plan = plan or recipe.plan()
    setup = setup or set_up(recipe)
    from dpft.training.saving import Saving
    from dpft.workflows.head import HeadTrainer

    output.mkdir(parents=True, exist_ok=True)
    trainer = make_trainer(setup, output, randomness=randomness, callbacks=callbacks, plan=plan)
    session = trainer.session
    session.releases.check()
    before = session.releases.charged
    saving = Saving(recipe, setup.task, lambda other: load_model(other)[1])
    if before < plan.steps:
        saving.try_it(setup.model, output)
    folder.write_recipe(recipe)
    started = datetime.now(UTC)
    if isinstance(trainer, HeadTrainer):
        trainer.train(go_on=resume)
        interrupted = False
    else:
        interrupted = _descend(trainer, folder, resume=resume)
    from dpft.report import write_card

    metrics = None
    try:
        metrics = trainer.evaluate() if evaluate and setup.validation is not None else None
    finally:  # what was paid for is kept, whatever happens to its evaluation
        loading, expected = saving.save(setup.model, folder.weights)
        write(folder, recipe, session, loading, metrics, interrupted)
        write_private(folder, session, started)
        write_card(output)
        folder.round_dates()
    saving.check(folder.weights, loading, expected)
    return output


def _descend(trainer: "DPTrainer", folder: RunFolder, *, resume: bool) -> bool:
    """Train, or take up weights that were trained; returns whether it ended early."""
    session = trainer.session
    checkpoint, before = folder.last_checkpoint() if resume else None, session.releases.charged
    try:
        if before >= session.plan.steps and not _saved(folder, before):
            if checkpoint is None:
                raise BudgetError(
                    f"All {before:,} steps of the run in {folder} were released and no weights of them were saved, so "
                    "nothing is left to go on with: start another run; runs keep checkpoints if run.save_steps is set."
                )
            trainer.load(str(checkpoint))  # all was released, and then it was killed before it had saved that
        else:
            trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint), from_start=resume)
    except KeyboardInterrupt:
        if session.releases.charged == before:  # not one step: the weights may not even be those of the checkpoint
            raise
        session.engine.discard()
        session.engine.steps_released = session.releases.charged  # a release cut short counts as well
        return True
    return session.released < session.plan.steps


def go_on_unless_interrupted(output: Path | str) -> None:
    """Raises KeyboardInterrupt: the interrupt key ended this run, so what was to come after it is not wanted either."""
    record = RunFolder(output).record()
    if record.interrupted and not record.halted:
        raise KeyboardInterrupt


def _saved(folder: RunFolder, released: int) -> bool:
    """Whether the folder's weights are those after all that was released."""
    return folder.finished and folder.record().released_steps >= released
