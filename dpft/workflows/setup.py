"""What a recipe names, loaded: data, task, model, subset, account and trainer."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dpft.errors import RecipeError, first_line
from dpft.privacy.noise import Randomness
from dpft.recipe import ModelTable, Recipe, expand
from dpft.training.data import load, load_public
from dpft.training.positions import fit

if TYPE_CHECKING:
    from torch import nn
    from transformers import TrainerCallback

    from dpft.ledger import Dataset
    from dpft.privacy.mechanisms.linear_head import Rows
    from dpft.privacy.plan import Plan
    from dpft.training.trainer import DPTrainer
    from dpft.workflows.head import HeadTrainer


@dataclass
class Setup:
    """Everything that a recipe names, loaded."""

    recipe: Recipe
    model: Any
    task: Any
    train: Any
    validation: Any
    features: "Rows | None" = None  # that a head was learned from, for other runs on the same data
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
    examples: Sequence[Any] = ()
    if subset.needs_public_data or subset.whitens:
        examples = own_samples(task, model, recipe) if public is None else Examples.encode(public, task).features
    model = subset.apply(model, lambda some: task.losses(model, task.collate(some)), examples)
    if recipe.learns_head:
        only_output_layer(task, model)
    fit(task, recipe.task, model)  # again, because a prompt tuner takes positions
    return Setup(recipe, model, task, train, validation)


def own_samples(task: Any, model: "nn.Module", recipe: Recipe) -> Sequence[Any]:
    """What the untouched model makes up, which is as public as the model.

    Raises:
        RecipeError: it makes up nothing.
    """
    samples: Sequence[Any] = task.samples(model) if hasattr(task, "samples") else ()
    if not samples:
        raise RecipeError(
            f"{recipe.subset} looks at public examples, and a model of {recipe.task.name} makes up none: declare "
            "public data in data.public, or leave out init='whitened'."
        )
    return samples


def only_output_layer(task: Any, model: "nn.Module") -> None:
    """Let the layer that makes the logits train, and nothing else.

    Raises:
        SubsetError: the model has none.
    """
    import torch

    from dpft.subset.evaluating import evaluating
    from dpft.tasks.task import made_up
    from dpft.training.features import output_layer

    with evaluating(model), torch.no_grad():
        head = output_layer(model, made_up(task))
    model.requires_grad_(False)
    head.layer.requires_grad_(True)


def load_model(recipe: Recipe) -> tuple[Any, Any]:
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
            task, model = find(recipe.task.name).load(recipe.task, Source(path, revision, options, recipe.learns_head))
        except (OSError, ValueError, ImportError) as error:
            if isinstance(error, RecipeError):
                raise
            raise RecipeError(
                f"The model {path} cannot be loaded ({first_line(error)}): give a folder that AutoModel loads, or a "
                "hub name."
            ) from error
    fit(task, recipe.task, model)
    if not recipe.model.dropout:
        without_dropout(model)
    return task, model


def _quantization(table: ModelTable) -> dict[str, Any]:
    """What ``from_pretrained`` is told; 4-bit layers multiply in the recipe's type, so that the preflight can prove
    them."""
    if table.quantize is None:
        return {}
    import torch
    from transformers import BitsAndBytesConfig

    if table.quantize == "8bit":
        return {"quantization_config": BitsAndBytesConfig(load_in_8bit=True, llm_int8_threshold=0.0)}
    compute = getattr(torch, table.dtype)
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=compute)
    return {"quantization_config": config}


def without_dropout(model: "nn.Module") -> None:
    """Set every dropout probability of the model's layers to zero; its configuration keeps what it says."""
    layers: Iterable[Any] = model.modules()
    for module in layers:
        if type(module).__name__.startswith("Dropout"):
            module.p = 0.0
        for name, value in list(vars(module).items()):
            if "dropout" in name and isinstance(value, float):
                setattr(module, name, 0.0)


def make_trainer(
    setup: Setup,
    output: Path,
    *,
    randomness: Randomness | None = None,
    callbacks: "Sequence[TrainerCallback]" = (),
    plan: "Plan | None" = None,
) -> "DPTrainer | HeadTrainer":
    """A :class:`dpft.DPTrainer` for the recipe, or what learns its head."""
    recipe = setup.recipe
    plan = plan or recipe.plan()
    options: dict[str, Any] = dict(
        randomness=randomness,
        ledger=open_account(recipe),
        purpose=recipe.ledger.purpose,
        account_rows=setup.account_rows,
    )
    if recipe.learns_head:
        from dpft.training.head import HeadSession
        from dpft.training.options import tell_each
        from dpft.workflows.head import HeadTrainer

        options |= dict(features=setup.features, rows_per_unit=recipe.data.rows_per_unit)
        options |= dict(tell=partial(tell_each, callbacks))
        return HeadTrainer(setup, HeadSession(setup.model, plan, setup.task, setup.train, output, **options))
    from transformers import TrainingArguments

    from dpft.training.trainer import DPTrainer

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
        raise RecipeError(f"The recipe's optimizer cannot be made ({first_line(error)}): fix [optimizer].") from error
    trainer = DPTrainer(
        model=setup.model,
        args=arguments,
        train_dataset=setup.train,
        eval_dataset=setup.validation,
        plan=plan,
        task=setup.task,
        token_budget=recipe.run.token_budget,
        memory=None if recipe.run.memory is None else int(recipe.run.memory * 2**30),
        frozen_prefix=recipe.run.frozen_prefix,
        draws=recipe.data.draws,
        evaluation_is_public=recipe.data.validation_is_public,
        callbacks=list(callbacks),
        **options,
    )
    from transformers import PrinterCallback

    trainer.remove_callback(PrinterCallback)
    return trainer


def open_account(recipe: Recipe) -> "Dataset | None":
    """The recipe's data set in its ledger; None if it names none."""
    if recipe.ledger.dataset is None:
        return None
    from dpft.ledger import Ledger

    return Ledger(recipe.ledger.url and expand(recipe.ledger.url), create=False).dataset(recipe.ledger.dataset)
