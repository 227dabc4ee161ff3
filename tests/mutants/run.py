"""Apply each mutant to a copy of the tree and demand that the tests catch it.

A mutant is a patch that re-introduces one known way of breaking ε (docs/pitfalls.md). Its first lines say which, and
which tests are to find it:

    # T6: the noise ignores the clip
    # tests: tests/privacy/test_plan.py
    # audit: VIOLATION

The third line stands where the break shows from outside: there `dpft audit step` must say so, too.

Usage: python tests/mutants/run.py [NAME ...]     (exit 1 if a mutant survives or no longer applies)
"""

import contextlib
import io
import multiprocessing
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import pytest

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
# Imported once for all mutants, and not a line of ours.
PRELOADED = ["torch", "transformers", "peft", "opacus", "datasets", "hypothesis"]
AUDIT = [sys.executable, "-c", "from dpft.cli import main; main()", "audit", "step", "audit.toml", "--steps", "3000"]
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


def header(patch: Path, key: str) -> str:
    found = re.search(rf"^# {key}: (.*)$", patch.read_text(), re.MULTILINE)
    return found[1] if found else ""


def hunt(patch: Path) -> tuple[bool, str]:
    """Whether a test fails with the mutant applied, and which one does; and what the audit says, where it can see.

    To be called in a process of its own: it imports the mutated tree.
    """
    with tempfile.TemporaryDirectory() as temporary:
        folder = os.path.realpath(temporary)
        for part in ("dpft", "tests", "benchmarks", "pyproject.toml"):
            copy = shutil.copytree if (ROOT / part).is_dir() else shutil.copy
            copy(ROOT / part, Path(folder) / part)
        applied = subprocess.run(["git", "apply", "--verbose", str(patch)], cwd=folder, capture_output=True, text=True)
        if applied.returncode:
            return False, f"does not apply: {applied.stderr.strip().splitlines()[-1]}"
        os.chdir(folder)
        os.environ["PYTHONPATH"] = folder  # of what the tests start
        sys.path.insert(0, folder)
        failure, said = FirstFailure(), io.StringIO()
        with contextlib.redirect_stdout(said):
            ended = pytest.main(["-x", "-q", "-p", "no:cacheprovider", *header(patch, "tests").split()], [failure])
        if (taken := sys.modules.get("dpft")) is not None and not taken.__file__.startswith(folder):
            return False, f"the tests took {taken.__file__}"
        wanted = header(patch, "audit")
        if wanted:
            Path("audit.toml").write_text(RECIPE)
            verdict = subprocess.run(AUDIT, capture_output=True, text=True).stdout
            if not verdict.startswith(wanted):
                return False, f"the audit says {verdict.splitlines()[0] if verdict else 'nothing'}"
        os.chdir(ROOT)
    if ended == pytest.ExitCode.TESTS_FAILED and failure.name:
        return True, failure.name + (f"; audit: {wanted}" if wanted else "")
    return False, "survived" if ended == pytest.ExitCode.OK else f"pytest ended with {ended}: {said.getvalue()[-300:]}"


def timed_hunt(patch: Path) -> tuple[bool, str, float]:
    since = time.perf_counter()
    return *hunt(patch), time.perf_counter() - since


def main(names: list[str]) -> int:
    patches = sorted(patch for patch in HERE.glob("*.patch") if not names or patch.stem in names)
    os.environ["OMP_NUM_THREADS"] = "1"
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    survivors = 0
    with ProcessPoolExecutor(os.cpu_count() or 2, context, max_tasks_per_child=1) as pool:
        for patch, (caught, by, seconds) in zip(patches, pool.map(timed_hunt, patches), strict=True):
            row = re.search(r"^# (T\d+): (.*)$", patch.read_text(), re.MULTILINE)
            survivors += not caught
            print(
                f"{row[1]:<4} {'caught  ' if caught else 'SURVIVED'} {seconds:3.0f} s {patch.stem:<34} {by}", flush=True
            )
    print(f"{len(patches) - survivors} of {len(patches)} mutants caught")
    return 1 if survivors or not patches else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
