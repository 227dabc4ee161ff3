"""One contract for every task, and what each promises beyond it."""

import math

import numpy as np
import pytest
import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers

from dpft.errors import RecipeError
from dpft.tasks import CausalLM, LabelledTask, SequenceClassification, Task
from dpft.tasks.losses import IGNORED, pad_features, token_losses
from dpft.tasks.own_loss import check_own_loss


@pytest.fixture(scope="module")
def tokenizer():
    words = ["<pad>", "<unk>", "<eos>"] + [f"w{i}" for i in range(57)]
    raw = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=raw, pad_token="<pad>", unk_token="<unk>", eos_token="<eos>"
    )


ROWS = {
    "text": ["w1 w2 w3", "w4", "w5 w6 w7 w8 w9"],
    "label": ["a", "b", "a"],
    "question": ["w1", "w2 w3", "w4 w5 w6 w7"],
    "answer": ["w8", "w9 w10", "w11 w12 w13"],
}


@pytest.fixture(params=["classification", "text", "pairs", "labelled"])
def prepared(request, tokenizer, case):
    """A task, a model for it and its encoded rows."""
    if request.param == "classification":
        return SequenceClassification(tokenizer, ["a", "b"], max_length=8), case("bert").model
    if request.param == "pairs":
        return CausalLM(tokenizer, prompt="question", response="answer"), case("llama").model
    if request.param == "text":
        return CausalLM(tokenizer, max_length=8), case("gpt2").model
    return LabelledTask(lambda features: pad_features(features, 0, token_labels=True)), case("gpt2").model


def encoded(task):
    if isinstance(task, LabelledTask):
        return task.encode(
            {"input_ids": [[5, 6, 7], [8], [9, 10, 11, 12]], "labels": [[5, 6, 7], [8], [9, 10, 11, 12]]}
        )
    return task.encode(ROWS)


def test_a_loss_is_the_same_alone_and_beside_others(prepared):
    """T1."""
    task, model = prepared
    model.eval()
    assert isinstance(task, Task)
    features = encoded(task)
    together = task.losses(model, task.collate(features))
    assert together.shape == (3,)
    for i, feature in enumerate(features):
        torch.testing.assert_close(task.losses(model, task.collate([feature]))[0], together[i], rtol=1e-5, atol=1e-6)


def test_features_of_a_row_depend_on_that_row_alone(prepared):
    """T14, T16: nothing is packed, nothing is learned from the other rows."""
    task, _ = prepared
    if isinstance(task, LabelledTask):
        return
    whole = encoded(task)
    for i in range(3):
        assert task.encode({key: values[i : i + 1] for key, values in ROWS.items()}) == whole[i : i + 1]


def test_lengths_count_the_tokens_before_padding(prepared):
    task, _ = prepared
    features = encoded(task)
    batch = task.collate(features)
    assert [task.size(f).tokens for f in features] == batch["attention_mask"].sum(1).tolist()


def test_a_response_alone_has_a_loss(tokenizer):
    task = CausalLM(tokenizer, prompt="question", response="answer")
    feature = task.encode(ROWS)[2]
    assert feature["labels"][:4] == [IGNORED] * 4
    assert feature["labels"][4:] == feature["input_ids"][4:] and feature["input_ids"][-1] == tokenizer.eos_token_id


def test_the_end_of_a_text_is_learned(tokenizer):
    features = CausalLM(tokenizer).encode(ROWS)
    assert [len(feature["labels"]) for feature in features] == [4, 2, 6]
    assert all(feature["labels"] == feature["input_ids"] for feature in features)
    assert {feature["labels"][-1] for feature in features} == {tokenizer.eos_token_id}


def test_a_long_prompt_is_cut_from_its_beginning(tokenizer):
    task = CausalLM(tokenizer, prompt="question", response="answer", max_length=6)
    feature = task.encode(ROWS)[2]
    assert tokenizer.decode(feature["input_ids"]) == "w6 w7 w11 w12 w13 <eos>"


def test_an_example_without_labelled_tokens_has_no_loss_and_no_gradient():
    logits = torch.randn(2, 4, 9, requires_grad=True)
    labels = torch.tensor([[IGNORED] * 4, [1, 2, 3, 4]])
    losses = token_losses(logits, labels, shift=True)
    losses.sum().backward()
    assert losses[0] == 0 and (logits.grad[0] == 0).all() and torch.isfinite(logits.grad).all()


def test_the_last_token_of_a_tuned_prompt_predicts_the_first_label():
    """Three virtual tokens before four: the same loss as with three labels of no word before the four, as PEFT has
    it."""
    torch.manual_seed(0)
    logits, labels = torch.randn(2, 3 + 4, 11), torch.randint(11, (2, 4))
    labels[1, 3] = IGNORED
    whole = torch.nn.functional.pad(labels, (3, 0), value=IGNORED)
    expected = token_losses(logits, whole, shift=True)
    torch.testing.assert_close(token_losses(logits, labels, shift=True), expected)


