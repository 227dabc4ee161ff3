"""The page on which a sweep is read: figures, their data, and what they say in words."""

import csv
import io
import re
import shlex
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from dpft.errors import RecipeError
from dpft.recipe import toml
from dpft.report import sections
from dpft.report.card import ADJACENCY_WORDS, environment, unit_words
from dpft.report.sections import Section
from dpft.report.summary import Summary, number
from dpft.report.sweep_plots import style
from dpft.runs.folder import RunFolder
from dpft.runs.sweep import NON_PRIVATE, PRIVATE, UNTOUCHED, Sweep

PAGE, CELLS = "index.html", "cells.csv"
REFERENCE = r"""(?:url\(|href=")#([\w.-]+)"""


def write_page(sweep: Sweep, folder: Path | str) -> list[Path]:
    """Make ``index.html``, ``cells.csv`` and the figures, twice where a part of the sweep may not be published.

    What stands in ``folder`` knows nothing of runs without privacy, nor of times and memory, which follow the data. All
    of it stands below ``folder/private``. Where the validation data are not public, nothing stands outside of it.

    Args:
        folder: the sweep's, from which the runs' folders are found.

    Returns:
        The files, what may be published first.

    Raises:
        RecipeError: nothing was trained in the sweep.
    """
    files = RunFolder(folder)
    if not any(cell.kind != UNTOUCHED for cell in sweep.cells):
        raise RecipeError(f"The sweep in {files} has no run, so there is nothing to show: run it first.")
    found: list[Path] = []
    if _may_be_published(sweep) and Summary(sweep.public).subsets:
        found += _write(sweep.public, files.path, files.path, private=False)
    if not _may_be_published(sweep) or sweep.public != sweep:
        found += _write(sweep, files.path, files.private, private=True)
    return found


def _may_be_published(sweep: Sweep) -> bool:
    """Whether figures of private runs may: the recipe declares the validation data public."""
    return bool(sweep.recipe.get("data", {}).get("validation_is_public", False))


def _write(sweep: Sweep, runs: Path, output: Path, *, private: bool) -> list[Path]:
    summary = Summary(sweep)
    shown = list(sections.all_of(summary, runs))
    output.mkdir(parents=True, exist_ok=True)
    pictures = {output / f"{one.name}.svg": one.figure for one in shown if one.figure}
    texts = {
        output / PAGE: _page(summary, shown, private),
        output / CELLS: _cells(sweep),
        **{path: figure for path, figure in pictures.items() if figure},
    }
    for path, text in texts.items():
        path.write_text(text, encoding="utf-8", newline="\n")
    return list(texts)


def _page(summary: Summary, shown: list[Section], private: bool) -> str:
    sweep = summary.sweep
    data, privacy, task, model = (sweep.recipe.get(name, {}) for name in ("data", "privacy", "task", "model"))
    facts = dict(
        summary=summary,
        sweep=sweep,
        private=private,
        uncovered=_uncovered(sweep),
        sections=[(one, _inline(one)) for one in shown],
        tiles=[(e, *best) for e in summary.budgets if (best := summary.best(e)) is not None],
        legend=[(name, style(place)["color"]) for place, name in enumerate(summary.subsets)],
        task=task.get("name", "not known"),
        model=Path(str(model.get("path", "not known"))).name,
        unit=unit_words(data.get("unit", "example")),
        adjacency=ADJACENCY_WORDS.get(privacy.get("adjacency", ""), "not known"),
        seeds=len({cell.seed for cell in sweep.cells if cell.kind != UNTOUCHED}),
        runs=sum(cell.kind != UNTOUCHED for cell in sweep.cells),
        private_runs=sum(cell.kind == PRIVATE for cell in sweep.cells),
        command=_command(summary),
        recipe=_recipe(sweep.recipe),
        metric=summary.metric.replace("_", " "),
        number=number,
    )
    templates = environment()
    templates.filters["whole"] = lambda text: text.replace("ε = ", "ε\u00a0=\u00a0")  # no line break parts it
    return templates.get_template("page.html.jinja").render(facts)


def _uncovered(sweep: Sweep) -> list[str]:
    """What on a private page may not be published, in words."""
    reasons = {
        "models that were trained on the private data without noise": any(c.kind == NON_PRIVATE for c in sweep.cells),
        "times and memory, which follow the data": any(c.seconds or c.peak_memory for c in sweep.cells),
        "metrics on validation data that are not declared public": not _may_be_published(sweep),
    }
    return [reason for reason, holds in reasons.items() if holds]


def _inline(section: Section) -> str | None:
    """The figure for a page of several: ids are its own, and only those that something refers to."""
    if section.figure is None:
        return None
    used = set(re.findall(REFERENCE, section.figure))
    keep = lambda found: f' id="{section.name}-{found[1]}"' if found[1] in used else ""
    text = re.sub(r' id="([^"]*)"', keep, section.figure)
    text = re.sub(r"<metadata>.*?</metadata>\s*", "", text, flags=re.DOTALL)
    return re.sub(REFERENCE, lambda found: found[0].replace("#", f"#{section.name}-"), text)


def _cells(sweep: Sweep) -> str:
    """One line for each run, with every number among its metrics."""
    rows = [
        {
            "kind": cell.kind,
            "subset": cell.subset,
            "epsilon": cell.epsilon,
            "seed": cell.seed,
            "trainable_parameters": cell.trainable_parameters,
            "seconds": cell.seconds,
            "peak_memory": cell.peak_memory,
            "folder": cell.folder,
            **dict(_numbers(cell.metrics)),
        }
        for cell in sweep.cells
    ]
    columns = dict.fromkeys(key for row in rows for key in row)
    kept = [key for key in columns if any(row.get(key) is not None for row in rows)]
    text = io.StringIO()
    writer = csv.DictWriter(text, kept, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def _numbers(metrics: Mapping[str, Any], above: str = "") -> Iterator[tuple[str, float]]:
    for name, value in metrics.items():
        if isinstance(value, Mapping):
            yield from _numbers(value, f"{above}{name}.")
        elif isinstance(value, (int, float)):
            yield f"{above}{name}", value


def _command(summary: Summary) -> str:
    """What makes the sweep again."""
    budgets = ",".join("inf" if e is None else f"{e:g}" for e in summary.budgets)
    seeds = 1 + max(cell.seed for cell in summary.sweep.cells)
    words = ["dpft", "sweep", "recipe.toml", "--output", "again", "--epsilon", budgets]
    return shlex.join([*words, "--subset", ", ".join(summary.subsets), "--seeds", str(seeds)])


def _recipe(tables: Mapping[str, Any]) -> str:
    """The recipe's file."""
    lines = [f"{key} = {toml.dumps(value)}" for key, value in tables.items() if not isinstance(value, Mapping)]
    for name, table in tables.items():
        if isinstance(table, Mapping):
            keys = [f"{key} = {toml.dumps(value)}" for key, value in table.items() if value is not None]
            lines += ["", f"[{name}]", *keys]
    return "\n".join(lines)
