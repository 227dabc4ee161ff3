"""The figures of a sweep: utility against ε and against the number of trainable parameters, and calibration."""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from matplotlib.ticker import FixedLocator, LogLocator, NullFormatter, NullLocator

from dpft.privacy.rounding import rounded_up
from dpft.report.plots import ACCENT, INK, SECOND, Labels, svg
from dpft.report.summary import PRIVACY_FREE, Mean, Summary, budget, is_control, number

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Of the subsets in their order, and again from the first: each is readable on white and on near-black.
COLOURS = (ACCENT, SECOND, "#2fa37c", "#a06be0", "#e0566b", "#1f9fb5", "#9a8a1c", "#d063b0", "#7d8f45", "#b07a50")
MARKERS = "os^DvPX*hd"
FREE: dict[str, Any] = {"color": INK, "marker": "x", "linestyle": "--", "markersize": 5}  # without privacy
HOLLOW: dict[str, Any] = {"linestyle": "", "markerfacecolor": "none"}
FAINT: dict[str, Any] = {"linestyle": ":", "linewidth": 0.9}  # subsets of unlike kinds are no curve
FAR = 1.5  # times the height of all points: a level that is farther from them is named and not drawn
APART = 0.065  # of the height of the axes, between two names
DECADES = 30.0  # times: sizes that lie closer are written out, not as powers of ten
DIFFERENT = 10.0  # times: from there on what should be low is shown on a logarithmic axis


def style(place: int) -> dict[str, Any]:
    """Colour and marker of a curve."""
    return {"color": COLOURS[place % len(COLOURS)], "marker": MARKERS[place % len(MARKERS)], "markersize": 4.5}


def over_epsilon(summary: Summary, said: str) -> str:
    """One line for each subset over the budgets; each seed is a small point. Runs without privacy stand to the right.

    Lines end with the subset's number. The untouched model and the majority class are levels.
    """
    x = _places(summary)
    reach = 0.012 * (max(x.values()) - min(x.values()) or 1)

    def draw(axes: "Axes") -> None:
        ends: list[tuple[float, str, str]] = []
        seen: list[float] = []
        for place, subset in enumerate(summary.subsets):
            shift = reach * (place - (len(summary.subsets) - 1) / 2)
            known = [(e, figure) for e in summary.budgets if (figure := summary.at(subset, e)) is not None]
            points = [(x[e] + shift, figure.mean, figure.spread) for e, figure in known if e is not None]
            look = style(place)
            _bars(axes, points, look)
            for e, figure in known:
                seen += _reach(figure)
                where = [x[e] + shift] * len(figure.values)
                axes.plot(where, figure.values, ".", color=look["color"], markersize=3, alpha=0.6)
                if e is None:
                    _bars(axes, [(x[e] + shift, figure.mean, figure.spread)], look)
                    if points:
                        axes.plot([points[-1][0], x[e] + shift], [points[-1][1], figure.mean], ":", color=look["color"])
            if known:
                ends.append((known[-1][1].mean, str(place + 1), look["color"]))
        _scale(axes, summary, seen)
        levels = {"majority class": summary.majority, "untouched model": getattr(summary.untouched, "mean", None)}
        _levels(axes, {name: level for name, level in levels.items() if level is not None}, seen)
        axes.set_xlim(min(x.values()) - 6 * reach, max(x.values()) + 12 * reach)
        _names(axes, ends)
        axes.xaxis.set_major_locator(FixedLocator(list(x.values())))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.set_xticklabels([PRIVACY_FREE if e is None else rounded_up(e) for e in x])
        if None in x:
            axes.axvline(x[None] - _step(summary) / 2, color=INK, linewidth=0.8, alpha=0.5)

    return svg(draw, Labels(f"{_words(summary)} against ε", "ε", _words(summary), said), 3.6)


