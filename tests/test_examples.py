"""The examples that are scripts. Those on real text run where it is given."""

import json
import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from dpft.cli import main

ROOT = Path(__file__).parent.parent
NOTES = ROOT / "examples" / "ner_notes.py"


def test_the_rules_tag_ages_doses_and_dates():
    example = runpy.run_path(str(NOTES))
    found = example["tagged"](
        "A 76-year-old, 2 weeks old once, took 2.5 mg on July 31, 2008 and 7/29/93, 1/2 a pill in May."
    )
    entities = [(word, tag) for word, tag in zip(found["words"], found["tags"], strict=True) if tag != "O"]
    assert entities == [
        ("76-year-old", "B-AGE"),
        *(("2", "B-AGE"), ("weeks", "I-AGE"), ("old", "I-AGE")),
        *(("2.5", "B-DOSE"), ("mg", "I-DOSE")),
        *(("July", "B-DATE"), ("31", "I-DATE"), (",", "I-DATE"), ("2008", "I-DATE")),
        *(("7/29/93", "B-DATE"), ("May", "B-DATE")),
    ]
    assert {tag for _, tag in entities} < set(example["LABELS"]) and len(example["LABELS"]) == 7
    assert len(NOTES.read_text(encoding="utf-8").splitlines()) < 60


@pytest.mark.slow
@pytest.mark.skipif(
    not os.environ.get("DPFT_DATA"), reason="DPFT_DATA does not name the folder with the real data sets"
)
@pytest.mark.skipif(
    not os.environ.get("DPFT_MODELS"), reason="DPFT_MODELS does not name the folder made by benchmarks/models.py"
)
def test_its_recipe_trains_on_real_notes(tmp_path):
    subprocess.run([sys.executable, str(NOTES), "--output", str(tmp_path / "ner")], check=True)
    run, changed = tmp_path / "run", ["privacy.steps=2", "privacy.batch_size=8", "data.validation_rows=20"]
    more = [part for setting in (*changed, "run.token_budget=512") for part in ("--set", setting)]
    result = CliRunner().invoke(main, ["train", str(tmp_path / "ner" / "recipe.toml"), *more, "--output", str(run)])
    assert result.exit_code == 0, result.output
    record = json.loads((run / "run.json").read_text())
    assert record["released_steps"] == 2 and record["units"] == 1201 and record["epsilon"] <= 3.0
    metrics = json.loads((run / "private" / "metrics.json").read_text())
    assert 0 <= metrics["entity_f1"] <= 1 and metrics["examples"] == 20
    assert set(metrics["per_entity"]) <= {"AGE", "DOSE", "DATE"}
