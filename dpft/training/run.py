"""One run: from a recipe to a folder that can be signed, published in part, and re-read (:mod:`dpft.runs.folder` names its files)."""

import math
import platform
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from dpft.errors import BudgetError, RecipeError, first_line
from dpft.privacy.noise import Randomness
from dpft.privacy.plan import Plan
from dpft.recipe import ModelTable, Recipe, expand
from dpft.runs.folder import RunFolder, today
from dpft.runs.record import AccountFacts, ClipFacts, MechanismFacts, RunRecord
from dpft.training.data import load, load_public
from dpft.training.positions import fit

PACKAGES = ("dpft", "torch", "opacus", "transformers", "peft", "dp-accounting", "numpy", "datasets")


@dataclass
class Setup:
    """Everything that a recipe names, loaded."""

    recipe: Recipe
    model: Any
    task: Any
    train: Any
    validation: Any
    account_rows: Any = None  # what the ledger's account recognises, where canaries were added to the training data


def set_up(recipe: Recipe, *, with_validation: bool = True) -> Setup:
    """Read data, then tokenizer and model, and apply the subset; nothing is charged.

    Raises:
        RecipeError, SubsetError: see :mod:`dpft.errors`.
    """
    train, validation = load(recipe, validation=with_validation)
    public = load_public(recipe)
    task, model = load_model(recipe)
    from dpft.subset import Subset
    from dpft.training.batches import Examples

    subset = Subset(recipe.subset)
    examples = Examples.encode(public, task).features if subset.needs_public_data else ()
    model = subset.apply(model, lambda some: task.losses(model, task.collate(some)), examples)
    fit(task, recipe.task, model)  # again, because a prompt tuner takes positions
    return Setup(recipe, model, task, train, validation)


def load_model(recipe: Recipe):
    """The task and the untouched model, whose new layers are initialised from ``run.seed``.

    Raises:
        RecipeError: the model cannot be loaded, or has fewer positions than ``task.max_length``.
    """
    import transformers

    from dpft.subset.base import quiet
    from dpft.tasks.registry import find
    from dpft.tasks.source import Source

    path, revision = expand(recipe.model.path), recipe.model.revision
    options = {"dtype": recipe.model.dtype, **_quantization(recipe.model)}
    transformers.set_seed(recipe.run.seed)
    with quiet():
        try:
            task, model = find(recipe.task.name).load(recipe.task, Source(path, revision, options))
        except (OSError, ValueError, ImportError) as error:
            if isinstance(error, RecipeError):
                raise
            raise RecipeError(
                f"The model {path} cannot be loaded ({first_line(error)}): give a folder that AutoModel loads, or a hub name."
            ) from error
    fit(task, recipe.task, model)
    if not recipe.model.dropout:
        _without_dropout(model)
    return task, model


def _quantization(table: ModelTable) -> dict:
    """What ``from_pretrained`` is told; 4-bit layers multiply in the recipe's type, so that the preflight can prove them."""
    if table.quantize is None:
        return {}
    import torch
    from transformers import BitsAndBytesConfig

    if table.quantize == "8bit":
        return {"quantization_config": BitsAndBytesConfig(load_in_8bit=True, llm_int8_threshold=0.0)}
    compute = getattr(torch, table.dtype)
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=compute)
    return {"quantization_config": config}


def _without_dropout(model) -> None:
    """Set every dropout probability of the model's layers to zero; its configuration keeps what it says."""
    for module in model.modules():
        if type(module).__name__.startswith("Dropout"):
            module.p = 0.0
        for name, value in list(vars(module).items()):
            if "dropout" in name and isinstance(value, float):
                setattr(module, name, 0.0)