def over_parameters(summary: Summary, said: str) -> str:
    """Points of each budget over the number of trainable parameters; subsets' numbers stand above.

    Sparse parts that choose at random are the control: they are hollow, and no line goes through them.
    """

    def draw(axes: "Axes") -> None:
        ends: list[tuple[float, str, str]] = []
        seen: list[float] = []
        for place, e in enumerate(summary.budgets):
            look = FREE if e is None else style(place)
            known = [(name, figure) for name in summary.subsets if (figure := summary.at(name, e)) is not None]
            for controls in (True, False):
                points = [
                    (size, figure.mean, figure.spread)
                    for name, figure in known
                    if (size := summary.parameters[name]) and is_control(name) == controls
                ]
                _bars(axes, points, look | (HOLLOW if controls else FAINT))
                if points and not controls:
                    ends.append((points[-1][1], budget(e), look["color"]))
            seen += [value for _, figure in known for value in _reach(figure)]
        axes.set_xscale("log")
        sizes = [size for size in summary.parameters.values() if size]
        axes.set_xlim(min(sizes) / 1.6, max(sizes) * (max(sizes) / min(sizes)) ** 0.2 * 1.3)
        if max(sizes) < DECADES * min(sizes):
            axes.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
            axes.xaxis.set_major_formatter(_count)
        axes.xaxis.set_minor_formatter(NullFormatter())
        _scale(axes, summary, seen)
        _names(axes, ends)
        above = axes.secondary_xaxis("top")
        places = _merged(summary, axes.get_xlim())
        above.set_xscale("log")
        above.xaxis.set_major_locator(FixedLocator([place for place, _ in places]))
        above.xaxis.set_minor_locator(NullLocator())
        above.set_xticklabels([name for _, name in places], color=INK, fontsize=8)
        above.tick_params(color=INK, length=3)
        above.spines["top"].set_visible(False)

    return svg(draw, Labels(f"{_words(summary)} by size", "trainable parameters", _words(summary), said), 3.6)


def reliability(summary: Summary, budgets: Sequence[float | None], said: str) -> str:
    """How often the model is right at each confidence, for some budgets; the diagonal is perfect."""

    def draw(axes: "Axes") -> None:
        axes.plot([0, 1], [0, 1], ":", color=INK, linewidth=1.5, label="perfect")
        for e in budgets:
            points = summary.reliability(e)
            place = summary.budgets.index(e)
            look = FREE if e is None else style(place)
            axes.plot([c for c, _, _ in points], [a for _, a, _ in points], linewidth=1.8, label=budget(e), **look)
        axes.set_xlim(0, 1.02)
        axes.set_ylim(0, 1.02)
        axes.legend(frameon=False, labelcolor=INK, fontsize=9, loc="upper left")

    return svg(draw, Labels("Confidence and how often it is right", "confidence", "accuracy", said), 3.6)


def _bars(axes: Any, points: Sequence[tuple[float, float, float]], look: dict[str, Any]) -> None:
    """A line through ``(x, mean, spread)``, each with a bar of the spread both ways."""
    if points:
        x, means, spreads = zip(*points, strict=True)
        axes.errorbar(x, means, spreads, elinewidth=1, capsize=2, **{"linewidth": 1.6, **look})


def _reach(figure: Mean) -> list[float]:
    """All that is drawn of it."""
    return [*figure.values, figure.mean - figure.spread, figure.mean + figure.spread]


def _words(summary: Summary) -> str:
    return summary.metric.replace("_", " ")


def _count(value: float, _: object) -> str:
    return f"{value:,.0f}"


def _places(summary: Summary) -> dict[float | None, float]:
    """Where each budget stands: at the logarithm of ε, and without privacy a step to the right."""
    places: dict[float | None, float] = {e: math.log(e) for e in summary.epsilons}
    if None in summary.budgets:
        places[None] = max(places.values(), default=0.0) + _step(summary)
    return places


def _step(summary: Summary) -> float:
    logs = [math.log(e) for e in summary.epsilons]
    return (logs[-1] - logs[0]) / (len(logs) - 1) if len(logs) > 1 else 1.0


