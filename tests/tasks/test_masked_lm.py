"""Masked words: drawn anew and secretly in each step, published where figures are compared."""

import math

import numpy as np
import pytest
import torch
import transformers

from dpft.errors import RecipeError
from dpft.gradients.engine import Engine
from dpft.recipe import Recipe
from dpft.tasks import MaskedLM
from dpft.tasks.losses import IGNORED
from dpft.training.batches import Examples
from dpft.workflows.setup import load_model
from tests.support.recipes import GOOD, WORDS
from tests.support.texts import POSITIONS, SMALL, TEXTS, proven, tokenizer

CLOSED = {"input_ids": [2, *range(3, 43), 2]}  # what a text begins and ends with is no word
DISTIL = dict(dim=16, n_layers=1, n_heads=2, hidden_dim=16, vocab_size=61, max_position_embeddings=32)
FAMILIES = {
    "bert": lambda: transformers.BertForMaskedLM(transformers.BertConfig(vocab_size=61, **SMALL, **POSITIONS)),
    "distilbert": lambda: transformers.DistilBertForMaskedLM(transformers.DistilBertConfig(**DISTIL)),
}


@pytest.fixture(scope="module")
def task():
    return MaskedLM(tokenizer())


def hidden(features):
    return [i for i, label in enumerate(features["labels"]) if label != IGNORED]


def test_a_share_of_the_words_is_masked_and_never_what_is_no_word(task):
    drawn = [task.draw(CLOSED, np.random.default_rng(i)) for i in range(20)]
    for one in drawn:
        assert len(hidden(one)) == round(0.15 * 40) and not {0, 41} & set(hidden(one))
        assert all(one["labels"][i] == CLOSED["input_ids"][i] for i in hidden(one))
        seen = [i for i in range(42) if i not in hidden(one)]
        assert [one["input_ids"][i] for i in seen] == [CLOSED["input_ids"][i] for i in seen]
    assert len({i for one in drawn for i in hidden(one)}) > 35


def test_a_short_text_has_one_masked_word_and_one_without_words_none(task):
    for ids, masked in (([5], 1), ([2, 5, 6, 2], 1), ([2, 2], 0)):
        drawn = task.draw({"input_ids": ids}, np.random.default_rng(0))
        assert len(hidden(drawn)) == masked and len(drawn["labels"]) == len(ids)


def test_eight_tenths_are_hidden_one_exchanged_and_one_left(task):
    random, mask = np.random.default_rng(0), task.tokenizer.mask_token_id
    drawn = [task.draw(CLOSED, random) for _ in range(500)]
    shown = [(one["input_ids"][i], one["labels"][i]) for one in drawn for i in hidden(one)]
    shares = [
        np.mean([token == mask for token, _ in shown]),
        np.mean([token not in (mask, own) for token, own in shown]),
        np.mean([token == own for token, own in shown]),
    ]
    assert shares == pytest.approx([0.8, 0.1, 0.1], abs=0.02)


def test_each_draw_masks_anew_from_no_seed(task, plan):
    """T20: of a long text, two of the draws are alike with a chance of less than one in a million."""
    found = []
    for _ in range(2):
        np.random.seed(0)
        torch.manual_seed(0)
        model = FAMILIES["bert"]()
        with Engine(model, plan()):
            examples = Examples([CLOSED], np.array([42]), np.array([[0]]), chance=task.draw)
            found += [tuple(hidden(examples.drawn([0])[0])) for _ in range(2)]
    assert len(set(found)) == 4


def test_published_masks_are_a_text_s_own_and_always_alike(task):
    features = task.encode({"text": TEXTS})
    together, again = task.collate(features), task.collate(features[::-1])
    assert torch.equal(together["labels"], again["labels"].flip(0))
    for i, one in enumerate(features):
        alone, length = task.collate([one]), len(one["input_ids"])
        assert torch.equal(alone["labels"][0], together["labels"][i, :length])
        assert torch.equal(alone["input_ids"][0], together["input_ids"][i, :length])
    assert hidden({"labels": task.collate([CLOSED])["labels"][0].tolist()}) == [1, 4, 7, 12, 28, 33]


def test_drawn_masks_stay_as_they_were_drawn(task):
    drawn = task.draw(CLOSED, np.random.default_rng(3))
    batch = task.collate([drawn, task.encode({"text": TEXTS})[0]])
    assert batch["labels"][0].tolist() == drawn["labels"] and batch["input_ids"][0].tolist() == drawn["input_ids"]


@pytest.mark.parametrize("family", FAMILIES)
def test_its_gradients_are_exact_and_its_loss_is_the_model_s_own(task, family, plan):
    transformers.set_seed(0)
    assert proven(task, FAMILIES[family](), {"text": TEXTS}, plan()).exact


def test_a_loss_is_the_mean_over_the_example_s_own_masked_words(task):
    """T1."""
    transformers.set_seed(0)
    model = FAMILIES["bert"]().eval()
    features = [{"input_ids": [2, 2]}, CLOSED | {"input_ids": CLOSED["input_ids"][:30]}, {"input_ids": [2, 7, 8, 2]}]
    batch = task.collate(features)
    with torch.no_grad():
        found = task.losses(model, batch)
        logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    each = torch.nn.functional.cross_entropy(logits.mT, batch["labels"], reduction="none")
    assert found[0] == 0
    for i in (1, 2):
        torch.testing.assert_close(found[i], each[i][batch["labels"][i] != IGNORED].mean())


def test_perplexity_is_over_all_masked_words(task):
    transformers.set_seed(0)
    model = FAMILIES["bert"]().eval()
    features = task.encode({"text": [" ".join(WORDS[3:23]), *TEXTS]})
    found = task.evaluate(model, [task.collate(features[:2]), task.collate(features[2:])])
    counts = [max(1, round(0.15 * len(one["input_ids"]))) for one in features]
    with torch.no_grad():
        losses = [float(task.losses(model, task.collate([one]))[0]) for one in features]
    total = sum(loss * count for loss, count in zip(losses, counts, strict=True))
    assert found["tokens"] == sum(counts) and found["examples"] == 5
    assert found["perplexity"] == pytest.approx(math.exp(total / sum(counts)), rel=1e-4)


def test_a_model_that_predicts_no_masked_words_is_refused(tmp_path):
    with pytest.raises(RecipeError, match='has no mask token, .* or task.name = "causal_lm"'):
        MaskedLM(tokenizer(mask_token=None))
    sides = {f"{side}_{key}": 2 for side in ("encoder", "decoder") for key in ("layers", "attention_heads", "ffn_dim")}
    config = transformers.BartConfig(vocab_size=60, d_model=16, **sides, **POSITIONS)
    transformers.BartForConditionalGeneration(config).save_pretrained(tmp_path)
    tokenizer().save_pretrained(tmp_path)
    recipe = Recipe.parse({**GOOD, "subset": "all", "model": {"path": str(tmp_path)}, "task": {"name": "masked_lm"}})
    with pytest.raises(RecipeError, match='encoder-decoder, .* use task.name = "seq2seq"'):
        load_model(recipe)
