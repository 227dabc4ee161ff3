"""What benchmarks/peers.py compares: dpft's default, and opake and Opacus as their documentation shows them."""

import csv
import json
import os
import sys
import tempfile
from collections.abc import Callable
from contextlib import redirect_stdout
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
UNITS, DELTA, TOKENS = 4_000, 1e-5, 48
CLIP = 1.0  # what examples of both peers have
STEPS = 64  # of full batches, as many as a head of dpft is accounted as


@dataclass
class Data:
    """Texts, their labels' numbers, and what the frozen encoder makes of them.

    Attributes:
        first: ``(n, d)`` the first token's last state, which the model's own pooler is given.
        pooled: ``(n, d)`` what its pooler makes of that, and its classifier is given.
        mean: ``(n, d)`` the mean over tokens, of length 1: what the encoder was trained for.
    """

    texts: list[str]
    labels: Any
    first: Any = None
    pooled: Any = None
    mean: Any = None


@dataclass
class Work:
    """What every system is given."""

    folder: Path
    chapters: list[str]
    train: Data
    validation: Data
    shared: dict = field(default_factory=dict)  # what a system keeps from cell to cell


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


def model_path() -> str:
    return os.path.join(os.environ["DPFT_MODELS"], "minilm-l6")


def made_work(folder: Path) -> Work:
    """The data in ``folder``, with the features that an earlier start left there."""
    import torch

    from dpft.workflows.demo import write_data

    train, validation, chapters = write_data(folder, UNITS)
    parts, cache = [rows(train, chapters), rows(validation, chapters)], folder / "features.pt"
    if not cache.exists():
        torch.save([(part.first, part.pooled, part.mean) for part in encoded(parts)], folder / "features.part")
        (folder / "features.part").rename(cache)
    for part, features in zip(parts, torch.load(cache), strict=True):
        part.first, part.pooled, part.mean = features
    return Work(folder, chapters, *parts)


def rows(path: Path, chapters: list[str]) -> Data:
    import torch

    with open(path, newline="", encoding="utf-8") as file:
        found = [(row["diagnosis"], chapters.index(row["chapter"])) for row in csv.DictReader(file)]
    return Data([text for text, _ in found], torch.tensor([label for _, label in found]))


def encoded(parts: list[Data]) -> list[Data]:
    """With features, which are made once because the encoder never trains."""
    import torch
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(model_path())
    encoder = transformers.AutoModel.from_pretrained(model_path()).eval()
    for part in parts:
        order = sorted(range(len(part.texts)), key=lambda i: len(part.texts[i]))
        made: dict[int, tuple] = {}
        for start in range(0, len(order), 128):
            places = order[start : start + 128]
            batch = tokenizer(
                [part.texts[i] for i in places], padding=True, truncation=True, max_length=TOKENS, return_tensors="pt"
            )
            with torch.no_grad():
                out = encoder(**batch)
            mask = batch["attention_mask"].unsqueeze(-1)
            mean = torch.nn.functional.normalize((out.last_hidden_state * mask).sum(1) / mask.sum(1))
            three = zip(out.last_hidden_state[:, 0], out.pooler_output, mean, strict=True)
            made |= dict(zip(places, three, strict=True))
        part.first, part.pooled, part.mean = (torch.stack([made[i][k] for i in range(len(order))]) for k in range(3))
    return parts


# -- dpft --------------------------------------------------------------------------------------------------------------


