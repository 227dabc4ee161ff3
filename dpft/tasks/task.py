"""The contract of a task: all that the rest of dpft knows of what is learned."""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence, Sized
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from dpft.errors import RecipeError
from dpft.recipe import TaskTable
from dpft.tasks.encoded import Encoded
from dpft.tasks.source import Source

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Features = Mapping[str, Any]
Batch = Mapping[str, Tensor]
Columns = Mapping[str, Sequence[Any]]  # of some rows
PATCH = 3 * 16 * 16  # numbers of an array that count as one token: what vision models commonly make one of
TEXTS = ("An example.", "Another example, which is a little longer than the first one.")  # of made-up rows


class Size(NamedTuple):
    """What an example is to a batch, both at least 1.

    Attributes:
        cost: what padding multiplies: a micro-batch takes the largest cost times its examples, within the token budget.
        tokens: positions that the model's layers see, by which the engine decides how to make a gradient's norm.
    """

    cost: int
    tokens: int


class Metrics(Protocol):
    """Figures over a whole data set; un-noised, so private if the data are."""

    def update(self, model: nn.Module, batch: Mapping[str, Tensor]) -> None:
        """Take in one collated batch; called without gradients, the model in evaluation mode."""

    def compute(self) -> dict[str, Any]:
        """The figures, :attr:`Task.headline` among them."""


