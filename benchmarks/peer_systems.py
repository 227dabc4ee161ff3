"""What benchmarks/peers.py compares: dpft's default, and opake and Opacus, each given the features that dpft made."""

import os
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import redirect_stdout
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any

from studies.run import TABLES

from dpft.recipe import Recipe

os.environ.setdefault("HF_HUB_OFFLINE", "1")
CLIP = 1.0  # what examples of both peers have
MICRO = 128  # examples whose gradients are held at once; it changes nothing else
STEPS = 64  # of full batches, as many as a head of dpft is accounted as


@dataclass
class Data:
    """What a head learns from, and is evaluated on.

    Attributes:
        features: ``(n, d)`` the mean over tokens of the frozen encoder's last state, of length 1.
        labels: ``(n,)`` whole numbers.
    """

    features: Any
    labels: Any


@dataclass
class Work:
    """What every system is given.

    Attributes:
        recipe: of the study.
        setup: what the recipe names, loaded, with the features that dpft made of the training data.
        seconds: how long it took to make the features and one head.
    """

    recipe: Recipe
    setup: Any
    train: Data
    validation: Data
    seconds: float

    @property
    def classes(self) -> int:
        return len(self.recipe.task.labels)

    @property
    def delta(self) -> float:
        return self.recipe.privacy.delta


@dataclass(frozen=True)
class Cell:
    epsilon: float
    seed: int
    rate: float | None = None


@dataclass(frozen=True)
class System:
    """``run(work, cell)`` returns the logits of the validation data, and the ε that was spent."""

    run: Callable[[Work, Cell], tuple[Any, float]]
    rates: tuple[float, ...] = ()  # learning rates to choose from
    package: str = "dpft"  # without it the system is left out
    seeds: int | None = None  # where one cell takes long


def made_work(table: str, folder: Path) -> Work:
    """A study's data in ``folder``, with the features that an earlier start left there."""
    import torch

    from dpft.privacy.mechanisms.linear_head import Rows
    from dpft.workflows.setup import set_up

    recipe = TABLES[table].read(folder / table)
    setup, cache = set_up(recipe), folder / table / "features.pt"
    if not cache.exists():
        since = time.monotonic()
        learned(setup, recipe)
        rows = {field.name: getattr(setup.features, field.name) for field in fields(Rows)}
        torch.save((rows, *validation(setup), time.monotonic() - since), cache.with_suffix(".part"))
        cache.with_suffix(".part").rename(cache)
    rows, *rest, seconds = torch.load(cache, weights_only=False)
    setup.features = Rows(**rows)
    unit = torch.nn.functional.normalize
    return Work(recipe, setup, Data(unit(rows["features"]), rows["labels"]), Data(unit(rest[0]), rest[1]), seconds)


def validation(setup: Any) -> tuple[Any, Any]:
    """Features and labels of the validation data."""
    import torch

    from dpft.subset.evaluating import evaluating
    from dpft.tasks.task import made_up
    from dpft.training.batches import Examples
    from dpft.training.features import features_of, output_layer

    found, examples = [], Examples.encode(setup.validation, setup.task).features
    with evaluating(setup.model), torch.no_grad():
        head = output_layer(setup.model, made_up(setup.task))
        for start in range(0, len(examples), 64):
            batch = setup.task.collate(examples[start : start + 64])
            found.append((features_of(setup.model, head, batch), batch["labels"]))
    features, labels = zip(*found, strict=True)
    return torch.cat(features), torch.cat(labels)


# -- dpft --------------------------------------------------------------------------------------------------------------


def dpft_default(work: Work, cell: Cell) -> tuple[dict, float]:
    """The study's recipe."""
    tables = work.recipe.model_dump()
    tables["privacy"]["epsilon"], tables["run"]["seed"] = cell.epsilon, cell.seed
    return learned(work.setup, Recipe.parse(tables))


def learned(setup: Any, recipe: Recipe) -> tuple[dict, float]:
    from dpft.runs.folder import RunFolder
    from dpft.workflows.train import train

    setup.recipe = recipe
    with tempfile.TemporaryDirectory() as folder, redirect_stdout(sys.stderr):
        record = RunFolder(train(recipe, Path(folder, "run"), setup=setup)).record()
    return record.metrics, record.epsilon


