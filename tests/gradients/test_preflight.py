"""Exact on every family and subset, or refused by name."""

import pytest
import torch
import transformers
from torch import nn

from dpft.errors import ExactnessError, GuaranteeError, IsolationError
from dpft.gradients.capture import Capture
from dpft.gradients.engine import Engine
from dpft.gradients.preflight import preflight
from dpft.subset import Subset
from dpft.tasks.task import class_losses, pad_features

SUBSETS = [
    "lora",
    "lora(targets='all-linear') + head",
    "lora(last_blocks=1) + norms",
    "head",
    "bias",
    "norms",
    "last_blocks(1)",
    "layers('*1*')",
    "all",
    "head + norms",
]
FAMILIES = ["bert", "gpt2", "llama", "vit", "dinov2"]


@pytest.mark.parametrize("subset", SUBSETS)
@pytest.mark.parametrize("family", FAMILIES)
def test_every_subset_is_exact_on_every_family(family, subset, case, plan):
    if (family, subset) == ("llama", "bias"):
        pytest.skip("Llama has no bias")
    made = case(family)
    made.model = Subset(subset).apply(made.model)
    before = {name: value.clone() for name, value in made.model.state_dict().items()}
    with Engine(made.model, plan()) as engine:
        found = preflight(engine, made.losses, made.examples)
    assert found.exact and found.isolated and found.max_relative_error < 1e-5
    assert found.trainable_parameters == sum(p.numel() for p in made.model.parameters() if p.requires_grad)
    assert all(torch.equal(before[name], value) for name, value in made.model.state_dict().items())
    assert all(p.grad is None for p in made.model.parameters())


def test_position_embeddings_are_refused_in_one_pass_and_handled_by_the_preflight(case, plan):
    """T3: their input is (1, T) however large the batch."""
    made = case("bert")
    made.model = Subset("layers('*position_embeddings*')").apply(made.model)
    with Engine(made.model, plan()) as engine:
        with pytest.raises(ExactnessError, match=r"position_embeddings.weight .* 1 gradients for a batch of 3"):
            engine.accumulate(made.losses(made.examples))
        engine.discard()
        assert preflight(engine, made.losses, made.examples).techniques == {"per example": 512}


def test_a_loss_divided_by_the_batch_is_refused(case, plan):
    """T1: the Hugging Face loss averages over the tokens of the batch."""
    made = case("gpt2")
    made.model = Subset("lora").apply(made.model)

    def coupled(examples):
        batch = made.batch(examples)
        loss = made.model(**batch).loss  # the mean over all tokens of the batch
        return loss.expand(len(examples)) / len(examples) + 0 * made.losses(examples)

    with Engine(made.model, plan()) as engine, pytest.raises(IsolationError, match="own loss"):
        preflight(engine, coupled, made.examples)


def test_padding_without_a_mask_is_refused(case, plan):
    """T2."""
    made = case("bert")
    made.model = Subset("lora").apply(made.model)

    def unmasked(examples):
        batch = made.batch(examples)
        return class_losses(made.model(input_ids=batch["input_ids"]).logits, batch["labels"])

    with Engine(made.model, plan()) as engine, pytest.raises(IsolationError, match="attention mask"):
        preflight(engine, unmasked, made.examples)


class Images(nn.Module):
    def __init__(self, middle):
        super().__init__()
        self.stem, self.middle, self.head = nn.Conv2d(1, 4, 3), middle, nn.Linear(4 * 36, 3)

    def forward(self, pixels):
        return self.head(self.middle(self.stem(pixels)).flatten(1))


class BatchMean(nn.Module):
    def forward(self, x):
        return x - x.mean(0, keepdim=True)


def frozen_images(middle):
    torch.manual_seed(0)
    model = Images(middle)
    model.requires_grad_(False)
    model.head.requires_grad_(True)
    examples = [{"pixels": torch.randn(1, 8, 8), "label": i} for i in range(3)]

    def losses(chosen):
        logits = model(torch.stack([e["pixels"] for e in chosen]))
        return class_losses(logits, torch.tensor([e["label"] for e in chosen]))

    return model, losses, examples


def test_frozen_batch_norm_left_in_train_mode_is_refused_by_name(plan):
    """T2: its running statistics take in the data un-noised, and its output mixes examples."""
    model, losses, examples = frozen_images(nn.BatchNorm2d(4))
    with Engine(model, plan()) as engine, pytest.raises(IsolationError, match=r"middle \(BatchNorm2d\).*GroupNorm"):
        preflight(engine, losses, examples)


