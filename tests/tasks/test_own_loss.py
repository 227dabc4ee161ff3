"""A data set that is tokenized already is learned by the model's own loss, whichever head the model has."""

import pytest
import torch
import transformers as T

from dpft.errors import RecipeError
from dpft.gradients.engine import Engine
from dpft.gradients.preflight import preflight
from dpft.tasks import LabelledTask, rules
from dpft.tasks.own_loss import check_own_loss
from tests.support.zoo import _bart_settings

BERT = dict(
    vocab_size=60, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16,
    max_position_embeddings=32, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
)  # fmt: skip
WAV = dict(
    hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, conv_dim=(8, 8), conv_stride=(4, 2), conv_kernel=(4, 2),
    num_feat_extract_layers=2, feat_extract_norm="layer", num_conv_pos_embeddings=4, num_conv_pos_embedding_groups=2, vocab_size=12, pad_token_id=0,
    mask_time_prob=0.0, layerdrop=0.0, hidden_dropout=0.0, attention_dropout=0.0, feat_proj_dropout=0.0, final_dropout=0.0, activation_dropout=0.0,
)  # fmt: skip


def ids(n):
    generator = torch.Generator().manual_seed(n)
    return torch.randint(5, 60, (n,), generator=generator).tolist()


def text(**labels):
    """Three texts of different lengths, with what ``labels`` make of a text's number and length."""
    return [{"input_ids": ids(n), **{k: f(i, n) for k, f in labels.items()}} for i, n in enumerate((4, 7, 9))]


def padded(features):
    longest = max(len(f["input_ids"]) for f in features)
    batch = {
        "attention_mask": torch.tensor(
            [[1] * len(f["input_ids"]) + [0] * (longest - len(f["input_ids"])) for f in features]
        )
    }
    for name in features[0]:
        values = [f[name] for f in features]
        if isinstance(values[0], list) and len({len(v) for v in values}) > 1 or name == "input_ids":
            filler = 0 if name == "input_ids" else -100
            values = [v + [filler] * (longest - len(v)) for v in values]
        batch[name] = torch.tensor(values)
    return batch


def heard(features):
    longest, spoken = (max(len(f[k]) for f in features) for k in ("input_values", "labels"))
    values = [f["input_values"] + [0.0] * (longest - len(f["input_values"])) for f in features]
    mask = [[1] * len(f["input_values"]) + [0] * (longest - len(f["input_values"])) for f in features]
    labels = [f["labels"] + [-100] * (spoken - len(f["labels"])) for f in features]
    return {"input_values": torch.tensor(values), "attention_mask": torch.tensor(mask), "labels": torch.tensor(labels)}


def sounds():
    return [
        {"input_values": torch.randn(n).tolist(), "labels": [3, 4, 5][: i + 1]} for i, n in enumerate((160, 200, 240))
    ]


