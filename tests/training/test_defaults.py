"""Without a task a private trainer does what ``transformers.Trainer`` does, example by example."""

import random
import warnings

import numpy as np
import pytest
import torch
import transformers as T
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from torch.utils.data import ConcatDataset, IterableDataset, random_split
from torch.utils.data import Dataset as TorchDataset

import dpft
from dpft.errors import GuaranteeError, RecipeError
from dpft.gradients.preflight.fingerprint import fingerprint
from dpft.tasks import LabelledTask

SMALL = dict(
    hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, max_position_embeddings=16
)
PLAN = dict(noise_multiplier=1.0, sample_rate=0.1, steps=2, delta=1e-3, units=80)


def tokenizer(words=("fever", "cough")):
    raw = Tokenizer(
        models.WordLevel({w: i for i, w in enumerate(("[PAD]", "[UNK]", "[MASK]", *words))}, unk_token="[UNK]")
    )
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    return T.PreTrainedTokenizerFast(tokenizer_object=raw, pad_token="[PAD]", unk_token="[UNK]", mask_token="[MASK]")


TOKENIZER = tokenizer()
TEXTS = Dataset.from_list(
    [{"text": "fever " * (1 + i % 3), "label": i % 2, "patient_id": f"P{i // 2}"} for i in range(80)]
)
TOKENS = TEXTS.map(lambda batch: TOKENIZER(batch["text"]), batched=True)


def classifier(**fields):
    return T.BertForSequenceClassification(T.BertConfig(vocab_size=5, **SMALL, **fields))


@pytest.fixture
def train(tmp_path):
    def run(rows, model=None, kind=dpft.DPTrainer, plan=None, args=None, folder="run", **fields):
        arguments = T.TrainingArguments(
            str(tmp_path / folder), report_to=[], use_cpu=True, disable_tqdm=True, **(args or {})
        )
        fields = {"data_collator": T.DataCollatorWithPadding(TOKENIZER), **fields}
        plan = dpft.Plan(**{**PLAN, **(plan or {})})
        trainer = kind(model=model or classifier(), args=arguments, train_dataset=rows, plan=plan, **fields)
        trainer.train()
        assert trainer.session.releases.charged == plan.steps
        return trainer

    return run


# -- data --------------------------------------------------------------------------------------------------------------


class Rows(TorchDataset):
    def __init__(self, tensors):
        self.tensors = tensors

    def __len__(self):
        return 80

    def __getitem__(self, i):
        found = TOKENIZER(TEXTS[i]["text"], padding="max_length", max_length=4)
        row = {**found, "labels": TEXTS[i]["label"]}
        return {name: torch.tensor(value) if self.tensors else value for name, value in row.items()}


DATA = {
    "a text column left in": (TOKENS.remove_columns("patient_id"), "example"),
    "units by a text": (TOKENS.remove_columns("text"), "patient_id"),
    "with_format('torch')": (TOKENS.remove_columns(["text", "patient_id"]).with_format("torch"), "example"),
    "with_format('numpy')": (TOKENS.remove_columns(["text", "patient_id"]).with_format("numpy"), "example"),
    "a torch data set": (Rows(False), "example"),
    "a torch data set of tensors": (Rows(True), "example"),
    "a split": (random_split(Rows(True), [60, 20])[0], "example"),
    "a concatenation": (ConcatDataset([Rows(True)] * 2), "example"),
    "a selection": (TOKENS.select(range(0, 80, 2)), "example"),
    "a list": ([TOKENS[i] for i in range(80)], "patient_id"),
}


@pytest.mark.parametrize("kind", DATA)
def test_data_as_tutorials_prepare_them_train(train, kind):
    rows, unit = DATA[kind]
    trainer = train(rows, plan={"unit": unit, "units": 40 if unit == "patient_id" else 80})
    assert len(trainer.session.examples.members) == (40 if unit == "patient_id" else len(rows))


def test_the_unit_column_never_reaches_the_collator(train):
    seen = set()

    def collate(features):
        seen.update(*features)
        return T.DataCollatorWithPadding(TOKENIZER)([{k: v for k, v in f.items() if k != "text"} for f in features])

    kept = TOKENS.remove_columns("token_type_ids") if "token_type_ids" in TOKENS.column_names else TOKENS
    args, plan = {"remove_unused_columns": False}, {"unit": "patient_id", "units": 40}
    train(kept, args=args, plan=plan, data_collator=collate)
    assert "patient_id" not in seen and "text" in seen


def test_data_without_single_rows_are_refused(train):
    class Stream(IterableDataset):
        def __iter__(self):
            yield TOKENS[0]

    with pytest.raises(GuaranteeError, match="Stream, of which no single row can be asked for"):
        train(Stream())


def test_no_rows_are_refused_in_a_sentence(train):
    with pytest.raises(RecipeError, match="data are empty"):
        train(TOKENS.select([]))


def test_columns_that_the_model_does_not_take_are_named(train):
    with pytest.raises(RecipeError, match="columns text, patient_id, and the model takes none"):
        train(TEXTS.remove_columns("label"))


