"""Small plots as SVG text, readable on a light and on a dark page."""

import html
import io
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import TYPE_CHECKING, Any

import matplotlib

matplotlib.use("svg")
from matplotlib import pyplot  # noqa: E402
from matplotlib.dates import AutoDateLocator, ConciseDateFormatter  # noqa: E402
from matplotlib.ticker import MaxNLocator  # noqa: E402

if TYPE_CHECKING:
    from matplotlib.axes import Axes

INK = "#7a8594"  # axes and labels: enough contrast on white and on near-black
ACCENT = "#2f80ed"
SECOND = "#e2803a"
STYLES: tuple[dict[str, Any], ...] = (
    {"color": ACCENT, "marker": "o"},
    {"color": SECOND, "marker": "s"},
    {"color": INK, "marker": "", "linestyle": "--"},
    {"color": "#2fa37c", "marker": "^"},
)


@dataclass(frozen=True)
class Labels:
    """What is written at a plot and at its axes, and what is said to those who cannot see it: by default the title."""

    title: str
    x: str
    y: str
    said: str = ""


def line(
    x: Sequence[float],
    y: Sequence[float],
    labels: Labels,
    *,
    mark: tuple[float, float, str] | None = None,
    log_y: bool = False,
) -> str:
    """One curve as an ``<svg>`` element, with an optional marked point and its label."""

    def draw(axes: "Axes") -> None:
        axes.plot(x, y, color=ACCENT, linewidth=2)
        if log_y:
            axes.set_yscale("log")
        if mark is not None:
            axes.plot(mark[0], mark[1], "o", color=SECOND, markersize=7)
            rising = y[-1] > y[0]  # the label goes to the empty side of the curve
            axes.annotate(
                mark[2],
                mark[:2],
                textcoords="offset points",
                xytext=(-9 if rising else 9, 9 if not rising else 7),
                ha="right" if rising else "left",
                color=SECOND,
            )
        if all(isinstance(value, int) for value in x):
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))

    return svg(draw, labels)


def lines(curves: Mapping[str, tuple[Sequence[float], Sequence[float]]], labels: Labels, *, log: str = "") -> str:
    """Named curves ``{name: (x, y)}`` with marked points; ``log`` names the logarithmic axes, such as ``"xy"``."""

    def draw(axes: "Axes") -> None:
        for (name, (x, y)), style in zip(curves.items(), STYLES, strict=False):
            axes.plot(x, y, label=name, linewidth=2, markersize=4, **style)
        axes.set_xscale("log" if "x" in log else "linear")
        axes.set_yscale("log" if "y" in log else "linear")
        axes.legend(frameon=False, labelcolor=INK, fontsize=9)

    return svg(draw, labels)


def roc(curves: dict[str, list[tuple[float, float]]], *, title: str = "Who was in the data?") -> str:
    """Named curves of ``(false alarms, detections)`` on logarithmic axes, with guessing dashed."""

    def draw(axes: "Axes") -> None:
        least = 1.0
        for (name, points), style in zip(curves.items(), STYLES, strict=False):
            half = min((x for x, _ in points if x > 0), default=1e-3) / 2  # where "none so far" is drawn
            shown = [(max(x, half), y) for x, y in points if y > 0]
            if shown:
                axes.plot(*zip(*shown, strict=True), label=name, linewidth=2, **{**style, "marker": ""})
                least = max(min(least, half), 1e-4)
        axes.plot([least, 1], [least, 1], color=INK, linestyle=":", linewidth=1.5, label="guessing")
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.set_xlim(least, 1)
        axes.legend(frameon=False, labelcolor=INK, fontsize=9)

    return svg(draw, Labels(title, "false alarms", "detected"))


def trade_off(curve: list[tuple[float, float]]) -> str:
    """The most detections that a guarantee allows at each rate of false alarms."""
    return roc({"at most": curve}, title="The best attack that the guarantee allows")


def staircase(times: list[datetime], values: list[float], *, limit: float, title: str, y_label: str) -> str:
    """A sum that grows at each of ``times``, below its limit."""

    def draw(axes: Any) -> None:  # whose own types do not know that it takes dates
        axes.step([times[0], *times], [0, *values], where="post", color=ACCENT, linewidth=2)
        axes.plot(times, values, "o", color=ACCENT, markersize=4)
        axes.axhline(limit, color=SECOND, linestyle="--", linewidth=1.5)
        axes.annotate(
            f"budget {limit:g}",
            (0.01, limit),
            xycoords=("axes fraction", "data"),
            xytext=(0, 4),
            textcoords="offset points",
            color=SECOND,
            fontsize=9,
        )
        axes.set_ylim(bottom=0)
        margin = max((times[-1] - times[0]) / 20, timedelta(minutes=10))
        axes.set_xlim(times[0] - margin, times[-1] + margin)
        locator = AutoDateLocator(maxticks=5)
        axes.xaxis.set_major_locator(locator)
        axes.xaxis.set_major_formatter(ConciseDateFormatter(locator))

    return svg(draw, Labels(title, "", y_label))


def svg(draw: "Callable[[Axes], None]", labels: Labels, height: float = 3.0) -> str:
    """What ``draw`` draws as an ``<svg>`` element, five inches wide and ``height`` high."""
    with pyplot.rc_context(
        {"svg.fonttype": "none", "font.family": "sans-serif", "font.size": 10, "svg.hashsalt": "dpft"}
    ):
        figure, axes = pyplot.subplots(figsize=(5.0, height), layout="constrained")
        draw(axes)
        axes.set_title(labels.title, parse_math=False, color=INK, fontsize=11, loc="left")
        axes.set_xlabel(labels.x)
        axes.set_ylabel(labels.y)
        axes.margins(y=0.15)
        axes.grid(True, color=INK, alpha=0.2)
        axes.spines[["top", "right"]].set_visible(False)
        axes.spines[["left", "bottom"]].set_color(INK)
        axes.tick_params(colors=INK, which="both")
        axes.xaxis.label.set_color(INK)
        axes.yaxis.label.set_color(INK)
        out = io.StringIO()
        figure.savefig(out, format="svg", transparent=True, metadata={"Date": None})
        pyplot.close(figure)
    text = out.getvalue()[out.getvalue().index("<svg") :]
    label = f'role="img" aria-label="{html.escape(labels.said or labels.title)}"'
    return re.sub(r'width="[\d.]+pt" height="[\d.]+pt"', lambda _: label, text, count=1)
