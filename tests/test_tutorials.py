"""The tutorials of CONTRIBUTING.md as a reader does them: a task from outside, a mechanism in a copy of the tree."""

import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from tests.tasks.test_contract import text

ROOT = Path(__file__).parent.parent
CONTRIBUTING = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
EXAMPLE = ROOT / "examples" / "regression_task"
DPFT = "from dpft.cli import main; main()"


def python(*arguments, path, cwd):
    """What another Python says that finds ``path`` first."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, path)), "OMP_NUM_THREADS": "1"}
    environment["DPFT_LEDGER"] = str(cwd / "ledger.db")
    return subprocess.run([sys.executable, *arguments], cwd=cwd, env=environment, capture_output=True, text=True)


def said(done):
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


# -- a task in one file --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """A folder that has what pip writes for the example: the module and its entry points."""
    folder = tmp_path_factory.mktemp("installed")
    project = tomllib.loads((EXAMPLE / "pyproject.toml").read_text(encoding="utf-8"))
    for module in project["tool"]["setuptools"]["py-modules"]:
        shutil.copy(EXAMPLE / f"{module}.py", folder)
    name, version = project["project"]["name"], project["project"]["version"]
    info = folder / f"{name.replace('-', '_')}-{version}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    entries = project["project"]["entry-points"]["dpft.tasks"]
    (info / "entry_points.txt").write_text("[dpft.tasks]\n" + "".join(f"{k} = {v}\n" for k, v in entries.items()))
    return folder


def test_the_task_is_one_short_file_that_contributing_points_to():
    (file,) = EXAMPLE.glob("*.py")
    assert len(file.read_text(encoding="utf-8").splitlines()) < 60
    assert f"({file.relative_to(ROOT).as_posix()})" in CONTRIBUTING
    assert not any("text_regression" in path.read_text(encoding="utf-8") for path in (ROOT / "dpft").rglob("*.py"))


def test_an_installed_task_is_held_to_the_contract_without_being_named(installed):
    contract = ROOT / "tests" / "tasks" / "test_contract.py"
    assert "text_regression" not in contract.read_text(encoding="utf-8")
    chosen = ("-m", "pytest", "-p", "no:cacheprovider", "-vv", str(contract), "-k", "text_regression")
    found = said(python(*chosen, path=(installed, ROOT), cwd=ROOT))
    passed = re.findall(r"::(test_\w+)\[text_regression\] PASSED", found)
    wanted = re.findall(r"^def (test_\w+)\(made\)", contract.read_text(encoding="utf-8"), re.MULTILINE)
    assert len(wanted) > 8 and set(passed) == set(wanted)


def test_an_installed_task_trains_from_the_command_line(installed, tmp_path):
    how = dict(path=(installed, ROOT), cwd=tmp_path)
    text(tmp_path / "model")
    rows = [{"text": "w1 " * (1 + i % 9), "number": float(1 + i % 9)} for i in range(40)]
    (tmp_path / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    init = ("init", "--task", "text_regression", "--model", "model", "--data", "train.jsonl")
    said(python("-c", DPFT, *init, **how))
    assert 'name = "text_regression"' in (tmp_path / "recipe.toml").read_text(encoding="utf-8")
    settings = {
        "task.scale": "10",
        "data.validation": "train.jsonl",
        "data.units": "40",
        "privacy.delta": "0.001",
        "run.token_budget": "128",
    }
    changed = [part for key, value in settings.items() for part in ("--set", f"{key}={value}")]
    said(python("-c", DPFT, "train", "recipe.toml", *changed, "--output", "run", **how))
    metrics = json.loads((tmp_path / "run" / "private" / "metrics.json").read_text())
    assert 0 <= metrics["mae"] < 100 and metrics["examples"] == 40
    assert "ε = 3" in (tmp_path / "run" / "card.md").read_text(encoding="utf-8")


# -- a mechanism in one file ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    """A copy of the package and of the mechanisms' contract, with the tutorial's file saved where it says."""
    folder, ignored = tmp_path_factory.mktemp("tree"), shutil.ignore_patterns("__pycache__")
    for part in ("dpft", "tests/privacy", "tests/support"):
        shutil.copytree(ROOT / part, folder / part, ignore=ignored)
    for file in ("pyproject.toml", "tests/__init__.py", "tests/conftest.py"):
        shutil.copy(ROOT / file, folder / file)
    place, code = re.search(r"Save this as `(dpft/[\w/.]+)`.*?```python\n(.*?)```", CONTRIBUTING, re.DOTALL).groups()
    assert not (ROOT / place).exists()
    (folder / place).write_text(code, encoding="utf-8")
    return folder, folder / place


def contract(folder, *chosen):
    """The contract of mechanisms in a copy of the tree."""
    tests = ("tests/privacy/test_mechanisms.py", *chosen)
    return python("-m", "pytest", "-p", "no:cacheprovider", "-vv", *tests, path=(folder,), cwd=folder)


def test_a_mechanism_is_found_and_held_to_the_contract(tree):
    folder, file = tree
    name = re.search(r'name = "([\w-]+)"', file.read_text(encoding="utf-8"))[1]
    named = [path for part in ("dpft", "tests") for path in (folder / part).rglob("*.py") if name in path.read_text()]
    assert named == [file]
    code = "import inspect, dpft.privacy.mechanisms as m, sys; print(inspect.getfile(m.mechanisms()[sys.argv[1]]))"
    assert said(python("-c", code, name, path=(folder,), cwd=folder)).strip() == str(file)
    found = said(contract(folder))
    passed, others = (re.findall(rf"::(test_\w+)\[.*?\b{one}\] PASSED", found) for one in (name, "statistics"))
    assert len(passed) > 10 and sorted(passed) == sorted(others)


def test_a_mechanism_with_other_noise_than_it_states_is_caught(tree):
    """What the tutorial says of a file without the division."""
    folder, file = tree
    right = file.read_text(encoding="utf-8")
    wrong = right.replace(" / math.sqrt(2)", "")
    assert wrong != right
    try:
        file.write_text(wrong, encoding="utf-8")
        done = contract(folder, "-k", "noise_is_what_is_stated")
    finally:
        file.write_text(right, encoding="utf-8")
    failed = set(re.findall(r"\[\d-([\w-]+)\] FAILED|\[([\w-]+)-\d\] FAILED", done.stdout))
    assert done.returncode == 1 and {name for pair in failed for name in pair if name} == {"dp-sgd-two-keys"}
