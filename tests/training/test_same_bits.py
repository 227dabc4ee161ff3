"""Nothing that is released changes by itself: seeded runs give, bit for bit, the weights that they gave before."""

import hashlib
import json
import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import dpft
from tests.support.recipes import classifier_in, language_in

ROOT = Path(__file__).parent.parent.parent
HASHES = Path(__file__).with_name("same_bits.json")
MADE_WITH = "2.13."
# Arithmetic that every x86-64 processor does alike: without it a wider one adds in another order.
ALIKE = {
    "ATEN_CPU_CAPABILITY": "default",
    "MKL_CBWR": "COMPATIBLE",
    "ONEDNN_MAX_CPU_ISA": "SSE41",
    "OMP_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
}
RUNS = {
    "classifier, lora + head": (classifier_in, {}),
    "classifier, all, with dropout": (classifier_in, {"subset": "all", "model.dropout": True}),
    "classifier, patients": (classifier_in, {"data.unit": "patient", "data.units": 12, "privacy.batch_size": 4}),
    "classifier, several rows of a patient": (
        classifier_in,
        {"data.unit": "patient", "data.units": 12, "privacy.batch_size": 4, "data.examples_per_unit": 3},
    ),
    "classifier, automatic clipping": (classifier_in, {"privacy.clipping": "automatic"}),
    "classifier, norms + bias, replace one": (
        classifier_in,
        {"subset": "norms + bias", "privacy.adjacency": "replace-one"},
    ),
    "classifier, sparse": (classifier_in, {"subset": "sparse(fraction=0.05)"}),
    "classifier, head over a kept prefix": (classifier_in, {"subset": "head", "run.frozen_prefix": "on"}),
    "language, all": (language_in, {}),
    "language, last block": (language_in, {"subset": "last_blocks(1)"}),
}


def trained(name: str, folder: Path) -> str:
    """SHA-256 of the names and values of a seeded run's weights."""
    make, changes = RUNS[name]
    tables = make(folder / "data")
    tables["run"] = {"token_budget": 128}  # what is timed would cut micro-batches by the machine's speed
    for key, value in changes.items():
        *parents, last = key.split(".")
        table = tables
        for parent in parents:
            table = table.setdefault(parent, {})
        table[last] = value
    run = dpft.train(dpft.Recipe.parse(tables), folder / "run", randomness=dpft.SeededRandomness(7))
    found = hashlib.sha256()
    for file in sorted((run / "weights").glob("*.safetensors")):
        for key, value in sorted(load_file(file).items()):
            found.update(key.encode() + value.contiguous().numpy().tobytes())
    return found.hexdigest()


@pytest.fixture(scope="module")
def found(tmp_path_factory) -> dict[str, str]:
    """The hashes of all runs, made by one process that does its arithmetic alike on every machine."""
    code = f"from tests.training.test_same_bits import main; main({str(tmp_path_factory.mktemp('runs'))!r})"
    command = [sys.executable, "-W", "ignore", "-c", code]
    done = subprocess.run(command, env=os.environ | ALIKE, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def main(folder: str) -> None:
    print(json.dumps({name: trained(name, Path(folder) / str(i)) for i, name in enumerate(RUNS)}))


@pytest.mark.skipif(
    platform.machine() not in ("x86_64", "AMD64") or not torch.__version__.startswith(MADE_WITH),
    reason=f"the bits were recorded with torch {MADE_WITH} on x86-64",
)
@pytest.mark.parametrize("name", RUNS)
def test_a_seeded_run_gives_the_same_bits_as_ever(name, found):
    assert found[name] == json.loads(HASHES.read_text(encoding="utf-8"))[name]