def test_an_encoder_decoder_predicts_in_place():
    config = transformers.T5Config(
        vocab_size=30, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2, decoder_start_token_id=0
    )
    model = transformers.T5ForConditionalGeneration(config).eval()
    batch = {
        "input_ids": torch.tensor([[3, 4, 5]]),
        "attention_mask": torch.ones(1, 3, dtype=torch.long),
        "labels": torch.tensor([[6, 7]]),
    }
    task = LabelledTask(lambda features: batch)
    torch.testing.assert_close(task.losses(model, batch)[0], model(**batch).loss)


def test_an_undeclared_label_is_refused(tokenizer):
    """T14."""
    with pytest.raises(RecipeError, match="Row 2 of 2 has a label .* that is not among the 2 declared") as error:
        SequenceClassification(tokenizer, ["a", "b"]).encode({"text": ["w1"] * 2, "label": ["a", "cough"]})
    assert "cough" not in str(error.value)


@pytest.mark.parametrize(
    ("declared", "labels"),
    [
        (["01", "1"], ["01", "1"]),
        (["yes", "no"], ["yes", "no"]),  # in the order in which they were declared
        (["0", "1"], [0, 1]),
        (["0", "1"], torch.tensor([0, 1])),
        (["false", "true"], [False, True]),
        (["False", "True"], [np.False_, np.True_]),
        (["None", "nan"], ["None", "nan"]),
    ],
)
def test_a_label_is_the_text_that_stands_there(tokenizer, declared, labels):
    found = SequenceClassification(tokenizer, declared).encode({"text": ["w1", "w2"], "label": labels})
    assert [feature["labels"] for feature in found] == [0, 1]


@pytest.mark.parametrize(
    ("label", "said"),
    [
        (None, "has no label"),
        (float("nan"), "has no label"),
        (" ", "has no label"),
        (1.0, "has a float"),
        (torch.tensor(1.0), "has a float"),
        (["1"], "has a list"),
        (2, "not among the 4 declared"),
        (True, "not among the 4 declared"),
        ("01", "not among the 4 declared"),
    ],
)
def test_what_is_no_declared_label_is_refused_with_its_reason(tokenizer, label, said):
    """T14: nothing missing passes as the class of that name."""
    task = SequenceClassification(tokenizer, ["None", "nan", "1", "1.0"])
    with pytest.raises(RecipeError, match=said):
        task.encode({"text": ["w1"], "label": [label]})


def test_a_model_with_fewer_classes_than_labels_is_refused(tokenizer, case):
    task = SequenceClassification(tokenizer, ["a", "b", "c", "d", "e", "f", "g", "h", "i"])
    batch = task.collate(task.encode({"text": ["w1"], "label": ["a"]}))
    with pytest.raises(RecipeError, match="classes apart, but 9 labels are declared: load the model with num_labels=9"):
        task.losses(case("bert").model, batch)


def test_classification_metrics(tokenizer):
    task = SequenceClassification(tokenizer, ["a", "b", "c"])
    logits = torch.tensor([[9.0, 0, 0], [9.0, 0, 0], [0, 9.0, 0], [0, 0, 9.0]])

    def model(**batch):
        return transformers.modeling_outputs.SequenceClassifierOutput(logits=logits)

    found = task.evaluate(model, [{"input_ids": None, "labels": torch.tensor([0, 1, 1, 1])}])
    assert found["accuracy"] == 0.5 and found["examples"] == 4
    assert found["per_class"]["a"] == {
        "precision": 0.5,
        "recall": 1.0,
        "f1": pytest.approx(2 / 3),
        "count": 1,
        "average_precision": 0.5,
    }
    assert found["macro_f1"] == pytest.approx((2 / 3 + 0.5) / 2)


def test_perplexity_is_over_all_tokens(tokenizer, case):
    task, model = CausalLM(tokenizer), case("gpt2").model.eval()
    features = task.encode(ROWS)
    found = task.evaluate(model, [task.collate(features[:2]), task.collate(features[2:])])
    with torch.no_grad():
        losses = [float(task.losses(model, task.collate([f]))[0]) for f in features]
    total = sum(loss * (len(f["input_ids"]) - 1) for loss, f in zip(losses, features, strict=True))
    tokens = sum(len(f["input_ids"]) - 1 for f in features)
    assert found["tokens"] == tokens
    assert found["perplexity"] == pytest.approx(math.exp(total / tokens), rel=1e-4)


class Described(LabelledTask):
    """A task of the user's own, whose loss is dpft's."""


class Tripled(transformers.BertForTokenClassification):
    """A model whose own loss is none of dpft's."""

    def forward(self, *args, **kwargs):
        found = super().forward(*args, **kwargs)
        found.loss = None if found.loss is None else 3 * found.loss
        return found


def test_a_task_that_inherits_its_loss_is_compared_with_the_models_own(case):
    config = transformers.BertConfig(
        vocab_size=60, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, num_labels=60
    )
    tokens = case("gpt2")
    with pytest.raises(RecipeError, match="loss of Tripled itself"):
        check_own_loss(Described(tokens.batch), Tripled(config), tokens.batch, tokens.examples)
