"""The contract that every registered task keeps: a new file in dpft/tasks is tested by being there."""

import json
from importlib.metadata import EntryPoint
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
import transformers
from click.testing import CliRunner
from tokenizers import Tokenizer, models, pre_tokenizers

from dpft.cli import main
from dpft.errors import RecipeError
from dpft.gradients.engine import Engine
from dpft.gradients.preflight import preflight
from dpft.recipe import Recipe
from dpft.tasks import LabelledTask, Size, Task, registry
from dpft.training.batches import Examples, Limits, LogicalBatches
from dpft.values import COLUMNS
from dpft.workflows.setup import load_model
from dpft.workflows.train import train
from tests.support.recipes import WORDS

DOCUMENT = Path(__file__).parent.parent.parent / "docs" / "recipe.md"


def tokenizer(folder, **special):
    words = [
        *WORDS,
        *special.values(),
        *"An example . Another , which is a little longer than the first one first".split(),
    ]
    raw = Tokenizer(models.WordLevel({word: i for i, word in enumerate(dict.fromkeys(words))}, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=raw, pad_token="<pad>", unk_token="<unk>", eos_token="<eos>", **special
    ).save_pretrained(folder)


def text(folder):
    config = transformers.GPT2Config(
        vocab_size=80, n_positions=512, n_embd=16, n_layer=1, n_head=2, eos_token_id=2, bos_token_id=2, pad_token_id=0
    )
    transformers.GPT2LMHeadModel(config).save_pretrained(folder)
    tokenizer(folder)


def masked_text(folder):
    config = transformers.BertConfig(
        vocab_size=80, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=24, pad_token_id=0
    )
    transformers.BertForMaskedLM(config).save_pretrained(folder)
    tokenizer(folder, mask_token="<mask>")


def text_to_text(folder):
    config = transformers.T5Config(
        vocab_size=80, d_model=16, d_kv=8, d_ff=24, num_layers=1, num_heads=2, decoder_start_token_id=0, eos_token_id=2
    )
    transformers.T5ForConditionalGeneration(config).save_pretrained(folder)
    tokenizer(folder)


def pictures(folder):
    config = transformers.ViTConfig(
        image_size=16, patch_size=8, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=24
    )
    transformers.ViTForImageClassification(config).save_pretrained(folder)
    transformers.ViTImageProcessor(size={"height": 16, "width": 16}).save_pretrained(folder)


CHECKPOINTS = (text, masked_text, text_to_text, pictures)  # a task is tried on the first that it loads


@pytest.fixture(scope="module", params=registry.names())
def made(request, tmp_path_factory):
    """What ``dpft init`` writes for a task, with a small model and the task's made-up rows as data."""
    folder, name = tmp_path_factory.mktemp(request.param), request.param
    done = CliRunner().invoke(main, ["init", "--task", name, "--model", "m", "--output", str(folder / "recipe.toml")])
    assert done.exit_code == 0, done.output
    for i, checkpoint in enumerate(CHECKPOINTS):
        transformers.set_seed(0)
        checkpoint(folder / f"model-{i}")
        overrides = (
            f"model.path={folder / f'model-{i}'}",
            f"data.train={folder / 'rows'}",
            f"data.validation={folder / 'rows'}",
            "data.units=8",
            "privacy.plan=declared",
            "privacy.batch_size=4",
            "privacy.epochs=1",
            "privacy.delta=0.01",
        )
        recipe = Recipe.read(folder / "recipe.toml", overrides)
        try:
            task, model = load_model(recipe)
        except RecipeError:
            continue
        rows = {column: list(values) * 4 for column, values in task.examples().items()}
        datasets.Dataset.from_dict(rows).save_to_disk(folder / "rows")
        return recipe, task, model.eval(), folder
    pytest.fail(f"No checkpoint of CHECKPOINTS fits {name}: add one.")


def two(task):
    return list(task.encode({name: values[:2] for name, values in task.examples().items()}))


def test_it_says_what_it_is(made):
    recipe, task, _, _ = made
    kind = registry.find(recipe.task.name)
    assert isinstance(task, Task) and type(task) is kind and kind.name == recipe.task.name and kind.__doc__
    assert kind.Settings is type(recipe.task)
    ours, documented = kind.__module__.startswith("dpft."), DOCUMENT.read_text(encoding="utf-8")
    for key, field in kind.Settings.model_fields.items():
        assert field.description, key
        assert not ours or f"| `task.{key}` |" in documented
    assert {column.kind for column in recipe.task.columns.values()} <= COLUMNS.keys()


def test_its_made_up_rows_are_rows_that_it_takes(made):
    recipe, task, _, _ = made
    rows = task.examples()
    assert rows.keys() == recipe.task.columns.keys() and len({len(values) for values in rows.values()}) == 1
    for name, column in recipe.task.columns.items():
        assert len(rows[name]) >= 2 and not any(column.fault(value, name) for value in rows[name])


def test_a_loss_is_each_example_s_own(made):
    """T1."""
    _, task, model, _ = made
    features = two(task)
    with torch.no_grad():
        together = task.losses(model, task.collate(features))
        alone = [task.losses(model, task.collate([one]))[0] for one in features]
    assert together.shape == (2,) and together.isfinite().all() and (together > 0).all()
    torch.testing.assert_close(together, torch.stack(alone), rtol=1e-5, atol=1e-6)


def test_features_of_a_row_depend_on_that_row_alone(made):
    """T14, T16: nothing is packed, nothing is learned from the other rows."""
    _, task, model, _ = made
    for i, one in enumerate(two(task)):
        (again,) = task.encode({name: values[i : i + 1] for name, values in task.examples().items()})
        found, expected = (task.collate([features]) for features in (again, one))
        assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_sizes_are_at_least_one(made):
    _, task, _, _ = made
    sizes = [task.size(one) for one in two(task)]
    assert all(isinstance(size, Size) and min(size) >= 1 for size in sizes)


def test_the_preflight_proves_it(made):
    """With a step's chance drawn once for the examples that are compared."""
    recipe, task, model, _ = made
    rows = datasets.Dataset.from_dict(dict(task.examples()))
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    with Engine(model, recipe.plan()) as engine:
        examples = Examples.encode(rows, task)
        losses = lambda features: task.losses(model, task.collate(features))
        assert preflight(engine, losses, examples.spread(2), longest=examples.longest).exact


def test_its_metrics_have_a_headline(made):
    _, task, model, _ = made
    features = two(task)
    together = task.evaluate(model, [task.collate(features)])
    apart = task.evaluate(model, [task.collate([one]) for one in features])
    assert isinstance(together[task.headline], float) and json.dumps(together)
    assert apart == pytest.approx(together) if task.groups is None else apart.keys() == together.keys()
    assert task.groups is None or all(isinstance(figures, dict) for figures in together[task.groups].values())


def test_a_canary_is_a_record(made):
    recipe, task, _, _ = made
    record = task.canary(np.random.default_rng(0))
    if record is not None:
        assert record.keys() == recipe.task.columns.keys() and json.dumps(record)
        assert not any(column.fault(record[name], name) for name, column in recipe.task.columns.items())
        assert record != task.canary(np.random.default_rng(1))


def test_its_first_recipe_runs_and_its_weights_load(made):
    recipe, task, _, folder = made
    run = train(recipe, folder / "run")
    assert json.loads((run / "run.json").read_text())["released_steps"] == recipe.plan().steps
    figures = json.loads((run / "private" / "metrics.json").read_text())
    assert task.headline in figures


class Shifted(LabelledTask):
    """Adds one number to every token of an example, another in every step."""

    def __init__(self, collator):
        super().__init__(collator)
        self.drawn = []

    def draw(self, features, random):
        self.drawn.append(int(random.integers(1 << 60)))
        shift = self.drawn[-1] % 9
        return {**features, "input_ids": [(token + shift) % 60 for token in features["input_ids"]]}


def test_a_step_s_chance_is_drawn_anew_in_every_step_and_once_for_the_preflight(case, plan):
    made = case("gpt2")
    task = Shifted(made.batch)
    plan = plan(sample_rate=1.0, units=len(made.examples))
    examples = Examples.encode(made.examples, task)
    with Engine(made.model, plan) as engine:
        losses = lambda features: task.losses(made.model, task.collate(features))
        assert preflight(engine, losses, examples.spread(), longest=examples.longest).isolated
        assert len(task.drawn) == len(examples.spread_places()) + 1
        limits = Limits(64, engine.max_examples)
        for batch in LogicalBatches(examples, task, plan.sampler(engine.randomness), steps=2, limits=limits):
            for inputs, units in batch:
                engine.accumulate(task.losses(made.model, inputs), units)
            engine.release()
    assert len(set(task.drawn)) == len(task.drawn) == len(examples.spread_places()) + 1 + 2 * len(examples)


def test_a_step_s_chance_follows_from_no_seed(case, plan):
    """T20: while an engine is attached, the generator is secret whatever seeds were set before."""
    drawn = []
    for _ in range(2):
        np.random.seed(0)
        task = Shifted(case("gpt2").batch)
        with Engine(case("gpt2").model, plan()):
            Examples.encode(case("gpt2").examples, task).spread()
        drawn.append(task.drawn)
    assert drawn[0] != drawn[1]


def test_a_task_without_chance_takes_none(case):
    np.random.seed(0)
    before = np.random.get_state()[1].copy()
    made = case("gpt2")
    Examples.encode(made.examples, LabelledTask(made.batch)).spread()
    assert (np.random.get_state()[1] == before).all()


class OfAUser:
    """A task that knows nothing of dpft's class."""

    def encode(self, rows):
        return [{"number": number} for number in rows["number"]]

    def length(self, features):
        return features["number"]


def test_a_task_of_a_user_needs_no_more_than_a_length():
    examples = Examples.encode([{"number": 3}, {"number": 5}], OfAUser())
    assert examples.lengths.tolist() == examples.costs.tolist() == [3, 5] and examples.chance is None


def test_a_length_of_a_subclass_counts(case):
    class Long(LabelledTask):
        def length(self, features):
            return 100

    assert Long(None).size({"input_ids": [1, 2]}) == (100, 100)
    assert LabelledTask(None).size({"input_ids": [1, 2]}) == (2, 2)


def test_cost_and_tokens_are_two_numbers(case):
    """An encoder of pictures pads nothing, but its layers see many tokens of each."""

    class Pictures(LabelledTask):
        def size(self, features):
            return Size(2, 50)

    examples = Examples.encode(case("gpt2").examples, Pictures(case("gpt2").batch))
    assert set(examples.lengths) == {50} and set(examples.costs) == {2}


def test_a_name_is_given_once():
    with pytest.raises(RecipeError, match="The task causal_lm is dpft.tasks.causal_lm.CausalLM already"):
        registry.task("causal_lm")(Shifted)
    assert registry.find("causal_lm") is not Shifted


def test_another_package_s_task_is_found_by_its_entry_point(monkeypatch):
    monkeypatch.setattr(registry, "_TASKS", dict(registry._TASKS))
    entries = {name: EntryPoint(name, f"tests.tasks.plugin_{name}", registry.GROUP) for name in ("copied", "broken")}
    monkeypatch.setattr(registry, "_installed", lambda: entries)
    assert {"copied", "broken", "causal_lm"} <= set(registry.names())
    kind = registry.find("copied")
    assert kind.name == "copied"
    tables = {
        "subset": "all",
        "model": {"path": "m"},
        "task": {"name": "copied", "column": "x"},
        "data": {"train": "t", "units": 100},
        "privacy": {"epsilon": 1.0, "delta": 1e-3, "batch_size": 5, "steps": 1},
    }
    recipe = Recipe.parse(tables)
    assert (
        recipe.task.column == "x" and Recipe.parse(recipe.model_dump()) == recipe and 'column = "x"' in recipe.to_toml()
    )
    with pytest.raises(RecipeError, match="The task broken cannot be loaded from .*: repair that package"):
        registry.find("broken")
    with pytest.raises(RecipeError, match="task.name is 'none', which no task is called: choose one of broken, "):
        registry.find("none")
