"""What a sweep shows: means and spreads over seeds, the best settings, and whether fewer parameters are better."""

import math
import re
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import combinations
from typing import Any

from scipy.stats import spearmanr, ttest_ind_from_stats

from dpft.privacy.rounding import rounded_up
from dpft.runs.sweep import NON_PRIVATE, UNTOUCHED, Cell, OverSeeds, Sweep
from dpft.tasks.class_metrics import BINS

LOWER_IS_BETTER = {"loss", "perplexity", "error", "ece", "mae", "mse", "rmse", "wer", "cer"}
SIGNIFICANCE = 0.05
CLEAR = 0.75  # of the pairs that the spread lets us tell apart
ENOUGH = 0.25  # of all pairs must be told apart, or there is no answer
PRIVACY_FREE = "no privacy"


@dataclass(frozen=True)
class Mean(OverSeeds):
    """A metric over the seeds of one setting."""

    values: tuple[float, ...]

    def __str__(self) -> str:
        """
        >>> str(Mean((0.5, 0.7))), str(Mean((21.04,)))
        ('0.600 ± 0.141', '21.0')
        """
        return number(self.mean) + (f" ± {number(self.spread)}" if len(self.values) > 1 else "")

    def differs(self, other: "Mean") -> bool | None:
        """Whether the means differ by Welch's t-test at ``SIGNIFICANCE``; None where one seed tells no spread."""
        if min(len(self.values), len(other.values)) < 2:
            return None
        if self.spread == other.spread == 0:
            return self.mean != other.mean
        sides = [value for one in (self, other) for value in (one.mean, one.spread, len(one.values))]
        return bool(ttest_ind_from_stats(*sides, equal_var=False).pvalue < SIGNIFICANCE)


def number(value: float) -> str:
    """
    >>> number(0.12345), number(21.04), number(1234.5)
    ('0.123', '21.0', '1,234')
    """
    return f"{value:.3f}" if abs(value) < 10 else f"{value:.1f}" if abs(value) < 100 else f"{value:,.0f}"


def signed(value: float, digits: int = 3) -> str:
    """
    >>> signed(0.25), signed(-0.0001), signed(-0.25, 2)
    ('+0.250', '0.000', '-0.25')
    """
    return f"{value:+.{digits}f}" if round(value, digits) else f"{0:.{digits}f}"


def budget(epsilon: float | None) -> str:
    """A budget's name.

    >>> budget(3.0), budget(None)
    ('ε = 3', 'no privacy')
    """
    return PRIVACY_FREE if epsilon is None else f"ε = {rounded_up(epsilon)}"


def at(epsilon: float | None) -> str:
    """
    >>> at(3.0), at(None)
    ('at ε = 3', 'without privacy')
    """
    return "without privacy" if epsilon is None else f"at {budget(epsilon)}"


def is_control(subset: str) -> bool:
    """Whether a sparse part chooses its weights at random.

    >>> is_control("sparse(rank=8, choose='random')"), is_control("sparse(rank=8)")
    (True, False)
    """
    return re.search(r"""choose\s*=\s*['"]random['"]""", subset) is not None


def listed(words: Sequence[str]) -> str:
    """
    >>> listed(["a", "b", "c"])
    'a, b and c'
    """
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"


@dataclass(frozen=True)
class Trend:
    """How utility follows the number of trainable parameters at one budget.

    Attributes:
        correlation: Spearman's, between having few parameters and utility; None where either is constant.
        pairs: pairs of subsets of different sizes.
        told_apart: those whose means differ by more than the spread explains; None where one seed tells no spread.
        fewer_won: those of them in which the smaller subset is the better one.
    """

    epsilon: float | None
    correlation: float | None
    pairs: int
    told_apart: int | None
    fewer_won: int

    @property
    def verdict(self) -> str:
        """``fewer``, ``more``, ``neither``, or ``open`` where the spread allows no answer."""
        if not self.told_apart or self.told_apart < ENOUGH * self.pairs:
            return "open"
        share = self.fewer_won / self.told_apart
        return "fewer" if share >= CLEAR else "more" if share <= 1 - CLEAR else "neither"


