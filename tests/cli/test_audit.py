"""The audit's commands."""

import json
import re
import shlex

from click.testing import CliRunner

from dpft.cli import main
from dpft.cli.audit import audit as group
from dpft.recipe import Recipe
from dpft.training.run import train


def run(command):
    return CliRunner().invoke(main, shlex.split(command)[1:])


def test_every_example_runs(recipe, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "recipe.toml").write_text(Recipe.parse(recipe).to_toml())
    train(Recipe.parse(recipe), tmp_path / "runs" / "notes")
    for command in group.commands:
        example = re.search(r"Example:\n\s+(dpft audit .*)", run(f"dpft audit {command} --help").output)[1]
        result = run(example)
        assert result.exit_code == 0, f"{example}: {result.output}"
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