def dpft_default(work: Work, cell: Cell) -> tuple[dict, float]:
    """The recipe that ``dpft init`` writes for texts, with the data, labels and budget declared."""
    from dpft.cli import main
    from dpft.recipe import Recipe
    from dpft.runs.folder import RunFolder
    from dpft.workflows.setup import set_up
    from dpft.workflows.train import train

    with tempfile.TemporaryDirectory() as folder, redirect_stdout(sys.stderr):
        file = Path(folder, "recipe.toml")
        options = ["--task", "sequence_classification", "--model", model_path(), "--output", str(file)]
        main(["init", *options], standalone_mode=False)
        changes = {
            "data.train": str(work.folder / "train.csv"),
            "data.validation": str(work.folder / "validation.csv"),
            "data.validation_is_public": True,
            "data.units": UNITS,
            "task.text": "diagnosis",
            "task.label": "chapter",
            "task.labels": work.chapters,
            "task.max_length": TOKENS,
            "privacy.epsilon": cell.epsilon,
            "privacy.delta": DELTA,
            "run.seed": cell.seed,
        }
        recipe = Recipe.read(file, tuple(f"{name}={json.dumps(value)}" for name, value in changes.items()))
        setup = work.shared.setdefault("dpft", None) or set_up(recipe)
        work.shared["dpft"], setup.recipe = setup, recipe
        record = RunFolder(train(recipe, Path(folder, "run"), setup=setup)).record()
    return record.metrics, record.epsilon


# -- Opacus ------------------------------------------------------------------------------------------------------------


def opacus_loop(work: Work, cell: Cell, *, features: str, batch: int, epochs: int) -> tuple[Any, float]:
    """The loop of Opacus's introduction: Adam, flat clipping, Poisson batches, the default accountant."""
    import torch
    from opacus import PrivacyEngine

    torch.manual_seed(cell.seed)
    inputs = getattr(work.train, features)
    model = head(features, len(work.chapters))
    data = torch.utils.data.TensorDataset(inputs, work.train.labels)
    engine = PrivacyEngine()
    wrapped, optimizer, loader = engine.make_private_with_epsilon(
        module=model,
        optimizer=torch.optim.Adam(model.parameters(), lr=cell.rate),
        data_loader=torch.utils.data.DataLoader(data, batch_size=batch, shuffle=True),
        target_epsilon=cell.epsilon,
        target_delta=DELTA,
        epochs=epochs,
        max_grad_norm=CLIP,
    )
    for _ in range(epochs):
        for some, labels in loader:
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(wrapped(some), labels).backward()
            optimizer.step()
    with torch.no_grad():
        return model.eval()(getattr(work.validation, features)), engine.get_epsilon(DELTA)


def head(features: str, classes: int) -> Any:
    """The model's own layers above ``features``: pooler and classifier, or the classifier; without dropout."""
    import torch
    import transformers

    width = 384
    classifier = torch.nn.Linear(width, classes)
    torch.nn.init.normal_(classifier.weight, std=0.02)  # as BertForSequenceClassification begins
    torch.nn.init.zeros_(classifier.bias)
    if features != "first":
        return classifier
    pooler = transformers.AutoModel.from_pretrained(model_path()).pooler.dense
    return torch.nn.Sequential(pooler, torch.nn.Tanh(), classifier).train()  # from_pretrained leaves it in evaluation


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


def opake_arguments(folder: str, cell: Cell) -> Any:
    """Its defaults; what is set is the budget, the seed, and that nothing is saved or shown."""
    from opake.transformers import TrainingArguments

    quiet = dict(save_strategy="no", logging_strategy="no", report_to=[], disable_tqdm=True, use_cpu=True)
    return partial(
        TrainingArguments,
        output_dir=folder,
        privacy_target_epsilon=cell.epsilon,
        privacy_target_delta=DELTA,
        seed=cell.seed,
        **quiet,
    )


def opake_model(work: Work, cell: Cell) -> tuple[Any, float]:
    """Its trainer with its defaults, given the model itself, as its documentation shows."""
    repair_dataclasses()
    import datasets
    import transformers
    from opake.transformers import DPTrainer

    tokenizer = transformers.AutoTokenizer.from_pretrained(model_path())

    def dataset(part: Data) -> Any:
        found = tokenizer(part.texts, truncation=True, max_length=TOKENS, return_token_type_ids=False)
        return datasets.Dataset.from_dict({**found, "labels": part.labels.tolist()})

    transformers.set_seed(cell.seed)
    classes = len(work.chapters)
    model = transformers.AutoModelForSequenceClassification.from_pretrained(model_path(), num_labels=classes)
    with tempfile.TemporaryDirectory() as folder:
        given = dict(train_dataset=dataset(work.train), processing_class=tokenizer)
        trainer = DPTrainer(model=model, args=opake_arguments(folder, cell)(), **given)
        spent = trainer.train().metrics["privacy_epsilon"]
        return trainer.predict(dataset(work.validation)).predictions, spent


