"""``dpft preflight``: the proof for a recipe's model, task and data, without a release."""

from dataclasses import dataclass

from dpft.gradients.engine import Engine
from dpft.gradients.preflight import Preflight
from dpft.gradients.preflight import preflight as prove
from dpft.privacy.plan import Plan
from dpft.recipe import Recipe
from dpft.tasks.own_loss import check_own_loss
from dpft.training.batches import Examples
from dpft.workflows.setup import Setup, set_up


@dataclass(frozen=True)
class Checked:
    """What was found, and the setup and engine that it was found with."""

    found: Preflight
    setup: Setup
    engine: Engine


def preflight_recipe(recipe: Recipe) -> Checked:
    """Prove on a few real examples that the loss is the model's own, gradients are exact and examples isolated; spends
    no budget.

    Raises:
        DPFTError: they are not; see :mod:`dpft.errors`.
    """
    setup = set_up(recipe, with_validation=False)
    examples = Examples.encode(setup.train, setup.task)
    losses = lambda batch: setup.task.losses(setup.model, setup.task.collate(batch))
    with Engine(setup.model, _any_plan(recipe)) as engine:
        with engine.capture.paused():
            check_own_loss(setup.task, setup.model, setup.task.collate, examples.spread())
        found = prove(engine, losses, examples.spread(), longest=examples.longest)
    return Checked(found, setup, engine)


def _any_plan(recipe: Recipe) -> Plan:
    """The checks release nothing, so the noise need not be calibrated."""
    return Plan(noise_multiplier=1.0, sample_rate=1.0, steps=1, delta=recipe.privacy.delta, clip=recipe.privacy.clip())