def test_arguments_that_the_plan_decides_are_named_in_one_warning(train):
    with pytest.warns(UserWarning, match="num_train_epochs, per_device_train_batch_size are not used") as found:
        train(TOKENS, args={"num_train_epochs": 9, "per_device_train_batch_size": 4})
    assert sum("not used" in str(one.message) for one in found) == 1


def test_arguments_left_alone_are_not_warned_of(train):
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        train(TOKENS)
    assert not any("not used" in str(one.message) for one in found)


# -- losses ------------------------------------------------------------------------------------------------------------


def test_a_tag_for_each_token_is_learned(tmp_path):
    """Each token's tag follows from that token alone: labels of the next token cannot teach that."""
    rng = random.Random(0)
    words = tokenizer([f"w{i}" for i in range(97)])

    def row():
        ids = [rng.randrange(3, 100) for _ in range(rng.randint(5, 15))]
        return {"input_ids": ids, "attention_mask": [1] * len(ids), "labels": [i % 3 for i in ids]}

    rows, collate = Dataset.from_list([row() for _ in range(400)]), T.DataCollatorForTokenClassification(words)
    torch.manual_seed(0)
    config = T.BertConfig(vocab_size=100, **{**SMALL, "hidden_size": 32, "intermediate_size": 64}, num_labels=3)
    model = dpft.Subset("all").apply(T.BertForTokenClassification(config))
    args = T.TrainingArguments(str(tmp_path), learning_rate=5e-3, report_to=[], use_cpu=True, disable_tqdm=True)
    plan = dpft.Plan(noise_multiplier=0.0, sample_rate=0.1, steps=150, delta=1e-4, units=400, clip=dpft.FlatClip(1e9))
    dpft.DPTrainer(
        model=model, args=args, train_dataset=rows, plan=plan, data_collator=collate, token_budget=4096
    ).train()
    batch = collate([rows[i] for i in range(100)])
    told, model = batch["labels"] != -100, model.eval()
    found = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits.argmax(-1)
    assert (found == batch["labels"])[told].float().mean() >= 0.99


class Weighted(dpft.DPTrainer):
    calls = 0

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        type(self).calls += 1
        labels = inputs.pop("labels")
        outputs = model(**inputs)
        each = torch.nn.functional.cross_entropy(outputs.logits, labels, torch.tensor([1.0, 5.0]), reduction="none")
        return (each, outputs) if return_outputs else each


class Averaged(Weighted):
    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        found = super().compute_loss(model, inputs)
        return found.mean()


def test_a_compute_loss_of_ones_own_is_used(train):
    train(TOKENS, kind=Weighted)
    assert Weighted.calls > 2


def test_a_loss_function_of_ones_own_is_used(train):
    calls = []

    def loss(outputs, labels, num_items_in_batch=None):
        calls.append(len(labels))
        return torch.nn.functional.cross_entropy(outputs.logits, labels, reduction="none")

    train(TOKENS, compute_loss_func=loss)
    assert len(calls) > 2


def masked_words(outputs, labels, num_items_in_batch=None):
    each = torch.nn.functional.cross_entropy(outputs.logits.transpose(1, 2), labels, reduction="none")
    masked_words.calls += 1
    return each.sum(1) / (labels != -100).sum(1).clamp_min(1)


def test_a_loss_function_of_ones_own_is_used_where_a_collator_masks(train):
    masked_words.calls = 0
    rows = TOKENS.remove_columns(["text", "patient_id", "label"])
    model = T.BertForMaskedLM(T.BertConfig(vocab_size=5, **SMALL))
    collate = T.DataCollatorForLanguageModeling(TOKENIZER, mlm=True, mlm_probability=0.5)
    train(rows, model=model, data_collator=collate, compute_loss_func=masked_words)
    assert masked_words.calls > 2


def test_a_loss_of_ones_own_is_proven_again_in_each_run(train):
    """T1: no version tells whether its code is what it was."""
    for trainer in (train(TOKENS, kind=Weighted), train(TOKENS, folder="func", compute_loss_func=weighted)):
        task, model = trainer.session.task, trainer.model
        task._collator = T.default_data_collator  # a function of the library's, so that the loss alone is in question
        assert fingerprint(model, task) is None
    plain = LabelledTask(T.default_data_collator)
    assert fingerprint(model, plain) is not None


def weighted(outputs, labels, num_items_in_batch=None):
    return torch.nn.functional.cross_entropy(outputs.logits, labels, reduction="none")


def test_a_mean_over_the_batch_is_refused_by_name(train):
    with pytest.raises(RecipeError, match=r"Averaged.compute_loss gave \(\) for"):
        train(TOKENS, kind=Averaged)
    with pytest.raises(RecipeError, match=r"compute_loss_func gave \(\) for"):
        train(TOKENS, compute_loss_func=lambda outputs, labels, num_items_in_batch=None: outputs.logits.mean())


