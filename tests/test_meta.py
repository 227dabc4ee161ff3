"""The project against its own words: imports, public names, documents, commands."""

import ast
import os
import re
import subprocess
import sys
import tomllib
from importlib import import_module
from pathlib import Path

import pytest

import dpft

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "tests" / "mutants"))
mutants = import_module("run")
LAYERS = [
    "errors",
    "values",
    "privacy",
    "ledger",
    "recipe",
    "runs",
    "subset",
    "gradients",
    "tasks",
    "training",
    "report",
    "workflows",
    "audit",
    "cli",
]
# recipe is checked against the subset's grammar, and takes [task] from the task.
EXCEPTIONS = {("recipe", "subset"), ("recipe", "tasks")}


def imports(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)


def modules():
    return [path for path in (ROOT / "dpft").rglob("*.py") if path.name != "__init__.py" or path.parent.name != "dpft"]


def test_text_files_are_utf8_on_every_system():
    for path in modules():
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.Call):
                continue
            binary = any(isinstance(a, ast.Constant) and a.value in ("rb", "wb", "ab", "xb") for a in node.args[1:2])
            opens = getattr(node.func, "id", "") == "open" and not binary
            if opens or getattr(node.func, "attr", "") in ("read_text", "write_text"):
                assert any(keyword.arg == "encoding" for keyword in node.keywords), f"{path}:{node.lineno}"


def test_imports_run_one_way():
    for path in modules():
        here = path.relative_to(ROOT / "dpft").parts[0].removesuffix(".py")
        for module in imports(path):
            if module.startswith("dpft."):
                there = module.split(".")[1]
                allowed = LAYERS.index(there) <= LAYERS.index(here) or (here, there) in EXCEPTIONS
                assert allowed, f"{path} imports {module}"


@pytest.mark.parametrize(
    ("library", "homes"),
    [
        ("peft", {"subset"}),
        ("opacus", {"gradients", "privacy"}),
        ("dp_accounting", {"privacy"}),
        ("click", {"cli"}),
        ("rich", {"cli"}),
        ("cryptography", {"privacy", "ledger"}),
        ("sqlalchemy", {"ledger"}),
        ("alembic", {"ledger"}),
        ("matplotlib", {"report"}),
        ("ray", {"workflows"}),
        ("rouge_score", {"tasks"}),
        ("sacrebleu", {"tasks"}),
    ],
)
def test_one_door_for_each_library(library, homes):
    found = {
        path.relative_to(ROOT / "dpft").parts[0]
        for path in modules()
        if any(m.split(".")[0] == library for m in imports(path))
    }
    assert found <= homes


def test_the_report_needs_no_torch():
    code = "import sys; import dpft.report; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


def test_every_public_name_exists_and_has_a_docstring():
    assert sorted(dpft.__all__) == dpft.__all__
    for name in dpft.__all__:
        assert getattr(dpft, name).__doc__, name
    with pytest.raises(AttributeError):
        _ = dpft.nothing


def test_type_checkers_are_told_the_names_that_python_finds():
    tree = ast.parse((ROOT / "dpft" / "__init__.py").read_text())
    block = next(node for node in tree.body if isinstance(node, ast.If))
    told = {alias.asname: node.module for node in block.body for alias in node.names}
    assert told == dpft._HOMES
    assert (ROOT / "dpft" / "py.typed").exists()


def test_files_stay_small():
    for path in modules():
        assert len(path.read_text().splitlines()) <= 400, path


def test_generated_documents_are_up_to_date():
    result = subprocess.run([sys.executable, "docs/generate.py", "--check"], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr


def test_every_pitfall_names_tests_that_exist_and_every_mutant_a_pitfall():
    rows = tomllib.loads((ROOT / "docs" / "pitfalls.toml").read_text())
    assert list(rows) == [f"T{i}" for i in range(1, 25)]
    for row in rows.values():
        assert all(one["title"] and one["who"] for one in (row, *row.get("seen", ())))
        assert {one["severity"] for one in (row, *row.get("seen", ()))} <= {"low", "medium", "high", "critical"}
        for test in row["tests"]:
            file, name = test.split("::")
            assert f"def {name}(" in (ROOT / file).read_text(), test
    mutated = {mutants.read(path)["row"] for path in (ROOT / "tests" / "mutants").glob("*.toml")}
    assert mutated <= set(rows)
    required = {f"T{i}" for i in range(1, 25)}
    assert required <= mutated


@pytest.mark.parametrize("path", sorted((ROOT / "tests" / "mutants").glob("*.toml")), ids=lambda path: path.stem)
def test_every_mutant_still_applies(path):
    mutant = mutants.read(path)
    assert path.stem.startswith(mutant["row"] + "-") and mutant["break"] and mutant["edit"]
    for test in mutant["tests"].split():
        assert (ROOT / test.split("::")[0]).exists(), test
    texts = {}
    for edit in mutant["edit"]:
        file = edit["file"]
        texts[file] = mutants.mutated(texts.get(file) or (ROOT / file).read_text(encoding="utf-8"), edit)
    for file, text in texts.items():
        assert text != (ROOT / file).read_text(encoding="utf-8")
        if file.endswith(".py"):
            ast.parse(text)


def test_links_in_documents_lead_somewhere():
    for path in [
        ROOT / "README.md",
        ROOT / "CONTRIBUTING.md",
        *(ROOT / "docs").rglob("*.md"),
        *(ROOT / "benchmarks").rglob("*.md"),
    ]:
        for target in re.findall(r"\]\(([^)#]+)", path.read_text()):
            if not target.startswith("http"):
                assert (path.parent / target).exists(), f"{path}: {target}"


def test_the_readme_commands_are_the_makefile_targets():
    readme, makefile = (ROOT / "README.md").read_text(), (ROOT / "Makefile").read_text()
    for target in re.findall(r"^make (\w+)", readme, re.MULTILINE):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE)
    assert "make test" in (ROOT / ".ci" / "run").read_text()


def test_constraints_pin_what_the_project_needs():
    pinned = {
        line.split("==")[0].lower().replace("_", "-")
        for line in (ROOT / "constraints.txt").read_text().splitlines()
        if "==" in line
    }
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    for requirement in project["dependencies"] + project["optional-dependencies"]["dev"]:
        name = re.match(r"[\w-]+", requirement)[0].lower()
        assert name == "dpft" or name in pinned, name
    assert dpft.__version__ == project["version"]


@pytest.mark.slow
def test_the_readme_example_runs(tmp_path):
    code = re.search(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)[1]
    assert len([line for line in code.splitlines() if line.strip()]) <= 15
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    result = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "(ε = 3, δ = 1e-05)" in result.stdout and (tmp_path / "run" / "weights" / "adapter_config.json").exists()