class Summary:
    """The figures of a sweep, all computed from the cells that it is given.

    Attributes:
        subsets: from the fewest trainable parameters to the most.
        epsilons: ascending.
        budgets: these, and last None if there are runs without privacy.
    """

    def __init__(self, sweep: Sweep) -> None:
        self.sweep, self.metric = sweep, sweep.headline
        trained = [cell for cell in sweep.cells if cell.kind != UNTOUCHED]
        self.parameters = {cell.subset: cell.trainable_parameters for cell in trained}
        self.subsets = sorted(self.parameters, key=lambda name: (self.parameters[name] or math.inf, name))
        self.epsilons = sorted({cell.epsilon for cell in trained if cell.epsilon is not None})
        has_free = any(cell.kind == NON_PRIVATE for cell in trained)
        self.budgets: list[float | None] = [*self.epsilons, *([None] if has_free else [])]
        self.lower_is_better = is_lower_better(self.metric)

    def cells(self, subset: str, epsilon: float | None) -> list[Cell]:
        """The runs of one setting; without a budget those without privacy."""
        return [
            cell
            for cell in self.sweep.cells
            if cell.kind != UNTOUCHED and (cell.subset, cell.epsilon) == (subset, epsilon)
        ]

    def at(self, subset: str, epsilon: float | None, metric: str | None = None) -> Mean | None:
        """A metric of one setting, by default the headline."""
        return mean(cell.metrics.get(metric or self.metric) for cell in self.cells(subset, epsilon))

    @cached_property
    def untouched(self) -> Mean | None:
        """The headline of the model before training; a new head is random, so each seed has its own."""
        return mean(cell.metrics.get(self.metric) for cell in self.sweep.cells if cell.kind == UNTOUCHED)

    @cached_property
    def majority(self) -> float | None:
        """The accuracy of always naming the most frequent class."""
        counts = [list(map(_count, cell.metrics.get("per_class", {}).values())) for cell in self.sweep.cells]
        known = [found for found in counts if found]
        return max(known[0]) / sum(known[0]) if known and self.metric == "accuracy" else None

    def better(self, one: float, other: float) -> bool:
        return one < other if self.lower_is_better else one > other

    def best(self, epsilon: float | None) -> tuple[str, Mean] | None:
        """The best subset at a budget; among equals the smallest."""
        found = [(name, figure) for name in self.subsets if (figure := self.at(name, epsilon)) is not None]
        return min(found, key=lambda one: self._cost(one[1].mean), default=None)

    @cached_property
    def chosen(self) -> str | None:
        """The subset with the best mean over all budgets that it has, among those that have most."""
        has = {name: [one for e in self.epsilons if (one := self.at(name, e)) is not None] for name in self.subsets}
        full = max(map(len, has.values()), default=0)
        most = [name for name in self.subsets if len(has[name]) == full > 0]
        return min(most, key=lambda name: statistics.fmean(self._cost(one.mean) for one in has[name]), default=None)

    def _cost(self, value: float) -> float:
        return value if self.lower_is_better else -value

    # -- the number of parameters --------------------------------------------------------------------------------------

    def trend(self, epsilon: float | None) -> Trend | None:
        """None where there are not two subsets of different sizes."""
        points = [
            (size, figure)
            for name in self.subsets
            if (size := self.parameters[name]) is not None and (figure := self.at(name, epsilon)) is not None
        ]
        pairs = [(one, other) for one, other in combinations(points, 2) if one[0] != other[0]]
        if not pairs:
            return None
        costs = [self._cost(figure.mean) for _, figure in points]
        correlation = float(spearmanr([size for size, _ in points], costs)[0]) if len(set(costs)) > 1 else None
        differ = [one[1].differs(other[1]) for one, other in pairs]
        apart = [pair for pair, told in zip(pairs, differ, strict=True) if told]
        return Trend(
            epsilon,
            correlation,
            len(pairs),
            None if None in differ and not apart else len(apart),
            sum(self.better(one[1].mean, other[1].mean) for one, other in apart),
        )

    def trends(self) -> list[Trend]:
        return [trend for epsilon in self.budgets if (trend := self.trend(epsilon)) is not None]

    def controls(self) -> list[str]:
        """Sentences that compare each ``sparse(choose='random')`` with the subset that it controls."""
        said = []
        for control in self.subsets:
            same = [name for name in self.subsets if _but_choice(name) == _but_choice(control)]
            for name in (name for name in same if is_control(control) and not is_control(name)):
                parts = []
                for epsilon in self.budgets:
                    one, other = self.at(name, epsilon), self.at(control, epsilon)
                    if one is not None and other is not None:
                        told = one.differs(other)
                        words = {None: "one seed", False: "within the spread", True: "more than the spread"}[told]
                        parts.append(f"{number(one.mean)} against {number(other.mean)} {at(epsilon)} ({words})")
                if parts:
                    said.append(f"{name} against its control {control}: {'; '.join(parts)}.")
        return said

    # -- parts of the data ---------------------------------------------------------------------------------------------

    def part(self, metric: str, name: str, figure: str, epsilon: float | None) -> Mean | None:
        """One figure of a class or group, of the chosen subset."""
        cells = self.cells(self.chosen, epsilon) if self.chosen is not None else []
        return mean(cell.metrics.get(metric, {}).get(name, {}).get(figure) for cell in cells)

    def parts(self, metric: str) -> dict[str, int]:
        """Every class or group and its count, the most frequent first."""
        counts = {
            name: _count(figures)
            for cell in self.sweep.cells
            if cell.subset == self.chosen
            for name, figures in cell.metrics.get(metric, {}).items()
        }
        return dict(sorted(counts.items(), key=lambda one: (-one[1], one[0])))

    @cached_property
    def reference(self) -> float | None:
        """The budget that losses are counted from: none at all, or the largest."""
        return self.budgets[-1] if self.budgets else None

    def lost(self, metric: str, figure: str) -> dict[str, float]:
        """By how much each class or group is worse at the smallest budget than at the reference; the most first."""
        if len(self.budgets) < 2:
            return {}
        found = {}
        for name in self.parts(metric):
            before = self.part(metric, name, figure, self.reference)
            after = self.part(metric, name, figure, self.budgets[0])
            if before is not None and after is not None:
                found[name] = before.mean - after.mean
        return dict(sorted(found.items(), key=lambda one: -one[1]))

    def reliability(self, epsilon: float | None) -> list[tuple[float, float, int]]:
        """``(confidence, accuracy, count)`` of each bin over all seeds of the chosen subset."""
        bins: dict[int, list[tuple[float, float, int]]] = {}
        for cell in self.cells(self.chosen, epsilon) if self.chosen is not None else ():
            for one in cell.metrics.get("reliability", ()):
                place = math.ceil(round(one["confidence"] * BINS, 9))
                bins.setdefault(place, []).append((one["confidence"], one["accuracy"], one["count"]))
        return [_pooled(bins[place]) for place in sorted(bins)]

    def resource(self, subset: str, kind: str, name: str) -> Mean | None:
        """``seconds`` or ``peak_memory`` over all trainings of one kind."""
        return mean(getattr(cell, name) for cell in self.sweep.cells if (cell.subset, cell.kind) == (subset, kind))


