"""Saved weights are loaded again and compared: on a copy before anything is charged, and at the end."""

import os
import re
import stat
from collections import namedtuple
from pathlib import Path

import peft
import pytest
import torch
import transformers
from transformers import BertForSequenceClassification

from dpft.errors import GuaranteeError, RecipeError, SubsetError
from dpft.subset import Subset, check_room, check_savable, check_saved, outputs, save_weights, saved
from tests.subset.test_layers import HEADS_OF
from tests.support.weights import adapters, logits, move
from tests.support.zoo import TASK_TYPE, TUNERS, Case

TIED = "prompt_tuning(num_virtual_tokens=3)"
SUBSETS = [
    "lora",
    "lora + norms",
    "sparse(fraction=0.1)",
    "sparse(fraction=0.1) + head",
    "sparse(rank=1)",
    "norms",
    TIED,
]


def numbers(error) -> list[float]:
    return [float(x) for x in re.findall(r"(?:by|reach|explains) ([\d.e+-]+)", str(error.value))]


@pytest.mark.parametrize("tuner", [name for name, tuner in TUNERS.items() if "bert" in tuner.families])
def test_every_tuner_saves_its_model_beside_a_new_classifier(tuner, load, monkeypatch):
    if (
        TUNERS[tuner].layers is not None and tuner != "poly"
    ):  # prompts, and poly's tasks, are for PEFT's classes of tasks
        monkeypatch.delitem(TASK_TYPE, "bert")  # which train the classifier as well
    made = Case("bert")
    made.model = load()
    TUNERS[tuner].put_on(made)

    def losses(model):
        made.model = model
        return made.losses(made.examples)

    assert check_savable(made.model, losses, load)


CLASSIFIERS = [
    f"{kind}ForSequenceClassification" for kind in ("Bart", "T5", "XLNet", "DistilBert", "ModernBert", "XLM")
]


@pytest.mark.parametrize("subset", ["lora(rank=8)", "lora(rank=8) + head"])
@pytest.mark.parametrize("kind", CLASSIFIERS)
def test_every_family_saves_its_model_beside_a_new_head(kind, subset, tmp_path):
    model = getattr(transformers, kind)
    config = model.config_class(**{**HEADS_OF[kind][0], "eos_token_id": 2})
    model(config).base_model.save_pretrained(tmp_path)
    tokens = torch.tensor([[5, 7, 8, 2], [6, 4, 9, 2]])  # BART reads its classes off the last end of a text
    load = lambda: model.from_pretrained(tmp_path)
    assert check_savable(Subset(subset).apply(load()), logits_of(tokens), load)


@pytest.mark.parametrize("base", ["checkpoint", "given", "own"])
@pytest.mark.parametrize("subset", SUBSETS)
def test_a_trial_changes_nothing_of_the_model(subset, base, load, case):
    model = Subset(subset).apply(case("bert").model if base == "own" else load())
    model.train()
    before = {name: (tensor, tensor.clone()) for name, tensor in model.state_dict(keep_vars=True).items()}
    chance = torch.get_rng_state()
    assert check_savable(model, logits, load if base == "given" else None)
    after = model.state_dict(keep_vars=True)
    assert after.keys() == before.keys() and model.training and torch.equal(chance, torch.get_rng_state())
    assert all(after[name] is tensor and torch.equal(tensor, copy) for name, (tensor, copy) in before.items())
    assert logits(model).isfinite().all()


def test_a_classifier_that_is_not_saved_is_found(load, tmp_path):
    model = Subset("lora").apply(load())
    move(model)
    expected = outputs(model, logits)
    model.save_pretrained(tmp_path)  # as PEFT does it
    line = 'peft.PeftModel.from_pretrained(base_model, "weights")'
    with pytest.raises(GuaranteeError, match=f"{tmp_path} load with peft.* to another model") as error:
        check_saved(expected, line, tmp_path, logits, load)
    difference, largest, explained = numbers(error)
    assert difference > 500 * explained and largest == pytest.approx(0.02, rel=1)
    check_saved(expected, save_weights(model, tmp_path), tmp_path, logits, load)