# -- Opacus ------------------------------------------------------------------------------------------------------------


def opacus_loop(work: Work, cell: Cell, *, batch: int | None, epochs: int) -> tuple[Any, float]:
    """The loop of Opacus's introduction: Adam, flat clipping, Poisson batches, the default accountant. No ``batch`` is
    all units. Its ghost clipping makes the same sums sooner."""
    import torch
    from opacus import PrivacyEngine

    class Pairs(torch.utils.data.TensorDataset):
        def __getitems__(self, places: list[int]) -> tuple:
            """A whole batch at once."""
            return self[torch.tensor(places, dtype=torch.long)]

    torch.manual_seed(cell.seed)
    model, data = head(work), Pairs(work.train.features, work.train.labels)
    loader = torch.utils.data.DataLoader(
        data, batch_size=batch or len(data), shuffle=True, collate_fn=lambda pair: pair
    )
    engine = PrivacyEngine()
    wrapped, optimizer, loss, loader = engine.make_private_with_epsilon(
        module=model,
        optimizer=torch.optim.Adam(model.parameters(), lr=cell.rate),
        criterion=torch.nn.CrossEntropyLoss(),
        data_loader=loader,
        target_epsilon=cell.epsilon,
        target_delta=work.delta,
        epochs=epochs,
        max_grad_norm=CLIP,
        grad_sample_mode="ghost",
    )
    for _ in range(epochs):
        for some, labels in loader:
            optimizer.zero_grad()
            loss(wrapped(some), labels).backward()
            optimizer.step()
    with torch.no_grad():
        return model.eval()(work.validation.features), engine.get_epsilon(work.delta)


def head(work: Work) -> Any:
    """A linear layer, as the classifier of a BERT begins."""
    import torch

    layer = torch.nn.Linear(work.train.features.shape[1], work.classes)
    torch.nn.init.normal_(layer.weight, std=0.02)
    torch.nn.init.zeros_(layer.bias)
    return layer


# -- opake -------------------------------------------------------------------------------------------------------------


def repair_dataclasses() -> None:
    """CPython's dataclasses before 3.11.9, 3.12.3 overlook the ``__weakref__`` of a base class without slots, and opake
    0.16.1 ends there with a TypeError on import: do as later versions do."""
    import dataclasses

    original = dataclasses._get_slots

    def slots(cls):
        if cls.__dict__.get("__slots__") is not None:
            yield from original(cls)
        elif cls.__weakrefoffset__:
            yield "__weakref__"

    if sys.version_info < (3, 12, 3):
        dataclasses._get_slots = slots


def opake_arguments(work: Work, cell: Cell, folder: str, **changes: Any) -> Any:
    """Its defaults; what is set is the budget, the seed, and that nothing is saved or shown."""
    from opake.transformers import TrainingArguments

    quiet = dict(save_strategy="no", logging_strategy="no", report_to=[], disable_tqdm=True, use_cpu=True)
    budget = dict(privacy_target_epsilon=cell.epsilon, privacy_target_delta=work.delta)
    return TrainingArguments(output_dir=folder, seed=cell.seed, **budget, **quiet, **changes)


def opake_model(work: Work, cell: Cell) -> tuple[Any, float]:
    """Its trainer with its defaults, given the model itself, as its documentation shows."""
    repair_dataclasses()
    import datasets
    import transformers
    from opake.transformers import DPTrainer

    path, task = os.path.expandvars(work.recipe.model.path), work.recipe.task
    tokenizer = transformers.AutoTokenizer.from_pretrained(path)

    def dataset(rows: Any) -> Any:
        texts, labels = ([str(row[column]) for row in rows] for column in (task.text, task.label))
        found = tokenizer(texts, truncation=True, max_length=128, return_token_type_ids=False)
        return datasets.Dataset.from_dict({**found, "labels": [task.labels.index(label) for label in labels]})

    transformers.set_seed(cell.seed)
    model = transformers.AutoModelForSequenceClassification.from_pretrained(path, num_labels=work.classes)
    with tempfile.TemporaryDirectory() as folder:
        given = dict(train_dataset=dataset(work.setup.train), processing_class=tokenizer)
        trainer = DPTrainer(model=model, args=opake_arguments(work, cell, folder), **given)
        spent = trainer.train().metrics["privacy_epsilon"]
        return trainer.predict(dataset(work.setup.validation)).predictions, spent