def is_lower_better(metric: str) -> bool:
    """
    >>> is_lower_better("loss_per_token"), is_lower_better("accuracy")
    (True, False)
    """
    return not LOWER_IS_BETTER.isdisjoint(metric.lower().split("_"))


def mean(values: Any) -> Mean | None:
    """Of the numbers among the values; None if there are none."""
    kept = tuple(float(value) for value in values if isinstance(value, (int, float)) and math.isfinite(value))
    return Mean(kept) if kept else None


def _but_choice(subset: str) -> str:
    """A subset without how ``sparse`` chooses.

    >>> _but_choice("sparse(choose='random', rank=8, seed=1) + head"), _but_choice("sparse(rank=8) + head")
    ('sparse(rank=8)+head', 'sparse(rank=8)+head')
    """
    bare = re.sub(r"""\b(choose|seed)=('[^']*'|"[^"]*"|\d+),?""", "", subset.replace(" ", ""))
    return bare.replace(",)", ")")


def _count(figures: Mapping[str, Any]) -> int:
    return int(figures.get("count", 0))


def _pooled(bins: list[tuple[float, float, int]]) -> tuple[float, float, int]:
    count = sum(number for _, _, number in bins)
    confidence, accuracy = (sum(one[i] * one[2] for one in bins) / count for i in (0, 1))
    return confidence, accuracy, count
