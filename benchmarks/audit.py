"""What canaries show of real models: trained without privacy, and under ε = 1.

    DPFT_DATA=... DPFT_MODELS=... python benchmarks/audit.py --json [--output FILE] [--set NAME] [--work FOLDER]

diagnoses  all-MiniLM-L6-v2, ICD-10-CM diagnoses (texts are public), random words with a random chapter as canaries
notes      SmolLM2-135M, clinical notes of mts_dialog, random words as canaries
secrets    the same with access codes of patients as canaries, and their exposure

Each trains the same recipe twice on the same canaries, with ε = 1 and without privacy. The recipes learn by heart: many
passes over few records, which is where leaks show best.
"""

import argparse
import csv
import os
import sys
import tempfile
from pathlib import Path

from output import circumstances, deliver, options

os.environ.setdefault("HF_HUB_OFFLINE", "1")
SETS = {"diagnoses": ("random-tokens", 400), "notes": ("random-tokens", 120), "secrets": ("secret", 120)}


def diagnoses(folder: Path) -> dict:
    from dpft.workflows.demo import write_data

    train, _, chapters = write_data(folder, 1_000)
    return {
        "subset": "lora(rank=16, last_blocks=2) + head",
        "model": {"path": "$DPFT_MODELS/minilm-l6"},
        "task": {
            "name": "sequence_classification",
            "text": "diagnosis",
            "label": "chapter",
            "labels": chapters,
            "max_length": 32,
        },
        "data": {"train": str(train), "units": 1_000},
        "privacy": {"epsilon": 1.0, "delta": 1e-5, "batch_size": 250, "steps": 80},
        "optimizer": {"learning_rate": 3e-3},
    }


def notes(folder: Path) -> dict:
    with open(Path(os.environ["DPFT_DATA"], "mts_dialog", "train.csv"), newline="", encoding="utf-8") as file:
        rows = [row["section_text"] for row in csv.DictReader(file)][:200]
    with open(folder / "train.csv", "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([("text",), *((row,) for row in rows)])
    return {
        "subset": "lora(rank=16, last_blocks=6)",
        "model": {"path": "$DPFT_MODELS/smollm2-135m"},
        "task": {"name": "causal_lm", "max_length": 32},
        "data": {"train": str(folder / "train.csv"), "units": 200},
        "privacy": {"epsilon": 1.0, "delta": 1e-5, "batch_size": 100, "steps": 40},
        "optimizer": {"learning_rate": 5e-3},
    }


def audited(name: str, folder: Path) -> dict:
    from dataclasses import asdict

    from dpft.audit.canaries import Planting
    from dpft.audit.exposure import audit_exposure
    from dpft.audit.game import BASELINE, Watch, audit_run
    from dpft.audit.report import describe
    from dpft.recipe import Recipe

    folder.mkdir(parents=True, exist_ok=True)
    recipe = Recipe.parse((diagnoses if name == "diagnoses" else notes)(folder))
    kind, canaries = SETS[name]
    found = audit_run(
        recipe, folder / "run", Planting(canaries=canaries, kind=kind), baseline=True, watch=Watch(announce=say)
    )
    say(describe(found))
    plain = folder / "run" / "private" / BASELINE
    row = {"set": name, "recipe": recipe.model_dump(), "private": found.json(), "plain": read(plain / "audit.json")}
    if kind == "secret":
        row["exposure"] = {"private": asdict(audit_exposure(folder / "run", secrets=30))}
        coins = plain / "private" / "canaries.json"
        coins.parent.mkdir(exist_ok=True)
        coins.write_bytes((folder / "run" / "private" / "canaries.json").read_bytes())
        row["exposure"]["plain"] = asdict(audit_exposure(plain, secrets=30))
    return row


def read(path: Path) -> dict:
    import json

    return json.loads(path.read_text())


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--set", action="append", choices=list(SETS))
    parser.add_argument("--work", type=Path, help="where the runs are kept; by default nowhere")
    options(parser)
    arguments = parser.parse_args()
    missing = [name for name in ("DPFT_DATA", "DPFT_MODELS") if name not in os.environ]
    if missing:
        sys.exit(
            f"{' and '.join(missing)} must name the folders with the sets and the models (see benchmarks/models.py)"
        )
    with tempfile.TemporaryDirectory() as temporary:
        work = arguments.work or Path(temporary)
        rows = [audited(name, work / name) for name in arguments.set or SETS]
    shown = {row["set"]: [row[side]["epsilon_lower_bound"] for side in ("plain", "private")] for row in rows}
    lines = [
        f"{name}: ε ≥ {plain:.2f} without privacy, ε ≥ {private:.2f} under ε = 1"
        for name, (plain, private) in shown.items()
    ]
    deliver({"rows": rows, **circumstances()}, arguments, "\n".join(lines))


if __name__ == "__main__":
    main()
