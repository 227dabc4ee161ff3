"""The command line: one sentence for every mistake, JSON where one reads, and help whose example works."""

import json
import re
import shlex
import subprocess
import sys

import pytest
from click.testing import CliRunner

from dpft.cli import COMMANDS, main


def run(*arguments):
    return CliRunner().invoke(main, list(arguments))


def example_of(command):
    text = run(command, "--help").output
    return shlex.split(re.search(r"Example:\n\s+(dpft .*(?:\n .*)?)\n\n", text)[1])


def test_plan_finds_epsilon():
    result = run(*"plan --noise-multiplier 1.0 --sample-rate 0.02 --steps 500 --delta 1e-5 --json".split())
    found = json.loads(result.stdout)
    assert found["epsilon"] == pytest.approx(2.773, rel=5e-3) and found["epsilon_rdp"] == pytest.approx(3.144, rel=5e-3)
    assert set(found) >= {
        "epsilon",
        "epsilon_rdp",
        "noise_multiplier",
        "sample_rate",
        "steps",
        "delta",
        "adjacency",
        "unit",
    }


def test_plan_finds_the_noise():
    found = json.loads(
        run(*"plan --epsilon 3 --delta 1e-6 --units 50000 --batch-size 256 --epochs 3 --json".split()).stdout
    )
    assert found["steps"] == 586 and 2.98 < found["epsilon"] <= 3.0


@pytest.mark.parametrize("command", ["plan", "init", "params", "preflight", "report", "train", "compare", "sweep"])
def test_the_example_of_every_help_runs(command, in_folder):
    if command == "report":
        assert run("train", "recipe.toml", "--output", "runs/notes").exit_code == 0
    words = example_of(command)
    words = [
        "1" if word == "3" and before == "--seeds" else word for before, word in zip(["", *words], words, strict=False)
    ]
    result = run(*words[1:])
    assert result.exit_code == 0, result.output


def test_every_command_has_an_example():
    for command in COMMANDS:
        assert example_of(command)[:2] == ["dpft", command]
    assert "Example:" in run("--help").output


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ("plan --epsilon 3 --delta 1e-3 --units 5000 --batch-size 10 --steps 5", "publishing a random unit"),
        ("plan --epsilon 3 --delta 1e-6", "No sampling rate"),
        ("train nowhere.toml --output x", "no recipe nowhere.toml"),
        ("report .", "no finished run"),
        ("params recipe.toml --set subset=tail", "'tail' is no part"),
        ("preflight recipe.toml --set data.train=gone.csv", "no data at gone.csv"),
        ("init --task causal_lm --model x --output recipe.toml", "exists already"),
        ("plan --sample-rate 0 --epochs 3 --delta 1e-5 --noise-multiplier 1", "sample_rate is 0"),
        ("plan --epochs inf --sample-rate 0.1 --delta 1e-5 --noise-multiplier 1", "epochs is inf"),
        ("plan --epsilon 1e6 --sample-rate 0.1 --steps 10 --delta 1e-5", "epsilon is 1e+06, which protects nobody"),
    ],
)
def test_a_mistake_is_one_sentence_and_no_traceback(arguments, said, in_folder):
    result = run(*shlex.split(arguments))
    assert result.exit_code == 1
    assert said in result.stderr and result.stderr.count("\n") == 1 and "Traceback" not in result.output


def test_wrong_usage_exits_with_2():
    assert run("plan", "--epsilon", "x", "--delta", "1e-5").exit_code == 2
    assert run("nothing").exit_code == 2


def test_a_spent_budget_exits_with_3(in_folder):
    assert run("train", "recipe.toml", "--output", "x", "--set", "run.save_steps=2").exit_code == 0
    result = run("train", "recipe.toml", "--output", "x", "--resume", "--set", "run.save_steps=2")
    assert result.exit_code == 3 and "nothing is left to resume" in result.stderr


def test_preflight_as_json(in_folder):
    found = json.loads(run("preflight", "recipe.toml", "--json").stdout)
    assert found["exact"] is True and found["isolated"] is True
    assert found["max_relative_error"] < 1e-4 and found["trainable_parameters"] > 0


def test_params_counts_what_trains(in_folder):
    found = json.loads(run("params", "recipe.toml", "--json", "--set", "subset=layers('classifier.*')").stdout)
    assert found["trainable_parameters"] == 16 * 3 + 3 == sum(p["count"] for p in found["parameters"])
    assert {p["technique"] for p in found["parameters"]} == {"rule"}
    assert "of" in run("params", "recipe.toml").stdout


def test_a_fresh_recipe_is_valid_and_commented(in_folder):
    from dpft.recipe import Recipe
    from dpft.tasks.registry import names

    for task in names():
        assert run("init", "--task", task, "--model", "m", "--output", f"{task}.toml").exit_code == 0
        text = (in_folder / f"{task}.toml").read_text()
        assert Recipe.read(in_folder / f"{task}.toml").task.name == task
        assert text.count("#") > 15


def test_train_prints_json(in_folder):
    result = run("train", "recipe.toml", "--output", "x", "--json")
    found = json.loads(result.stdout)
    assert found["epsilon"] <= 3 and "accuracy" in found["metrics"] and found["folder"] == "x"


def test_compare_composes_what_it_spends(in_folder):
    result = run("compare", "recipe.toml", "--output", "x", "--epsilon", "2", "--epsilon", "1", "--json")
    assert result.exit_code == 0, (result.output, result.exception)
    found = json.loads(result.stdout)
    assert [row["setting"] for row in found["rows"]] == ["untouched", "non-private", "ε = 2", "ε = 1"]
    assert 2.0 < found["composed_epsilon"] < 3.0
    again = json.loads(
        run("compare", "recipe.toml", "--output", "x", "--epsilon", "2", "--epsilon", "1", "--json").stdout
    )
    assert again["rows"] == found["rows"]  # what is there is not trained, and not paid for, again


def test_help_does_not_wait_for_torch():
    code = "import sys; from click.testing import CliRunner; from dpft.cli import main; CliRunner().invoke(main, ['--help']); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
