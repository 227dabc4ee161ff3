"""Audits of trainings that no recipe describes: images, audio, a loop of your own. Canaries are features, as a task
encodes them.

canaries = random_inputs(examples[0], 200, labels=10)                      # noise in the shape of a picture
found = audit_training(train, examples, canaries, task, model, delta=1e-5, claimed=1.0)
"""

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from dpft.audit.canaries import below, shuffled
from dpft.audit.report import Audit, judge
from dpft.audit.scores import losses
from dpft.privacy.noise import Randomness, SecureRandomness
from dpft.tasks import Task

Features = Mapping[str, Any]


def random_inputs(like: Features, number: int, *, labels: int, randomness: Randomness | None = None) -> list[dict]:
    """``number`` features like a public one, every real-valued tensor of it replaced by Gaussian noise of the same mean
    and deviation, each with a random one of so many ``labels``."""
    randomness = randomness or SecureRandomness()
    return [
        {name: _noise(value, randomness) for name, value in like.items()} | {"labels": below(labels, 1, randomness)[0]}
        for _ in range(number)
    ]


def mislabelled(public: Sequence[Features], *, labels: int, randomness: Randomness | None = None) -> list[dict]:
    """Public features, each with a random label other than its own."""
    randomness = randomness or SecureRandomness()
    return [
        {**one, "labels": (int(one["labels"]) + 1 + below(labels - 1, 1, randomness)[0]) % labels} for one in public
    ]


def audit_training(
    train: Callable[[list], nn.Module],
    examples: Sequence[Features],
    canaries: Sequence[Features],
    task: Task,
    before: nn.Module,
    *,
    delta: float,
    claimed: float | None = None,
    significance: float = 0.05,
    randomness: Randomness | None = None,
) -> Audit:
    """Train on the examples and, by secret coins, half of the canaries, and tell from the model which were there.

    Args:
        train: makes a model of a list of features; each is one unit.
        before: the model before training; it is copied, so ``train`` may change it.

    Raises:
        PlanError: there are too few canaries.
    """
    randomness = randomness or SecureRandomness()
    coins = randomness.bernoulli(len(canaries), 0.5)
    scores = losses(copy.deepcopy(before), task, canaries)
    planted = [*examples, *(canary for canary, inside in zip(canaries, coins, strict=True) if inside)]
    order = shuffled(len(planted), randomness)
    scores -= losses(train([planted[place] for place in order]), task, canaries)
    return judge(
        scores,
        coins,
        delta=delta,
        claimed=claimed,
        significance=significance,
        threat_model="sees the trained model and the one before, and chose the canaries",
        canary="features",
    )


def _noise(value: Any, randomness: Randomness) -> Any:
    tensor = torch.as_tensor(value) if not isinstance(value, str) else None
    if tensor is None or not tensor.is_floating_point() or tensor.numel() < 2:
        return value
    noise = randomness.gaussian(tensor.numel()).reshape(tensor.shape)
    return (tensor.mean() + noise * tensor.std()).to(tensor.dtype)