def make_trainer(setup: Setup, output: Path, *, randomness: Randomness | None = None, callbacks=(), plan=None):
    """A :class:`dpft.DPTrainer` for the recipe."""
    from transformers import TrainingArguments

    from dpft.training.trainer import DPTrainer

    recipe = setup.recipe
    settings = dict(
        output_dir=str(output),
        optim=recipe.optimizer.name,
        learning_rate=recipe.optimizer.learning_rate,
        lr_scheduler_type=recipe.optimizer.schedule,
        warmup_steps=recipe.optimizer.warmup_steps,
        weight_decay=recipe.optimizer.weight_decay,
        seed=recipe.run.seed,
        save_strategy="steps" if recipe.run.save_steps else "no",
        save_steps=recipe.run.save_steps or 500,
        save_total_limit=2,
        logging_strategy="no",
        report_to=[],
        disable_tqdm=True,
    )
    try:
        arguments = TrainingArguments(**settings)
    except (ValueError, TypeError) as error:
        raise RecipeError(f"The recipe's optimizer cannot be made ({first_line(error)}): mend [optimizer].") from error
    trainer = DPTrainer(
        model=setup.model,
        args=arguments,
        train_dataset=setup.train,
        eval_dataset=setup.validation,
        plan=plan or recipe.plan(),
        task=setup.task,
        randomness=randomness,
        token_budget=recipe.run.token_budget,
        memory=None if recipe.run.memory is None else int(recipe.run.memory * 2**30),
        frozen_prefix=recipe.run.frozen_prefix,
        ledger=open_account(recipe),
        purpose=recipe.ledger.purpose,
        account_rows=setup.account_rows,
        evaluation_is_public=recipe.data.validation_is_public,
        callbacks=list(callbacks),
    )
    from transformers import PrinterCallback

    trainer.remove_callback(PrinterCallback)
    return trainer


def open_account(recipe: Recipe):
    """The recipe's data set in its ledger; None if it names none."""
    if recipe.ledger.dataset is None:
        return None
    from dpft.ledger import Ledger

    return Ledger(recipe.ledger.url and expand(recipe.ledger.url), create=False).dataset(recipe.ledger.dataset)


def train(
    recipe: Recipe,
    output: Path | str,
    *,
    randomness: Randomness | None = None,
    callbacks=(),
    resume: bool = False,
    evaluate: bool = True,
    setup: Setup | None = None,
    plan: Plan | None = None,
) -> Path:
    """Train and leave a run folder; what the interrupt key ends early is a complete, smaller run.

    A folder whose run failed before its first release can be used again. One that failed later goes on with ``resume``: from its last
    checkpoint, or, if it left none, with new weights; what was released stays counted either way.

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
            f"{output} holds no run that has released anything, so there is nothing to resume: start it without --resume."
        )
    checkpoint = folder.last_checkpoint() if resume else None
    plan = plan or recipe.plan()
    setup = setup or set_up(recipe)
    from dpft.training.saving import Saving

    output.mkdir(parents=True, exist_ok=True)
    trainer = make_trainer(setup, output, randomness=randomness, callbacks=callbacks, plan=plan)
    trainer.session.releases.check()
    before = trainer.session.releases.charged
    saving = Saving(recipe, setup.task, lambda other: load_model(other)[1])
    if before < plan.steps:
        saving.try_it(setup.model, output)
    folder.write_recipe(recipe)
    started = datetime.now(UTC)
    interrupted = False
    try:
        if before >= trainer.session.plan.steps and not _saved(folder, before):
            if checkpoint is None:
                raise BudgetError(
                    f"All {before:,} steps of the run in {output} were released and no weights of them were saved, so nothing is left to go on with: "
                    "start another run; runs keep checkpoints if run.save_steps is set."
                )
            trainer.load(str(checkpoint))  # all was released, and then it was killed before it had saved that
        else:
            trainer.train(resume_from_checkpoint=checkpoint and str(checkpoint), from_start=resume)
    except KeyboardInterrupt:
        if (
            trainer.session.releases.charged == before
        ):  # not one step, so the weights may not even be those of the checkpoint
            raise
        interrupted = True
        trainer.session.engine.discard()
        trainer.session.engine.steps_released = trainer.session.releases.charged  # a release cut short counts as well
    interrupted = interrupted or trainer.session.engine.steps_released < trainer.session.plan.steps
    from dpft.report import write_card

    metrics = None
    try:
        metrics = trainer.evaluate() if evaluate and setup.validation is not None else None
    finally:  # what was paid for is kept, whatever happens to its evaluation
        loading, expected = saving.save(setup.model, folder.weights)
        write(folder, recipe, trainer, loading, metrics, interrupted)
        _write_private(folder, trainer, started)
        write_card(output)
        folder.round_dates()
    saving.check(folder.weights, loading, expected)
    return output


def go_on_unless_interrupted(output: Path | str) -> None:
    """Raises KeyboardInterrupt: the interrupt key ended this run, so what was to come after it is not wanted either."""
    record = RunFolder(output).record()
    if record.interrupted and not record.halted:
        raise KeyboardInterrupt


def _saved(folder: RunFolder, released: int) -> bool:
    """Whether the folder's weights are those after all that was released."""
    return folder.finished and folder.record().released_steps >= released


