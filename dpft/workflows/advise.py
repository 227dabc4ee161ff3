"""``dpft plan --advise``: how a recipe spends its ε best, from public facts and the model; no private row is read."""

import math
import time
from dataclasses import dataclass
from typing import Any

from dpft.privacy.plan import Plan
from dpft.recipe import Recipe
from dpft.recipe.tables import OptimizerTable, PrivacyTable

# Noise beside a signal of at most 1, and what the studies lost at so much (benchmarks/studies).
HEAD_BANDS = (
    (0.01, "within about a point of the head without privacy"),
    (0.05, "one to three points below the head without privacy"),
    (0.2, "several points below the head without privacy, rare labels more"),
)
ADAPTER_BANDS = (
    (1.0, "most of what the run without privacy gains"),
    (3.0, "a part of what the run without privacy gains"),
)
LITTLE = "little more than the untouched model: more units, a larger ε or fewer trained numbers would help"
REPEATS = 3  # timings of a batch


@dataclass(frozen=True)
class Advice:
    """A plan, and why.

    Attributes:
        recipe: the recipe with the plan written out.
        plan: the recipe's, calibrated.
        trainable_parameters: P.
        why: a sentence for each choice.
        hours: how long the steps take here; None where it was not measured.
    """

    recipe: Recipe
    plan: Plan
    trainable_parameters: int
    why: tuple[str, ...]
    hours: float | None

    @property
    def noise_multiplier(self) -> float:
        """σ of each release."""
        return self.plan.noise_multiplier

    @property
    def noise_batch_ratio(self) -> float:
        """σ/(qN₀), the noise on each number of a step's mean gradient (McKenna et al. 2025)."""
        return self.noise_multiplier / self.plan.expected_batch_size

    @property
    def noise(self) -> float:
        """σ√P/(qN₀√T), the length of the noise on the mean of all steps' gradients, beside a signal of at most 1."""
        return self.noise_batch_ratio * math.sqrt(self.trainable_parameters / self.plan.steps)

    @property
    def expects(self) -> str:
        """What such noise left in the studies."""
        bands = HEAD_BANDS if self.recipe.learns_head else ADAPTER_BANDS
        return next((words for most, words in bands if self.noise < most), LITTLE)

    def facts(self) -> dict[str, Any]:
        """For a table."""
        privacy, optimizer = self.recipe.privacy, self.recipe.optimizer
        descends = not self.recipe.learns_head
        return {
            "subset": self.recipe.subset,
            "method": self.recipe.method,
            "epsilon": privacy.epsilon,
            "delta": privacy.delta,
            "batch_size": privacy.batch_size if descends else self.recipe.data.units,
            "steps": self.plan.steps,
            "clipping": privacy.clipping,
            "optimizer": optimizer.name if descends else None,
            "learning_rate": optimizer.learning_rate if descends else None,
            "trainable_parameters": self.trainable_parameters,
            "noise_multiplier": self.noise_multiplier,
            "noise_batch_ratio": self.noise_batch_ratio,
            "noise": self.noise,
            "expects": self.expects,
            "hours": self.hours,
        }


def advise(recipe: Recipe, hours: float | None = None) -> Advice:
    """The best known plan for a recipe's units, ε, δ and model.

    Args:
        recipe: its own plan, open or declared, is not looked at, but for ``privacy.epochs``.
        hours: the time for training on this machine; without it ``privacy.epochs`` passes over the data, or one.

    Raises:
        RecipeError: the recipe names no ε, or its model cannot be loaded.
    """
    from dpft.errors import RecipeError

    if recipe.privacy.epsilon is None:
        raise RecipeError("A plan is advised for an ε, and the recipe names none: give privacy.epsilon.")
    why: list[str] = []
    passes = recipe.privacy.epochs or 1.0
    subset = _subset(recipe, why)
    choice = _open(recipe, subset, passes)
    seconds = None
    numbers, timed = _measured(choice, measure_time=not choice.learns_head)
    if timed is not None:
        seconds = timed * choice.data.units
        if hours is not None:
            passes = max(1 / choice.data.units, hours * 3600 / seconds)
            choice = _open(recipe, subset, passes)
        why.append(f"A pass over {choice.data.units:,} units takes about {_duration(seconds)} here.")
    choice = choice.planned()
    plan = choice.plan()
    if choice.learns_head:
        why.append("Every unit enters every sum, so nobody is sampled and one noise serves the whole run.")
    else:
        why.append(
            f"{plan.steps:,} steps of {choice.privacy.batch_size:,}: more steps in {passes:.3g} passes over the data "
            "would add noise, and fewer would not learn."
        )
        why.append("Clipping is automatic, because then no bound has to be tuned on private data.")
    taken = None if seconds is None else plan.steps * plan.sample_rate * seconds / 3600
    return Advice(choice, plan, numbers, tuple(why), taken)


