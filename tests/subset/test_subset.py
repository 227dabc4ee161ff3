"""Which parameters train, written in one line, and saved so that the ecosystem loads them."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from dpft.errors import SubsetError
from dpft.subset import All, Bias, Head, LastBlocks, Layers, Lora, Norms, Subset, save_weights
from tests.support.weights import move


def trainable(model):
    return {name for name, p in model.named_parameters() if p.requires_grad}


parts = st.one_of(
    st.builds(Lora, rank=st.integers(1, 64), dropout=st.sampled_from([0.0, 0.1]), last_blocks=st.integers(0, 3)),
    st.builds(LastBlocks, k=st.integers(1, 9)),
    st.builds(Layers, pattern=st.sampled_from(["*", "*.layer.1.*", "it's*"])),
    st.sampled_from([Head(), Bias(), Norms(), All()]),
)


@given(st.lists(parts, min_size=1, max_size=4).filter(lambda p: sum(isinstance(x, Lora) for x in p) < 2))
def test_an_expression_reads_back_as_the_same_objects(chosen):
    subset = Subset(*chosen)
    assert Subset(str(subset)) == subset


def test_objects_and_words_are_the_same():
    assert Lora(rank=4) + Head() + Norms() == Subset("lora(rank=4) + head + norms")
    assert Subset("last_blocks(2)") == Subset(LastBlocks(2)) == Subset("last_blocks(k=2)")


@pytest.mark.parametrize(
    "text",
    [
        "",
        "lora + tail",
        "lora(rank=)",
        "lora(rang=8)",
        "lora * head",
        "__import__('os')",
        "lora + lora(rank=2)",
        "lora(rank=open('x'))",
    ],
)
def test_what_cannot_be_read_is_refused(text):
    with pytest.raises(SubsetError):
        Subset(text)


@pytest.mark.parametrize(
    ("subset", "expected"),
    [
        ("head", {"bert.pooler.dense.weight", "bert.pooler.dense.bias", "classifier.weight", "classifier.bias"}),
        ("layers('classifier.*')", {"classifier.weight", "classifier.bias"}),
    ],
)
def test_a_subset_trains_exactly_what_it_names(case, subset, expected):
    assert trainable(Subset(subset).apply(case("bert").model)) == expected


def test_bias_norms_and_blocks_by_structure(case):
    model = case("bert").model
    assert all(name.endswith("bias") for name in trainable(Subset("bias").apply(model)))
    assert all("LayerNorm" in name for name in trainable(Subset("norms").apply(model)))
    assert {name.split(".")[3] for name in trainable(Subset("last_blocks(1)").apply(model))} == {"1"}
    assert len(trainable(Subset("norms").apply(case("llama").model))) == 5


def test_lora_on_the_last_blocks_only(case):
    names = trainable(Subset("lora(last_blocks=1, targets='all-linear')").apply(case("gpt2").model))
    assert names and all(".h.1." in name for name in names)


@pytest.mark.parametrize(
    "subset", ["layers('nothing*')", "bias", "last_blocks(3)", "lora(last_blocks=9)", "lora(targets='nothing')"]
)
def test_a_part_that_finds_nothing_is_refused(case, subset):
    with pytest.raises(SubsetError):
        Subset(subset).apply(case("llama").model)


def test_an_adapted_model_is_refused(case):
    with pytest.raises(SubsetError, match="already has adapters"):
        Subset("head").apply(Subset("lora").apply(case("bert").model))


@pytest.mark.parametrize(
    "subset", ["lora", "lora + head", "head", "lora + norms", "lora(targets='all-linear') + head + bias"]
)
def test_saved_weights_load_and_compute_the_same(case, subset, tmp_path):
    made = case("bert")
    made.model.save_pretrained(tmp_path / "base")
    model = Subset(subset).apply(made.model).eval()
    move(model)
    batch = made.batch(made.examples)
    batch.pop("labels")
    expected = model(**batch).logits
    how = save_weights(model, tmp_path / "weights")
    if "PeftModel" in how:
        loaded = PeftModel.from_pretrained(
            AutoModelForSequenceClassification.from_pretrained(tmp_path / "base"), tmp_path / "weights"
        )
    else:
        loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path / "weights")
    torch.testing.assert_close(loaded.eval()(**batch).logits, expected, rtol=1e-4, atol=1e-5)
    assert ("PeftModel" in how) == (subset in ("lora", "lora + head"))


def test_a_tied_head_beside_lora_is_saved_whole(case, tmp_path):
    made = case("llama")
    model = Subset("lora + head").apply(made.model).eval()
    move(model)
    tokens = torch.tensor([[3, 4, 5]])
    expected = model(input_ids=tokens).logits
    assert "LlamaForCausalLM" in save_weights(model, tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    torch.testing.assert_close(loaded(input_ids=tokens).logits, expected, rtol=1e-4, atol=1e-5)
