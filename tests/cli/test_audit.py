"""The audit's commands."""

import json
import os
import re
import shlex
import sys
from pathlib import Path

from click.testing import CliRunner

from dpft.audit.canaries import KINDS
from dpft.cli import main
from dpft.cli.audit import audit as group
from dpft.recipe import Recipe
from dpft.workflows.train import train


def run(command):
    return CliRunner().invoke(main, shlex.split(command)[1:])


TRAIN = """
import sys, transformers
data, out = sys.argv[1:]
assert len(open(data).read().splitlines()) > 40
transformers.AutoModelForSequenceClassification.from_pretrained("model", num_labels=3).save_pretrained(out)
"""


def test_every_example_runs(recipe, language, tmp_path, monkeypatch):
    classes, words = tmp_path / "classes", tmp_path / "words"
    for folder, tables in ((classes, recipe), (words, language)):
        folder.mkdir()
        (folder / "recipe.toml").write_text(Recipe.parse(tables).to_toml())
        for name in ("train.csv", "validation.csv", "model"):
            (folder / name).symlink_to(tables["model"]["path"].removesuffix("model") + name)
    (classes / "train.py").write_text(TRAIN)
    train(Recipe.parse(recipe), classes / "runs" / "notes")
    # The example says `python`: the one that runs these tests, whatever the shell would find.
    monkeypatch.setenv("PATH", str(Path(sys.executable).parent), prepend=os.pathsep)
    monkeypatch.chdir(words)
    assert run("dpft audit run recipe.toml --output runs/secrets --kind secret --canaries 20").exit_code == 0
    for command in group.commands:
        monkeypatch.chdir(words if command == "exposure" else classes)
        example = re.search(r"Example:\n\s+(dpft audit .*)", run(f"dpft audit {command} --help").output)[1]
        result = run(example)
        assert result.exit_code == 0, f"{example}: {result.output}"
        if "--output" not in example:  # what writes a folder is asked for JSON below
            assert json.loads(run(f"{example} --json").stdout)


def test_bounds_print_the_known_number():
    command = "dpft audit bounds --canaries 1000 --guesses 100 --correct 75 --delta 1e-4 --significance 0.05 --json"
    found = json.loads(run(command).stdout)
    assert round(found["epsilon_lower_bound"], 3) == 0.673 and found["ceiling"] > 5 and "Steinke" in found["method"]
    gaussian = json.loads(run(command + " --method f-dp").stdout)
    assert gaussian["epsilon_lower_bound"] > found["epsilon_lower_bound"]


def test_a_contradiction_ends_with_exit_code_1(recipe, tmp_path):
    folder = train(Recipe.parse(recipe), tmp_path / "run")
    facts = json.loads((folder / "run.json").read_text())
    (folder / "run.json").write_text(json.dumps({**facts, "epsilon": 0.1}))
    result = run(f"dpft audit spending {folder}")
    assert result.exit_code == 1 and "VIOLATION" in result.output and "states ε = 0.1" in result.output


def test_the_kinds_of_canaries_are_those_that_can_be_made():
    for command in ("run", "command"):
        (kind,) = (option for option in group.commands[command].params if option.name == "kind")
        assert tuple(kind.type.choices) == KINDS
