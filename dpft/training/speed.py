"""What makes a trainer's run fast and changes nothing that it releases: the frozen prefix and the token budget."""

from contextlib import nullcontext

import numpy as np
from torch import Tensor

from dpft.errors import RecipeError
from dpft.runs.folder import RunFolder
from dpft.training.batches import EVALUATION_TOKENS
from dpft.training.prefix import WORTH, FrozenPrefix
from dpft.training.tuning import Budget, fastest_budget


def kept_prefix(trainer) -> FrozenPrefix | None:
    """The frozen prefix of every example, if it pays by the plan's figures or was asked for."""
    if trainer.frozen_prefix == "off":
        return None
    examples, asked = trainer._examples(), trainer.frozen_prefix == "on"
    uses = trainer.plan.sample_rate * (trainer.plan.steps - trainer.engine.steps_released)
    if uses < WORTH and not asked:
        return None
    prefix = FrozenPrefix.find(trainer.model, trainer._losses, trainer._collated(examples.spread()))
    folder = RunFolder(trainer.args.output_dir).private
    folder.mkdir(parents=True, exist_ok=True)
    if asked and prefix is None:
        raise RecipeError(
            "frozen_prefix is on, but nothing before what trains can be kept: the first block trains already, or pads texts in its own way; switch it off."
        )
    if prefix is None or (not asked and (prefix.random or not prefix.fits(examples, folder))):
        return None
    trainer._tell("say", f"keeping the output of {prefix.name}")
    collate = lambda places: trainer._collated([examples.features[place] for place in places])
    try:
        prefix.fill(examples, collate, trainer._losses, folder, EVALUATION_TOKENS)
    except Exception:  # a model may raise anything when its beginning is replayed
        prefix.close()
        if asked:
            raise
        return None
    return prefix


def timed_budget(trainer, memory: int) -> Budget:
    """Nothing of it is released; the budget stays in this process, because times of private examples made it."""
    examples = trainer._step_examples()
    place = examples.spread_places()[-1]

    def losses(n: int) -> Tensor:
        batch = trainer._collated([examples.features[place]] * n)
        if trainer.prefix is not None:
            trainer.prefix.select(np.full(n, place), batch)
        return trainer._losses(batch)

    def accumulate(found: Tensor) -> None:
        trainer.engine.accumulate(found, range(len(found)))  # which forgets all of it by itself if it fails
        trainer.engine.discard()

    tokens = max(1, int(examples.lengths[place]))
    trainer.model.train()
    with trainer.prefix or nullcontext():
        return fastest_budget(
            losses,
            accumulate,
            model=trainer.model,
            tokens=tokens,
            most=trainer.engine.max_examples(tokens),
            memory=memory,
            draw=examples.expected(trainer.plan) * float(examples.lengths.mean()),
        )