def _scale(axes: "Axes", summary: Summary, seen: Sequence[float]) -> None:
    """The vertical axis holds every seed; a metric that explodes has a logarithmic one."""
    low, high = min(seen), max(seen)
    if summary.lower_is_better and low > 0 and high > DIFFERENT * low:
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter(_plain)
        axes.yaxis.set_minor_formatter(NullFormatter())
        axes.set_ylim(low / 1.3, high * 1.3)
        return
    margin = 0.1 * (high - low) or 0.05 * abs(high) or 0.1
    axes.set_ylim(low - margin, high + margin)


def _plain(value: float, _: object) -> str:
    return f"{value:g}"


def _levels(axes: "Axes", levels: dict[str, float], seen: Sequence[float]) -> None:
    """Horizontal lines with their names; one that is far from all points is named at the edge beside an arrow."""
    low, high = min(seen), max(seen)
    height = high - low
    near = {n: v for n, v in levels.items() if low - FAR * height <= v <= high + FAR * height}
    if axes.get_yscale() == "linear" and near:
        bottom, top = axes.get_ylim()
        margin = 0.1 * (max(top, *near.values()) - min(bottom, *near.values()))
        axes.set_ylim(min(bottom, *(v - margin for v in near.values())), max(top, *(v + margin for v in near.values())))
    written: list[float] = []
    for name, value in sorted(levels.items(), key=lambda one: one[1]):
        bottom, top = axes.get_ylim()
        inside = bottom < value < top
        if inside:
            axes.axhline(value, color=INK, linestyle="--" if name.startswith("un") else ":", linewidth=1.3)
        _, place = axes.transAxes.inverted().transform(axes.transData.transform((axes.get_xlim()[0], value)))
        place = min(max(float(place) + 0.01, 0.01), 0.93)
        away = 0.005 if place < 0.5 else -0.005
        while any(abs(place - other) < APART for other in written):
            place += away
        written.append(place)
        arrow = "" if inside else "↓ " if value <= bottom else "↑ "
        said = f"{arrow}{name} {number(value)}"
        axes.text(0.94, place, said, transform=axes.transAxes, color=INK, fontsize=8, ha="right")


def _names(axes: "Axes", ends: Sequence[tuple[float, str, str]]) -> None:
    """Names at the right of lines, pushed apart where they would lie over one another."""
    to_axes = lambda value: float(axes.transAxes.inverted().transform(axes.transData.transform((1, value)))[1])
    written = sorted((to_axes(value), name, colour) for value, name, colour in ends)
    places = [place for place, _, _ in written]
    for _ in range(200):
        moved = False
        for i in range(len(places) - 1):
            gap = APART - (places[i + 1] - places[i])
            if gap > 1e-6:
                places[i], places[i + 1], moved = places[i] - gap / 2, places[i + 1] + gap / 2, True
        if not moved:
            break
    shift = max(0.0, 0.02 - places[0]) - max(0.0, places[-1] - 0.97) if places else 0.0
    for place, (_, name, colour) in zip(places, written, strict=True):
        axes.text(
            1.0,
            place + shift,
            name,
            transform=axes.transAxes,
            color=colour,
            fontsize=9,
            ha="right",
            va="center",
            weight="bold",
        )


def _merged(summary: Summary, limits: tuple[float, float]) -> list[tuple[float, str]]:
    """The subsets' numbers at their sizes; what would lie over one another is written as one."""
    width = math.log(limits[1] / limits[0])
    found: list[tuple[float, float, list[int]]] = []  # where it ends, its place, the numbers
    for place, subset in enumerate(summary.subsets, 1):
        size = summary.parameters[subset]
        if not size:
            continue
        at = math.log(size / limits[0]) / width
        if found and at - found[-1][0] < 0.035:
            _, first, numbers = found[-1]
            numbers.append(place)
            found[-1] = (at + 0.012 * len(numbers), first, numbers)
        else:
            found.append((at, size, [place]))
    return [(size, ",".join(map(str, numbers))) for _, size, numbers in found]
