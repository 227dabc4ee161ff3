"""Is the advice right? The plan of ``dpft plan --advise`` beside other ways to spend the same ε.

    export DPFT_MODELS=... DPFT_DATA=...
    python benchmarks/advice.py [STUDY ...] [--epsilon E] [--seeds N] [--json]

Of each study (benchmarks/studies/run.py): every method of a head, the advised one with other clips and numbers of
steps, and a LoRA in the last block with the head. The gap is how far the advice is below the best of them, in points of
accuracy. A cell that the results hold is not computed again.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from output import circumstances, deliver, options
from studies.run import TABLES

from dpft.errors import DPFTError
from dpft.recipe import Recipe
from dpft.runs.folder import RunFolder
from dpft.tasks.registry import find
from dpft.workflows.advise import advise
from dpft.workflows.setup import set_up
from dpft.workflows.train import train

RESULTS = Path(__file__).parent / "results" / "advice.json"
STUDIES = ("icd10", "uit_vsfc_sentiment", "uit_vsfc_topic", "nm_appeals", "mts_sections")
EPSILONS = (3.0, 1.0)
ADVISED = "advised"
LORA = "lora(rank=8, last_blocks=1) + head"


def candidates(recipe: Recipe) -> Iterator[tuple[str, Recipe]]:
    """The advised recipe, then others with the same ε and δ."""
    best = advise(recipe).recipe
    yield ADVISED, best
    for method in ("head-centred", "head-descent", "head-prototypes", "head-least-squares"):
        yield method, changed(best, method=method)
    for clip in (0.4, 1.2):
        yield f"clip {clip}", changed(best, clip_norm=clip)
    for steps in (32, 128):
        yield f"{steps} steps", changed(best, steps=steps)
    tables = best.model_dump() | {"subset": LORA}
    kept = {name: tables["privacy"][name] for name in ("epsilon", "delta", "adjacency")}
    yield LORA, Recipe.parse(tables | {"privacy": kept | {"plan": "auto", "epochs": 1.0}})


def changed(recipe: Recipe, **privacy: Any) -> Recipe:
    return Recipe.parse(recipe.model_dump() | {"privacy": recipe.privacy.model_dump() | privacy})


def measured(study: str, arguments: argparse.Namespace, known: list[dict]) -> Iterator[dict]:
    """The cells that are not known yet; heads share the features."""
    data = Path(arguments.work).resolve() / "data" / study
    shared = None
    for epsilon in arguments.epsilon or EPSILONS:
        recipe = changed(TABLES[study].read(data), epsilon=epsilon)
        for name, candidate in candidates(recipe):
            for seed in range(1 if name == LORA else arguments.seeds):
                setting = {"epsilon": epsilon, "candidate": name, "seed": seed}
                if (name == LORA and arguments.heads) or any(setting.items() <= cell.items() for cell in known):
                    continue
                run = candidate.model_copy(update={"run": candidate.run.model_copy(update={"seed": seed})})
                if run.learns_head:
                    shared = shared or set_up(run)
                    shared.recipe = run
                yield setting | score(run, shared if run.learns_head else None)


def score(recipe: Recipe, setup: Any) -> dict:
    """The headline figure of a run; its folder is not kept."""
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        try:
            metrics = RunFolder(train(recipe, Path(folder) / "run", setup=setup)).metrics() or {}
        except DPFTError as error:
            return {"error": str(error)}
    kind = find(recipe.task.name)
    return {
        "method": recipe.method,
        "score": round(float(metrics[kind.headline]), 4),
        "macro_f1": round(float(metrics["macro_f1"]), 4),
        "seconds": round(time.monotonic() - started, 1),
    }


def summary(cells: list[dict]) -> list[dict]:
    """For each ε the advice, the best of all candidates, and the gap in points."""
    rows = []
    for epsilon in sorted({cell["epsilon"] for cell in cells}, reverse=True):
        scores: dict[str, list[float]] = {}
        for cell in cells:
            if cell["epsilon"] == epsilon and "score" in cell:
                scores.setdefault(cell["candidate"], []).append(cell["score"])
        means = {name: statistics.fmean(some) for name, some in scores.items()}
        if ADVISED not in means:
            continue
        best = max(means, key=lambda name: means[name])
        method = next(cell["method"] for cell in cells if (cell["epsilon"], cell["candidate"]) == (epsilon, ADVISED))
        rows.append(
            {
                "epsilon": epsilon,
                "advised": method,
                "score": round(means[ADVISED], 4),
                "best": best,
                "best_score": round(means[best], 4),
                "gap": round(100 * (means[best] - means[ADVISED]), 2),
                "candidates": len(means),
            }
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("studies", nargs="*", default=list(STUDIES), metavar="STUDY", help=", ".join(STUDIES))
    parser.add_argument("--epsilon", type=float, action="append", help="by default 3 and 1")
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--heads", action="store_true", help="leave out the LoRA, which takes minutes")
    parser.add_argument("--work", type=Path, default=Path("runs/advice"), help="where the data stay")
    options(parser)
    parser.set_defaults(output=RESULTS)
    arguments = parser.parse_args()
    before = json.loads(arguments.output.read_text(encoding="utf-8")) if arguments.output.exists() else {}
    found: dict[str, Any] = {"studies": before.get("studies", {}), **circumstances()}
    for study in arguments.studies:
        cells = found["studies"].get(study, {}).get("cells", [])
        for cell in measured(study, arguments, cells):
            print(study, cell, file=sys.stderr)
            cells.append(cell)
            found["studies"][study] = {"rows": summary(cells), "cells": cells}
            arguments.output.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    lines = [
        f"{study}  {row}" for study in arguments.studies for row in found["studies"].get(study, {}).get("rows", ())
    ]
    deliver(found, arguments, "\n".join(lines))


if __name__ == "__main__":
    main()
