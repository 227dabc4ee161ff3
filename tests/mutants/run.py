"""Apply each mutant to a copy of the tree and demand that the tests catch it.

A mutant is a patch that re-introduces one known way of breaking ε (docs/pitfalls.md). Its first lines say which, and
which tests are to find it:

    # T6: the noise ignores the clip
    # tests: tests/privacy/test_plan.py
    # audit: VIOLATION

The third line stands where the break shows from outside: there `dpft audit step` must say so, too.

Usage: python tests/mutants/run.py [NAME ...]     (exit 1 if a mutant survives or no longer applies)
"""

import os
import re
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

HERE = Path(__file__).parent
ROOT = HERE.parent.parent


AUDIT = [sys.executable, "-c", "from dpft.cli import main; main()", "audit", "step", "audit.toml", "--steps", "3000"]
RECIPE = """
subset = "lora"
model.path = "none"
task.name = "causal_lm"
data = {train = "none.csv", units = 1000}
privacy = {noise_multiplier = 1.0, delta = 1e-5, batch_size = 50, steps = 100, clip_norm = 2.0}
"""


def header(patch: Path, key: str) -> str:
    found = re.search(rf"^# {key}: (.*)$", patch.read_text(), re.MULTILINE)
    return found[1] if found else ""


def hunt(patch: Path) -> tuple[bool, str]:
    """Whether a test fails with the mutant applied, and which one does; and what the audit says, where it can see."""
    with tempfile.TemporaryDirectory() as folder:
        for part in ("dpft", "tests", "benchmarks", "pyproject.toml"):
            copy = shutil.copytree if (ROOT / part).is_dir() else shutil.copy
            copy(ROOT / part, Path(folder) / part)
        applied = subprocess.run(["git", "apply", "--verbose", str(patch)], cwd=folder, capture_output=True, text=True)
        if applied.returncode:
            return False, f"does not apply: {applied.stderr.strip().splitlines()[-1]}"
        command = [
            sys.executable,
            "-m",
            "pytest",
            "-x",
            "-q",
            "-p",
            "no:cacheprovider",
            *header(patch, "tests").split(),
        ]
        environment = {**os.environ, "PYTHONPATH": folder, "OMP_NUM_THREADS": "1"}
        result = subprocess.run(command, cwd=folder, capture_output=True, text=True, env=environment)
        wanted = header(patch, "audit")
        if wanted:
            (Path(folder) / "audit.toml").write_text(RECIPE)
            said = subprocess.run(AUDIT, cwd=folder, capture_output=True, text=True, env=environment).stdout
            if not said.startswith(wanted):
                return False, f"the audit says {said.splitlines()[0] if said else 'nothing'}"
    found = re.search(r"^FAILED (\S+)", result.stdout, re.MULTILINE)
    if result.returncode == 1 and found:
        return True, found[1] + (f"; audit: {wanted}" if wanted else "")
    return (
        False,
        "survived" if result.returncode == 0 else f"pytest ended with {result.returncode}: {result.stdout[-300:]}",
    )


def main(names: list[str]) -> int:
    patches = sorted(patch for patch in HERE.glob("*.patch") if not names or patch.stem in names)
    with ThreadPoolExecutor(max(1, (os.cpu_count() or 2))) as pool:
        results = list(pool.map(hunt, patches))
    for patch, (caught, by) in zip(patches, results, strict=True):
        row = re.search(r"^# (T\d+): (.*)$", patch.read_text(), re.MULTILINE)
        print(f"{row[1]:<4} {'caught  ' if caught else 'SURVIVED'} {patch.stem:<34} {by}")
    survivors = sum(not caught for caught, _ in results)
    print(f"{len(results) - survivors} of {len(results)} mutants caught")
    return 1 if survivors or not results else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
