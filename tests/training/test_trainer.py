"""DPTrainer: Hugging Face's habits, dpft's guarantee."""

import json
import shutil
from contextlib import contextmanager

import pytest
import torch
from transformers import (
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    T5Config,
    T5ForConditionalGeneration,
    TrainerCallback,
    TrainingArguments,
    get_scheduler,
)

from dpft.errors import BudgetError, GuaranteeError, IsolationError
from dpft.gradients.batch_gradients import BatchGradients
from dpft.gradients.engine import Engine
from dpft.gradients.preflight import preflight
from dpft.privacy.noise import SeededRandomness
from dpft.subset import Subset
from dpft.tasks import LabelledTask
from dpft.tasks.losses import class_losses
from dpft.training.arguments import FORBIDDEN
from dpft.training.batches import Examples, Limits, LogicalBatches
from dpft.training.trainer import DPTrainer, DPTrainerMixin
from dpft.workflows.setup import without_dropout


def arguments(tmp_path, **fields):
    settings = dict(
        output_dir=str(tmp_path),
        report_to=[],
        disable_tqdm=True,
        learning_rate=0.01,
        save_strategy="no",
        logging_strategy="no",
    )
    return TrainingArguments(**{**settings, **fields})


@pytest.fixture
def make(case, plan, tmp_path):
    def trainer(
        subset="lora + head",
        args=None,
        randomness=None,
        folder=tmp_path,
        family="bert",
        **fields,
    ):
        made = case(family)
        model = Subset(subset).apply(made.model)
        fields = {"task": LabelledTask(made.batch), "plan": plan(units=30, steps=6), **fields}
        return DPTrainer(
            model=model,
            args=args or arguments(folder),
            train_dataset=made.examples * 10,
            eval_dataset=made.examples,
            randomness=randomness,
            **fields,
        )

    return trainer


def weights(trainer):
    return {name: p.detach().clone() for name, p in trainer.model.named_parameters() if p.requires_grad}


def test_training_releases_the_planned_steps_and_states_the_claim(make):
    trainer = make()
    before = weights(trainer)
    trainer.train()
    assert trainer.session.engine.steps_released == trainer.session.releases.charged == trainer.state.global_step == 6
    assert trainer.guarantee == trainer.session.plan.guarantee(6)
    assert trainer.session.preflight.exact
    assert all(not torch.equal(before[name], value) for name, value in weights(trainer).items())


def test_a_hand_written_loop_gives_the_same_weights_bit_for_bit(make, tmp_path):
    """Parity: the trainer is nothing but this loop."""
    trainer = make(randomness=SeededRandomness(7), token_budget=1024)
    other = make(randomness=SeededRandomness(7), folder=tmp_path / "other", token_budget=1024)
    for made in (trainer, other):
        without_dropout(made.model)
    trainer.train()

    model, plan, task, source = other.model, other.session.plan, other.session.task, other.session.randomness
    optimizer = torch.optim.AdamW(
        [p for p in model.parameters() if p.requires_grad], lr=0.01, weight_decay=0.0, fused=True
    )
    schedule = get_scheduler("linear", optimizer, num_warmup_steps=0, num_training_steps=plan.steps)
    examples = Examples.encode(other.train_dataset, task, plan.unit)
    with Engine(model, plan, source) as engine:
        batches = LogicalBatches(
            examples, task, plan.sampler(source), steps=plan.steps, limits=Limits(1024, engine.max_examples)
        )
        for batch in batches:
            model.train()
            for inputs, units in batch:
                inputs = {key: value.to(model.device) for key, value in inputs.items()}
                engine.accumulate(task.losses(model, inputs), units)
            engine.release()
            optimizer.step()
            schedule.step()
    for name, value in weights(trainer).items():
        assert torch.equal(value, dict(model.named_parameters())[name]), name


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("gradient_accumulation_steps", 2),
        ("label_smoothing_factor", 0.1),
        ("train_sampling_strategy", "group_by_length"),
        ("max_grad_norm", 0.5),
        ("max_steps", 99),
        ("auto_find_batch_size", True),
        ("include_num_input_tokens_seen", "all"),
        ("torch_compile", True),
        ("neftune_noise_alpha", 5.0),
        ("eval_strategy", "steps"),
        ("full_determinism", True),
        ("use_liger_kernel", True),
        ("push_to_hub", True),
        ("optim", "lomo"),
        ("optim", "galore_adamw_layerwise"),
    ],
)
def test_arguments_that_break_the_guarantee_are_refused_by_name(make, tmp_path, field, value):
    args = arguments(tmp_path)
    object.__setattr__(args, field, value)
    with pytest.raises(GuaranteeError, match=field):
        make(args=args)
    assert field in FORBIDDEN or field in ("max_grad_norm", "max_steps", "eval_strategy", "optim")


