"""A run from recipe to folder: data checks, what is left behind, and what is kept apart."""

import csv
import json
import tomllib

import datasets
import pytest
import torch
import transformers
from click.testing import CliRunner
from peft import PeftModel
from safetensors.torch import load_file

from dpft.cli import main
from dpft.errors import BudgetError, GuaranteeError, RecipeError
from dpft.recipe import Recipe
from dpft.report import write_card
from dpft.training import data
from dpft.workflows.compare import compare
from dpft.workflows.train import train


def snapshot(folder):
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def test_a_run_leaves_a_folder_that_says_everything(recipe, tmp_path):
    folder = train(Recipe.parse(recipe), tmp_path / "run")
    run = json.loads((folder / "run.json").read_text())
    assert run["epsilon"] <= 3.0 and run["released_steps"] == run["planned_steps"] == 4
    assert run["events"] == [
        {
            "version": 2,
            "kind": "poisson_sampled_gaussian",
            "noise_multiplier": pytest.approx(run["events"][0]["noise_multiplier"]),
            "sample_rate": 0.25,
            "count": 4,
        }
    ]
    assert json.loads((folder / "releases.json").read_text())["charged"] == 4
    assert Recipe.parse(tomllib.loads((folder / "recipe.toml").read_text())) == Recipe.parse(recipe)
    base = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "model")
    PeftModel.from_pretrained(base, folder / "weights")
    assert (folder / "weights" / "README.md").read_text().startswith("---\nbase_model")
    assert "# Privacy card" in (folder / "weights" / "README.md").read_text()
    assert set(run["versions"]) >= {"dpft", "torch", "opacus", "transformers", "peft", "dp-accounting"}
    for name in ("card.md", "card.html"):
        assert "ε = " in (folder / name).read_text()


def test_metrics_on_private_data_stay_out_of_what_is_published(recipe, tmp_path):
    """T13."""
    folder = train(Recipe.parse(recipe), tmp_path / "run")
    accuracy = json.loads((folder / "private" / "metrics.json").read_text())["accuracy"]
    for path in folder.rglob("*"):
        if path.is_file() and "private" not in path.parts and path.suffix in (".json", ".md", ".html", ".toml"):
            text = path.read_text()
            assert "accuracy" not in text and "macro" not in text, path
    assert 0 <= accuracy <= 1
    recipe["data"]["validation_is_public"] = True
    public = train(Recipe.parse(recipe), tmp_path / "public")
    assert (
        "accuracy" in (public / "card.md").read_text()
        and "| b | 3 |" in (public / "card.md").read_text()
        and not (public / "private" / "metrics.json").exists()
    )


def test_the_same_folder_twice_is_refused(recipe, tmp_path):
    """T15."""
    train(Recipe.parse(recipe), tmp_path / "run")
    with pytest.raises(RecipeError, match="holds a run already"):
        train(Recipe.parse(recipe), tmp_path / "run")


def test_a_run_without_noise_is_called_not_private(recipe, tmp_path):
    folder = train(Recipe.parse(recipe).without_privacy(), tmp_path / "run")
    run = json.loads((folder / "run.json").read_text())
    assert run["epsilon"] is None and not run["private"]
    for name in ("card.md", "card.html"):
        text = (folder / name).read_text()
        assert "NOT PRIVATE" in text and "ε = " not in text


def test_a_seeded_run_is_called_not_private_everywhere(recipe, tmp_path):
    """T10."""
    path = tmp_path / "recipe.toml"
    path.write_text(Recipe.parse(recipe).to_toml())
    result = CliRunner().invoke(main, ["train", str(path), "--output", str(tmp_path / "run"), "--seeded-noise", "1"])
    assert result.exit_code == 0 and "NOT PRIVATE" in result.stdout and "ε" not in result.output
    run = json.loads((tmp_path / "run" / "run.json").read_text())
    assert run["epsilon"] is None and run["epsilon_rdp"] is None and "NOT PRIVATE" in run["guarantee"]
    for name in ("card.md", "card.html"):
        text = (tmp_path / "run" / name).read_text()
        assert "NOT PRIVATE" in text and "ε = " not in text


def test_the_card_is_derived_from_the_events(recipe, tmp_path):
    folder = train(Recipe.parse(recipe), tmp_path / "run")
    before = (folder / "card.html").read_text()
    write_card(folder)
    assert (folder / "card.html").read_text() == before
    run = json.loads((folder / "run.json").read_text())
    run["events"][0]["count"], run["epsilon"] = 400, 0.1  # whatever someone wrote as ε, the events decide
    (folder / "run.json").write_text(json.dumps(run))
    write_card(folder)
    assert "ε = 0.1" not in (folder / "card.md").read_text()
    with pytest.raises(RecipeError, match="no finished run"):
        write_card(tmp_path)