def opake_trainer(work: Work, cell: Cell) -> tuple[Any, float]:
    """Its trainer with its defaults, given the model's classifier over what the frozen rest makes."""
    repair_dataclasses()
    import torch
    from opake.transformers import DPTrainer

    class Classifier(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.classifier = head("pooled", len(work.chapters))

        def forward(self, features, labels=None):
            logits = self.classifier(features)
            return {"loss": torch.nn.functional.cross_entropy(logits, labels), "logits": logits}

    torch.manual_seed(cell.seed)
    model = Classifier()
    data = [{"features": one, "labels": label} for one, label in zip(work.train.pooled, work.train.labels, strict=True)]
    with tempfile.TemporaryDirectory() as folder:
        arguments = opake_arguments(folder, cell)(use_compat_patches=False, remove_unused_columns=False)
        trainer = DPTrainer(model=model, args=arguments, train_dataset=data)
        spent = trainer.train().metrics["privacy_epsilon"]
    with torch.no_grad():
        return trainer.model.classifier(work.validation.pooled), spent


def opake_plan(work: Work, cell: Cell) -> tuple[Any, float]:
    """The loop of its quickstart, planned as dpft plans: mean features, all units in each of few steps, and its AdamW
    with the correction for noise."""
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
    model, parameters = make_functional(head("mean", len(work.chapters)))
    process = lambda noise: dpsgd.poisson(dpsgd.gaussian(noise), 1.0)
    budget = accounting.epsilon_budget(cell.epsilon, delta=DELTA)
    found = accounting.calibrate(budget, lambda noise: process(noise) * STEPS, param_min=0.1, param_max=200.0)

    def loss(parameters, features, label):
        return torch.nn.functional.cross_entropy(model(parameters, features.unsqueeze(0)), label.unsqueeze(0))

    gradient, clip_state = clipped_grad(loss, clipping_norm=CLIP, batch_argnums=(1, 2), normalize_by=UNITS)
    noise, noise_state = gaussian_noise(noise_multiplier=found.param, key=key(cell.seed))
    optimizer = adamw(lr=cell.rate, weight_decay=0.0, noise_bias_correction=True)
    state, accountant = optimizer.init(parameters), accounting.Accountant()
    for _ in range(STEPS):
        gradients, clip_state = gradient(parameters, work.train.mean, work.train.labels, state=clip_state)
        noisy, noise_state = noise(gradients, noise_state)
        updates, state = optimizer.update(noisy, state, params=parameters)
        parameters = torchopt.apply_updates(parameters, updates)
        accountant = accountant | process(found.param)
    with torch.no_grad():
        return model(parameters, work.validation.mean), accountant.epsilon_at(DELTA)


# -- all of them ------------------------------------------------------------------------------------------------------

SYSTEMS = {
    "dpft: what `dpft init` writes": System(dpft_default),
    "Opacus: classifier": System(
        partial(opacus_loop, features="pooled", batch=256, epochs=10), rates=(0.001, 0.01, 0.1)
    ),
    "Opacus: pooler and classifier": System(
        partial(opacus_loop, features="first", batch=256, epochs=10), rates=(0.0001, 0.001, 0.01)
    ),
    "Opacus: mean features, full batches": System(
        partial(opacus_loop, features="mean", batch=UNITS, epochs=STEPS), rates=(0.03, 0.1, 0.3)
    ),
    "opake: mean features, full batches": System(opake_plan, rates=(0.03, 0.1, 0.3), package="opake"),
    "opake: defaults, classifier": System(opake_trainer, package="opake"),
    "opake: defaults, the model": System(
        opake_model, package="opake"
    ),  # last: what it changes in transformers stays changed
}
