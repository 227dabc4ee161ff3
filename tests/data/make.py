"""Make the run folders and the ledger of one version of dpft, which tests of later versions read.

Usage, in a folder with what ``tests.support.recipes.classifier_in`` writes: PYTHONPATH=<that version> python make.py
VERSION

The tests keep what is small: no weights, no cards, of a checkpoint only its step and count.
"""

import csv
import getpass
import os
import platform
import sys
from pathlib import Path

import transformers

import dpft
from dpft import Event, Ledger, Plan
from dpft.ledger.verify import export
from dpft.recipe import Recipe
from dpft.workflows.train import train

VERSION = sys.argv[1]
OUT = Path(VERSION)


class Interrupt(transformers.TrainerCallback):
    """The interrupt key, after two steps."""

    def on_step_end(self, args, state, control, **_):
        if state.global_step == 2:
            raise KeyboardInterrupt


def recipe(**more):
    """A recipe whose units are people; its paths are relative, because it is kept."""
    tables = {
        "subset": "lora + head",
        "model": {"path": "model"},
        "task": {"name": "sequence_classification", "labels": ["a", "b", "c"]},
        "data": {"train": "train.csv", "validation": "validation.csv", "units": 20, "unit": "patient"},
        "privacy": {"epsilon": 2.0, "delta": 1e-3, "batch_size": 5, "steps": 4},
    }
    tables["data"]["examples_per_unit"] = 2
    return Recipe.parse({**tables, **{key: {**tables.get(key, {}), **table} for key, table in more.items()}})


def main() -> None:
    assert dpft.__version__ == VERSION, dpft.__version__
    OUT.mkdir()
    getpass.getuser, platform.node = lambda: "tester", lambda: "host"
    os.environ["XDG_DATA_HOME"] = str((OUT / "home").resolve())
    os.environ["DPFT_LEDGER_KEY"] = str((OUT / "ledger.key").resolve())
    ledger = Ledger(str(OUT / "ledger.db"))
    rows = list(csv.DictReader(open("train.csv")))
    notes = ledger.create("notes", epsilon=8, delta=1e-3, unit="patient", rows=rows)
    account = {"url": f"{VERSION}/ledger.db", "dataset": "notes", "purpose": "diagnoses"}
    train(recipe(ledger=account, data={"validation_is_public": True}), OUT / "charged")
    notes.spend([Event(200, 5.0, 0.01), Event(1, 40.0, 1.0)], purpose="sampled and whole")
    notes.spend([Event(1, None, None, 0.3, 1e-9)], purpose="another tool")
    notes.amend(epsilon=9.0)
    letters = ledger.create("letters", epsilon=4, delta=1e-5)
    plan = Plan(noise_multiplier=2.0, sample_rate=0.05, steps=100, delta=1e-5, units=1000)
    run = letters.open(plan)
    run.charge(5)
    run.charge(5)
    train(recipe(run={"save_steps": 1}), OUT / "interrupted", callbacks=[Interrupt()])
    train(recipe().without_privacy(), OUT / "without-noise")
    export(ledger.store, OUT / "ledger.jsonl")


if __name__ == "__main__":
    main()
