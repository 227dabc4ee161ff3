"""From a Poisson draw of units to micro-batches with little padding.

A logical batch has any size, zero included. Its examples are sorted by length and cut where that costs least, each micro-batch
as much as so many tokens more, so that it holds at most ``token_budget`` padded tokens. The cut changes speed and memory, never
the sum of clipped gradients: a unit's examples stay consecutive, and the engine completes a unit before it clips.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache, partial

import numpy as np

from dpft.privacy.plan import Plan
from dpft.privacy.sampling import PoissonSampler
from dpft.tasks.task import Task

CHUNK = 1000  # rows given to the tokenizer at a time
EVALUATION_TOKENS = 4096  # padded tokens of a batch that keeps nothing for a backward pass
OVERHEAD = 32.0  # tokens that a micro-batch costs beside its own, on two CPU cores about; a run measures it


@dataclass(frozen=True)
class Examples:
    """Encoded examples, their lengths in tokens, and which of them belong to which unit."""

    features: Sequence
    lengths: np.ndarray
    members: Sequence[np.ndarray]

    @classmethod
    def encode(cls, rows, task: Task, unit: str = "example") -> "Examples":
        """Encode a ``datasets.Dataset`` or a list of rows; ``unit`` is ``"example"`` or the column that names the unit."""
        features, owners = [], []
        for start in range(0, len(rows), CHUNK):
            columns = rows[start : start + CHUNK]
            if isinstance(columns, list):
                columns = {key: [row[key] for row in columns] for key in columns[0]}
            features += task.encode(columns)
            owners += columns[unit] if unit != "example" else []
        lengths = np.array([task.length(feature) for feature in features], dtype=np.int64)
        if unit == "example":
            members = np.arange(len(features)).reshape(-1, 1)
        else:
            groups: dict = {}
            for i, owner in enumerate(owners):
                groups.setdefault(owner, []).append(i)
            members = [np.array(group) for group in groups.values()]
        return cls(features, lengths, members)

    def __len__(self) -> int:
        return len(self.features)

    def expected(self, plan: Plan) -> float:
        """How many examples a logical batch has on average."""
        return plan.sample_rate * sum(min(len(members), plan.examples_per_unit) for members in self.members)

    def spread(self, n: int = 3) -> list:
        """``n`` examples of different lengths: what the preflight looks at."""
        return [self.features[place] for place in self.spread_places(n)]

    @property
    def longest(self):
        """The longest example, beside which the preflight looks at another."""
        return self.features[int(self.lengths.argmax())]

    def spread_places(self, n: int = 3) -> list[int]:
        """Numbers of ``n`` examples: of different lengths, and among the shortest.

        Structure shows in short examples as well, and the longest would cost the most.
        """
        lengths, places = np.unique(self.lengths, return_index=True)
        last = min(max(n - 1, len(lengths) // 16), len(lengths) - 1)
        found = places[np.unique(np.linspace(0, last, n).round().astype(int))].tolist() if len(lengths) else []
        return found + [i for i in range(min(n, len(self))) if i not in found][: n - len(found)]


def cut(
    lengths: Sequence[int],
    units: Sequence[int],
    *,
    token_budget: int,
    overhead: float = OVERHEAD,
    max_examples: Callable[[int], int] = lambda tokens: 1 << 30,
) -> list[np.ndarray]:
    """Cut examples into micro-batches of at most ``token_budget`` padded tokens, each unit's examples consecutive.

    Of all cuts of the sorted examples this is the one with the smallest sum of padded tokens and ``overhead`` for each
    micro-batch (by dynamic programming).

    Args:
        lengths: ``(n,)`` tokens of each example.
        units: ``(n,)`` which unit each belongs to.
        overhead: tokens' worth of time that a micro-batch costs beside its own tokens.
        max_examples: how many examples of a given length a micro-batch may hold (:meth:`Engine.max_examples`).

    Returns:
        Arrays of positions into ``lengths``, together every position once; long examples come first, so that too
        large a budget fails at once. An example longer than the budget makes a micro-batch of its own.

    >>> [group.tolist() for group in cut([20, 90, 30, 31], [0, 1, 2, 3], token_budget=100, overhead=5)]
    [[1], [3, 2], [0]]
    """
    lengths, units, most = np.asarray(lengths), np.asarray(units), cache(max_examples)
    longest: dict[int, int] = {}
    for length, unit in zip(lengths.tolist(), units.tolist(), strict=True):
        longest[unit] = max(length, longest.get(unit, 0))
    by_unit = np.array([longest[unit] for unit in units.tolist()], dtype=np.int64)
    order = np.lexsort((-lengths, units, -by_unit))
    widths, places = by_unit[order], np.arange(len(order))  # of a micro-batch that begins there, at most
    costs = np.zeros(len(order) + 1)  # of the best cut of the first so many
    starts = [0]  # where its last micro-batch begins
    first = 0
    for end in range(1, len(order) + 1):
        while end - first > 1 and (
            widths[first] * (end - first) > token_budget or end - first > most(int(widths[first]))
        ):
            first += 1
        tried = costs[first:end] + widths[first:end] * (end - places[first:end])
        best = int(tried.argmin())
        costs[end] = tried[best] + overhead
        starts.append(first + best)
    groups, end = [], len(order)
    while end:
        groups.append(order[starts[end] : end])
        end = starts[end]
    return groups[::-1]


class LogicalBatch:
    """One Poisson draw, as an iterable of ``(batch, units)`` micro-batches; it has none if the draw was empty."""

    def __init__(
        self,
        examples: Examples,
        task: Task,
        places: np.ndarray,
        units: np.ndarray,
        groups: list[np.ndarray],
        chosen: Callable[[np.ndarray, dict], None] | None,
    ) -> None:
        self._examples, self._task, self._places, self._units, self._groups = examples, task, places, units, groups
        self._chosen = chosen

    def __iter__(self) -> Iterator[tuple[dict, list[int]]]:
        for group in self._groups:
            places = self._places[group]
            batch = self._task.collate([self._examples.features[place] for place in places])
            if self._chosen is not None:
                self._chosen(places, batch)
            yield batch, self._units[group].tolist()


class LogicalBatches:
    """``steps`` logical batches, drawn when asked for, each time this is iterated.

    Args:
        token_budget, overhead, max_examples: see :func:`cut`.
        chosen: told the examples' numbers and the batch just before each micro-batch is given out.
    """

    def __init__(
        self,
        examples: Examples,
        task: Task,
        sampler: PoissonSampler,
        *,
        steps: int,
        token_budget: int,
        overhead: float = OVERHEAD,
        max_examples: Callable[[int], int],
        chosen: Callable[[np.ndarray, dict], None] | None = None,
    ) -> None:
        self.examples, self.task, self.sampler, self.steps, self._chosen = examples, task, sampler, steps, chosen
        self._cut = partial(cut, token_budget=token_budget, overhead=overhead, max_examples=max_examples)

    def __len__(self) -> int:
        return self.steps

    def __iter__(self) -> Iterator[LogicalBatch]:
        for _ in range(self.steps):
            yield self.draw()

    def draw(self) -> LogicalBatch:
        drawn = self.sampler.units(len(self.examples.members))
        chosen = [self.sampler.examples(self.examples.members[unit]) for unit in drawn]
        places = np.concatenate(chosen) if chosen else np.empty(0, dtype=np.int64)
        units = np.repeat(drawn, [len(c) for c in chosen]) if chosen else places
        groups = self._cut(self.examples.lengths[places], units)
        return LogicalBatch(self.examples, self.task, places, units, groups, self._chosen)


def plain_batches(examples: Examples, task: Task, token_budget: int) -> Iterator[dict]:
    """Every example once, sorted by length, without units: for evaluation."""
    for group in cut(examples.lengths, range(len(examples)), token_budget=token_budget):
        yield task.collate([examples.features[place] for place in group])