def test_a_model_that_is_made_when_training_begins_is_refused(make):
    """T19: the engine would watch one model while another is trained, un-noised."""
    trainer = make()
    with pytest.raises(GuaranteeError, match="model_init makes another model"):
        DPTrainer(
            model_init=lambda: trainer.model, args=trainer.args, task=trainer.session.task, plan=trainer.session.plan
        )


def test_a_model_that_is_exchanged_is_refused(make, case):
    """T19."""

    class Exchange(TrainerCallback):
        def on_train_begin(self, *_, **__):
            trainer.model = Subset("lora + head").apply(case("bert").model)

    trainer = make(callbacks=[Exchange()])
    with pytest.raises(GuaranteeError, match="was exchanged after the preflight"):
        trainer.train()
    assert trainer.session.releases.charged == 0


def test_what_a_failed_trial_added_up_is_never_released(make, monkeypatch):
    """A budget that does not fit fails in the middle of a sum of copies of one private example."""
    trainer = make()

    def fails(losses, accumulate, *_):
        add_to = BatchGradients.add_to

        def half(*arguments):
            add_to(*arguments)
            raise torch.OutOfMemoryError

        with monkeypatch.context() as patch, pytest.raises(torch.OutOfMemoryError):
            patch.setattr(BatchGradients, "add_to", half)
            accumulate(losses(3))
        assert trainer.session.engine._total is None
        raise Reached

    class Reached(Exception):
        pass

    monkeypatch.setattr("dpft.training.speed.fastest_budget", fails)
    with pytest.raises(Reached):
        trainer.train()


def test_the_claim_covers_what_an_earlier_process_released(make, plan):
    make().train()
    assert make().guarantee == plan(units=30, steps=6).guarantee(6)
    with pytest.raises(GuaranteeError, match="noise_multiplier"):
        _ = make(plan=plan(units=30, steps=6, noise_multiplier=5.0)).guarantee


def test_a_best_checkpoint_is_refused(make, tmp_path):
    """T13."""
    args = arguments(tmp_path, save_strategy="steps")
    args.load_best_model_at_end = True
    with pytest.raises(GuaranteeError, match="load_best_model_at_end"):
        make(args=args)


class Recorder(TrainerCallback):
    def __init__(self):
        self.logs = []

    def on_log(self, args, state, control, logs=None, **_):
        self.logs.append(dict(logs))


