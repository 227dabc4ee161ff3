"""Exposure: how much better than chance a model ranks a secret that was in its training, and whether it says it aloud.

Of an audit with canaries of kind ``secret`` (:mod:`dpft.audit.game`). A secret's exposure is ``log₂ |R| − log₂ rank``
among random codes R for the same sentence (Carlini et al. 2019, section 4.2, by sampling): log₂ |R| if none is
likelier, one or two if the model knows nothing. Secrets that were not in the data are the control.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from dpft.audit import canaries as made
from dpft.audit.canaries import Canaries, Canary
from dpft.audit.scores import losses, trained
from dpft.errors import RecipeError
from dpft.privacy.noise import SecureRandomness
from dpft.recipe import Recipe
from dpft.runs import RunFolder
from dpft.tasks.losses import IGNORED
from dpft.tasks.task import Task
from dpft.workflows.setup import load_model

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Exposure:
    """Means over ``secrets`` that were in the data and ``absent`` that were not; ``extracted`` counts greedy
    completions."""

    secrets: int
    absent: int
    candidates: int
    ceiling: float
    exposure: float
    exposure_of_absent: float
    extracted: int
    extracted_of_absent: int
    codes: int  # how many there are to guess from


def audit_exposure(
    folder: Path | str,
    *,
    secrets: int = 20,
    candidates: int = 100,
    progress: Callable[[int, int], None] = lambda done, of: None,
) -> Exposure:
    """Rank and extract the secrets of an audit.

    Args:
        folder: what :func:`dpft.audit.game.audit_run` left.
        secrets: how many that were in the data, and as many that were not.
        candidates: random codes against which each is ranked.

    Raises:
        RecipeError: the folder holds no audit with secrets.
    """
    run = RunFolder(folder)
    planted = Canaries.load(run.canaries_file) if run.canaries_file.exists() else None
    if planted is None or planted.kind != "secret" or not run.finished:
        raise RecipeError(f"{folder} holds no finished audit with secrets: make one with dpft audit run --kind secret.")
    recipe = run.recipe()
    task, before = load_model(recipe)
    model = trained(before, recipe, run.weights)
    chosen = {there: np.flatnonzero(planted.included == there)[:secrets] for there in (True, False)}
    total = sum(map(len, chosen.values()))
    found: dict[bool, tuple[float, int]] = {}
    for there, places in chosen.items():
        exposures, said = [], 0
        for place in places:
            canary = planted.canaries[place]
            exposures.append(_exposure(canary, int(place), candidates, recipe, task, model))
            said += _extracted(canary, recipe, task, model)
            progress(len(exposures) + (0 if there else len(chosen[True])), total)
        found[there] = (float(np.mean(exposures)), said)
    return Exposure(
        len(chosen[True]),
        len(chosen[False]),
        candidates,
        math.log2(candidates + 1),
        found[True][0],
        found[False][0],
        found[True][1],
        found[False][1],
        10**made.DIGITS,
    )


def _exposure(
    canary: Canary, number: int, candidates: int, recipe: Recipe, task: Task, model: "PreTrainedModel"
) -> float:
    others = [made.secret(number, task, SecureRandomness()) for _ in range(candidates)]
    found = losses(model, task, made.features([canary, *others], recipe, task))
    return math.log2(candidates + 1) - math.log2(1 + (found[1:] < found[0]).sum() + (found[1:] == found[0]).sum() / 2)


def _extracted(canary: Canary, recipe: Recipe, task: Task, model: "PreTrainedModel") -> bool:
    """Whether the model, given what comes before the secret, goes on with the secret."""
    (one,) = made.features([canary], recipe, task)
    ids, labels = one["input_ids"], one["labels"]
    told = next(i for i, label in enumerate(labels) if label != IGNORED)
    decodes = model.config.is_encoder_decoder  # what it says then has a sequence of its own
    asked = torch.tensor([ids if decodes else ids[:told]], device=model.device)
    padding = task.tokenizer.pad_token_id if task.tokenizer.pad_token_id is not None else task.tokenizer.eos_token_id
    how = dict(max_new_tokens=len(labels) - told, do_sample=False, pad_token_id=padding)
    model.eval()
    with torch.no_grad():
        out = model.generate(input_ids=asked, attention_mask=torch.ones_like(asked), **how)
    said = task.tokenizer.decode(out[0, 0 if decodes else asked.shape[1] :])
    return canary.secret in said.replace(" ", "")


def describe(found: Exposure) -> str:
    """The audit in words."""
    return (
        f"Exposure {found.exposure:.2f} bits for {found.secrets} secrets that were in the data, "
        f"{found.exposure_of_absent:.2f} for {found.absent} that were not "
        f"(chance is about 1.4, {found.ceiling:.2f} the most that {found.candidates} candidates show).\n"
        f"Said aloud: {found.extracted} of {found.secrets} that were in the data, {found.extracted_of_absent} of "
        f"those that were not ({found.codes:,} codes to guess from)."
    )
