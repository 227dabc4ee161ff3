"""A text from a text: what is learned of it, figures without and with generation, and canaries."""

import json
import math
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import sacrebleu
import torch
import transformers
from click.testing import CliRunner

from dpft.audit.canaries import Canary, Planting, features, make
from dpft.audit.exposure import _extracted
from dpft.cli import main
from dpft.errors import RecipeError
from dpft.recipe import Recipe
from dpft.tasks import Seq2Seq
from dpft.tasks.losses import IGNORED
from dpft.tasks.own_loss import check_own_loss
from dpft.workflows.setup import load_model
from tests.support.recipes import GOOD
from tests.support.texts import proven, tokenizer
from tests.tasks.test_contract import text_to_text

ROWS = {
    "source": ["w1 w2 w3", "w4", "w5 w6 w7 w8 w9 w10"],
    "target": ["w1", "w2 w11 w1 w12 w13 w14 w15", "w16 w17"],
}
SIDES = {f"{side}_{key}": n for side in ("encoder", "decoder")
         for key, n in (("layers", 1), ("attention_heads", 2), ("ffn_dim", 24))}  # fmt: skip
BART = dict(**SIDES, vocab_size=61, d_model=16, max_position_embeddings=32, pad_token_id=0, eos_token_id=2)
T5 = dict(vocab_size=61, d_model=16, d_kv=8, d_ff=24, num_layers=1, num_heads=2, decoder_start_token_id=0)
FAMILIES = {
    "t5": lambda: transformers.T5ForConditionalGeneration(transformers.T5Config(**T5)),
    "bart": lambda: transformers.BartForConditionalGeneration(
        transformers.BartConfig(**BART, decoder_start_token_id=2, forced_eos_token_id=None)
    ),
    "marian": lambda: transformers.MarianMTModel(
        transformers.MarianConfig(**BART, decoder_start_token_id=0, forced_eos_token_id=None)
    ),
}


def model_of(family):
    transformers.set_seed(0)
    return FAMILIES[family]().eval()


def task(**settings):
    return Seq2Seq(tokenizer(), **settings)


def tables(**settings):
    return {**GOOD, "subset": "all", "task": {"name": "seq2seq", **settings}}


def learned(made, one):
    return made.tokenizer.decode([label for label in one["labels"] if label != IGNORED])


@pytest.mark.parametrize("family", FAMILIES)
def test_its_gradients_are_exact_and_its_loss_is_the_model_s_own(family, plan):
    assert proven(task(), model_of(family), ROWS, plan()).exact


@pytest.mark.parametrize("family", FAMILIES)
def test_a_frozen_head_s_loss_is_the_model_s_own(family):
    """T23: the head of T5 is looked at a few tokens at a time; BART's adds something to it and is not."""
    made, model = task(), model_of(family).requires_grad_(False)
    if hasattr(model, "final_logits_bias"):
        model.final_logits_bias.normal_()
    check_own_loss(made, model, made.collate, made.encode(ROWS))


def test_a_loss_is_the_mean_over_the_example_s_own_target():
    """T1."""
    made, model = task(), model_of("t5")
    found = made.encode(ROWS)
    with torch.no_grad():
        together = made.losses(model, made.collate(found))
        for i, one in enumerate(found):
            own = model(input_ids=torch.tensor([one["input_ids"]]), labels=torch.tensor([one["labels"]])).loss
            torch.testing.assert_close(together[i], own, rtol=1e-5, atol=1e-6)


def test_the_end_of_a_target_is_learned_and_a_long_one_cut_before_it():
    made = task(prefix="w20 ", max_length=4, target_length=5)
    found = made.encode(ROWS)
    assert [learned(made, one) for one in found] == ["w1 <eos>", "w2 w11 w1 w12 <eos>", "w16 w17 <eos>"]
    read = [made.tokenizer.decode(one["input_ids"]) for one in found]
    assert read == ["w20 w1 w2 w3", "w20 w4", "w20 w5 w6 w7"]
    assert made.size(found[1]) == (2 + 5, 5)


def test_both_texts_are_padded_and_only_the_source_has_a_mask():
    batch = task().collate(task().encode(ROWS))
    assert batch["attention_mask"].sum(1).tolist() == [3, 1, 6] and batch["input_ids"].shape == (3, 6)
    assert (batch["labels"] != IGNORED).sum(1).tolist() == [2, 8, 3] and batch["labels"].shape == (3, 8)


def test_perplexity_is_over_all_tokens_of_the_targets():
    made, model = task(), model_of("t5")
    found = made.encode(ROWS)
    figures = made.evaluate(model, [made.collate(found[:2]), made.collate(found[2:])])
    with torch.no_grad():
        losses = [float(made.losses(model, made.collate([one]))[0]) for one in found]
    total = sum(loss * len(one["labels"]) for loss, one in zip(losses, found, strict=True))
    assert figures["tokens"] == 13 and figures["examples"] == 3 and "bleu" not in figures
    assert figures["perplexity"] == pytest.approx(math.exp(total / 13), rel=1e-4)


