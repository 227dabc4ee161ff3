"""Real pre-trained models on real text: the demo's encoder everywhere, the rest where its folders are given."""

import json
import os
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from dpft.cli import main
from dpft.gradients.engine import Engine
from dpft.gradients.preflight import preflight
from dpft.recipe import Recipe
from dpft.training.batches import Examples
from dpft.workflows.demo import diagnoses, model_path, write_data
from dpft.workflows.setup import set_up
from dpft.workflows.train import train

pytestmark = pytest.mark.slow
DATA = os.environ.get("DPFT_DATA")
MODELS = os.environ.get("DPFT_MODELS")
needs_data = pytest.mark.skipif(not DATA, reason="DPFT_DATA does not name the folder with the real data sets")
needs_models = pytest.mark.skipif(
    not MODELS, reason="DPFT_MODELS does not name the folder made by benchmarks/models.py"
)


def recipe(subset, model, task, data, *, more=None, **privacy):
    settings = {"epsilon": 3.0, "delta": 1e-5, "batch_size": 24, "steps": 2, "clipping": "automatic", **privacy}
    model = {"path": model, **(more or {})}
    run = {"token_budget": 128}  # what "auto" finds is tested on models that are tried faster
    return Recipe.parse(dict(subset=subset, model=model, task=task, data=data, privacy=settings, run=run))


def checked(recipe):
    """What the preflight says of a recipe's first examples."""
    setup = set_up(recipe, with_validation=False)
    examples = Examples.encode(setup.train.select(range(100)), setup.task)
    with Engine(setup.model, recipe.plan()) as engine:
        return preflight(
            engine, lambda batch: setup.task.losses(setup.model, setup.task.collate(batch)), examples.spread()
        )


@pytest.fixture(scope="module")
def icd(tmp_path_factory):
    train_file, validation, chapters = write_data(tmp_path_factory.mktemp("icd"), 2_000)
    return (
        {
            "name": "sequence_classification",
            "text": "diagnosis",
            "label": "chapter",
            "labels": chapters,
            "max_length": 48,
        },
        {"train": str(train_file), "validation": str(validation), "units": 2_000},
    )


def test_there_are_as_many_diagnoses_as_the_code_book_has():
    rows = diagnoses()
    assert len(rows) == 74_736 and len({chapter for _, chapter in rows}) == 22


@pytest.mark.parametrize(
    "subset", ["lora(targets='all-linear') + head", "bias", "norms + head", "last_blocks(1)", "all"]
)
def test_a_real_encoder_is_exact(icd, subset):
    task, data = icd
    found = checked(recipe(subset, model_path(), task, data, noise_multiplier=1.0, epsilon=None))
    assert found.exact and found.isolated and found.max_relative_error < 1e-4


@needs_models
@needs_data
@pytest.mark.parametrize(
    "subset", ["lora(targets='all-linear')", "norms", "last_blocks(1)", "sparse(fraction=0.001) + ia3"]
)
def test_a_real_language_model_is_exact_on_clinical_notes(subset):
    task = {"name": "causal_lm", "prompt": "dialogue", "response": "section_text", "max_length": 256}
    data = {"train": "$DPFT_DATA/mts_dialog/train.csv", "units": 1_200}
    found = checked(recipe(subset, "$DPFT_MODELS/smollm2-135m", task, data, noise_multiplier=1.0, epsilon=None))
    assert found.exact and found.isolated and found.max_relative_error < 1e-4


@needs_models
@needs_data
@pytest.mark.parametrize("model", [{"quantize": "4bit"}, {"quantize": "8bit"}, {"dtype": "bfloat16"}])
def test_lora_on_a_quantized_or_bf16_base_is_exact_and_trains(model, tmp_path):
    task = {"name": "causal_lm", "text": "section_text", "max_length": 32}
    data = {"train": "$DPFT_DATA/mts_dialog/train.csv", "units": 1_200}
    made = recipe("lora(rank=2, last_blocks=2)", "$DPFT_MODELS/smollm2-135m", task, data, more=model, batch_size=3)
    folder = train(made, tmp_path / "run")
    run = json.loads((folder / "run.json").read_text())
    assert run["released_steps"] == 2 and (folder / "weights" / "adapter_model.safetensors").exists()
    kept = json.loads((folder / "private" / "preflight.json").read_text())
    assert kept["findings"]["report"]["max_relative_error"] < 1e-4


@needs_data
def test_court_cases_as_units(tmp_path):
    task = {"name": "sequence_classification", "label": "states_outcome", "labels": ["False", "True"], "max_length": 64}
    data = {"train": f"{DATA}/nm_appeals/train.jsonl", "units": 380, "unit": "case_id", "examples_per_unit": 3}
    folder = train(recipe("head + norms", model_path(), task, data, delta=1e-4, batch_size=16), tmp_path / "run")
    run = json.loads((folder / "run.json").read_text())
    assert run["unit"] == "case_id" and run["epsilon"] <= 3.0 and run["released_steps"] == 2


@needs_models
def test_a_real_language_model_trains_and_its_adapter_loads(tmp_path):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    rows = [{"note": text} for text, _ in diagnoses()[:200]]
    (tmp_path / "notes.jsonl").write_text("\n".join(map(json.dumps, rows)))
    task = {"name": "causal_lm", "text": "note", "max_length": 32}
    data = {"train": str(tmp_path / "notes.jsonl"), "units": 200}
    folder = train(recipe("lora", f"{MODELS}/smollm2-135m", task, data, delta=1e-4, batch_size=8), tmp_path / "run")
    model = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(f"{MODELS}/smollm2-135m"), folder / "weights"
    )
    tokenizer = AutoTokenizer.from_pretrained(folder / "weights")
    assert any(value.abs().max() > 0 for name, value in model.state_dict().items() if "lora_B" in name)
    text = tokenizer("The patient was diagnosed with", return_tensors="pt")
    assert model.generate(**text, max_new_tokens=4, do_sample=False).shape[1] == text["input_ids"].shape[1] + 4


def test_the_fast_demo(tmp_path):
    result = CliRunner().invoke(main, ["demo", "--fast", "--output", str(tmp_path / "demo"), "--json"])
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    rows = {row["setting"]: row for row in found["rows"]}
    assert list(rows) == ["untouched", "non-private", "ε = 3"] and found["composed_epsilon"] <= 3.0
    assert rows["ε = 3"]["accuracy"] > 0.5 > rows["untouched"]["accuracy"]
    folder = Path(found["folders"][-1])
    assert {"card.md", "card.html", "weights"} <= {path.name for path in folder.iterdir()}
    assert json.loads((folder / "run.json").read_text())["delta"] == 1e-6
    assert torch.is_grad_enabled()