def test_nothing_private_is_logged_or_saved(make, tmp_path):
    """T13: no loss, no norm, no token count, no true batch size, no time or memory that follows it; ε instead."""
    recorder = Recorder()
    steps = dict(logging_strategy="steps", logging_steps=1, save_strategy="steps", save_steps=3)
    trainer = make(args=arguments(tmp_path, **steps, skip_memory_metrics=False), callbacks=[recorder])
    output = trainer.train()
    trainer.evaluate()
    assert output.training_loss != output.training_loss  # NaN
    allowed = {"epsilon", "learning_rate", "epoch", "step"}
    for logs in [*recorder.logs, *trainer.state.log_history, output.metrics]:
        assert set(logs) <= allowed, logs
    spent = [logs["epsilon"] for logs in recorder.logs if "learning_rate" in logs]
    assert spent == sorted(spent) and spent[-1] == pytest.approx(trainer.session.plan.epsilon, rel=1e-2)
    state = json.loads((tmp_path / "checkpoint-6" / "trainer_state.json").read_text())
    assert state["total_flos"] == 0 and state["num_input_tokens_seen"] == 0
    assert all(set(entry) <= allowed for entry in state["log_history"])


def test_public_evaluation_may_be_logged(make, tmp_path):
    recorder = Recorder()
    args = arguments(tmp_path, eval_strategy="steps", eval_steps=3)
    trainer = make(args=args, evaluation_is_public=True, callbacks=[recorder])
    trainer.train()
    assert sum("eval_loss" in logs for logs in recorder.logs) == 2


def test_a_run_keeps_the_heap_until_it_ends(make, monkeypatch):
    seen = []

    @contextmanager
    def watched():
        seen.append("kept")
        yield
        seen.append("given back")

    class Steps(TrainerCallback):
        def on_step_end(self, *_, **__):
            seen.append("step")

    monkeypatch.setattr("dpft.training.session.keep_freed_memory", watched)
    make(callbacks=[Steps()]).train()
    assert seen == ["kept", *["step"] * 6, "given back"]


def test_starting_over_in_the_same_folder_is_refused(make):
    """T15."""
    make().train()
    with pytest.raises(BudgetError, match="has released 6 steps.*resume_from_checkpoint"):
        make().train()


class Crash(TrainerCallback):
    def __init__(self, at):
        self.at = at

    def on_step_end(self, args, state, control, **_):
        if state.global_step == self.at:
            raise RuntimeError("power cut")


@pytest.mark.parametrize(
    "subset",
    [
        "lora + head",
        "head",
        "lora + norms",
        "sparse(fraction=0.1) + bias",
        "ia3",
        "prompt_tuning(num_virtual_tokens=2)",
    ],
)
def test_a_resumed_run_never_exceeds_its_plan(make, tmp_path, subset):
    """T15: steps after the checkpoint were released and stay charged; T10: noise is fresh."""
    args = lambda: arguments(tmp_path, save_strategy="steps", save_steps=2)
    with pytest.raises(RuntimeError, match="power cut"):
        make(subset, args=args(), callbacks=[Crash(3)]).train()
    resumed = make(subset, args=args())
    assert resumed.session.releases.charged == 3
    resumed.train(resume_from_checkpoint=True)
    assert resumed.session.releases.charged == resumed.session.engine.steps_released == 6
    assert resumed.state.global_step == 5  # resumed from 2, and 3 of the plan's 6 releases were left
    with pytest.raises(BudgetError, match="nothing is left"):
        make(subset, args=args()).train(resume_from_checkpoint=True)


def test_a_resumed_run_takes_up_the_preflight_of_the_same_model_alone(make, tmp_path, monkeypatch):
    from dpft.training import session

    done = []
    monkeypatch.setattr(session, "preflight", lambda *a: done.append(1) or preflight(*a))
    with monkeypatch.context() as patch:  # as if the tests' own collation were a package's
        patch.setattr("dpft.gradients.preflight.fingerprint._versioned", lambda part: True)
        of_one_model(make, tmp_path / "versioned", done)
    of_changing_code(make, tmp_path / "changing", monkeypatch)


