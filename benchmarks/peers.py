"""Peers at the same ε: dpft's default, opake and Opacus on the same data, model, budget and seeds.

    DPFT_MODELS=... python benchmarks/peers.py [--system TEXT] [--epsilon E] [--seeds N] [--json]

A frozen all-MiniLM-L6-v2 and a head classify diagnoses into the chapters of ICD-10-CM. Every system says itself which
ε it spent. A cell that the results hold is not computed again. A peer may choose a rate on the validation data,
by accuracy at ε = 3 and seed 0, and does not pay for it; dpft has one setting. See benchmarks/studies/peers/README.md.

opake is tried where it is installed (opake[transformers]==0.16.1).
"""

import argparse
import json
import os
import statistics
import sys
import time
import warnings
from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from output import circumstances, deliver, options
from peer_systems import DELTA, SYSTEMS, UNITS, Cell, System, Work, made_work

RESULTS = Path(__file__).parent / "studies" / "peers" / "results.json"
EPSILONS = (8.0, 3.0, 1.0)
TUNED_AT = (3.0, 0)  # ε and seed


def scored(work: Work, system: System, cell: Cell) -> dict:
    """A row of the results."""
    from sklearn.metrics import accuracy_score, f1_score

    row = {"epsilon": cell.epsilon, "seed": cell.seed, "rate": cell.rate}
    since, busy = time.monotonic(), time.process_time()
    try:
        found, spent = system.run(work, cell)
    except Exception as error:  # a peer's own words
        return row | {"error": f"{type(error).__name__}: {str(error).splitlines()[0]}"}
    row |= {"seconds": round(time.monotonic() - since, 1), "cpu_seconds": round(time.process_time() - busy, 1)}
    if isinstance(found, dict):
        accuracy, macro_f1 = found["accuracy"], found["macro_f1"]
    else:
        import torch

        wanted, found = work.validation.labels.tolist(), torch.as_tensor(found).argmax(-1).tolist()
        present = sorted(set(wanted))
        accuracy = accuracy_score(wanted, found)
        macro_f1 = f1_score(wanted, found, labels=present, average="macro", zero_division=0)
    return row | {"stated_epsilon": spent, "accuracy": round(float(accuracy), 4), "macro_f1": round(float(macro_f1), 4)}


def known(cells: Iterable[dict], name: str, cell: Cell) -> dict | None:
    """The row of a cell that was computed before."""
    wanted = (name, cell.epsilon, cell.seed, cell.rate)
    return next((row for row in cells if (row["system"], row["epsilon"], row["seed"], row["rate"]) == wanted), None)


def best_rate(cells: Iterable[dict], name: str, rates: tuple[float, ...]) -> float | None:
    """The rate of the most accurate cell among those that chose; the first one where none ran."""
    tried = [known(cells, name, Cell(*TUNED_AT, rate)) for rate in rates]
    ran = [row for row in tried if row and "accuracy" in row]
    return max(ran, key=lambda row: row["accuracy"])["rate"] if ran else (rates or (None,))[0]


def summary(cells: list[dict]) -> list[dict]:
    """For each system and ε: means over seeds, at the rate that was chosen."""
    found = []
    for name, system in SYSTEMS.items():
        rate = best_rate(cells, name, system.rates)
        for epsilon in sorted({row["epsilon"] for row in cells}, reverse=True):
            some = [r for r in cells if (r["system"], r["epsilon"], r["rate"]) == (name, epsilon, rate)]
            if some:
                found.append({"system": name, "epsilon": epsilon, "rate": rate, **averaged(some)})
                found[-1]["settings"] = max(1, len(system.rates))
    return found


def averaged(some: list[dict]) -> dict:
    ran = [row for row in some if "accuracy" in row]
    if not ran:
        return {"seeds": 0, "error": some[0]["error"]}
    row: dict[str, Any] = {"seeds": len(ran), "stated_epsilon": max(row["stated_epsilon"] for row in ran)}
    for name in ("accuracy", "macro_f1"):
        values = [one[name] for one in ran]
        row[name] = round(statistics.fmean(values), 4)
        row[f"{name}_spread"] = round(statistics.stdev(values), 4) if len(values) > 1 else None
    return row | {"cpu_seconds": round(statistics.median(one["cpu_seconds"] for one in ran), 1)}


def table(found: list[dict]) -> str:
    """Markdown."""
    lines = ["| system | ε | stated ε | accuracy | macro-F1 | seeds | settings | CPU seconds |", "|" + " --- |" * 8]
    for row in found:
        begin = f"| {row['system']} | {row['epsilon']:g} |"
        if "error" in row:
            lines.append(f"{begin} – | {row['error']} | – | 0 | {row['settings']} | – |")
            continue
        figures = [
            f"{row[name]:.3f}" + (f" ± {row[f'{name}_spread']:.3f}" if row[f"{name}_spread"] is not None else "")
            for name in ("accuracy", "macro_f1")
        ]
        rest = [row["seeds"], row["settings"], row["cpu_seconds"]]
        lines.append(f"{begin} {row['stated_epsilon']:.4f} | {' | '.join(map(str, figures + rest))} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--system", metavar="TEXT", default="", help="only systems whose name contains this")
    parser.add_argument("--epsilon", type=float, action="append", help="by default 8, 3 and 1")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--work", type=Path, default=Path("runs/peers"), help="where the data and their features stay")
    options(parser)
    parser.set_defaults(output=RESULTS)
    arguments = parser.parse_args()
    if "DPFT_MODELS" not in os.environ:
        sys.exit("DPFT_MODELS must name the folder with minilm-l6 (see benchmarks/models.py)")
    warnings.simplefilter("ignore")
    before = json.loads(arguments.output.read_text(encoding="utf-8")) if arguments.output.exists() else {}
    cells = before.get("cells", [])
    found = {"delta": DELTA, "units": UNITS, "cells": cells, **circumstances()}
    for package in ("opake", "torchopt", "scikit-learn"):
        try:
            found["versions"][package] = version(package)
        except PackageNotFoundError:
            found["versions"][package] = "not installed"
    work: Work | None = None
    for name, system in SYSTEMS.items():
        if arguments.system not in name:
            continue
        if find_spec(system.package) is None:
            print(f"{name}: left out, because {system.package} is not installed", file=sys.stderr)
            continue
        tried = [Cell(*TUNED_AT, rate) for rate in system.rates]
        wanted = [(e, seed) for seed in range(arguments.seeds) for e in arguments.epsilon or EPSILONS]
        for cell in [*tried, *wanted]:
            if isinstance(cell, tuple):
                cell = Cell(*cell, best_rate(cells, name, system.rates))
            if known(cells, name, cell):
                continue
            work = work or made_work(arguments.work.resolve())
            cells.append({"system": name, **scored(work, system, cell)})
            print(cells[-1], file=sys.stderr, flush=True)
            found["rows"] = summary(cells)
            arguments.output.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    found["rows"] = summary(cells)
    deliver(found, arguments, table(found["rows"]))


if __name__ == "__main__":
    main()