class Says:
    """A model that writes what it is told to, and whose logits are all zero."""

    config = SimpleNamespace(is_encoder_decoder=True)
    device = torch.device("cpu")

    def __init__(self, ids):
        self.ids, self.asked = ids, []

    def __call__(self, decoder_input_ids, **inputs):
        return SimpleNamespace(logits=torch.zeros(*decoder_input_ids.shape, 61))

    def prepare_decoder_input_ids_from_labels(self, labels):
        return labels

    def generate(self, input_ids, **how):
        self.asked.append(how)
        return self.ids

    def eval(self):
        return self


def test_what_is_written_is_compared_by_sacrebleu_and_rouge():
    made = task(generate=True, target_length=9)
    said = ["w1", "w2 w11 w1 w12 w13 w14 w9", "w9 w17"]
    ids = made.tokenizer([f"{one} <eos>" for one in said], padding=True, return_tensors="pt")["input_ids"]
    model = Says(torch.nn.functional.pad(ids, (1, 0), value=0))  # begins with padding, as T5's decoder does
    found = made.evaluate(model, [made.collate(made.encode(ROWS))])
    assert found["exact_match"] == pytest.approx(1 / 3)
    assert found["bleu"] == pytest.approx(sacrebleu.corpus_bleu(said, [ROWS["target"]]).score) and found["bleu"] > 50
    assert found["rouge_l"] == pytest.approx(np.mean([1, 6 / 7, 1 / 2]))  # longest common part, over 1, 7 and 2 words
    assert found["perplexity"] == pytest.approx(61) and model.asked[0]["max_new_tokens"] == 9


def test_generation_without_its_packages_is_refused_before_anything_is_loaded(monkeypatch):
    monkeypatch.setitem(sys.modules, "sacrebleu", None)
    with pytest.raises(RecipeError, match="sacrebleu is not installed: run `pip install dpft.text.`"):
        task(generate=True)
    assert task().metrics()


@pytest.mark.parametrize("key", ["max_length", "target_length"])
def test_no_text_is_longer_than_the_model_s_positions(tmp_path, key):
    model_of("bart").save_pretrained(tmp_path)
    tokenizer().save_pretrained(tmp_path)
    settings = tables() | {"model": {"path": str(tmp_path)}}
    made, _ = load_model(Recipe.parse(settings))
    assert made.max_length == made.target_length == 32
    with pytest.raises(RecipeError, match=f"task.{key} is 33 tokens, but the model has positions for 32"):
        load_model(Recipe.parse(settings | {"task": {"name": "seq2seq", key: 33}}))


def test_it_trains_and_writes_from_a_recipe(tmp_path):
    text_to_text(tmp_path / "model")
    rows = [{name: values[i % 3] for name, values in ROWS.items()} for i in range(12)]
    (tmp_path / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    path = str(tmp_path / "train.jsonl")
    recipe = Recipe.parse(
        tables(generate=True, target_length=8)
        | {
            "subset": "lora(rank=2)",
            "model": {"path": str(tmp_path / "model")},
            "data": {"train": path, "validation": path, "units": 12},
            "privacy": {"noise_multiplier": 1.0, "delta": 1e-2, "batch_size": 4, "steps": 2},
            "run": {"token_budget": 256},
        }
    )
    (tmp_path / "recipe.toml").write_text(recipe.to_toml())
    done = CliRunner().invoke(main, ["train", str(tmp_path / "recipe.toml"), "--output", str(tmp_path / "run")])
    assert done.exit_code == 0, done.output
    metrics = json.loads((tmp_path / "run" / "private" / "metrics.json").read_text())
    assert metrics["tokens"] == 4 * 13 and 0 <= metrics["bleu"] <= 100 and 0 <= metrics["rouge_l"] <= 1


def test_its_canaries_are_judged_by_the_target():
    made, recipe = task(max_length=40, target_length=40), Recipe.parse(tables())
    record = made.follow("w1 w2", "w3 w4")
    (one,) = made.encode({name: [value] for name, value in record.items()})
    assert record == {"source": "w1 w2", "target": "w3 w4"} and learned(made, made.judged(one, "w1 w2")) == "w3 w4"
    canaries = make(Planting(canaries=10, kind="new-token"), recipe, made).canaries
    judged = [learned(made, one) for one in features(canaries, recipe, made)]
    assert judged == [canary.record["target"].strip() for canary in canaries]
    likely = made.likelihoods(Says(None), made.collate([made.judged(one, ""), one]))
    assert [len(row) for row in likely] == [2, 3] and likely[1][0] == pytest.approx(-math.log(61))


@pytest.mark.parametrize(("said", "extracted"), [("<pad> w3 w4 <eos>", True), ("w1 w2", False)])
def test_a_secret_is_looked_for_in_what_the_decoder_writes(said, extracted):
    made, recipe = task(), Recipe.parse(tables())
    canary = Canary(made.follow("w1 w2", "w3 w4"), "w1 w2", "w3w4")
    model = Says(made.tokenizer([said], return_tensors="pt")["input_ids"])
    assert _extracted(canary, recipe, made, model) == extracted
