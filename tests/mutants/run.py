"""Apply each mutant to a copy of the tree and demand that the tests catch it.

A mutant is a TOML file that re-introduces one known way of breaking ε (docs/pitfalls.md) by replacing text, so that it
survives whatever moves around it:

    row = "T6"
    break = "the noise ignores the clip"
    tests = "tests/privacy/test_plan.py"    # which of them must fail
    audit = "VIOLATION"                     # where the break shows from outside: what `dpft audit step` must say

    [[edit]]
    file = "dpft/privacy/mechanisms/mechanism.py"
    symbol = "Mechanism.noise_std"          # the function, class or method that holds the text once; "" for the file
    old = '''self.gradient_noise_multiplier * clip.sensitivity'''
    new = '''self.gradient_noise_multiplier'''

Usage: python tests/mutants/run.py [NAME ...]     (exit 1 if a mutant survives or no longer applies)
"""

import ast
import contextlib
import gc
import io
import multiprocessing
import os
import shutil
import sys
import tempfile
import time
import tomllib
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import pytest

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
# Imported once for all mutants, and not a line of ours.
PRELOADED = ["torch", "transformers", "peft", "opacus", "datasets", "hypothesis", "transformers.trainer"]
PRELOADED += ["dp_accounting", "scipy.stats", "sqlalchemy.dialects.sqlite", "alembic.command", "matplotlib.pyplot"]
PRELOADED += [f"transformers.models.{name}.modeling_{name}" for name in ("bert", "gpt2", "llama", "t5", "vit")]
# A warning, such as that Hypothesis was imported before pytest, is not what must catch a mutant.
OPTIONS = ["-x", "-q", "-p", "no:cacheprovider", "-W", "default"]
AUDIT = ["audit", "step", "audit.toml", "--steps", "3000"]
RECIPE = """
subset = "lora"
model.path = "none"
task.name = "causal_lm"
data = {train = "none.csv", units = 1000}
privacy = {noise_multiplier = 1.0, delta = 1e-5, batch_size = 50, steps = 100, clip_norm = 2.0}
"""


class FirstFailure:
    """A pytest plugin."""

    name = ""

    def pytest_runtest_logreport(self, report) -> None:
        if report.failed and not self.name:
            self.name = report.nodeid


def read(path: Path) -> dict:
    return tomllib.loads(path.read_text(encoding="utf-8"))


def mutated(text: str, edit: dict) -> str:
    """The file's ``text`` after an edit.

    Raises:
        ValueError: the file lacks the symbol, or the symbol does not hold the old text exactly once.
    """
    start, end = _span(text, edit["symbol"])
    count = text[start:end].count(edit["old"])
    if count != 1:
        raise ValueError(f"{edit['file']} {edit['symbol']} holds the old text {count} times")
    return text[:start] + text[start:end].replace(edit["old"], edit["new"]) + text[end:]


def _span(text: str, symbol: str) -> tuple[int, int]:
    """Where the symbol's source begins and ends, decorators included."""
    lines = text.splitlines(keepends=True)
    first, last, body = 1, len(lines), ast.parse(text).body if symbol else []
    for part in symbol.split(".") if symbol else ():
        node = next((node for node in body if getattr(node, "name", None) == part), None)
        if node is None:
            raise ValueError(f"there is no {symbol}")
        first = min(inner.lineno for inner in (node, *node.decorator_list))
        last, body = node.end_lineno, node.body
    return len("".join(lines[: first - 1])), len("".join(lines[:last]))


def hunt(path: Path) -> tuple[bool, str]:
    """Whether a test fails with the mutant applied, and which one does; and what the audit says, where it can see.

    To be called in a process of its own: it imports the mutated tree.
    """
    gc.freeze()  # what is preloaded stays, and the collector need neither look through it nor copy its pages
    with tempfile.TemporaryDirectory() as temporary:
        folder = os.path.realpath(temporary)
        for part in ("dpft", "tests", "benchmarks", "pyproject.toml"):
            copy = shutil.copytree if (ROOT / part).is_dir() else shutil.copy
            copy(ROOT / part, Path(folder) / part)
        mutant = read(path)
        try:
            for edit in mutant["edit"]:
                file = Path(folder) / edit["file"]
                file.write_text(mutated(file.read_text(encoding="utf-8"), edit), encoding="utf-8")
        except (ValueError, OSError) as error:
            return False, f"does not apply: {error}"
        os.chdir(folder)
        os.environ["PYTHONPATH"] = folder  # of what the tests start
        sys.path.insert(0, folder)
        failure, said = FirstFailure(), io.StringIO()
        with contextlib.redirect_stdout(said):
            ended = pytest.main([*OPTIONS, *mutant["tests"].split()], [failure])
        if (taken := sys.modules.get("dpft")) is not None and not taken.__file__.startswith(folder):
            return False, f"the tests took {taken.__file__}"
        wanted = mutant.get("audit")
        if wanted:
            Path("audit.toml").write_text(RECIPE)
            verdict = audited()
            if not verdict.startswith(wanted):
                return False, f"the audit says {verdict.splitlines()[0] if verdict else 'nothing'}"
        os.chdir(ROOT)
    if ended == pytest.ExitCode.TESTS_FAILED and failure.name:
        return True, failure.name + (f"; audit: {wanted}" if wanted else "")
    return False, "survived" if ended == pytest.ExitCode.OK else f"pytest ended with {ended}: {said.getvalue()[-300:]}"


def audited() -> str:
    """What the mutated ``dpft audit step`` prints; it is imported already."""
    from dpft.cli import main

    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(io.StringIO()), contextlib.suppress(SystemExit):
        main(AUDIT)
    return said.getvalue()


def timed_hunt(path: Path) -> tuple[bool, str, float]:
    since = time.perf_counter()
    return *hunt(path), time.perf_counter() - since


def main(names: list[str]) -> int:
    paths = sorted(path for path in HERE.glob("*.toml") if not names or path.stem in names)
    os.environ["OMP_NUM_THREADS"] = "1"
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    survivors = 0
    with ProcessPoolExecutor(os.cpu_count() or 2, context, max_tasks_per_child=1) as pool:
        for path, (caught, by, seconds) in zip(paths, pool.map(timed_hunt, paths), strict=True):
            survivors += not caught
            print(
                f"{read(path)['row']:<4} {'caught  ' if caught else 'SURVIVED'} {seconds:3.0f} s {path.stem:<34} {by}",
                flush=True,
            )
    print(f"{len(paths) - survivors} of {len(paths)} mutants caught")
    return 1 if survivors or not paths else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
