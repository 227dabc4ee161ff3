"""The frozen prefix: replayed, it is what the model gives; kept, nobody can read it."""

import numpy as np
import pytest
import torch
import transformers
from transformers import TrainerCallback, TrainingArguments

from dpft.errors import IsolationError, RecipeError
from dpft.privacy.noise import SeededRandomness
from dpft.subset import Subset
from dpft.tasks import LabelledTask
from dpft.tasks.losses import class_losses, pad_features
from dpft.training.batches import Examples
from dpft.training.prefix import FrozenPrefix
from dpft.training.trainer import DPTrainer
from dpft.workflows.setup import without_dropout


class Collated:
    """A classifier and examples of several lengths, as the trainer sees them."""

    def __init__(self, model, subset):
        self.model = Subset(subset).apply(model)
        texts = [[5, 6], [7, 8, 9, 10, 11], [12, 13, 14], [15], [16, 17, 18, 19]]
        self.features = [{"input_ids": ids, "labels": i % 3} for i, ids in enumerate(texts)]
        self.examples = Examples(self.features, np.array([len(ids) for ids in texts]), np.arange(5).reshape(-1, 1))

    def collate(self, places):
        return pad_features([self.features[place] for place in places], 0, token_labels=False)

    def losses(self, batch):
        inputs = {key: value for key, value in batch.items() if key != "labels"}
        return class_losses(self.model(**inputs).logits, batch["labels"])


@pytest.fixture
def bert(case):
    return case("bert").model


def filled(bert, subset, tmp_path):
    task = Collated(bert, subset)
    task.model.eval()
    prefix = FrozenPrefix.find(task.model, task.losses, task.collate([0, 1]))
    if prefix is not None:
        prefix.fill(task.examples, task.collate, task.losses, tmp_path, token_budget=8)
    return task, prefix


@pytest.mark.parametrize(
    "subset, boundary, skipped",
    [
        ('layers("classifier*")', "bert", 1),
        ("last_blocks(1)", "bert.encoder.layer.0", 1),
        ("lora(last_blocks=1) + head", "bert.encoder.layer.0", 1),
    ],
)
def test_a_replayed_prefix_gives_the_losses_and_gradients_of_the_model(bert, tmp_path, subset, boundary, skipped):
    task, prefix = filled(bert, subset, tmp_path)
    assert prefix.name.endswith(boundary) and len(prefix.modules) == skipped
    trained = [p for p in task.model.parameters() if p.requires_grad]
    for places in ([0, 1, 2, 3, 4], [3], [1, 1], [4, 0]):
        batch = task.collate(places)
        wanted = task.losses(batch)
        expected = torch.autograd.grad(wanted.sum(), trained)
        inside = next(prefix.modules[-1].children())
        hook = inside.register_forward_hook(lambda *_: pytest.fail("a frozen layer was computed again"))
        prefix.select(places, batch)
        with prefix:
            made = task.losses(batch)
        found = torch.autograd.grad(made.sum(), trained)
        hook.remove()
        torch.testing.assert_close(made, wanted, rtol=1e-5, atol=1e-6)
        for one, other in zip(found, expected, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)
    prefix.close()
    assert "forward" not in vars(prefix.modules[-1])


def test_only_what_the_loss_depends_on_is_kept(bert, tmp_path):
    """A classifier looks at the pooled vector alone: so many numbers for an example, and none for a token."""
    task, prefix = filled(bert, 'layers("classifier*")', tmp_path)
    assert prefix.numbers == (0, task.model.config.hidden_size)
    assert prefix.shortened(task.examples).lengths.tolist() == [1] * 5
    assert prefix.bytes(task.examples) == 5 * 4 * task.model.config.hidden_size


def test_there_is_no_prefix_where_the_first_block_trains(bert, tmp_path):
    assert filled(bert, "lora(rank=2)", tmp_path)[1] is None
    assert filled(bert, "all", tmp_path)[1] is None


def test_dropout_makes_a_prefix_random(bert):
    task = Collated(bert, "last_blocks(1)")
    for module in task.model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    assert not FrozenPrefix.find(task.model, task.losses, task.collate([0, 1])).random
    task.model.bert.embeddings.dropout.p = 0.5
    assert FrozenPrefix.find(task.model, task.losses, task.collate([0, 1])).random


def test_a_prefix_that_others_in_the_batch_change_is_refused(bert, tmp_path, monkeypatch):
    """T2: what was computed beside others would stay in every later step."""
    task = Collated(bert, "last_blocks(1)")
    task.model.eval()
    block = task.model.bert.encoder.layer[0]
    forward = type(block).forward

    def coupled(self, *args, **kwargs):
        output = forward(self, *args, **kwargs)
        return output + 0.5 * output.mean(0, keepdim=True) if self is block else output

    monkeypatch.setattr(type(block), "forward", coupled)
    prefix = FrozenPrefix.find(task.model, task.losses, task.collate([0, 1]))
    with pytest.raises(IsolationError, match="beside others"):
        prefix.fill(task.examples, task.collate, task.losses, tmp_path, token_budget=8)