@pytest.mark.parametrize("subset", SUBSETS)
def test_one_weight_of_many_that_differs_is_found(subset, load, tmp_path):
    model = Subset(subset).apply(load())
    move(model)
    expected = outputs(model, logits)
    line = save_weights(model, tmp_path)
    check_saved(expected, line, tmp_path, logits, load)
    expected[0, 1] += 3e-4
    with pytest.raises(GuaranteeError, match="differ by 0.0003"):
        check_saved(expected, line, tmp_path, logits, load)


def test_a_base_that_is_not_its_checkpoint_is_refused_before_anything_is_charged(load):
    model = Subset("lora").apply(load())
    with torch.no_grad():
        model.base_model.model.bert.pooler.dense.bias += 0.5  # frozen, and nowhere saved
    with pytest.raises(GuaranteeError, match="to another model") as error:
        check_savable(model, logits)
    difference, _, explained = numbers(error)
    assert difference > 100 * explained


def test_what_cannot_be_loaded_is_refused_in_a_sentence(load, tmp_path):
    model = Subset("lora").apply(load())
    line = save_weights(model, tmp_path)
    (tmp_path / "adapter_model.safetensors").write_bytes(b"cut short")
    with pytest.raises(GuaranteeError, match=f"{tmp_path} cannot be loaded with peft.*choose another subset"):
        check_saved(outputs(model, logits), line, tmp_path, logits, load)


def test_what_cannot_be_saved_is_refused_in_a_sentence(load):
    class Unsaved(BertForSequenceClassification):
        def save_pretrained(self, *_, **__):
            raise ValueError("no such thing\nand more")

    with pytest.raises(GuaranteeError, match=r"cannot be saved \(no such thing\)"):
        check_savable(Subset("norms").apply(load(Unsaved)), logits)


def test_adapters_that_cannot_be_saved_are_named(load):
    model = adapters(load(), "public", "cardiology")
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora" in name)
    with pytest.raises(SubsetError, match="'cardiology' trains and is not active, so its 8 parameters"):
        check_savable(model, logits, load)
    mixed = peft.PeftMixedModel(load(), peft.LoraConfig(r=2, target_modules=["query"]), adapter_name="first")
    mixed.add_adapter("second", peft.LoHaConfig(r=2, target_modules=["value"]))
    with pytest.raises(SubsetError, match="first, second are of several kinds"):
        check_savable(mixed, logits, load)


@pytest.mark.parametrize("fails", [True, False])
def test_the_folder_of_a_trial_is_private_and_goes_away(fails, load, tmp_path, monkeypatch):
    seen = []

    def watched(model, folder):
        seen.append((folder, stat.S_IMODE(os.stat(folder).st_mode)))
        return save_weights(model, folder) if not fails else 1 / 0

    monkeypatch.setattr(saved, "save_weights", watched)
    model = Subset("lora").apply(load())
    if fails:
        with pytest.raises(GuaranteeError):
            check_savable(model, logits, folder=tmp_path)
    else:
        assert check_savable(model, logits, folder=tmp_path)
    [(folder, mode)] = seen
    assert mode == 0o700 and Path(folder).parent == tmp_path and not Path(folder).exists()


@pytest.mark.parametrize(
    ("found", "expected", "difference"),
    [
        ([1.0, 2.0], [1.0, 2.5], 0.5),
        ([1.0, float("nan")], [1.0, float("nan")], 0.0),
        ([1.0, float("inf")], [1.0, float("inf")], 0.0),
        ([1.0, float("nan")], [1.0, 2.0], float("inf")),
        ([1.0], [1.0, 2.0], float("inf")),
    ],
)
def test_not_a_number_equals_only_itself(found, expected, difference):
    assert saved._difference(torch.tensor(found), torch.tensor(expected)) == difference or difference == float("inf")
    assert (saved._difference(torch.tensor(found), torch.tensor(expected)) > 1e30) == (difference == float("inf"))


