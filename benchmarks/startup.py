"""How long commands take on a small model: wall and CPU seconds, the least of several runs.

python benchmarks/startup.py --runs 5 --json
"""

import argparse
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from output import circumstances, deliver, options

sys.path.insert(0, str(Path(__file__).parent.parent))  # for the recipe that the tests use

COMMANDS = {
    "help": ["--help"],
    "plan": "plan --noise-multiplier 1.0 --sample-rate 0.02 --steps 500 --delta 1e-5".split(),
    "preflight": ["preflight", "recipe.toml"],
    "train": ["train", "recipe.toml", "--output", "run"],
}
ENTRY = "import sys; from dpft.cli import main; main(sys.argv[1:])"


def prepare(folder: Path) -> None:
    from dpft.recipe import Recipe
    from tests.support.recipes import classifier_in

    (folder / "recipe.toml").write_text(Recipe.parse(classifier_in(folder)).to_toml(), encoding="utf-8")


def once(command: list[str], folder: Path) -> tuple[float, float]:
    """Wall and CPU seconds of one run; ``--output`` is fresh."""
    with tempfile.TemporaryDirectory(dir=folder) as fresh:
        command = [str(Path(fresh) / "run") if word == "run" else word for word in command]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        cpu, start = _cpu_of_children(), time.perf_counter()
        subprocess.run(
            [sys.executable, "-c", ENTRY, *command], cwd=folder, env=environment, check=True, capture_output=True
        )
        return time.perf_counter() - start, _cpu_of_children() - cpu


def _cpu_of_children() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=5)
    options(parser)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        prepare(folder)
        times: dict[str, list[tuple[float, float]]] = {command: [] for command in COMMANDS}
        for _ in range(arguments.runs):  # in turn, so that a busy machine is busy for each of them
            for command, words in COMMANDS.items():
                times[command].append(once(words, folder))
    found = {
        command: {"wall_s": min(wall for wall, _ in some), "cpu_s": min(cpu for _, cpu in some)}
        for command, some in times.items()
    }
    text = "\n".join(f"{name:<10} {row['wall_s']:5.1f} s, {row['cpu_s']:5.1f} s of CPU" for name, row in found.items())
    deliver({"runs": arguments.runs, "commands": found, **circumstances()}, arguments, text)


if __name__ == "__main__":
    main()
