"""What was trained is what is saved: what the base's checkpoint lacks goes with it, and adapters may have any name."""

import peft
import pytest
import torch
import transformers
from peft import PeftModel
from torch import nn
from transformers import BertForSequenceClassification, LlamaForCausalLM, LlamaModel

from dpft.subset import Subset, load_weights, save_weights
from dpft.subset.base import load_base, new_tensors
from tests.support.weights import adapters, logits, move


def loaded(line, folder, load):
    """What the line gives, in another process with another seed."""
    torch.manual_seed(99)
    if "PeftModel" in line:
        return PeftModel.from_pretrained(load(), folder)
    return load_weights(load(), folder) if "dpft" in line else BertForSequenceClassification.from_pretrained(folder)


SUBSETS = [
    "lora", "ia3", "vera(r=4)", "prompt_tuning(num_virtual_tokens=3)", "lora + norms", "lora(targets='classifier')",
    "sparse(fraction=0.05)", "sparse(rank=1)", "sparse(fraction=0.1, layers='classifier*')", "lora + head", "norms",
]  # fmt: skip


@pytest.mark.parametrize("subset", SUBSETS)
def test_a_new_classifier_that_does_not_train_is_saved_as_it_was(subset, load, tmp_path):
    model = Subset(subset).apply(load())
    move(model)
    expected = logits(model)
    line = save_weights(model, tmp_path / "weights")
    again = loaded(line, tmp_path / "weights", load)
    assert float((logits(again) - expected).abs().max()) < 1e-5
    untouched = loaded("base", tmp_path / "base", load)  # whose classifier the other seed made
    assert float((logits(untouched) - expected).abs().max()) > 1e-3


@pytest.mark.parametrize("subset", ["lora + norms", "sparse(rank=1)", "ia3"])
def test_a_new_classifier_is_saved_beside_a_bf16_base(subset, load, tmp_path):
    half = lambda: load(dtype=torch.bfloat16)
    model = Subset(subset).apply(half())
    expected = logits(model)
    again = loaded(save_weights(model, tmp_path / "weights"), tmp_path / "weights", half)
    torch.testing.assert_close(logits(again), expected, rtol=0.02, atol=0.001)


def test_two_runs_on_one_base_keep_their_classifiers(load, tmp_path):
    expected = {}
    for seed, name in enumerate(("one", "two")):
        torch.manual_seed(seed)
        model = Subset("lora").apply(load())
        move(model)
        expected[name] = logits(model)
        save_weights(model, tmp_path / name)
    both = PeftModel.from_pretrained(load(), tmp_path / "one", adapter_name="one")
    both.load_adapter(tmp_path / "two", "two")
    for name in ("one", "two", "one"):
        both.set_adapter(name)
        assert torch.equal(logits(both), expected[name])


def test_the_folder_loads_without_naming_the_base(load, tmp_path):
    model = Subset("lora").apply(load())
    expected = logits(model)
    save_weights(model, tmp_path / "weights")
    again = peft.AutoPeftModelForSequenceClassification.from_pretrained(tmp_path / "weights", num_labels=3)
    assert torch.equal(logits(again), expected)


def test_what_is_new_is_what_the_checkpoint_lacks(load, case):
    assert new_tensors(load()) == ["classifier.weight", "classifier.bias"]
    adapted = Subset("lora").apply(load())
    assert new_tensors(adapted) == ["base_model.model.classifier.weight", "base_model.model.classifier.bias"]
    made = case("bert").model  # from its configuration, so that nobody knows which of it is new
    assert set(new_tensors(made)) == {name for name in made.state_dict() if "pooler" in name or "classifier" in name}
    assert new_tensors(case("llama").model) == []  # its head is tied to the embeddings


def test_what_stands_in_place_of_a_head_is_new(load):
    model = load()
    model.classifier = nn.Sequential(nn.Linear(16, 8), nn.Tanh(), nn.Linear(8, 3))
    assert new_tensors(model) == [f"classifier.{i}.{kind}" for i in (0, 2) for kind in ("weight", "bias")]


class Tempered(BertForSequenceClassification):
    """With a random temperature that is no parameter."""

    def __init__(self, config):
        super().__init__(config)
        self.register_buffer("temperature", torch.ones(1))

    def _init_weights(self, module):
        super()._init_weights(module)
        if hasattr(module, "temperature"):
            nn.init.uniform_(module.temperature, 1.0, 9.0)

    def forward(self, **inputs):
        found = super().forward(**inputs)
        found.logits = found.logits * self.temperature
        return found