def test_a_trial_moves_the_outputs_by_more_than_rounding(load):
    """So that weights that are not saved at all cannot pass as rounding, in bfloat16 neither."""
    for kind in (torch.float32, torch.bfloat16):
        model = Subset("ia3").apply(load(dtype=kind))
        before = outputs(model, logits)
        moved = saved._move(model, logits)
        rounding = saved._tolerance(model) * saved._scale(before)
        assert saved._difference(moved, before) > saved.VISIBLE * rounding


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("subset", ["lora", "lora + norms"])
def test_a_quantized_base_is_compared_too(bits, subset, tmp_path):
    sizes = dict(vocab_size=60, hidden_size=64, num_hidden_layers=1, num_attention_heads=2, intermediate_size=128)
    transformers.LlamaModel(transformers.LlamaConfig(**sizes, pad_token_id=0)).save_pretrained(tmp_path / "base")
    how = transformers.BitsAndBytesConfig(
        load_in_4bit=bits == 4, load_in_8bit=bits == 8, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32
    )
    quantized = lambda: transformers.LlamaForSequenceClassification.from_pretrained(
        tmp_path / "base", quantization_config=how
    )
    model = Subset(subset).apply(quantized()).train()
    tokens = torch.tensor([[5, 6, 7, 8]])
    before = model(input_ids=tokens).logits
    assert check_savable(model, logits_of(tokens)) and check_savable(model, logits_of(tokens), quantized)
    assert torch.equal(model(input_ids=tokens).logits, before)
    expected = outputs(model, logits_of(tokens))
    peft.PeftModel.save_pretrained(model, tmp_path / "weights")
    with pytest.raises(GuaranteeError, match="another model"):  # the new classifier is not in it
        line = 'peft.PeftModel.from_pretrained(base_model, "weights")'
        check_saved(expected, line, tmp_path / "weights", logits_of(tokens), quantized)


def logits_of(tokens):
    return lambda model: model(input_ids=tokens).logits


def test_weights_above_the_limit_and_copies_beyond_memory_are_left_to_the_end(load, monkeypatch):
    model = Subset("lora + norms").apply(load())
    assert not check_savable(model, logits, free=1000)
    monkeypatch.setattr(saved, "LARGEST", 100)
    assert not check_savable(model, logits, free=1 << 30)


def test_a_base_beyond_memory_is_taken_from_the_model_itself(load, monkeypatch):
    model, calls = Subset("lora").apply(load()), []
    assert check_savable(model, logits, lambda: calls.append(1), free=1000) and not calls
    monkeypatch.setattr("dpft.subset.weights.new_tensors", lambda model: [])  # the classifier is not saved
    with pytest.raises(GuaranteeError, match="another model"):
        check_savable(model, logits, free=1000)


Usage = namedtuple("Usage", "total used free")


@pytest.mark.parametrize(
    ("subset", "checkpoints"), [("lora", 0), ("lora + head", 2), ("norms", 1), ("sparse(rank=1)", 3)]
)
def test_a_run_needs_room_for_weights_and_checkpoints(subset, checkpoints, load, tmp_path, monkeypatch):
    model = Subset(subset).apply(load())
    written = saved.saved_bytes(model)
    trained = sum(p.nbytes for p in model.parameters() if p.requires_grad)
    needed = written + checkpoints * (written + 3 * trained)
    place = tmp_path / "not" / "there" / "yet"
    monkeypatch.setattr("shutil.disk_usage", lambda folder: Usage(0, 0, needed if Path(folder) == tmp_path else 0))
    check_room(model, place, checkpoints)
    monkeypatch.setattr("shutil.disk_usage", lambda folder: Usage(0, 0, needed - 1))
    with pytest.raises(RecipeError, match=rf"{checkpoints} checkpoints take .* and {tmp_path} has .* free"):
        check_room(model, place, checkpoints)
    save_weights(model, tmp_path / "weights")
    size = sum(file.stat().st_size for file in (tmp_path / "weights").rglob("*.safetensors"))
    assert size < written + 20_000  # of headers