def of_one_model(make, tmp_path, done):
    args = lambda **more: arguments(tmp_path, save_strategy="steps", save_steps=1, **more)
    subset = "prompt_tuning(num_virtual_tokens=2)"
    with pytest.raises(RuntimeError, match="power cut"):
        make(subset, args=args(), callbacks=[Crash(2)]).train()
    with pytest.raises(RuntimeError, match="power cut"):
        resumed = make(subset, args=args(), callbacks=[Crash(2)])
        resumed.train(resume_from_checkpoint=True)
    assert len(done) == 1 and resumed.session.engine.max_examples(9) == 1
    assert resumed.session.preflight.techniques == {"per example": resumed.session.preflight.trainable_parameters}
    make(subset, args=args(bf16=True, use_cpu=True)).train(resume_from_checkpoint=True)
    assert len(done) == 2


def of_changing_code(make, tmp_path, monkeypatch):
    """T1: a task of the user's own may have been edited since, and no version tells."""
    args = lambda: arguments(tmp_path, save_strategy="steps", save_steps=1)
    with pytest.raises(RuntimeError, match="power cut"):
        make(args=args(), callbacks=[Crash(2)]).train()
    coupled = make(args=args())
    monkeypatch.setattr("dpft.tasks.rules.class_losses", lambda *a: (found := class_losses(*a)) / len(found))
    with pytest.raises(IsolationError):
        coupled.train(resume_from_checkpoint=True)
    assert coupled.session.releases.charged == 2


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (dict(noise_multiplier=5.0), "noise_multiplier"),
        (dict(sample_rate=0.01), "sample_rate"),
        ({}, "private_randomness"),
    ],
)
def test_a_run_is_not_resumed_under_another_plan(make, plan, tmp_path, change, named):
    """T15: the claim would state the new noise for the old releases."""
    args = lambda: arguments(tmp_path, save_strategy="steps", save_steps=1)
    with pytest.raises(RuntimeError, match="power cut"):
        make(args=args(), callbacks=[Crash(2)]).train()
    other = plan(**{"units": 30, "steps": 6, **change})
    with pytest.raises(GuaranteeError, match=named):
        make(args=args(), plan=other, randomness=None if change else SeededRandomness(0)).train(
            resume_from_checkpoint=True
        )


@pytest.mark.parametrize("subset", ["lora + head", "lora + norms"])
def test_a_checkpoint_holds_the_whole_subset(make, tmp_path, subset):
    trainer = make(subset, args=arguments(tmp_path, save_strategy="steps", save_steps=3))
    trainer.train()
    shutil.copytree(tmp_path / "checkpoint-6", tmp_path / "other" / "checkpoint-6")
    fresh = make(subset, folder=tmp_path / "other")
    fresh._load_from_checkpoint(str(tmp_path / "other" / "checkpoint-6"))
    for name, value in weights(trainer).items():
        assert torch.equal(value, weights(fresh)[name]), name


def test_no_noise_follows_from_a_checkpoint(make, tmp_path):
    """T10: restoring every saved random state does not bring the noise back."""
    released = []
    for run in ("a", "b"):
        trainer = make(
            args=arguments(tmp_path / run, save_strategy="steps", save_steps=1, seed=1), folder=tmp_path / run
        )
        trainer.train()
        released.append(weights(trainer))
    assert not any(torch.equal(released[0][name], released[1][name]) for name in released[0])
    files = {file.name for file in (tmp_path / "a" / "checkpoint-6").iterdir()}
    assert not any("key" in name or "noise" in name for name in files)


def test_an_interrupt_leaves_what_was_released(make):
    class Interrupt(TrainerCallback):
        def on_step_end(self, args, state, control, **_):
            if state.global_step == 2:
                raise KeyboardInterrupt

    trainer = make(callbacks=[Interrupt()])
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert trainer.session.engine.steps_released == trainer.session.releases.charged == 2
    assert trainer.guarantee == trainer.session.plan.guarantee(2)
    assert not any("forward" in vars(module) for module in trainer.model.modules())


