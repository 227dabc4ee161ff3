"""From a Poisson draw of units to micro-batches with little padding.

A logical batch has any size, zero included. Its examples are sorted by length and cut where that costs least, each
micro-batch as much as so many tokens more, so that it holds at most ``token_budget`` padded tokens. The cut changes
speed and memory, never the sum of clipped gradients: a unit's examples stay consecutive, and the engine completes a
unit before it clips.
"""

from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dpft.errors import GuaranteeError, RecipeError
from dpft.privacy.chance import step_generator
from dpft.privacy.plan import Plan
from dpft.privacy.sampling import PoissonSampler
from dpft.tasks.encoded import Encoded
from dpft.tasks.task import Batch, Features, Size, Task, draws, size_of
from dpft.training.rows import WhenDrawn, files_undecoded, may_vary, read_when_drawn
from dpft.training.units import check_count, unit_ids
from dpft.values import kind, plain

CHUNK = 1000  # rows given to the tokenizer at a time
EVALUATION_TOKENS = 4096  # padded tokens of a batch that keeps nothing for a backward pass
OVERHEAD = 32.0  # tokens that a micro-batch costs beside its own, on two CPU cores about; a run measures it

Numbers = NDArray[np.int64]
Chosen = Callable[[Numbers, Batch], None]


