"""DPTrainer: ``transformers.Trainer`` whose every step is one release of a :class:`dpft.Session`."""

import math
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import TrainOutput, get_last_checkpoint

from dpft.errors import GuaranteeError
from dpft.privacy.plan import Plan
from dpft.tasks import Task
from dpft.training.arguments import check_arguments, warn_of_ignored
from dpft.training.batches import LogicalBatch, LogicalBatches
from dpft.training.checks import check_evaluation, copied_optimizer, try_optimizer
from dpft.training.defaults import default_task, refuse_data, refuse_unused
from dpft.training.evaluation import Evaluation
from dpft.training.options import tell_each
from dpft.training.session import Session

OPTIONS = ("randomness", "token_budget", "memory", "frozen_prefix", "ledger", "purpose", "account_rows", "draws")


class DPTrainerMixin(Evaluation):
    """Mix into :class:`transformers.Trainer` or a subclass (``Seq2SeqTrainer``, TRL's ``SFTTrainer``): put it first.

    Keyword arguments beside the trainer's own:
        plan: the privacy plan; its ``steps`` are the trainer's steps, its ``unit`` the column that names a row's unit.
        task: per-example losses, collation and metrics; by default the model's own loss, the trainer's data collator,
            ``compute_metrics``, and a ``compute_loss`` or ``compute_loss_func`` of the user's own, which returns
            ``(B,)`` losses.
        evaluation_is_public: whether metrics on ``eval_dataset`` may be logged. If not, :meth:`evaluate` returns them
            to its caller and nothing else sees them.
        randomness, token_budget, memory, frozen_prefix, ledger, purpose, account_rows, draws: see
            :class:`dpft.SessionOptions`.

    Guarantee:
        ``trainer.guarantee`` is true at every moment: see :class:`dpft.Session`, which is ``trainer.session``. The
        first rows of the evaluation are tried before the first charge too.

    Raises:
        GuaranteeError: an argument would break the guarantee, or would be ignored; named.
    """

    def __init__(
        self, *args: Any, plan: Plan, task: Task | None = None, evaluation_is_public: bool = False, **kwargs: Any
    ) -> None:
        options = {name: kwargs.pop(name) for name in OPTIONS if name in kwargs}
        self.evaluation_is_public = evaluation_is_public
        arguments = kwargs.get("args") or next((a for a in args if isinstance(a, TrainingArguments)), None)
        if arguments is not None:
            check_arguments(arguments, plan, evaluation_is_public)
        refuse_data(kwargs.get("train_dataset"))
        super().__init__(*args, **kwargs)
        check_arguments(self.args, plan, evaluation_is_public)
        warn_of_ignored(self.args)
        self.has_task = task is not None
        if task is not None:
            refuse_unused(self)
        if self.model_init is not None:
            raise GuaranteeError(
                "model_init makes another model when training begins, which nothing would clip or noise: pass the "
                "model itself."
            )
        self.args.max_steps = plan.steps
        self.args.max_grad_norm = 0.0
        self.args.ignore_data_skip = True  # a resumed run draws afresh: replaying old draws would need a stored seed
        self.session = Session(
            self.model,
            plan,
            default_task(self, plan.unit) if task is None else task,
            self.train_dataset,
            self.args.output_dir,
            autocast=self.compute_loss_context_manager if self.args.bf16 else None,
            prepare=self._prepare_inputs,
            tell=lambda name, *facts: tell_each(self.callback_handler.callbacks, name, *facts),
            **options,
        )
        self.add_callback(_StopWhenSpent(self.session))

    @property
    def guarantee(self) -> str:
        """The claim for everything released into this output directory so far."""
        return self.session.guarantee

    # -- training ------------------------------------------------------------------------------------------------

    def train(
        self, resume_from_checkpoint: str | bool | None = None, *, from_start: bool = False, **kwargs: Any
    ) -> TrainOutput:
        """Preflight, then train; see :meth:`transformers.Trainer.train`. The returned training loss is NaN: it is
        private.

        Args:
            resume_from_checkpoint: a checkpoint's folder, also of a run elsewhere, whose releases then count here; or
                True for the last.
            from_start: go on with a run that left no checkpoint: the weights begin anew, and what was released stays
                counted.
        """
        checkpoint: str | None
        if resume_from_checkpoint is True:
            checkpoint = get_last_checkpoint(self.args.output_dir)
        else:
            checkpoint = resume_from_checkpoint or None
        checks = [
            partial(check_evaluation, self.measured, self.eval_dataset),
            partial(try_optimizer, partial(copied_optimizer, self)),
        ]
        self.session.take_rows(self.train_dataset)  # which a user may have set
        with self.session.open(checkpoint, from_start=from_start, checks=checks):
            self.session.pay()
            output = super().train(resume_from_checkpoint=checkpoint, **kwargs)
        return output._replace(training_loss=math.nan, metrics=self.shown(output.metrics))

    def get_train_dataloader(self) -> LogicalBatches:
        return self.session.batches()

    def num_examples(self, dataloader: Any) -> int:
        if isinstance(dataloader, LogicalBatches):
            return round(self.session.plan.expected_batch_size * self.session.plan.steps)
        return int(super().num_examples(dataloader))

    def training_step(self, model: nn.Module, inputs: LogicalBatch, num_items_in_batch: Any = None) -> Tensor:
        """One step of the session. Returns zero: the loss is private."""
        if self.model is not self.session.model:
            raise GuaranteeError(
                "The trainer's model was exchanged after the preflight, so nothing would clip or noise the new one: "
                "make a new trainer."
            )
        self.session.step(inputs)
        return torch.zeros((), device=self.args.device)

    # -- checkpoints ---------------------------------------------------------------------------------------------

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None) -> None:
        """Beside PEFT's adapter, save what trains in place, which PEFT leaves out, and how much was released."""
        self.session.check_frozen()
        super()._save(output_dir, state_dict)
        self.session.save_trainable(Path(output_dir or self.args.output_dir))

    def _save_rng_state(self, output_dir: str) -> None:
        """Nothing: the generators' states tell how much chance a step took, and so who was drawn."""

    def _load_rng_state(self, checkpoint: str | None) -> None:
        """Nothing: a step's chance is fresh, resumed or not."""

    def push_to_hub(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Raises GuaranteeError: it would upload the whole output folder, what is private included."""
        raise GuaranteeError(
            "push_to_hub uploads the whole output folder, private/ included: save the finished weights "
            "(dpft.save_weights) and upload their folder."
        )

    def load(self, checkpoint: str) -> None:
        """Take up a checkpoint's weights after all of the plan was released; the claim is for all of it."""
        self.session.take_up_finished()
        self._load_from_checkpoint(checkpoint)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        self.session.load_checkpoint(resume_from_checkpoint)

    # -- what would tell of the data ----------------------------------------------------------------------------------

    def floating_point_ops(self, inputs: Any) -> int:
        """Zero: the count would give away the true batch sizes."""
        return 0

    def _get_num_items_in_batch(self, *args: Any) -> None: ...

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> None: ...


class DPTrainer(DPTrainerMixin, Trainer):
    """:class:`transformers.Trainer` under differential privacy; see :class:`DPTrainerMixin`."""


class _StopWhenSpent(TrainerCallback):
    """A run ends when the plan's releases are spent, although a checkpoint was older, or when the ledger pays for no
    more."""

    def __init__(self, session: Session) -> None:
        self._session = session

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> TrainerControl:
        if not self._session.goes_on():
            control.should_training_stop = True
        return control