def write(folder: RunFolder, recipe: Recipe, trainer, loading: str, metrics: dict | None, interrupted: bool) -> None:
    """The run's record. Un-noised metrics go to ``private/`` unless the validation data are public."""
    plan, released = trainer.session.plan, trainer.session.engine.steps_released
    private = trainer.session.engine.randomness.private and plan.noise_multiplier > 0
    public = recipe.data.validation_is_public
    found = None if metrics is None else {name.removeprefix("eval_"): value for name, value in metrics.items()}
    record = RunRecord(
        guarantee=trainer.guarantee,
        private=private,
        epsilon=plan.epsilon_after(released) if private else None,
        epsilon_rdp=plan.epsilon_rdp if private and math.isfinite(plan.epsilon_rdp) else None,
        delta=plan.delta,
        unit=plan.unit,
        units=plan.units,
        examples_per_unit=plan.examples_per_unit,
        adjacency=plan.adjacency,
        events=plan.events(released),
        planned_steps=plan.steps,
        released_steps=released,
        interrupted=interrupted,
        halted=trainer.session.halted,
        ledger=_account(trainer),
        expected_batch_size=plan.expected_batch_size,
        mechanism=MechanismFacts(**asdict(plan.mechanism.describe(released))),
        clip=ClipFacts(rule=type(plan.clip).__name__, clip_norm=plan.clip.sensitivity),
        subset=recipe.subset,
        trainable_parameters=trainer.session.preflight.trainable_parameters if trainer.session.preflight else None,
        all_parameters=sum(p.numel() for p in trainer.model.parameters()),
        weights=loading,
        metrics=(found or None) if public else None,
        metrics_are_private=found is not None and not public,
        date=today(),
        versions=versions(),
    )
    folder.write_record(record)
    if found is not None and not public:
        folder.write_private(folder.metrics_file, found)


def _write_private(folder: RunFolder, trainer, started: datetime) -> None:
    """What follows the data: times, techniques, the layer that was kept, how many rows the account knew."""
    facts = {
        "techniques": trainer.session.preflight.techniques if trainer.session.preflight else None,
        "frozen_prefix": trainer.session.prefix.name if trainer.session.prefix else None,
        "overlap": trainer.session.account.overlap if trainer.session.account else None,
        "started": started.isoformat(timespec="seconds"),
        "finished": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    notice = "PRIVATE: these follow the data; the guarantee does not cover them."
    folder.write_private(folder.facts_file, facts, notice)


def _account(trainer) -> AccountFacts | None:
    """Where the run was charged, and what its data set had spent when it ended."""
    if trainer.session.account is None:
        return None
    dataset = trainer.session.account.dataset
    return AccountFacts(
        **trainer.session.account.facts,
        budget=dataset.policy["epsilon"],
        delta=dataset.policy["delta"],
        spent=dataset.spent(),
        runs=len(dataset.record.runs),
    )


def versions() -> dict[str, str]:
    """What a run depended on."""
    found = {"python": platform.python_version(), "platform": f"{platform.system()} {platform.machine()}"}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found