@pytest.mark.parametrize("subset", ["lora", "sparse(fraction=0.05)"])
def test_a_new_buffer_is_saved(subset, load, tmp_path):
    model = Subset(subset).apply(load(Tempered))
    expected = logits(model)
    line = save_weights(model, tmp_path / "weights")
    torch.testing.assert_close(logits(loaded(line, tmp_path / "weights", lambda: load(Tempered))), expected)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("subset", ["lora", "ia3", "sparse(fraction=0.05)"])
def test_a_resized_embedding_is_saved(subset, tied, case, tmp_path):
    config = case("llama").model.config
    config.tie_word_embeddings = tied
    LlamaForCausalLM(config).save_pretrained(tmp_path / "base")

    def load():
        model = LlamaForCausalLM.from_pretrained(tmp_path / "base")
        model.resize_token_embeddings(65, mean_resizing=False)
        return model

    model = Subset(subset).apply(load())
    expected = logits(model)
    line = save_weights(model, tmp_path / "weights")
    torch.testing.assert_close(logits(loaded(line, tmp_path / "weights", load)), expected)


def test_a_fresh_base_is_what_its_checkpoint_makes(load, tmp_path):
    model = load()
    torch.manual_seed(99)
    again = load_base(model)
    assert torch.equal(again.bert.pooler.dense.weight, model.bert.pooler.dense.weight)
    assert not torch.equal(again.classifier.weight, model.classifier.weight)
    model.config._name_or_path = str(tmp_path / "gone")
    assert load_base(model) is None


# -- adapters by other names ------------------------------------------------------------------------------------------


def test_an_adapter_of_any_name_is_saved(load, tmp_path):
    model = adapters(load(), "cardiology")
    expected = logits(model)
    line = save_weights(model, tmp_path / "weights")
    assert line == 'peft.PeftModel.from_pretrained(base_model, "weights")'
    torch.testing.assert_close(logits(loaded(line, tmp_path / "weights", load)), expected)
    assert not (tmp_path / "weights" / "cardiology").exists()


def test_of_two_adapters_the_active_one_is_saved(load, tmp_path):
    model = adapters(load(), "default", "cardiology")
    other = logits(model)
    model.set_adapter("cardiology")
    expected = logits(model)
    line = save_weights(model, tmp_path / "weights")
    assert line.startswith("peft.PeftModel")
    torch.testing.assert_close(logits(loaded(line, tmp_path / "weights", load)), expected)
    assert not torch.allclose(other, expected)


@pytest.mark.parametrize("names", [("public", "cardiology"), ("default", "cardiology")])
def test_two_active_adapters_are_saved_in_their_order(names, load, tmp_path):
    model = adapters(load(), *names)
    alone = logits(model)
    model.base_model.set_adapter(list(names[::-1]))
    expected = logits(model)
    line = save_weights(model, tmp_path / "weights")
    again = loaded(line, tmp_path / "weights", load)
    assert line.startswith("dpft.load_weights") and again.active_adapters == list(names[::-1])
    torch.testing.assert_close(logits(again), expected)
    assert not torch.allclose(alone, expected)


@pytest.mark.parametrize("names", [("cardiology",), ("public", "cardiology")])
def test_named_adapters_beside_other_weights_are_merged(names, load, tmp_path):
    model = adapters(load(), *names)
    model.base_model.set_adapter(list(names))
    for name, parameter in model.named_parameters():
        if "LayerNorm" in name:
            parameter.requires_grad_(True)
    move(model)
    expected = logits(model)
    line = save_weights(model, tmp_path / "weights")
    assert line.startswith("BertForSequenceClassification") and not [*(tmp_path / "weights").glob("**/adapter*")]
    torch.testing.assert_close(logits(loaded(line, tmp_path / "weights", load)), expected, rtol=1e-4, atol=1e-5)


def test_a_decoder_with_a_new_classifier_is_saved(case, tmp_path):
    config = case("llama").model.config
    LlamaModel(config).save_pretrained(tmp_path / "base")
    load = lambda: transformers.LlamaForSequenceClassification.from_pretrained(tmp_path / "base", pad_token_id=0)
    model = Subset("lora").apply(load())
    expected = logits(model)
    line = save_weights(model, tmp_path / "weights")
    assert torch.equal(logits(loaded(line, tmp_path / "weights", load)), expected)