def test_masks_are_drawn_by_each_step_for_each_example(train):
    words = tokenizer([f"w{i}" for i in range(37)])
    rows = Dataset.from_list([{"input_ids": [3 + (i * k) % 37 for k in range(4 + i % 9)]} for i in range(80)])
    model = T.BertForMaskedLM(T.BertConfig(vocab_size=40, **SMALL))
    collate = T.DataCollatorForLanguageModeling(words, mlm=True, mlm_probability=0.3)
    trainer = train(rows, model=model, data_collator=collate)
    examples = trainer.session.examples
    with trainer.session.engine:
        drawn = [str(examples.drawn([5, 6])) for _ in range(8)]
    assert len(set(drawn)) > 1


def test_a_collator_that_masks_by_a_seed_is_refused(train):
    collate = T.DataCollatorForLanguageModeling(tokenizer(), mlm=True, seed=3)
    with pytest.raises(GuaranteeError, match="masks by the seed 3"):
        train(TOKENS, model=T.BertForMaskedLM(T.BertConfig(vocab_size=5, **SMALL)), data_collator=collate)


# -- metrics -----------------------------------------------------------------------------------------------------------


def accuracy(prediction):
    return {"accuracy": float((np.argmax(prediction.predictions, -1) == prediction.label_ids).mean())}


class Listens(T.TrainerCallback):
    def __init__(self):
        self.heard = []

    def on_evaluate(self, args, state, control, metrics=None, **_):
        self.heard.append(metrics)

    def on_log(self, args, state, control, logs=None, **_):
        self.heard.append({name: value for name, value in logs.items() if name.startswith("eval_")} or None)

    on_predict = on_evaluate


def test_metrics_of_ones_own_are_computed(train):
    trainer = train(TOKENS, compute_metrics=accuracy, eval_dataset=TOKENS)
    found = trainer.evaluate()
    assert 0 <= found["eval_accuracy"] <= 1 and found["eval_loss"] > 0
    assert trainer.predict(TOKENS.select(range(7))).predictions.shape == (7, 2)


def test_several_sets_are_evaluated_by_name(train):
    trainer = train(TOKENS, compute_metrics=accuracy, eval_dataset={"a": TOKENS.select(range(9)), "b": TOKENS})
    assert {"eval_a_accuracy", "eval_b_accuracy"} <= set(trainer.evaluate())
    assert {"eval_c_accuracy"} <= set(trainer.evaluate({"c": TOKENS}))


def test_nobody_hears_of_a_private_evaluation(train):
    ear = Listens()
    trainer = train(TOKENS, compute_metrics=accuracy, eval_dataset=TOKENS, callbacks=[ear])
    trainer._metrics = {
        "train": {},
        "eval": {"mean_token_accuracy": [0.5]},
    }  # as SFTTrainer keeps them for its next log
    trainer.evaluate()
    trainer.predict(TOKENS)
    assert not trainer._metrics["eval"]
    assert not any(ear.heard) and not any("eval_loss" in one for one in trainer.state.log_history)
    trainer.evaluation_is_public = True
    trainer.evaluate()
    assert any("eval_accuracy" in one for one in ear.heard if one)


def test_a_trainer_with_a_task_predicts_by_it(train, tmp_path):
    task = dpft.SequenceClassification(TOKENIZER, ["0", "1"], max_length=8)
    trainer = train(TEXTS, task=task)
    assert trainer.predict(TEXTS).predictions.shape == (80, 2)
    assert trainer.evaluate(TEXTS)["eval_examples"] == 80


def test_what_is_generated_can_be_judged(tmp_path):
    class Private(dpft.DPTrainerMixin, T.Seq2SeqTrainer):
        pass

    config = T.BartConfig(
        vocab_size=12, d_model=16, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2, decoder_attention_heads=2, encoder_ffn_dim=16,
        decoder_ffn_dim=16, max_position_embeddings=32, pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=2,
        forced_eos_token_id=None,
    )  # fmt: skip
    rows = Dataset.from_list([{"input_ids": [4 + i % 5, 5, 6], "labels": [7, 4 + i % 5, 2]} for i in range(80)])
    args = T.Seq2SeqTrainingArguments(
        str(tmp_path), report_to=[], use_cpu=True, disable_tqdm=True, predict_with_generate=True
    )
    beyond = []  # whether all beyond six tokens is padding

    def judge(prediction):
        beyond.append(bool(np.isin(prediction.predictions[:, 6:], (0, -100)).all()))
        return {"seen": float(len(prediction.predictions))}

    trainer = Private(
        model=T.BartForConditionalGeneration(config),
        args=args,
        train_dataset=rows,
        eval_dataset=rows.select(range(10)),
        plan=dpft.Plan(**PLAN),
        data_collator=T.default_data_collator,
        compute_metrics=judge,
    )
    trainer.train()
    assert trainer.evaluate(max_length=6, num_beams=2)["eval_seen"] == 10 and beyond[-1]
    assert trainer.evaluate(max_length=12, min_length=9)["eval_seen"] == 10 and not beyond[-1]