def test_a_coupled_task_is_refused_before_anything_is_charged(make, case):
    """T1."""

    class Coupled(LabelledTask):
        def losses(self, model, batch):
            losses = super().losses(model, batch)
            return losses / len(losses)

    with pytest.raises(IsolationError):
        trainer = make(task=Coupled(case("bert").batch))
        trainer.train()
    assert trainer.session.releases.charged == 0


def test_units_by_column(make, case, plan):
    """T16: three patients with ten rows each are three units."""
    made = case("bert")
    rows = [{**example, "patient": i % 3} for i, example in enumerate(made.examples * 10)]
    task = LabelledTask(lambda features: made.batch([{k: v for k, v in f.items() if k != "patient"} for f in features]))
    trainer = make(plan=plan(units=3, steps=2, sample_rate=1.0, unit="patient", examples_per_unit=4), task=task)
    trainer.train_dataset = rows
    trainer.train()
    assert len(trainer.session.examples.members) == 3
    assert "patient" in trainer.guarantee


def test_the_mixin_fits_seq2seq_trainer(plan, tmp_path):
    from transformers import DataCollatorForSeq2Seq

    class Private(DPTrainerMixin, Seq2SeqTrainer):
        pass

    config = T5Config(
        vocab_size=30, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2, decoder_start_token_id=0, pad_token_id=0
    )
    model = Subset("lora(targets='q,v')").apply(T5ForConditionalGeneration(config))
    rows = [
        {"input_ids": [3 + i, 4, 5][: 1 + i], "attention_mask": [1] * (1 + i), "labels": [6, 7 + i, 1][: 3 - i]}
        for i in range(3)
    ] * 4

    class Pad:
        pad_token_id, padding_side = 0, "right"

        def pad(self, features, return_tensors=None, **_):
            longest = max(len(f["input_ids"]) for f in features)
            rows = {
                k: torch.tensor([list(f[k]) + [0] * (longest - len(f[k])) for f in features])
                for k in ("input_ids", "attention_mask")
            }
            return (
                {**rows, "labels": torch.tensor([f["labels"] for f in features])} if "labels" in features[0] else rows
            )

    collator = DataCollatorForSeq2Seq(Pad(), return_tensors="pt")
    args = Seq2SeqTrainingArguments(output_dir=str(tmp_path), report_to=[], disable_tqdm=True, save_strategy="no")
    trainer = Private(model=model, args=args, train_dataset=rows, data_collator=collator, plan=plan(units=12, steps=3))
    trainer.train()
    assert trainer.session.preflight.exact and trainer.session.releases.charged == 3


def test_the_mixin_fits_sft_trainer(plan, tmp_path, case):
    trl = pytest.importorskip("trl")
    import datasets
    import transformers
    from tokenizers import Tokenizer, models, pre_tokenizers

    class Private(DPTrainerMixin, trl.SFTTrainer):
        pass

    words = ["<pad>", "<unk>", "<eos>"] + [f"w{i}" for i in range(57)]
    raw = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=raw, pad_token="<pad>", unk_token="<unk>", eos_token="<eos>"
    )
    rows = datasets.Dataset.from_dict({"text": ["w1 w2 w3", "w4 w5", "w6 w7 w8 w9"] * 4})
    args = trl.SFTConfig(
        output_dir=str(tmp_path),
        report_to=[],
        disable_tqdm=True,
        save_strategy="no",
        max_length=16,
        bf16=False,
        use_cpu=True,
    )
    model = Subset("lora").apply(case("llama").model)
    trainer = Private(
        model=model, args=args, train_dataset=rows, processing_class=tokenizer, plan=plan(units=12, steps=3)
    )
    trainer.train()
    assert trainer.session.preflight.exact and trainer.session.releases.charged == 3
    with pytest.raises(GuaranteeError, match="packing"):
        packed = trl.SFTConfig(output_dir=str(tmp_path), report_to=[], packing=True, bf16=False, use_cpu=True)
        Private(model=model, args=packed, train_dataset=rows, processing_class=tokenizer, plan=plan(units=12, steps=3))
