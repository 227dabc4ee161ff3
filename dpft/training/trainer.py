"""DPTrainer: ``transformers.Trainer`` whose every step is one release of the engine."""

import json
import math
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_utils import get_last_checkpoint

from dpft.errors import BudgetError, GuaranteeError, LedgerError, RecipeError
from dpft.gradients.determinism import evaluating
from dpft.gradients.engine import Engine
from dpft.gradients.preflight import Preflight, fingerprint, preflight
from dpft.gradients.side_effects import FrozenState
from dpft.ledger import Dataset
from dpft.privacy.noise import Randomness, SecureRandomness
from dpft.privacy.plan import Plan
from dpft.tasks.own_loss import check_own_loss
from dpft.tasks.task import LabelledTask, Task
from dpft.training.account import Account
from dpft.training.arguments import check_arguments
from dpft.training.batches import EVALUATION_TOKENS, Examples, LogicalBatch, LogicalBatches, check_units, plain_batches
from dpft.training.checks import check_evaluation, check_optimizer, refuse_unused
from dpft.training.heap import kept_heap
from dpft.training.releases import Releases
from dpft.training.speed import kept_prefix, timed_budget
from dpft.training.tuning import Budget, free_memory, workspace

TRAINABLE = "trainable.safetensors"  # in a checkpoint: the whole subset
PUBLIC_LOGS = ("epoch", "step", "learning_rate", "epsilon")  # and figures on evaluation data that are declared public
TOKEN_BUDGET = 1024  # padded tokens of a micro-batch until a better budget is known