class Task(ABC):
    """One kind of learning in one file: subclass it, and decorate it with :func:`dpft.tasks.registry.task` so that
    recipes find it.

    A training loop calls ``encode``, ``size``, ``draw``, ``collate``, ``losses`` and ``metrics``; a recipe calls
    ``load``, ``examples`` and ``save`` as well; an audit calls ``canary``, and where they exist ``follow``, ``judged``
    and ``likelihoods``.

    A task that is no subclass works if it has ``encode``, ``collate``, ``losses`` and ``evaluate``, and ``size`` or
    ``length``.

    Attributes:
        name: by which recipes call it; the decorator sets it.
        Settings: its own ``[task]`` table; each key has a description, and ``columns`` says what the data must have.
        headline: the metric that stands for all in a comparison.
        groups: the metric that holds a mapping from a group, such as a class, to its figures.
        adds_layers: whether ``load`` adds layers that the run's seed initialises.
        template: what ``dpft init`` writes for it: ``subset``, and the keys of ``task`` that must be declared.
        takes_files: whether ``encode`` is given pictures and sounds of ``datasets`` as ``{bytes, path}``, not decoded.
        has_chance: whether ``draw`` does anything, where the settings decide it.
        group: a column of the evaluation data whose values get figures of their own; its metrics then have ``add``,
            which takes in other metrics of the same task.
        tokenizer, max_length: of a task that says what follows a cue (``follow``); the length is in tokens.
    """

    name: ClassVar[str]
    Settings: ClassVar[type[TaskTable]] = TaskTable
    headline: ClassVar[str] = "loss"
    groups: ClassVar[str | None] = None
    adds_layers: ClassVar[bool] = False
    template: ClassVar[Mapping[str, Any]] = {"subset": "lora(rank=8)", "task": {}}
    takes_files: ClassVar[bool] = False
    has_chance: bool = True
    group: str | None = None
    tokenizer: "PreTrainedTokenizerBase"
    max_length: int

    # -- from a recipe ---------------------------------------------------------------------------------------------

    @classmethod
    def load(cls, settings: Any, source: Source) -> tuple["Task", nn.Module]:
        """The task and the model that it trains; the settings are an instance of the class's own ``Settings``.

        A task with the setting ``max_length`` or ``target_length`` reads its attribute of that name when it encodes:
        the model's positions decide it later.
        """
        raise RecipeError(f"{cls.__name__} has no load, so no recipe can train it: give it one, or use it from Python.")

    def save(self, folder: Path | str) -> None:
        """Write a tokenizer or processor beside the weights; by default there is none."""
        return None

    def examples(self) -> Columns:
        """Made-up rows of every column, two or more of different sizes: the trial of saving is made on them."""
        raise RecipeError(
            f"{type(self).__name__} has no examples, on which saving a recipe's run is tried: give it made-up rows."
        )

    # -- data ------------------------------------------------------------------------------------------------------

    @abstractmethod
    def encode(self, rows: Columns) -> Sequence[Features] | Encoded:
        """Columns of some rows to one feature a row, from that row alone; any other number as :class:`Encoded`.

        Features may name a file that ``collate`` decodes; ``size`` must do without. Large or computed rows are encoded
        anew at each draw, one by one, and nothing of them is kept (:func:`dpft.training.rows.read_when_drawn`).
        """

    def size(self, features: Features) -> Size:
        """By default what ``length`` says, if there is one, or the largest among the features; for both numbers.

        A sequence counts its length. An array of two and more dimensions counts one for each ``PATCH`` numbers, or its
        first dimension if that is more: a picture of 3 × 224 × 224 is 196, and 50 frames of 80 numbers are 50.
        """
        own = getattr(self, "length", None)
        largest = max(map(_tokens, features.values()), default=1) if own is None else own(features)
        return Size(largest, largest)

    def draw(self, features: Features, random: np.random.Generator) -> Features:
        """A step's chance for one example: a crop, a mask, a timestep; by default none.

        Each draw of an example calls it anew with a secret generator. The preflight draws its examples once and keeps
        them. Evaluations and audits collate what was not drawn, so ``collate`` takes both.
        """
        return features

    # (self, features) -> features for steps in which the output of the layers that read the input is kept
    unread: ClassVar[Callable[[Any, Features], Features] | None] = None

    @abstractmethod
    def collate(self, features: Sequence[Features]) -> Mapping[str, Tensor]:
        """Pad features to one batch; an ``attention_mask``, if there is one, is right-padded."""

    # -- learning --------------------------------------------------------------------------------------------------

    @abstractmethod
    def losses(self, model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
        """``(B,)`` losses, each from its own example alone: never divided by a count over the batch."""

    def metrics(self) -> Metrics:
        """By default the mean loss."""
        return MeanLoss(self)

    def evaluate(self, model: nn.Module, batches: Iterable[Mapping[str, Tensor]]) -> dict[str, Any]:
        """The metrics over an iterable of collated batches."""
        metrics = self.metrics()
        with torch.no_grad():
            for batch in batches:
                metrics.update(model, batch)
        return metrics.compute()

    def samples(self, model: nn.Module) -> Sequence[Features]:
        """Examples that the untouched model makes up, as public as the model; by default none."""
        return ()

    def hinted(self) -> Sequence[Features]:
        """Public examples in the span of whose features a head by itself is learned; by default none: in all of it."""
        return ()

    # -- audits ----------------------------------------------------------------------------------------------------

    def canary(self, random: np.random.Generator) -> dict[str, Any] | None:
        """A made-up record that nothing else in the data supports; None if the task is audited by features only."""
        return None

    def follow(self, cue: str, text: str) -> dict[str, Any] | None:
        """The record in which ``text`` follows ``cue``; None if the model does not say what follows."""
        return None

    def judged(self, features: Features, cue: str) -> Features:
        """Where the model says what follows: the features with the labels of what follows ``cue`` alone."""
        raise RecipeError(
            f"{type(self).__name__} says what follows a cue and not where: give it judged, or let follow return None."
        )

    # (self, model, batch) -> for each example its tokens' log-probabilities, if it has such
    likelihoods: ClassVar[Callable[[Any, nn.Module, Mapping[str, Tensor]], Sequence[Tensor]] | None] = None


def made_up(task: Task) -> Batch:
    """The task's made-up rows as one batch."""
    encoded = task.encode(task.examples())
    return task.collate(encoded.features if isinstance(encoded, Encoded) else encoded)


class MeanLoss:
    """The mean of the examples' losses."""

    def __init__(self, task: Task) -> None:
        self._task, self._total, self._examples = task, 0.0, 0

    def update(self, model: nn.Module, batch: Mapping[str, Tensor]) -> None:
        losses = self._task.losses(model, batch)
        self._total, self._examples = self._total + float(losses.sum()), self._examples + len(losses)

    def compute(self) -> dict[str, Any]:
        return {"loss": self._total / max(self._examples, 1), "examples": self._examples}


def _tokens(value: Any) -> int:
    """What a feature counts by default; 1 for a single number."""
    size = getattr(value, "size", None)  # of a picture of Pillow: width and height
    shape: list[int] = [3, *size] if isinstance(size, tuple) else list(getattr(value, "shape", ()))
    while not hasattr(value, "shape") and isinstance(value, Sized):
        shape.append(len(value))
        value = value[0] if isinstance(value, Sequence) and not isinstance(value, (str, bytes)) and len(value) else None
    return max(1, *shape[:1], math.prod(shape) // PATCH if len(shape) > 1 else 1)


def size_of(task: Any, features: Features) -> Size:
    """The example's size by any task, also by one that is no :class:`Task` and has a ``length``."""
    return task.size(features) if hasattr(task, "size") else Task.size(task, features)


def draws(task: Any) -> bool:
    """Whether the task has a chance of its own in each step."""
    return getattr(type(task), "draw", Task.draw) is not Task.draw and getattr(task, "has_chance", True)