def opake_trainer(work: Work, cell: Cell, **changes: Any) -> tuple[Any, float]:
    """Its trainer, with its defaults beside ``changes``."""
    repair_dataclasses()
    import torch
    from opake.transformers import DPTrainer

    class Classifier(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.classifier = head(work)

        def forward(self, features, labels=None):
            logits = self.classifier(features)
            return {"loss": torch.nn.functional.cross_entropy(logits, labels), "logits": logits}

    torch.manual_seed(cell.seed)
    pairs = zip(work.train.features, work.train.labels, strict=True)
    data = [{"features": one, "labels": label} for one, label in pairs]
    if cell.rate is not None:
        changes["learning_rate"] = cell.rate
    with tempfile.TemporaryDirectory() as folder:
        # A module that is no model of transformers has nothing to patch, and its columns are not to be dropped.
        arguments = opake_arguments(
            work, cell, folder, use_compat_patches=False, remove_unused_columns=False, **changes
        )
        trainer = DPTrainer(model=Classifier(), args=arguments, train_dataset=data)
        spent = trainer.train().metrics["privacy_epsilon"]
    with torch.no_grad():
        return trainer.model.classifier(work.validation.features), spent


def opake_plan(work: Work, cell: Cell) -> tuple[Any, float]:
    """The loop of its quickstart, planned as dpft plans: all units in each of few steps; with its AdamW and the
    correction for noise."""
    repair_dataclasses()
    import opake.accounting as accounting
    import opake.dpsgd.accounting as dpsgd
    import torch
    import torchopt
    from opake.dpsgd.clipping import clipped_grad
    from opake.dpsgd.noise import gaussian_noise
    from opake.functional import make_functional
    from opake.optimizers import adamw
    from opake.random import key

    torch.manual_seed(cell.seed)
    model, parameters = make_functional(head(work))
    process = lambda noise: dpsgd.poisson(dpsgd.gaussian(noise), 1.0)
    budget = accounting.epsilon_budget(cell.epsilon, delta=work.delta)
    found = accounting.calibrate(budget, lambda noise: process(noise) * STEPS, param_min=0.1, param_max=200.0)

    def loss(parameters, features, label):
        return torch.nn.functional.cross_entropy(model(parameters, features.unsqueeze(0)), label.unsqueeze(0))

    options = dict(clipping_norm=CLIP, batch_argnums=(1, 2), normalize_by=work.recipe.data.units, microbatch_size=MICRO)
    gradient, clip_state = clipped_grad(loss, **options)
    noise, noise_state = gaussian_noise(noise_multiplier=found.param, key=key(cell.seed))
    optimizer = adamw(lr=cell.rate, weight_decay=0.0, noise_bias_correction=True)
    state, accountant = optimizer.init(parameters), accounting.Accountant()
    for _ in range(STEPS):
        gradients, clip_state = gradient(parameters, work.train.features, work.train.labels, state=clip_state)
        noisy, noise_state = noise(gradients, noise_state)
        updates, state = optimizer.update(noisy, state, params=parameters)
        parameters = torchopt.apply_updates(parameters, updates)
        accountant = accountant | process(found.param)
    with torch.no_grad():
        return model(parameters, work.validation.features), accountant.epsilon_at(work.delta)


# -- all of them ------------------------------------------------------------------------------------------------------

BATCHES = dict(per_device_train_batch_size=256, num_train_epochs=10)
SYSTEMS = {
    "dpft: default": System(dpft_default),
    "Opacus: batches of 256": System(partial(opacus_loop, batch=256, epochs=10), rates=(0.01, 0.03, 0.1)),
    "Opacus: full batches": System(partial(opacus_loop, batch=None, epochs=STEPS), rates=(0.1, 0.3, 1.0)),
    # opake's cells take minutes: one seed, at the rate that the same plan chose with Opacus.
    "opake: batches of 256": System(partial(opake_trainer, **BATCHES), rates=(0.03,), package="opake", seeds=1),
    "opake: full batches": System(opake_plan, rates=(0.3,), package="opake", seeds=1),
    "opake: defaults": System(opake_trainer, package="opake", seeds=1),
    "opake: defaults, the model itself": System(opake_model, package="opake", seeds=1),  # last: it patches transformers
}