@dataclass(frozen=True)
class Examples:
    """Encoded examples, their sizes, and which of them belong to which unit.

    Attributes:
        lengths: ``(n,)`` tokens that the model's layers see of each (:attr:`dpft.tasks.Size.tokens`).
        members: each unit's examples, by their numbers.
        costs: ``(n,)``, what padding multiplies (:attr:`dpft.tasks.Size.cost`); by default the lengths.
        chance: the task's ``draw``, if it has one of its own.
        draws: K, how often a step draws an example's chance: the mean of K gradients is the example's.
        varies: whether a row that is read again may be another (:func:`dpft.training.rows.may_vary`).
    """

    features: Sequence[Any]
    lengths: Numbers
    members: Sequence[Numbers] | Numbers
    costs: Numbers = None  # type: ignore[assignment]  # the lengths are put in its place
    chance: Callable[[Features, np.random.Generator], Features] | None = None
    varies: bool = False
    draws: int = 1

    def __post_init__(self) -> None:
        if self.costs is None:
            object.__setattr__(self, "costs", self.lengths)

    @classmethod
    def encode(cls, rows: Any, task: Task, unit: str = "example") -> "Examples":
        """Encode a ``datasets.Dataset`` or any sequence of rows; of rows that are read when drawn, only the sizes are
        kept.

        Args:
            unit: ``"example"``, or the column that names a row's unit (:func:`dpft.training.units.unit_ids`).

        Raises:
            RecipeError: there are no rows, a column is missing, an id names no unit, or the task made other than one
                feature a row and did not return :class:`dpft.tasks.Encoded`.
        """
        rows = files_undecoded(rows) if getattr(task, "takes_files", False) else rows
        late = read_when_drawn(rows)
        size = 1 if late else CHUNK
        features: list[Any] = []
        places: list[int] = []
        ids: list[Any] = []
        sizes: list[Size] = []
        for start in range(0, len(rows), size):
            columns = _columns(rows, start, min(start + size, len(rows)))
            if unit != "example":
                if unit not in columns:
                    raise RecipeError(f"The data have no column {unit!r}: they have {', '.join(columns)}.")
                ids += plain(columns[unit])
            try:
                encoded, owners = _with_rows(task.encode(columns), min(size, len(rows) - start))
            except RecipeError as error:
                if not late:
                    raise
                raise RecipeError(f"The data's row {start + 1:,}, encoded alone: {error}") from error
            sizes += [size_of(task, feature) for feature in encoded]
            features += () if late else encoded
            places += [start + owner for owner in owners]
        if not places:
            raise RecipeError("The data are empty: there is nothing to learn from.")
        made: Sequence[Any] = features
        if late:
            made = WhenDrawn(lambda row: _with_rows(task.encode(_columns(rows, row, row + 1)), 1)[0], places)
        costs, lengths = np.array(sizes, dtype=np.int64).T.copy()
        members: Sequence[Numbers] | Numbers
        units = range(len(rows)) if unit == "example" else unit_ids(ids, unit)
        if unit == "example" and places == list(units):
            members = np.arange(len(made)).reshape(-1, 1)
        else:
            groups: dict[Hashable, list[int]] = {}
            for i, place in enumerate(places):
                groups.setdefault(units[place], []).append(i)
            members = [np.array(group) for group in groups.values()]
        return cls(made, lengths, members, costs, task.draw if draws(task) else None, may_vary(rows))

    def __len__(self) -> int:
        return len(self.features)

    def expected(self, plan: Plan) -> float:
        """How many draws of examples a logical batch has on average."""
        return (
            self.draws * plan.sample_rate * sum(min(len(members), plan.examples_per_unit) for members in self.members)
        )

    def drawn(self, places: Sequence[int] | Numbers) -> list[Any]:
        """The features of these examples after a step's chance, which each call draws anew."""
        some = [self.features[place] for place in places]
        if self.chance is None:
            return some
        random = step_generator()
        return [self.chance(one, random) for one in some]

    def spread(self, n: int = 3) -> list[Any]:
        """``n`` examples of different lengths, drawn once: what the preflight compares."""
        return self.drawn(self.spread_places(n))

    @property
    def longest(self) -> Any:
        """The longest example, drawn once, beside which the preflight compares another."""
        return self.drawn([int(self.lengths.argmax())])[0]

    def spread_places(self, n: int = 3) -> list[int]:
        """Numbers of ``n`` examples: of different lengths, and among the shortest.

        Structure shows in short examples as well, and the longest would cost the most.
        """
        lengths, places = np.unique(self.lengths, return_index=True)
        last = min(max(n - 1, len(lengths) // 16), len(lengths) - 1)
        found = places[np.unique(np.linspace(0, last, n).round().astype(int))].tolist() if len(lengths) else []
        return found + [i for i in range(min(n, len(self))) if i not in found][: n - len(found)]


def _columns(rows: Any, start: int, end: int) -> dict[str, Any]:
    """Some rows as columns. Of a data set that is none of ``datasets``', single rows are all that can be asked for."""
    if hasattr(rows, "column_names"):
        return rows[start:end]
    some = [rows[i] for i in range(start, end)]
    for i, row in enumerate(some, start + 1):
        if not isinstance(row, Mapping):
            raise RecipeError(f"The data's row {i:,} is {kind(row)}, but a row maps columns to values: make it a dict.")
        if row.keys() != some[0].keys():
            raise RecipeError(f"The data's row {i:,} has other columns than those before it: give all rows the same.")
    return {key: [row[key] for row in some] for key in some[0]}


def _with_rows(encoded: Sequence[Any] | Encoded, rows: int) -> tuple[Sequence[Any], Sequence[int]]:
    """Features, and for each the position of its row among so many ``rows``."""
    if not isinstance(encoded, Encoded):
        if len(encoded) != rows:
            raise RecipeError(
                f"The task made {len(encoded):,} features of {rows:,} rows, so it is unknown whose each is: "
                "make one of each row, or return dpft.tasks.Encoded, which names the rows."
            )
        return encoded, range(rows)
    owners = plain(encoded.rows)
    if len(owners) != len(encoded.features) or any(type(i) is not int or not 0 <= i < rows for i in owners):
        raise RecipeError(
            f"The task named {len(owners):,} rows for {len(encoded.features):,} features of {rows:,} rows: "
            "name one row, counted from 0, for each feature."
        )
    return encoded.features, owners


def check_units(examples: Examples, plan: Plan) -> None:
    """Refuse a plan that is not meant for these examples.

    Raises:
        RecipeError: the plan's number of units is more than twice, or less than half, that of the examples; or several
            draws of an example's chance are asked for, and there is none, or they would add up.
    """
    if plan.units is not None:
        check_count(len(examples.members), plan.units)
    if examples.draws == 1:
        return
    if examples.draws < 1 or examples.chance is None:
        raise RecipeError(
            f"{examples.draws} draws of each example were asked for, and a task without chance draws the same: set "
            "data.draws to 1, or give the task a chance, such as task.crop."
        )
    if plan.unit_gradient != "mean":
        raise RecipeError(
            f"{examples.draws} draws of each example would count as so many examples in a sum: choose "
            "data.unit_gradient = 'mean', or one draw."
        )


def cut(
    lengths: Sequence[int] | Numbers,
    units: Sequence[int] | Numbers,
    *,
    token_budget: int,
    overhead: float = OVERHEAD,
    max_examples: Callable[[int], int] = lambda tokens: 1 << 30,
    tokens: Sequence[int] | Numbers | None = None,
) -> list[Numbers]:
    """Cut examples into micro-batches of at most ``token_budget`` padded tokens, each unit's examples consecutive.

    Of all cuts of the sorted examples this is the one with the smallest sum of padded tokens and ``overhead`` for each
    micro-batch (by dynamic programming).

    Args:
        lengths: ``(n,)``, what each example costs in tokens.
        units: ``(n,)`` which unit each belongs to.
        overhead: tokens' worth of time that a micro-batch costs beside its own tokens.
        max_examples: how many examples of so many tokens a micro-batch may hold (:meth:`Engine.max_examples`).
        tokens: ``(n,)``, what the layers see of each example; by default what it costs.

    Returns:
        Arrays of positions into ``lengths``, together every position once; long examples come first, so that too
        large a budget fails at once. An example longer than the budget makes a micro-batch of its own.

    >>> [group.tolist() for group in cut([20, 90, 30, 31], [0, 1, 2, 3], token_budget=100, overhead=5)]
    [[1], [3, 2], [0]]
    """
    lengths, whose, most = np.asarray(lengths), np.asarray(units), cache(max_examples)
    by_unit = _largest_of_unit(lengths, whose)
    order = np.lexsort((-lengths, whose, -by_unit))
    widths, places = by_unit[order], np.arange(len(order))  # of a micro-batch that begins there, at most
    seen = widths if tokens is None else _largest_of_unit(np.asarray(tokens), whose)[order]
    costs = np.zeros(len(order) + 1)  # of the best cut of the first so many
    starts = [0]  # where its last micro-batch begins
    first = 0
    for end in range(1, len(order) + 1):
        while end - first > 1 and (
            widths[first] * (end - first) > token_budget or end - first > most(int(seen[first:end].max()))
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


def _largest_of_unit(values: Numbers, units: Numbers) -> Numbers:
    """For each example the largest value among its unit's."""
    largest: dict[int, int] = {}
    for value, unit in zip(values.tolist(), units.tolist(), strict=True):
        largest[unit] = max(value, largest.get(unit, 0))
    return np.array([largest[unit] for unit in units.tolist()], dtype=np.int64)


class LogicalBatch:
    """One Poisson draw, as an iterable of ``(batch, units)`` micro-batches; it has none if the draw was empty."""

    def __init__(
        self,
        examples: Examples,
        task: Task,
        places: Numbers,
        units: Numbers,
        groups: list[Numbers],
        chosen: Chosen,
    ) -> None:
        self._examples, self._task, self._places, self._units, self._groups = examples, task, places, units, groups
        self._chosen = chosen

    def __iter__(self) -> Iterator[tuple[Batch, list[int]]]:
        for group in self._groups:
            places = self._places[group]
            batch = self._task.collate(self._examples.drawn(places))
            self._chosen(places, batch)
            yield batch, self._units[group].tolist()


@dataclass(frozen=True)
class Limits:
    """What a micro-batch may hold, and what it costs beside that; see :func:`cut`."""

    token_budget: int
    max_examples: Callable[[int], int]
    overhead: float = OVERHEAD


class LogicalBatches:
    """``steps`` logical batches, drawn when asked for, each time this is iterated.

    Args:
        limits: of each micro-batch.
        chosen: told the examples' numbers and the batch just before each micro-batch is given out.
    """

    def __init__(
        self,
        examples: Examples,
        task: Task,
        sampler: PoissonSampler,
        *,
        steps: int,
        limits: Limits,
        chosen: Chosen | None = None,
    ) -> None:
        self.examples, self.task, self.sampler, self.steps = examples, task, sampler, steps
        self._limits, self._chosen = limits, chosen

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
        # A unit's gradient is the mean over its rows, and each draw is one: all of it comes before the clip.
        places, units = np.repeat(places, self.examples.draws), np.repeat(units, self.examples.draws)
        groups = cut(
            self.examples.costs[places],
            units,
            token_budget=self._limits.token_budget,
            overhead=self._limits.overhead,
            max_examples=self._limits.max_examples,
            tokens=self.examples.lengths[places],
        )
        return LogicalBatch(self.examples, self.task, places, units, groups, self._in_turn())

    def _in_turn(self) -> Chosen:
        """What is told of each micro-batch of the next draw."""
        turn, chosen = self.sampler.turn, self._chosen

        def tell(places: Numbers, batch: Batch) -> None:
            if self.sampler.turn != turn:
                raise GuaranteeError(
                    f"A batch was drawn when {turn:,} steps were released, and is used after {self.sampler.turn:,}, "
                    "when other units have their turn: draw each batch when the step before it is released."
                )
            if chosen is not None:
                chosen(places, batch)

        return tell


def plain_batches(examples: Examples, task: Task, token_budget: int) -> Iterator[Batch]:
    """Every example once, sorted by length, without units: for evaluation."""
    for group in cut(examples.costs, range(len(examples)), token_budget=token_budget):
        yield task.collate([examples.features[place] for place in group])