class Remembering(nn.Module):
    """Keeps the largest value it ever saw: its output is each example's own, its buffer is everyone's."""

    def __init__(self):
        super().__init__()
        self.register_buffer("largest", torch.zeros(()))

    def forward(self, x):
        self.largest = torch.maximum(self.largest, x.detach().max())
        return x


def test_a_buffer_that_takes_in_data_is_refused_by_name(plan):
    """T2, T5: it would be saved with the weights, un-noised."""
    model, losses, examples = frozen_images(Remembering())
    with (
        Engine(model, plan()) as engine,
        pytest.raises(IsolationError, match=r"middle \(Remembering\) writes .* middle.largest"),
    ):
        preflight(engine, losses, examples)


@pytest.mark.parametrize("middle", [nn.BatchNorm2d(4, track_running_stats=False), BatchMean()])
def test_a_layer_that_mixes_examples_is_refused_by_name(middle, plan):
    """T2."""
    model, losses, examples = frozen_images(middle)
    with (
        Engine(model, plan()) as engine,
        pytest.raises(IsolationError, match=rf"layer middle \({type(middle).__name__}\)"),
    ):
        preflight(engine, losses, examples)


def test_group_norm_passes(plan):
    model, losses, examples = frozen_images(nn.GroupNorm(2, 4))
    with Engine(model, plan()) as engine:
        assert preflight(engine, losses, examples).exact


def test_a_wrong_rule_is_refused(case, plan, monkeypatch):
    made = case("bert")
    made.model = Subset("head").apply(made.model)
    record = Capture._record

    def wrong(self, module, tapped, call, grad_output):
        record(self, module, tapped, call, grad_output * 1.001)

    monkeypatch.setattr(Capture, "_record", wrong)
    with Engine(made.model, plan()) as engine, pytest.raises(ExactnessError, match="differs from the brute-force"):
        preflight(engine, made.losses, made.examples)


def test_one_example_proves_nothing(case, plan):
    made = case("bert")
    with Engine(made.model, plan()) as engine, pytest.raises(GuaranteeError, match="two or more"):
        preflight(engine, made.losses, made.examples[:1])


def test_a_parameter_used_outside_its_layer_is_found(plan):
    """T4: a use that the tap does not see would be lost."""
    torch.manual_seed(0)
    model = nn.ModuleDict({"a": nn.Linear(4, 4), "b": nn.Linear(4, 3)})
    examples = [(torch.randn(4), i) for i in range(3)]

    def losses(chosen):
        x = torch.stack([x for x, _ in chosen])
        hidden = torch.tanh(model["a"](x)) @ model["a"].weight.T
        return class_losses(model["b"](hidden), torch.tensor([y for _, y in chosen]))

    with Engine(model, plan()) as engine:
        with pytest.raises(ExactnessError, match="a.weight .*outside its layer"):
            engine.accumulate(losses(examples))
        engine.discard()
        found = preflight(engine, losses, examples)
    assert found.max_relative_error < 1e-5 and found.techniques["per example"] >= 16


def test_dropout_does_not_disturb_the_proof(case, plan):
    made = case("bert")
    made.model = Subset("lora(dropout=0.5) + head").apply(made.model)
    assert any(isinstance(m, nn.Dropout) and m.p > 0 for m in made.model.modules())
    with Engine(made.model, plan()) as engine:
        assert preflight(engine, made.losses, made.examples).max_relative_error < 1e-5


def test_padding_id_that_occurs_in_a_text_is_exact(plan):
    """The embedding's padding row gets no gradient, also where a text contains that token."""
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=30,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        max_position_embeddings=16,
    )
    model = Subset("layers('*word_embeddings*')").apply(transformers.BertForSequenceClassification(config))
    examples = [{"input_ids": [5, 0, 7], "labels": 0}, {"input_ids": [0, 3, 4, 9], "labels": 1}]

    def losses(chosen):
        batch = pad_features(chosen, 0, token_labels=False)
        return class_losses(
            model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits, batch["labels"]
        )

    with Engine(model, plan()) as engine:
        assert preflight(engine, losses, examples).techniques == {"rule": 480}