BART = T.BartConfig(**{**_bart_settings(), "eos_token_id": 1}, max_position_embeddings=32, num_labels=2)
ends = lambda rows: [{**row, "input_ids": [*row["input_ids"], 1]} for row in rows]
HEADS = {
    "one class": (lambda: T.BertForSequenceClassification(T.BertConfig(**BERT)), text(labels=lambda i, n: i % 2), rules.classes),
    "several labels": (
        lambda: T.BertForSequenceClassification(T.BertConfig(**BERT, num_labels=3, problem_type="multi_label_classification")),
        text(labels=lambda i, n: [1.0, 0.0, float(i % 2)]),
        rules.several_labels,
    ),
    "a number": (
        lambda: T.BertForSequenceClassification(T.BertConfig(**BERT, num_labels=1)), text(labels=lambda i, n: i / 3), rules.numbers
    ),
    "three numbers": (
        lambda: T.BertForSequenceClassification(T.BertConfig(**BERT, num_labels=3, problem_type="regression")),
        text(labels=lambda i, n: [1.0, -2.0, i / 3]),
        rules.numbers,
    ),
    "the next token": (
        lambda: T.GPT2LMHeadModel(T.GPT2Config(vocab_size=60, n_embd=16, n_layer=1, n_head=2, n_positions=32)),
        text(labels=lambda i, n: ids(n)),
        rules.next_token,
    ),
    "a tag for each token": (
        lambda: T.BertForTokenClassification(T.BertConfig(**BERT, num_labels=5)), text(labels=lambda i, n: [j % 5 for j in range(n)]), rules.own_token
    ),
    "tags by a language model": (
        lambda: T.GPT2ForTokenClassification(T.GPT2Config(vocab_size=60, n_embd=16, n_layer=1, n_head=2, n_positions=32, num_labels=5)),
        text(labels=lambda i, n: [j % 5 for j in range(n)]),
        rules.own_token,
    ),
    "masked words": (
        lambda: T.BertForMaskedLM(T.BertConfig(**BERT)), text(labels=lambda i, n: [-100, *ids(n)[1:3], *[-100] * (n - 3)]), rules.own_token
    ),
    "spans": (
        lambda: T.BertForQuestionAnswering(T.BertConfig(**BERT)),
        text(start_positions=lambda i, n: 1, end_positions=lambda i, n: min(n - 1, 1 + i)),
        rules.spans,
    ),
    "a class by an encoder-decoder": (lambda: T.BartForSequenceClassification(BART), ends(text(labels=lambda i, n: i % 2)), rules.classes),
    "an answer": (lambda: T.BartForConditionalGeneration(BART), text(labels=lambda i, n: ids(n)[:3]), rules.decoded),
    "what was said": (lambda: T.Wav2Vec2ForCTC(T.Wav2Vec2Config(**WAV, ctc_loss_reduction="sum")), sounds(), rules.alignments),
    "what was said, by its length": (
        lambda: T.Wav2Vec2ForCTC(T.Wav2Vec2Config(**WAV, ctc_loss_reduction="mean")), sounds(), rules.alignments
    ),
}  # fmt: skip


@pytest.mark.parametrize("head", HEADS)
def test_the_rule_of_a_head_is_found_and_exact(head, plan):
    make, features, rule = HEADS[head]
    torch.manual_seed(0)
    model, task = make(), LabelledTask(heard if head.startswith("what was said") else padded)
    check_own_loss(task, model, task.collate, features)
    assert task.rule is rule
    model.eval()
    for feature in features:  # alone, and beside others
        own = model(**task.collate([feature])).loss
        torch.testing.assert_close(task.losses(model, task.collate([feature]))[0], own, rtol=1e-4, atol=1e-5)
    together = task.losses(model, task.collate(features))
    alone = torch.cat([task.losses(model, task.collate([feature])) for feature in features])
    torch.testing.assert_close(together, alone, rtol=2e-4, atol=1e-5)
    if not head.startswith("what was said"):
        with Engine(model, plan()) as engine:
            preflight(engine, lambda some: task.losses(model, task.collate(some)), features)


def test_labels_that_fit_no_rule_are_refused_with_both_numbers():
    class Weighted(T.BertForSequenceClassification):
        def forward(self, *args, **kwargs):
            found = super().forward(*args, **kwargs)
            found.loss = None if found.loss is None else 3 * found.loss
            return found

    make, features, _ = HEADS["one class"]
    task = LabelledTask(padded)
    with pytest.raises(RecipeError, match=r"dpft's loss is 0\.\d+ and the loss of Weighted itself is [12]\.\d+"):
        check_own_loss(task, Weighted(T.BertConfig(**BERT)), task.collate, features)


def test_examples_without_labels_tell_nothing():
    task = LabelledTask(padded)
    features = text(labels=lambda i, n: [-100] * n)
    with pytest.raises(RecipeError, match="None of 3 examples that were tried has a label"):
        check_own_loss(task, T.BertForMaskedLM(T.BertConfig(**BERT)), task.collate, features)


def test_a_class_beyond_those_of_the_model_is_refused_in_a_sentence():
    task = LabelledTask(padded)
    with pytest.raises(RecipeError, match="cannot compute its own loss on an example"):
        model = T.BertForSequenceClassification(T.BertConfig(**BERT))
        check_own_loss(task, model, task.collate, text(labels=lambda i, n: i))