class DPTrainerMixin:
    """Mix into :class:`transformers.Trainer` or a subclass (``Seq2SeqTrainer``, TRL's ``SFTTrainer``): put it first.

    Keyword arguments beside the trainer's own:
        plan: the privacy plan; its ``steps`` are the trainer's steps, its ``unit`` the column that names a row's unit.
        task: per-example losses and collation; by default made of the trainer's data collator and ``labels``.
        randomness: the source of sampling and noise; a seeded one is for tests and states NOT PRIVATE.
        token_budget: padded tokens in a micro-batch; ``"auto"`` times a few budgets on this machine and takes the smallest
            that is about as fast as any, within ``memory``.
        memory: bytes that a micro-batch may take beside the model, for ``"auto"``; by default a share of what is free.
        frozen_prefix: whether the output of layers before all that trains is computed once for each example and kept,
            encrypted, as long as the run (:mod:`dpft.training.prefix`): ``"auto"`` if it pays and the layers are deterministic,
            ``"on"``, with these layers in evaluation mode, or ``"off"``.
        ledger: the data set's account (:meth:`dpft.Ledger.dataset`), charged in blocks before they are released; training
            ends at the block that no longer fits. Without one nothing across runs is counted.
        purpose: what the run is for; goes on the ledger's record.
        evaluation_is_public: whether metrics on ``eval_dataset`` may be logged. If not, :meth:`evaluate` returns them
            to its caller and nothing else sees them.

    Guarantee:
        ``trainer.guarantee`` is true at every moment, after a crash and a resume included: every release is counted on
        disk before it happens, and training ends when the plan's number has been released. What can fail is tried before the first
        charge: the proof, the loss against the model's own, the optimizer, the first rows of the evaluation.

    Raises:
        GuaranteeError: an argument would break the guarantee, or would be ignored; named.
    """

    def __init__(
        self,
        *args,
        plan: Plan,
        task: Task | None = None,
        randomness: Randomness | None = None,
        token_budget: int | Literal["auto"] = "auto",
        memory: int | None = None,
        frozen_prefix: str = "auto",
        ledger: Dataset | None = None,
        purpose: str = "",
        evaluation_is_public: bool = False,
        **kwargs,
    ) -> None:
        self.frozen_prefix, self.prefix = frozen_prefix, None
        self._tune, self.memory = token_budget == "auto", memory
        self.budget = Budget(TOKEN_BUDGET if self._tune else token_budget)
        self.ledger, self.purpose = ledger, purpose
        self.account: Account | None = None
        self.account_rows = None  # the data that the account is kept for, where it is not quite the training data
        self.halted: str | None = None  # why the ledger ended the run early
        self.plan, self.evaluation_is_public = plan, evaluation_is_public
        self.randomness = randomness or SecureRandomness()
        self.engine: Engine | None = None
        self.preflight: Preflight | None = None
        self._task = task
        self._frozen: FrozenState | None = None  # what does not train, as it was when training began
        self._train_examples: Examples | None = None
        arguments = kwargs.get("args") or next((a for a in args if isinstance(a, TrainingArguments)), None)
        if arguments is not None:
            check_arguments(arguments, plan, evaluation_is_public)
        super().__init__(*args, **kwargs)
        check_arguments(self.args, plan, evaluation_is_public)
        refuse_unused(self)
        if self.model_init is not None:
            raise GuaranteeError(
                "model_init makes another model when training begins, which nothing would clip or noise: pass the model itself."
            )
        self.args.max_steps = plan.steps
        self.args.max_grad_norm = 0.0
        self.args.ignore_data_skip = True  # a resumed run draws afresh: replaying old draws would need a stored seed
        self.releases = Releases(self.args.output_dir, plan, self.randomness)
        self.add_callback(_StopWhenSpent(self))

    @property
    def task(self) -> Task:
        if self._task is None:
            self._task = LabelledTask(self.data_collator)
        return self._task

    @property
    def guarantee(self) -> str:
        """The claim for everything released into this output directory so far.

        Raises:
            GuaranteeError: what the directory holds was released under another plan.
        """
        if self.engine is not None:
            return self.engine.guarantee
        self.releases.check()
        return self._spent_engine().guarantee

    def _spent_engine(self) -> Engine:
        """An engine that has released what this output directory's runs have."""
        engine = Engine(self.model, self.plan, self.randomness, before_release=self._before_release)
        engine.steps_released = self.releases.charged
        return engine

    # -- training ------------------------------------------------------------------------------------------------

    def train(self, resume_from_checkpoint=None, *, from_start: bool = False, **kwargs):
        """Preflight, then train; see :meth:`transformers.Trainer.train`. The returned training loss is NaN: it is private.

        Args:
            resume_from_checkpoint: a checkpoint's folder, also of a run elsewhere, whose releases then count here; or True for the last.
            from_start: go on with a run that left no checkpoint: the weights begin anew, and what was released stays counted.
        """
        with self.releases.held():
            return self._train(resume_from_checkpoint, from_start, **kwargs)

    def _train(self, checkpoint, from_start: bool, **kwargs):
        if checkpoint is True:
            checkpoint = get_last_checkpoint(self.args.output_dir)
        if checkpoint:
            self.releases.take_up(checkpoint)
        charged = self.releases.charged
        if charged and not checkpoint and not from_start:
            raise BudgetError(
                f"{self.args.output_dir} holds a run that has released {charged:,} steps, and starting over would spend its "
                "budget again unseen: resume_from_checkpoint, or choose another output_dir."
            )
        self.releases.check()
        self.engine = self._spent_engine()
        if charged >= self.plan.steps:
            raise BudgetError(f"All {self.plan.steps:,} planned steps have been released: nothing is left to resume.")
        self.account = self._opened_account(charged)
        self._tell("watch", self.engine)
        with kept_heap(), self.engine:
            self._check_before_charge()
            with self.engine.capture.paused():
                self.prefix = kept_prefix(self)
            memory = free_memory(self.args.device) if self.memory is None else self.memory
            self.engine.workspace_bytes = workspace(self.args.device, memory)
            if self._tune:
                self.budget = timed_budget(self, memory)
            self._frozen = FrozenState(self.model, [p for p in self.model.parameters() if not p.requires_grad])
            try:
                if self.account is not None:
                    self.account.charge_block()
                output = super().train(resume_from_checkpoint=checkpoint, **kwargs)
                self._frozen.check(self.engine.capture.caches)
            finally:
                if self.prefix is not None:
                    self.prefix.close()
                if self.account is not None:
                    self.halted = self.account.settle() or self.halted
        return output._replace(training_loss=math.nan, metrics=self._shown(output.metrics))

    def _check_before_charge(self) -> None:
        """All that could fail, or make the run worthless, is found here, where nothing was paid for."""
        check_units(self._examples(), self.plan)
        with (
            self.engine.capture.paused()
        ):  # first, because labels that do not fit would stop the preflight somewhere inside
            check_own_loss(self.task, self.model, self._collated, self._examples().spread())
            check_evaluation(self)
        check_optimizer(self)
        self.preflight = self._preflight()

    def _opened_account(self, released: int) -> Account | None:
        """All that can be refused is refused here, before the preflight; nothing is charged yet."""
        folder = Path(self.args.output_dir)
        rows = self.train_dataset if self.account_rows is None else self.account_rows
        rows = rows if self.ledger and isinstance(rows[0], Mapping) else None
        model = getattr(self.model.config, "_name_or_path", "") or type(self.model).__name__
        about = dict(rows=rows, purpose=self.purpose, model=model)
        return Account.of(self.ledger, self.plan, self.randomness, folder, released, **about)

    def _before_release(self, number: int) -> None:
        if self.account is not None:
            self.account.check(number)
        self.releases.charge(number)

    def _tell(self, name: str, *facts) -> None:
        """Call the method of this name of every callback that has one."""
        for callback in self.callback_handler.callbacks:
            if hasattr(callback, name):
                getattr(callback, name)(*facts)

    def _preflight(self) -> Preflight:
        """The proof, or what an earlier start of this very run found; it is the same for the same model and versions."""
        path = Path(self.args.output_dir) / "private" / "preflight.json"  # its errors are numbers made from the data
        examples = self._examples()
        key = fingerprint(self.model, self.task, self.args.bf16, int(examples.lengths.max()))
        try:
            known = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            known = {}
        if key is not None and known.get("key") == key:
            self.engine.capture.load_state(known["state"])
            return Preflight(**known["found"])
        losses = lambda features, **how: self._losses(self._collated(features), **how)
        precise = partial(losses, autocast=False) if self.args.bf16 else None
        found = preflight(self.engine, losses, examples.spread(), precise, examples.longest)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(
            json.dumps({"key": key, "state": self.engine.capture.state(), "found": asdict(found)}), encoding="utf-8"
        )
        return found

    def _examples(self) -> Examples:
        if self._train_examples is None:
            self._train_examples = Examples.encode(self.train_dataset, self.task, self.plan.unit)
        return self._train_examples

    def _collated(self, features: Sequence) -> dict:
        return self._prepare_inputs(self.task.collate(features))

    def _losses(self, batch: dict, *, autocast: bool = True) -> Tensor:
        with self.compute_loss_context_manager() if autocast else nullcontext():
            return self.task.losses(self.model, batch)

    def _step_examples(self) -> Examples:
        """The examples, as long as they are to what a step computes."""
        examples = self._examples()
        return examples if self.prefix is None else replace(examples, lengths=self.prefix.lengths(examples))

    def get_train_dataloader(self) -> LogicalBatches:
        prefix = self.prefix
        return LogicalBatches(
            self._step_examples(),
            self.task,
            self.plan.sampler(self.randomness),
            steps=self.plan.steps,
            token_budget=self.budget.tokens,
            overhead=self.budget.overhead,
            max_examples=self.engine.max_examples,
            chosen=prefix.select if prefix is not None else None,
        )

    def num_examples(self, dataloader) -> int:
        return (
            round(self.plan.expected_batch_size * self.plan.steps)
            if isinstance(dataloader, LogicalBatches)
            else super().num_examples(dataloader)
        )

    def training_step(self, model, inputs: LogicalBatch, num_items_in_batch=None) -> Tensor:
        """Accumulate every micro-batch of the draw and release once. Returns zero: the loss is private."""
        if self.model is not self.engine.capture.model:
            raise GuaranteeError(
                "The trainer's model was exchanged after the preflight, so nothing would clip or noise the new one: make a new trainer."
            )
        model.train()
        self.engine.renew_chance()
        with self.prefix or nullcontext():
            for batch, units in inputs:
                losses = self._losses(self._prepare_inputs(batch))
                self.engine.accumulate(losses, units)
        self.engine.release()
        return torch.zeros((), device=self.args.device)

    # -- checkpoints ---------------------------------------------------------------------------------------------

    def _save(self, output_dir: str | None = None, state_dict=None) -> None:
        """Beside PEFT's adapter, save what trains in place, which PEFT leaves out, and how much was released."""
        if self._frozen is not None:
            self._frozen.check(self.engine.capture.caches)
        super()._save(output_dir, state_dict)
        folder = Path(output_dir or self.args.output_dir)
        save_file({name: p.detach().contiguous() for name, p in trainable(self.model)}, folder / TRAINABLE)
        if folder != self.releases.path.parent:
            self.releases.save(folder, self.engine)

    def _save_rng_state(self, output_dir: str) -> None:
        """Nothing: the generators' states tell how much chance a step took, and so who was drawn."""

    def _load_rng_state(self, checkpoint: str | None) -> None:
        """Nothing: a step's chance is fresh, resumed or not."""

    def push_to_hub(self, *args, **kwargs):
        """Raises GuaranteeError: it would upload the whole output folder, what is private included."""
        raise GuaranteeError(
            "push_to_hub uploads the whole output folder, private/ included: save the finished weights (dpft.save_weights) and upload their folder."
        )

    def load(self, checkpoint: str) -> None:
        """Take up a checkpoint's weights after all of the plan was released; the claim is for all of it."""
        self.engine = self._spent_engine()
        self._load_from_checkpoint(checkpoint)
        self.account = self._opened_account(self.releases.charged)

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        saved = load_file(Path(resume_from_checkpoint) / TRAINABLE)
        with torch.no_grad():
            for name, parameter in trainable(self.model):
                parameter.copy_(saved[name])
        self.releases.take_up_numbers(resume_from_checkpoint, self.engine)

    # -- what is shown -------------------------------------------------------------------------------------------

    def log(self, logs: dict[str, float], *args, **kwargs) -> None:
        """Log ε spent instead of the training loss; times and memory, too, would follow the true batch sizes."""
        super().log(self._shown(logs), *args, **kwargs)

    def _shown(self, logs: dict[str, float]) -> dict[str, float]:
        """What of the logs is computed from the plan, from released weights, or from data declared public."""
        public = (*PUBLIC_LOGS, *(name for name in logs if name.startswith("eval_") and self.evaluation_is_public))
        logs = {name: value for name, value in logs.items() if name in public}
        if self.engine is not None and self.engine.steps_released and self.randomness.private:
            logs["epsilon"] = self.plan.epsilon_after(self.engine.steps_released, exact=False)
        return logs

    def floating_point_ops(self, inputs) -> int:
        """Zero: the count would give away the true batch sizes."""
        return 0

    def _get_num_items_in_batch(self, *args) -> None:
        return None

    def _get_grad_norm(self, model, grad_norm=None) -> None:
        return None

    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix: str = "eval") -> dict[str, Any]:
        """The task's metrics on ``eval_dataset``, or on each of several by name, un-noised: logged only if ``evaluation_is_public``."""
        rows = self.eval_dataset if eval_dataset is None else eval_dataset
        if isinstance(rows, Mapping):
            parts = {
                name: self.evaluate(part, ignore_keys, f"{metric_key_prefix}_{name}") for name, part in rows.items()
            }
            return {name: value for found in parts.values() for name, value in found.items()}
        if rows is None:
            raise RecipeError("There is no eval_dataset to evaluate on: pass one.")
        examples = rows if isinstance(rows, Examples) else Examples.encode(rows, self.task)
        batches = map(self._prepare_inputs, plain_batches(examples, self.task, EVALUATION_TOKENS))
        with evaluating(self.model):
            found = self.task.evaluate(self.model, batches)
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in found.items()}
        if self.evaluation_is_public:
            self.log({name: value for name, value in metrics.items() if isinstance(value, (int, float))})
            self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics


class DPTrainer(DPTrainerMixin, Trainer):
    """:class:`transformers.Trainer` under differential privacy; see :class:`DPTrainerMixin`."""


class _StopWhenSpent(TrainerCallback):
    """A run ends when the plan's releases are spent, although a checkpoint was older, or when the ledger pays for no more."""

    def __init__(self, trainer: DPTrainerMixin) -> None:
        self._trainer = trainer

    def on_step_end(self, args, state, control, **_):
        trainer = self._trainer
        released, account = trainer.engine.steps_released, trainer.account
        if released >= trainer.plan.steps:
            control.should_training_stop = True
        elif account is not None and released >= account.covered:
            try:
                account.charge_block()
            except (BudgetError, LedgerError) as error:
                trainer.halted, control.should_training_stop = str(error), True
        return control


def trainable(model) -> list[tuple[str, torch.nn.Parameter]]:
    """Names and parameters of the subset, tied ones once."""
    return [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
