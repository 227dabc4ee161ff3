"""Peers at the same ε: dpft's default, opake and Opacus on the same features, units, budget and seeds.

    export DPFT_MODELS=... DPFT_DATA=...
    python benchmarks/peers.py [STUDY ...] [--system TEXT] [--epsilon E] [--seeds N] [--json]

A study's frozen encoder makes features, and every system learns a head over them. Every system says itself which ε it
spent. A cell that the results hold is not computed again. A peer chooses a rate on the validation data, at each ε by
the accuracy of seed 0, and does not pay for it; dpft has one setting. See benchmarks/studies/peers/README.md.

opake is tried where it is installed (opake[transformers]==0.16.1).
"""

import argparse
import json
import os
import statistics
import sys
import time
import warnings
from collections.abc import Iterable, Iterator
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from output import circumstances, deliver, options
from peer_systems import SYSTEMS, Cell, System, Work, made_work

RESULTS = Path(__file__).parent / "studies" / "peers" / "results.json"
TABLES = ("icd10", "uit_vsfc_sentiment")
EPSILONS = (8.0, 3.0, 1.0)


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
    return row | {
        "stated_epsilon": float(spent),
        "accuracy": round(float(accuracy), 4),
        "macro_f1": round(float(macro_f1), 4),
    }


def known(cells: Iterable[dict], name: str, cell: Cell) -> dict | None:
    """The row of a cell that was computed before."""
    wanted = (name, cell.epsilon, cell.seed, cell.rate)
    return next((row for row in cells if (row["system"], row["epsilon"], row["seed"], row["rate"]) == wanted), None)


def best_rate(cells: Iterable[dict], name: str, epsilon: float) -> float | None:
    """The rate of the system's most accurate cell of seed 0 at this ε; that of the first one where none ran."""
    tried = [row for row in cells if (row["system"], row["epsilon"], row["seed"]) == (name, epsilon, 0)]
    return max(tried, key=lambda row: row.get("accuracy", 0.0))["rate"]


def summary(cells: list[dict]) -> list[dict]:
    """For each system and ε: means over seeds, at the rate that was chosen."""
    found = []
    for epsilon in sorted({row["epsilon"] for row in cells}, reverse=True):
        for name in SYSTEMS:
            if all((row["system"], row["epsilon"], row["seed"]) != (name, epsilon, 0) for row in cells):
                continue
            rate = best_rate(cells, name, epsilon)
            some = [row for row in cells if (row["system"], row["epsilon"]) == (name, epsilon)]
            settings = len({row["rate"] for row in some})
            some = [row for row in some if row["rate"] == rate]
            found.append({"system": name, "epsilon": epsilon, "settings": settings, "rate": rate, **averaged(some)})
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


def shown(rows: list[dict]) -> str:
    """Markdown."""
    lines = ["| ε | system | accuracy | macro-F1 | stated ε | seeds | settings | CPU seconds |", "|" + " --- |" * 8]
    for row in rows:
        begin = f"| {row['epsilon']:g} | {row['system']} |"
        if "error" in row:
            lines.append(f"{begin} {row['error']} | – | – | 0 | {row['settings']} | – |")
            continue
        figures = [
            f"{row[name]:.3f}" + (f" ± {row[f'{name}_spread']:.3f}" if row[f"{name}_spread"] is not None else "")
            for name in ("accuracy", "macro_f1")
        ]
        rest = [f"{row['stated_epsilon']:.3f}", row["seeds"], row["settings"], f"{row['cpu_seconds']:.0f}"]
        lines.append(f"{begin} {' | '.join(map(str, figures + rest))} |")
    return "\n".join(lines)


def measured(table: str, arguments: argparse.Namespace, cells: list[dict]) -> Iterator[dict]:
    """The cells that are not known yet, as they are measured; a rate is chosen before other seeds run."""
    work: Work | None = None
    for name, system in SYSTEMS.items():
        if arguments.system not in name:
            continue
        if find_spec(system.package) is None:
            print(f"{name}: left out, because {system.package} is not installed", file=sys.stderr)
            continue
        for epsilon in arguments.epsilon or EPSILONS:
            for seed in range(min(arguments.seeds, system.seeds or arguments.seeds)):
                for rate in (system.rates or (None,)) if seed == 0 else (best_rate(cells, name, epsilon),):
                    cell = Cell(epsilon, seed, rate)
                    if known(cells, name, cell):
                        continue
                    work = work or made_work(table, arguments.work.resolve())
                    yield {"system": name, **scored(work, system, cell)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("studies", nargs="*", default=list(TABLES), metavar="STUDY", help=", ".join(TABLES))
    parser.add_argument("--system", metavar="TEXT", default="", help="only systems whose name contains this")
    parser.add_argument("--epsilon", type=float, action="append", help="by default 8, 3 and 1")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--work", type=Path, default=Path("runs/peers"), help="where the data and their features stay")
    options(parser)
    parser.set_defaults(output=RESULTS)
    arguments = parser.parse_args()
    if "DPFT_MODELS" not in os.environ:
        sys.exit("DPFT_MODELS must name the folder with the studies' models (see benchmarks/models.py)")
    warnings.simplefilter("ignore")
    before = json.loads(arguments.output.read_text(encoding="utf-8")) if arguments.output.exists() else {}
    found: dict[str, Any] = {"studies": before.get("studies", {}), **circumstances()}
    for package in ("opake", "opacus", "torchopt", "scikit-learn"):
        try:
            found["versions"][package] = version(package)
        except PackageNotFoundError:
            found["versions"][package] = "not installed"
    for table in arguments.studies:
        study = found["studies"].setdefault(table, {"rows": [], "cells": []})
        for cell in measured(table, arguments, study["cells"]):
            study["cells"].append(cell)
            study["rows"] = summary(study["cells"])
            print(f"{table}: {cell}", file=sys.stderr, flush=True)
            arguments.output.write_text(json.dumps(found, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        study["rows"] = summary(study["cells"])
    texts = [f"{table}\n\n{shown(found['studies'][table]['rows'])}" for table in arguments.studies]
    deliver(found, arguments, "\n\n".join(texts))


if __name__ == "__main__":
    main()