def test_an_interrupt_leaves_a_card_that_says_how_far_it_went(recipe, tmp_path):
    class Interrupt(transformers.TrainerCallback):
        def on_step_end(self, args, state, control, **_):
            if state.global_step == 2:
                raise KeyboardInterrupt

    folder = train(Recipe.parse(recipe), tmp_path / "run", callbacks=[Interrupt()])
    run = json.loads((folder / "run.json").read_text())
    assert run["interrupted"] and run["released_steps"] == 2 and run["epsilon"] < 3.0
    assert "ended after 2 of 4" in (folder / "card.md").read_text()


def test_an_interrupt_before_the_first_release_leaves_no_card(recipe, tmp_path):
    class Interrupt(transformers.TrainerCallback):
        def on_train_begin(self, args, state, control, **_):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(Recipe.parse(recipe), tmp_path / "run", callbacks=[Interrupt()])
    assert snapshot(tmp_path / "run") == {"recipe.toml", "private/preflight.json", "private/lock"}
    train(Recipe.parse(recipe), tmp_path / "run")


def test_an_interrupted_run_resumes_to_its_plan(recipe, tmp_path):
    class Interrupt(transformers.TrainerCallback):
        def on_step_end(self, args, state, control, **_):
            if state.global_step == 3:
                raise KeyboardInterrupt

    recipe["run"] = {"save_steps": 1}
    train(Recipe.parse(recipe), tmp_path / "run", callbacks=[Interrupt()])
    folder = train(Recipe.parse(recipe), tmp_path / "run", resume=True)
    run = json.loads((folder / "run.json").read_text())
    assert run["released_steps"] == 4 and not run["interrupted"]
    with pytest.raises(RecipeError, match="holds no run that has released anything"):
        recipe["run"] = {}
        train(Recipe.parse(recipe), tmp_path / "empty", resume=True)


def test_an_interrupt_before_a_resumed_run_goes_on_leaves_its_weights(recipe, tmp_path, monkeypatch):
    class Interrupt(transformers.TrainerCallback):
        def on_step_end(self, args, state, control, **_):
            if state.global_step == 3:
                raise KeyboardInterrupt

    def interrupted(trainer):
        raise KeyboardInterrupt

    recipe["run"] = {"save_steps": 2}
    folder = train(Recipe.parse(recipe), tmp_path / "run", callbacks=[Interrupt()])
    before = {path: path.read_bytes() for path in (folder / "weights").iterdir()}
    monkeypatch.setattr("dpft.training.session.Session._preflight", interrupted)
    with pytest.raises(KeyboardInterrupt):
        train(Recipe.parse(recipe), folder, resume=True)
    assert before == {path: path.read_bytes() for path in (folder / "weights").iterdir()}
    kept, recipe["privacy"]["epsilon"] = (folder / "recipe.toml").read_text(), 1.0
    with pytest.raises(GuaranteeError, match="noise_multiplier"):
        train(Recipe.parse(recipe), folder, resume=True)
    assert (folder / "recipe.toml").read_text() == kept


def test_a_run_that_was_killed_before_it_saved_is_taken_up_from_its_checkpoint(recipe, tmp_path, monkeypatch):
    recipe["run"] = {"save_steps": 2}
    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="power cut"):
        patch.setattr("dpft.training.trainer.DPTrainerMixin.evaluate", cut)
        patch.setattr("dpft.training.saving.save_weights", cut)
        train(Recipe.parse(recipe), tmp_path / "run")
    assert not (tmp_path / "run" / "run.json").exists()
    (tmp_path / "run" / "checkpoint-9").mkdir()  # begun, and not written to its end
    folder = train(Recipe.parse(recipe), tmp_path / "run", resume=True)
    run = json.loads((folder / "run.json").read_text())
    assert run["released_steps"] == 4 and not run["interrupted"] and run["epsilon"] <= 3.0
    saved = load_file(folder / "checkpoint-4" / "trainable.safetensors")
    kept = load_file(folder / "weights" / "adapter_model.safetensors")
    name = next(name for name in kept if "lora_B" in name)
    assert torch.equal(kept[name], saved[name.replace("lora_B.weight", "lora_B.default.weight")])
    with pytest.raises(BudgetError, match="nothing is left to resume"):
        train(Recipe.parse(recipe), tmp_path / "run", resume=True)


def cut(*_, **__):
    raise RuntimeError("power cut")


def test_what_was_paid_for_is_kept_though_its_evaluation_fails(recipe, tmp_path, monkeypatch):
    def fails(*_):
        raise torch.OutOfMemoryError("logits")

    monkeypatch.setattr("dpft.training.trainer.DPTrainerMixin.evaluate", fails)
    with pytest.raises(torch.OutOfMemoryError):
        train(Recipe.parse(recipe), tmp_path / "run")
    run = json.loads((tmp_path / "run" / "run.json").read_text())
    assert run["released_steps"] == 4 and run["metrics"] is None and (tmp_path / "run" / "card.md").exists()
    assert list((tmp_path / "run" / "weights").glob("*.safetensors"))