def _subset(recipe: Recipe, why: list[str]) -> str:
    """The head, where the task has one to learn by itself; else the recipe's, with the best start that a LoRA has."""
    from dataclasses import replace

    from dpft.subset import Lora, Subset
    from dpft.tasks.registry import find
    from dpft.tasks.task import Task

    kind, asked = find(recipe.task.name), Subset(recipe.subset)
    if kind.template["subset"] == "head":
        if str(asked) != "head":
            why.append(
                "A head over well-made features costs the least noise: in the study of diagnoses it beat adapters at "
                "every ε."
            )
        return "head"
    if recipe.data.public is None and kind.samples is Task.samples:
        return str(asked)
    better = [
        replace(part, freeze_a=True, init="whitened") if isinstance(part, Lora) and not part.dora else part
        for part in asked.parts
    ]
    if str(Subset(*better)) != str(asked):
        why.append(
            "A LoRA whose A stays where public text puts it has half the numbers that take noise, and more signal in "
            "each."
        )
    return str(Subset(*better))


def _open(recipe: Recipe, subset: str, passes: float) -> Recipe:
    """The recipe without a plan of its own."""
    privacy = PrivacyTable(
        epsilon=recipe.privacy.epsilon,
        delta=recipe.privacy.delta,
        adjacency=recipe.privacy.adjacency,
        plan="auto",
        epochs=None if subset == "head" else passes,
    )
    tables = recipe.model_dump() | {"subset": subset, "privacy": privacy.model_dump()}
    tables["optimizer"] = OptimizerTable().model_dump()
    if subset == "head":
        tables["data"] = recipe.data.of_head().model_dump()
    return Recipe.checked(tables)


def _measured(recipe: Recipe, *, measure_time: bool) -> tuple[int, float | None]:
    """How many numbers train, and the seconds of one example, from made-up rows half as long as texts may be."""
    from dpft.subset import Subset
    from dpft.tasks.encoded import Encoded
    from dpft.tasks.task import size_of
    from dpft.workflows.setup import load_model, only_output_layer

    task, model = load_model(recipe)
    encoded = task.encode(task.examples())
    made = list(encoded.features if isinstance(encoded, Encoded) else encoded)
    model = Subset(recipe.subset).apply(model, lambda some: task.losses(model, task.collate(some)), made)
    if recipe.learns_head:
        only_output_layer(task, model)
    numbers = sum(p.numel() for p in model.parameters() if p.requires_grad)
    if not measure_time:
        return numbers, None
    rows = made * 4
    batch, times = task.collate(rows), []
    for _ in range(REPEATS):
        started = time.perf_counter()
        task.losses(model, batch).sum().backward()
        times.append(time.perf_counter() - started)
    longest = max(size_of(task, one).cost for one in rows)
    usual = getattr(task, "max_length", 0) / 2 or longest
    return numbers, min(times) / (len(rows) * longest) * usual


def _duration(seconds: float) -> str:
    for most, unit, name in ((120, 1, "s"), (7200, 60, "min")):
        if seconds < most:
            return f"{seconds / unit:.0f} {name}"
    return f"{seconds / 3600:.1f} h"
