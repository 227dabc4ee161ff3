"""Repeat a study: every cell of its table from its recipe, on real data.

    python benchmarks/models.py minilm-l6 multilingual-e5-small smollm2-135m --output models
    export DPFT_MODELS=$PWD/models DPFT_DATA=...
    python benchmarks/studies/run.py icd10 --json

A study is a folder beside this file: recipe.toml, README.md and results.json, which this program writes. Each line
is the mean over seeds: the untouched model, without privacy, and each ε.
"""

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

from dpft.recipe import Recipe
from dpft.workflows.compare import compare

STUDIES = Path(__file__).parent
EPSILONS = (8.0, 3.0, 1.0)


def _diagnoses(folder: Path) -> tuple[str, ...]:
    from dpft.workflows.demo import UNITS, write_data

    train, validation, _ = write_data(folder, UNITS)
    return f"data.train={json.dumps(str(train))}", f"data.validation={json.dumps(str(validation))}"


def _queries(folder: Path) -> tuple[str, ...]:
    """E5 was trained on texts that begin with what they are."""
    import csv

    folder.mkdir(parents=True, exist_ok=True)
    overrides = []
    for name in ("train", "validation"):
        with open(Path(os.environ["DPFT_DATA"]) / "uit_vsfc" / f"{name}.csv", encoding="utf-8") as file:
            rows = [{**row, "text": f"query: {row['text']}"} for row in csv.DictReader(file)]
        with open(folder / f"{name}.csv", "w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, rows[0])
            writer.writeheader()
            writer.writerows(rows)
        overrides.append(f"data.{name}={json.dumps(str(folder / f'{name}.csv'))}")
    return tuple(overrides)


def _as_they_are(folder: Path) -> tuple[str, ...]:
    return ()


# Of each table: its study's folder, what writes its data, and what it changes in the recipe.
TABLES: dict[str, tuple[str, Callable[[Path], tuple[str, ...]], tuple[str, ...]]] = {
    "icd10": ("icd10", _diagnoses, ()),
    "uit_vsfc_sentiment": ("uit_vsfc", _queries, ()),
    "uit_vsfc_topic": (
        "uit_vsfc",
        _queries,
        ('task.label="topic"', 'task.labels=["0", "1", "2", "3"]'),
    ),
    "nm_appeals": ("nm_appeals", _as_they_are, ()),
    "mts_notes": ("mts_notes", _as_they_are, ()),
}
FIGURES = ("accuracy", "macro_f1", "loss_per_token", "perplexity")


def run(table: str, output: Path, seeds: int) -> list[dict]:
    """Every cell of a table; a cell that an earlier start of this program finished is not computed again."""
    study, write, changes = TABLES[table]
    recipe = Recipe.read(STUDIES / study / "recipe.toml", (*write(output / "data" / study), *changes))
    started = time.monotonic()
    compared = compare(
        recipe,
        output / table,
        epsilons=EPSILONS,
        seeds=range(seeds),
        announce=lambda text: print(f"{table}: {text}, {time.monotonic() - started:.0f} s", file=sys.stderr),
    )
    found = []
    for row in compared.rows():
        metrics = [c.metrics for c in compared.cells if (c.kind, c.epsilon) == (row.kind, row.epsilon)]
        cell = {"setting": row.setting, "epsilon": row.epsilon, "seeds": len(metrics)}
        for name in FIGURES:
            values = [one[name] for one in metrics if name in one]
            if values:
                cell |= {name: round(statistics.fmean(values), 4)}
                cell |= {f"{name}_spread": round(statistics.stdev(values), 4) if len(values) > 1 else 0.0}
        rare = [min(one["per_class"].values(), key=lambda c: c["count"]) for one in metrics if "per_class" in one]
        if rare:
            for name in ("f1", "average_precision"):
                values = [one[name] for one in rare]
                cell |= {f"rarest_{name}": round(statistics.fmean(values), 4)}
                cell |= {f"rarest_{name}_spread": round(statistics.stdev(values), 4) if len(values) > 1 else 0.0}
        found.append(cell)
    results = STUDIES / study / "results.json"
    known = json.loads(results.read_text(encoding="utf-8")) if results.exists() else {}
    known[table] = {"rows": found, "delta": compared.delta, "units": compared.units, "versions": compared.versions}
    results.write_text(json.dumps(known, indent=2) + "\n", encoding="utf-8")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tables", nargs="*", default=list(TABLES), metavar="TABLE", help=", ".join(TABLES))
    parser.add_argument("--output", type=Path, default=Path("runs/studies"))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    for table in arguments.tables:
        rows = run(table, arguments.output, arguments.seeds)
        if arguments.json:
            print(json.dumps(rows))
            continue
        print(f"\n{table}")
        for row in rows:
            shown = ("setting", *FIGURES, "rarest_f1", "rarest_average_precision")
            print("  ".join(f"{row[key]!s:>12}" for key in shown if key in row))


if __name__ == "__main__":
    main()