def test_an_optimizer_that_is_not_known_is_refused(recipe, tmp_path):
    recipe["optimizer"] = {"name": "adamx"}
    with pytest.raises(RecipeError, match=r"The recipe's optimizer cannot be made \(adamx is not"):
        train(Recipe.parse(recipe), tmp_path / "run")
    assert not (tmp_path / "run" / "recipe.toml").exists()


def test_an_interrupt_ends_a_whole_comparison_and_private_figures_stay_private(recipe, tmp_path):
    """T13; and the budget of the runs that nobody wants any more stays unspent."""

    class Interrupt(transformers.TrainerCallback):
        def on_step_end(self, args, state, control, **_):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        compare(Recipe.parse(recipe), tmp_path / "all", epsilons=[3.0, 1.0], callbacks=lambda: [Interrupt()])
    assert {path.name for path in (tmp_path / "all").iterdir()} == {"private"}
    compare(Recipe.parse(recipe), tmp_path / "one", epsilons=[3.0], non_private=False)
    assert {path.name for path in (tmp_path / "one").iterdir()} == {"epsilon-3", "private"}


@pytest.mark.parametrize("unit_gradient", ["mean", "sum"])
def test_patients_as_units(recipe, tmp_path, unit_gradient):
    """T16."""
    recipe["data"] |= {"unit": "patient", "units": 12, "examples_per_unit": 2, "unit_gradient": unit_gradient}
    recipe["privacy"] |= {"batch_size": 6}
    folder = train(Recipe.parse(recipe), tmp_path / "run")
    assert "share one value of patient" in (folder / "card.md").read_text()
    assert json.loads((folder / "run.json").read_text())["unit"] == "patient"


@pytest.mark.parametrize(
    ("row", "change", "said"),
    [
        (("", "a", "p"), {}, "row 41 has no text"),
        (("w1", "d", "p"), {}, "row 41 has a label in column 'label'"),
        (("w1", "a", ""), {"unit": "patient", "units": 13}, "row 41 has no 'patient'"),
        (None, {"unit": "doctor"}, "no column 'doctor': it has text, label, patient"),
        (None, {"units": 400}, "declares 400 units, but data.train has about 40"),
        (None, {"train": "nowhere.csv"}, "no data at nowhere.csv"),
        (("w1", "a", "p", "one too many"), {}, "row 41 .* has 4 cells, but the header has 3"),
    ],
)
def test_bad_data_is_refused_before_anything_is_written_or_charged(recipe, tmp_path, row, change, said):
    if row:
        with open(tmp_path / "train.csv", "a", newline="") as file:
            csv.writer(file).writerow(row)
    recipe["data"] |= change
    before = snapshot(tmp_path)
    with pytest.raises(RecipeError, match=said):
        train(Recipe.parse(recipe), tmp_path / "run")
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize("kind", ["csv", "tsv", "jsonl", "parquet", "saved"])
def test_every_format_reads_the_same(recipe, tmp_path, kind):
    rows = data.read(recipe["data"]["train"])
    path = tmp_path / f"other.{kind}"
    {
        "csv": lambda: rows.to_csv(path),
        "tsv": lambda: rows.to_csv(path, sep="\t"),
        "jsonl": lambda: rows.to_json(path),
        "parquet": lambda: rows.to_parquet(path),
        "saved": lambda: rows.save_to_disk(path),
    }[kind]()
    assert data.read(str(path)).to_list() == rows.to_list()
    assert len(data.read([str(path), str(path)])) == 80


def test_unknown_formats_are_refused(tmp_path):
    (tmp_path / "x.xlsx").write_text("")
    with pytest.raises(RecipeError, match="no known format"):
        data.read(str(tmp_path / "x.xlsx"))


def test_a_model_that_cannot_be_loaded(recipe, tmp_path):
    recipe["model"]["path"] = str(tmp_path / "nothing")
    with pytest.raises(RecipeError, match="cannot be loaded"):
        train(Recipe.parse(recipe), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_empty_draws_in_a_real_run(recipe, tmp_path):
    """T9: with an expected batch of one, a third of the draws are empty."""
    recipe["privacy"] |= {"batch_size": 1, "steps": 12}
    folder = train(Recipe.parse(recipe), tmp_path / "run")
    assert json.loads((folder / "run.json").read_text())["released_steps"] == 12


def test_language_models_run_too(recipe, tmp_path, case):
    case("llama").model.save_pretrained(tmp_path / "model")
    recipe |= {"subset": "lora", "task": {"name": "causal_lm", "max_length": 16}}
    folder = train(Recipe.parse(recipe), tmp_path / "run")
    assert json.loads((folder / "private" / "metrics.json").read_text())["perplexity"] > 1
    assert not datasets.is_progress_bar_enabled() and torch.is_grad_enabled()