def test_a_model_that_pads_in_its_own_way_has_no_prefix():
    """Longformer pads to its window: what it gives for an example alone is of another length than beside others."""
    torch.manual_seed(0)
    sizes = dict(vocab_size=50, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=16)
    config = transformers.LongformerConfig(**sizes, attention_window=[16, 16], num_labels=3, pad_token_id=1)
    task = Collated(transformers.LongformerForSequenceClassification(config), "last_blocks(1)")
    assert FrozenPrefix.find(task.model, task.losses, task.collate([0, 1])) is None


def test_padding_before_the_tokens_is_refused(bert, tmp_path):
    task = Collated(bert, "last_blocks(1)")
    collate = task.collate
    task.collate = lambda places: {k: v.flip(1) if v.dim() == 2 else v for k, v in collate(places).items()}
    prefix = FrozenPrefix.find(task.model, task.losses, task.collate([0, 1]))
    with pytest.raises(IsolationError, match="padded before"):
        prefix.fill(task.examples, task.collate, task.losses, tmp_path, token_budget=8)


def run(case, plan, folder, subset, frozen_prefix, dropout=0.0, **fields):
    made = case("bert")
    model = Subset(subset).apply(made.model)
    without_dropout(model)
    next(module for name, module in model.named_modules() if name.endswith("attention.output.dropout")).p = dropout
    arguments = dict(output_dir=str(folder), report_to=[], disable_tqdm=True, learning_rate=0.01, save_strategy="no")
    trainer = DPTrainer(
        model=model,
        args=TrainingArguments(**arguments, logging_strategy="no"),
        train_dataset=made.examples * 10,
        eval_dataset=made.examples,
        randomness=SeededRandomness(3),
        plan=plan(units=30, steps=6),
        task=LabelledTask(made.batch),
        frozen_prefix=frozen_prefix,
        **fields,
    )
    trainer.calls = CallsInSteps(model.base_model.model.bert if "lora" in subset else model.bert)
    trainer.add_callback(trainer.calls)
    trainer.train()
    return trainer


class CallsInSteps(TrainerCallback):
    """How often the encoder's first block computed while the trainer took its steps."""

    def __init__(self, encoder):
        self.count, self._counting = 0, False
        encoder.encoder.layer[0].attention.register_forward_hook(self._called)

    def _called(self, *_):
        self.count += self._counting

    def on_train_begin(self, *_, **__):
        self._counting = True

    def on_train_end(self, *_, **__):
        self._counting = False


@pytest.mark.parametrize("subset", ["last_blocks(1) + head", "lora(rank=2, last_blocks=1)", 'layers("classifier*")'])
def test_a_run_with_a_prefix_trains_the_same_weights(case, plan, tmp_path, subset):
    """And evaluates other examples as ever, and leaves nothing of the prefix behind."""
    runs = [run(case, plan, tmp_path / how, subset, how, token_budget=16) for how in ("off", "on")]
    assert (
        runs[0].session.prefix is None and runs[1].session.prefix is not None and runs[1].session.prefix._store is None
    )
    assert runs[0].calls.count > 0 and runs[1].calls.count == 0
    expected = dict(runs[0].model.named_parameters())
    for name, parameter in runs[1].model.named_parameters():
        torch.testing.assert_close(parameter, expected[name], rtol=1e-3, atol=1e-5)
    assert runs[1].evaluate()["eval_loss"] == pytest.approx(runs[0].evaluate()["eval_loss"], rel=1e-3)
    files = {path.name for path in (tmp_path / "on").rglob("*") if path.is_file()}
    assert files == {path.name for path in (tmp_path / "off").rglob("*") if path.is_file()}


def test_it_is_kept_only_where_it_pays(case, plan, tmp_path):
    """Six steps at rate ½ use each example three times; one step does not."""
    assert run(case, plan, tmp_path / "a", "head", "auto").session.prefix is not None
    assert run(case, lambda **f: plan(**{**f, "steps": 1}), tmp_path / "b", "head", "auto").session.prefix is None
    assert run(case, plan, tmp_path / "c", "lora + head", "auto").session.prefix is None
    with pytest.raises(RecipeError, match="first block trains"):
        run(case, plan, tmp_path / "d", "lora + head", "on")


def test_layers_with_dropout_are_not_computed_once_for_all_steps(case, plan, tmp_path):
    """T20: kept without being asked for, they would train another model than the one that was named."""
    assert run(case, plan, tmp_path / "a", "head", "auto", dropout=0.5, token_budget=64).session.prefix is None
