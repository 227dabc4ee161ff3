"""What makes a run fast and changes nothing that it releases: the frozen prefix and the token budget."""

from contextlib import nullcontext
from typing import TYPE_CHECKING

import numpy as np
from torch import Tensor

from dpft.errors import RecipeError
from dpft.runs.folder import RunFolder
from dpft.training.batches import EVALUATION_TOKENS
from dpft.training.prefix import WORTH, FrozenPrefix
from dpft.training.tuning import Room, TokenBudget, fastest_budget

if TYPE_CHECKING:
    from dpft.training.session import Session


def kept_prefix(session: "Session") -> FrozenPrefix | None:
    """The frozen prefix of every example, if it pays by the plan's figures or was asked for."""
    asked = session.options.frozen_prefix == "on"
    if session.options.frozen_prefix == "off":
        return None
    examples = session.examples
    if examples.chance is not None:
        if asked:
            raise RecipeError(
                "frozen_prefix is on, but the task draws each example anew in every step, so nothing of it can be "
                "kept: switch it off."
            )
        return None
    if examples.varies and not asked:
        return None
    uses = session.plan.sample_rate * (session.plan.steps - session.engine.steps_released)
    if uses < WORTH and not asked:
        return None
    prefix = FrozenPrefix.find(session.model, session.losses, session.collated(examples.spread()))
    folder = RunFolder(session.folder).private
    folder.mkdir(parents=True, exist_ok=True)
    if asked and prefix is None:
        raise RecipeError(
            "frozen_prefix is on, but nothing before what trains can be kept: the first block trains already, or pads "
            "texts in its own way; switch it off."
        )
    if prefix is None or (not asked and (prefix.random or not prefix.fits(examples, folder))):
        return None
    session.options.tell("say", f"keeping the output of {prefix.name}")
    collate = lambda places: session.collated([examples.features[place] for place in places])
    prefix.unread = getattr(session.task, "unread", None)
    replayed = lambda places: session.collated(prefix.shortened(examples).drawn(places))
    try:
        prefix.fill(examples, collate, session.losses, folder, EVALUATION_TOKENS, replayed)
    except Exception:  # a model may raise anything when its beginning is replayed
        prefix.close()
        if asked:
            raise
        return None
    return prefix


def timed_budget(session: "Session", memory: int) -> TokenBudget:
    """Nothing of it is released; the budget stays in this process, because times of private examples made it."""
    examples = session.step_examples
    place = examples.spread_places()[-1]
    example = examples.drawn([place])

    def losses(n: int) -> Tensor:
        batch = session.collated(example * n)
        if session.prefix is not None:
            session.prefix.select(np.full(n, place), batch)
        return session.losses(batch)

    def accumulate(found: Tensor) -> None:
        session.engine.accumulate(found, range(len(found)))  # which forgets all of it by itself if it fails
        session.engine.discard()

    cost, tokens = max(1, int(examples.costs[place])), max(1, int(examples.lengths[place]))
    session.model.train()
    with session.prefix or nullcontext():
        room = Room(
            tokens=cost,
            most=session.engine.max_examples(tokens),
            memory=memory,
            draw=examples.expected(session.plan) * float(examples.costs.mean()),
        )
        return fastest_budget(losses, accumulate, session.model, room)
