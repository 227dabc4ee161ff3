"""Audits of trainings that no recipe describes: images, audio, a loop of your own. Canaries are features, as a task
encodes them.

canaries = random_inputs(examples[0], 200, labels=10)                      # noise in the shape of a picture
found = audit_training(Training(train, task, model), examples, canaries, Claim(delta=1e-5, epsilon=1.0))
"""

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from dpft.audit.canaries import below, shuffled
from dpft.audit.report import Audit, Claim, bound_epsilon
from dpft.audit.scores import losses
from dpft.privacy.noise import Randomness, SecureRandomness
from dpft.tasks.task import Features, Task

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def random_inputs(like: Features, number: int, *, labels: int, randomness: Randomness | None = None) -> list[Features]:
    """``number`` features like a public one, every real-valued tensor of it replaced by Gaussian noise of the same mean
    and deviation, each with a random one of so many ``labels``."""
    randomness = randomness or SecureRandomness()
    return [
        {name: _noise(value, randomness) for name, value in like.items()} | {"labels": below(labels, 1, randomness)[0]}
        for _ in range(number)
    ]


def mislabelled(public: Sequence[Features], *, labels: int, randomness: Randomness | None = None) -> list[Features]:
    """Public features, each with a random label other than its own."""
    randomness = randomness or SecureRandomness()
    return [
        {**one, "labels": (int(one["labels"]) + 1 + below(labels - 1, 1, randomness)[0]) % labels} for one in public
    ]


@dataclass(frozen=True)
class Training:
    """What is audited.

    Attributes:
        train: makes a model of a list of features; each is one unit.
        task: what is learned.
        before: the model before training; it is copied, so ``train`` may change it.
    """

    train: Callable[[list[Features]], "PreTrainedModel"]
    task: Task
    before: "PreTrainedModel"


def audit_training(
    training: Training,
    examples: Sequence[Features],
    canaries: Sequence[Features],
    claim: Claim,
    *,
    randomness: Randomness | None = None,
) -> Audit:
    """Train on the examples and, by secret coins, half of the canaries, and tell from the model which were there.

    Raises:
        PlanError: there are too few canaries.
    """
    randomness = randomness or SecureRandomness()
    coins = randomness.bernoulli(len(canaries), 0.5)
    scores = losses(copy.deepcopy(training.before), training.task, canaries)
    planted = [*examples, *(canary for canary, inside in zip(canaries, coins, strict=True) if inside)]
    order = shuffled(len(planted), randomness)
    scores -= losses(training.train([planted[place] for place in order]), training.task, canaries)
    return bound_epsilon(
        scores,
        coins,
        claim,
        threat_model="sees the trained model and the one before, and chose the canaries",
        canary="features",
    )


def _noise(value: Any, randomness: Randomness) -> Any:
    tensor = torch.as_tensor(value) if not isinstance(value, str) else None
    if tensor is None or not tensor.is_floating_point() or tensor.numel() < 2:
        return value
    noise = randomness.gaussian(tensor.numel()).reshape(tensor.shape)
    return (tensor.mean() + noise * tensor.std()).to(tensor.dtype)
