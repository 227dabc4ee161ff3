"""One private run, whatever its loop: the proof, the kept prefix, micro-batches, counted and charged releases,
checkpoints."""

import copy
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dpft.errors import BudgetError, GuaranteeError, LedgerError
from dpft.gradients.engine import Engine
from dpft.gradients.findings import Findings
from dpft.gradients.preflight import Preflight, preflight
from dpft.gradients.preflight.fingerprint import fingerprint
from dpft.gradients.preflight.side_effects import FrozenState
from dpft.ledger import About
from dpft.privacy.noise import SecureRandomness
from dpft.privacy.plan import Plan
from dpft.runs.folder import STATE, RunFolder
from dpft.subset.evaluating import evaluating
from dpft.subset.weights import load_kept, save_kept
from dpft.tasks.own_loss import check_own_loss
from dpft.tasks.task import Batch, Features, Task
from dpft.training.batches import (
    Examples,
    Limits,
    LogicalBatch,
    LogicalBatches,
    check_units,
)
from dpft.training.checks import try_optimizer
from dpft.training.heap import keep_freed_memory
from dpft.training.measuring import measure
from dpft.training.meter import BudgetMeter
from dpft.training.options import SessionOptions
from dpft.training.prefix import FrozenPrefix
from dpft.training.releases import Releases
from dpft.training.rows import as_stored
from dpft.training.speed import kept_prefix, timed_budget
from dpft.training.tuning import TokenBudget, free_memory, workspace

TRAINABLE = "trainable.safetensors"  # in a checkpoint: the whole subset
TOKEN_BUDGET = 1024  # padded tokens of a micro-batch until a better budget is known


class Session:
    """What a private run needs, for any loop; :class:`dpft.DPTrainer` is one that Hugging Face wrote.

        with dpft.Session(model, plan, task, rows, "run") as session:
            for draw in session.draws(optimizer):  # the plan's steps, or as many as the ledger pays for
                session.step(draw)  # .grad holds the noisy mean
                optimizer.step()
        print(session.guarantee)

    Args:
        model: its trainable parameters are the subset.
        plan: its ``unit`` is the column that names a row's unit.
        rows: a ``datasets.Dataset`` or any sequence of rows.
        folder: where releases are counted; ``private/`` below it holds what follows the data.
        **options: see :class:`SessionOptions`.

    Guarantee:
        :attr:`guarantee` is true at every moment, after a crash and a resume included: every release is counted on
        disk before it happens, and none is made beyond the plan's number or what the ledger has paid for. What can fail
        is tried before the first charge: the proof, the loss against the model's own, the optimizer.

    Attributes:
        engine, preflight, prefix, account: once the session is open.
        halted: why the ledger ended the run early.
    """

    def __init__(self, model: nn.Module, plan: Plan, task: Task, rows: Any, folder: Path | str, **options: Any) -> None:
        self.model, self.plan, self.task, self.rows, self.folder = model, plan, task, rows, Path(folder)
        self.options = SessionOptions(**options)
        self.randomness = self.options.randomness or SecureRandomness()
        self.releases = Releases(self.folder, plan, self.randomness)
        asked = self.options.token_budget
        self.budget = TokenBudget(TOKEN_BUDGET if asked == "auto" else asked)
        self._engine: Engine | None = None
        self.preflight: Preflight | None = None
        self.prefix: FrozenPrefix | None = None
        self.account: BudgetMeter | None = None
        self.halted: str | None = None
        self._frozen: FrozenState | None = None  # what does not train, as it was when training began
        self._stack = ExitStack()

    # -- from the first check to the last release ----------------------------------------------------------------------

    def __enter__(self) -> "Session":
        return self._stack.enter_context(self.open())

    def __exit__(self, *error: Any) -> bool | None:
        return self._stack.__exit__(*error)

    @contextmanager
    def open(
        self,
        checkpoint: Path | str | None = None,
        *,
        from_start: bool = False,
        checks: Sequence[Callable[[], None]] = (),
    ) -> Iterator["Session"]:
        """Check all that could fail, prove the gradients, and be ready for the first draw; nothing is charged yet.

        Args:
            checkpoint: a checkpoint's folder, also of a run elsewhere, whose releases then count here;
                :meth:`load_checkpoint` loads its weights.
            from_start: go on with a run that left no checkpoint: the weights begin anew, and what was released stays
                counted.
            checks: more of what could fail, such as an evaluation's first rows.

        Raises:
            BudgetError: the folder holds a run, and neither is given; or nothing is left of its plan.
            DPFTError: see :mod:`dpft.errors`.
        """
        with self.releases.held(), ExitStack() as stack:
            self._begin(checkpoint, from_start)
            stack.callback(self._end)
            self.options.tell("watch", self.engine)
            stack.enter_context(keep_freed_memory())
            stack.enter_context(self.engine)
            self._check_before_charge(checks)
            with self.engine.capture.paused():
                self.prefix = kept_prefix(self)
            device = self.device
            memory = free_memory(device) if self.options.memory is None else self.options.memory
            self.engine.workspace_bytes = workspace(device, memory)
            if self.options.token_budget == "auto":
                self.budget = timed_budget(self, memory)
            self._remember_frozen()
            yield self
            self.check_frozen()

    def _begin(self, checkpoint: Path | str | None, from_start: bool) -> None:
        if checkpoint:
            self.releases.take_up(checkpoint)
        charged = self.releases.charged
        if charged and not checkpoint and not from_start:
            raise BudgetError(
                f"{self.folder} holds a run that has released {charged:,} steps, and starting over would spend its "
                "budget again unseen: go on from a checkpoint (resume_from_checkpoint of a trainer, checkpoint of "
                "Session.open), go on with new weights (from_start=True), or choose another folder."
            )
        self.releases.check()
        self.releases.end_round(self.plan.steps)
        charged = self.releases.charged
        self._engine = self._spent_engine()
        self._sampler = self.plan.sampler(self.randomness).following(lambda: self.engine.steps_released)
        if charged >= self.plan.steps:
            raise BudgetError(f"All {self.plan.steps:,} planned steps have been released: nothing is left to resume.")
        self.account = self._opened_account(charged)

    def _end(self) -> None:
        if self.prefix is not None:
            self.prefix.close()
        if self.account is not None:
            self.halted = self.account.settle() or self.halted

    def take_up_finished(self) -> None:
        """Stand for a run whose every step was released before, and whose last weights :meth:`load_checkpoint`
        loads."""
        self._engine = self._spent_engine()
        self.account = self._opened_account(self.releases.charged)

    def pay(self) -> None:
        """Have the ledger pay for the first releases; raises BudgetError: not one of them fits."""
        if self.account is not None and self.engine.steps_released >= self.account.covered:
            self.account.charge_block()

    def goes_on(self) -> bool:
        """Whether another release is planned and paid for; the ledger's next block is charged where the last is used
        up."""
        if self.engine.steps_released >= self.plan.steps:
            return False
        try:
            self.pay()
        except (BudgetError, LedgerError) as error:
            self.halted = str(error)
            return False
        return True

    def draws(self, optimizer: torch.optim.Optimizer | None = None) -> Iterator[LogicalBatch]:
        """Each step's logical batch, as long as :meth:`goes_on`.

        Args:
            optimizer: takes a step on a copy before the first release is paid for.

        Raises:
            RecipeError: the optimizer cannot take a step.
            BudgetError, LedgerError: not one release is paid for.
        """
        if optimizer is not None:
            try_optimizer(lambda: copy.deepcopy(optimizer))
        self.pay()
        for draw in self.batches():
            yield draw
            if not self.goes_on():
                return

    def batches(self) -> LogicalBatches:
        """The plan's logical batches, drawn when asked for."""
        limits = Limits(self.budget.tokens, self.engine.max_examples, self.budget.overhead)
        return LogicalBatches(
            self.step_examples,
            self.task,
            self._sampler,
            steps=self.plan.steps,
            limits=limits,
            chosen=self.prefix.select if self.prefix is not None else None,
        )

    def step(self, draw: LogicalBatch) -> None:
        """Accumulate every micro-batch of the draw, and release once; an empty draw is a release too."""
        self.model.train()
        self.engine.renew_chance()
        with self.prefix or nullcontext():
            for batch, units in draw:
                self.engine.accumulate(self.losses(self._prepared(batch)), units)
        self.engine.release()

    @property
    def engine(self) -> Engine:
        """What makes, clips and releases gradients, from the session's opening on.

        Raises:
            GuaranteeError: the session was not opened.
        """
        if self._engine is None:
            raise GuaranteeError(
                "The session was not opened, so nothing was proven and nothing can be released: use it in a with "
                "statement."
            )
        return self._engine

    # -- what is claimed -----------------------------------------------------------------------------------------------

    @property
    def guarantee(self) -> str:
        """The claim for everything released into this folder so far.

        Raises:
            GuaranteeError: what the folder holds was released under another plan.
        """
        if self._engine is not None:
            return self._engine.guarantee
        self.releases.check()
        return self._spent_engine().guarantee

    @property
    def released(self) -> int:
        """How many steps were released into this folder."""
        return self.engine.steps_released

    @property
    def trainable_parameters(self) -> int | None:
        """How many numbers train; None before the proof."""
        return self.preflight.trainable_parameters if self.preflight else None

    @property
    def spent(self) -> float | None:
        """ε of what was released, as a progress bar shows it; None where nothing was, or nothing that is private."""
        engine = self._engine
        if engine is None or not engine.steps_released or not engine.randomness.private:
            return None
        return engine.plan.epsilon_after(engine.steps_released, exact=False)

    def evaluate(self, rows: Any) -> dict[str, Any]:
        """The task's metrics on other rows, un-noised: private if the rows are."""
        with evaluating(self.model):
            return measure(rows, self.task, self.model, self._prepared)

    def take_rows(self, rows: Any) -> None:
        """Train on other rows from the next :meth:`open` on."""
        self.rows = rows
        vars(self).pop("examples", None)

    # -- checkpoints ---------------------------------------------------------------------------------------------------

    def save_checkpoint(self, folder: Path | str, optimizer: torch.optim.Optimizer | None = None) -> None:
        """What :meth:`load_checkpoint` needs: all that trains, what was released, and the optimizer's state; no
        generator's."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        self.save_trainable(folder)
        if optimizer is not None:
            torch.save(optimizer.state_dict(), folder / "optimizer.pt")
        (folder / STATE).write_text(json.dumps({"global_step": self.engine.steps_released}), encoding="utf-8")

    def load_checkpoint(self, folder: Path | str, optimizer: torch.optim.Optimizer | None = None) -> None:
        """Load what :meth:`save_checkpoint` saved, into the model and an optimizer of the same kind."""
        self.check_frozen()
        load_kept(self.model, Path(folder) / TRAINABLE)
        if self._frozen is not None:
            self._remember_frozen()
        self.releases.take_up_numbers(folder, self._engine)
        if optimizer is not None:
            optimizer.load_state_dict(torch.load(Path(folder) / "optimizer.pt", weights_only=True))

    def save_trainable(self, folder: Path) -> None:
        """All that trains, what stands beside it in an adapter, and how much was released."""
        self.check_frozen()
        save_kept(self.model, folder / TRAINABLE)
        if folder != self.folder:
            self.releases.save(folder, self.engine)

    # -- what the session's parts ask of it ----------------------------------------------------------------------------

    @cached_property
    def examples(self) -> Examples:
        """The rows, encoded."""
        return replace(Examples.encode(self.rows, self.task, self.plan.unit), draws=self.options.draws)

    @property
    def step_examples(self) -> Examples:
        """The examples, as long as they are to what a step computes."""
        return self.examples if self.prefix is None else self.prefix.shortened(self.examples)

    @property
    def device(self) -> torch.device:
        return next(p for p in self.model.parameters() if p.requires_grad).device

    def losses(self, batch: Batch, *, autocast: bool = True) -> Tensor:
        """``(B,)`` losses of a batch on the model's device."""
        mixed = self.options.autocast if autocast else None
        with mixed() if mixed else nullcontext():
            return self.task.losses(self.model, batch)

    def collated(self, features: Sequence[Features]) -> Batch:
        """A batch on the model's device."""
        return self._prepared(self.task.collate(features))

    def _prepared(self, batch: Batch) -> Batch:
        if self.options.prepare is not None:
            return self.options.prepare(batch)
        device = self.device
        return {key: value.to(device) if isinstance(value, Tensor) else value for key, value in batch.items()}

    # -- defences ------------------------------------------------------------------------------------------------------

    def _check_before_charge(self, checks: Sequence[Callable[[], None]]) -> None:
        """All that could fail, or make the run worthless, is found here, where nothing was paid for."""
        check_units(self.examples, self.plan)
        with self.engine.capture.paused():
            # First, because labels that do not fit would stop the preflight somewhere inside.
            check_own_loss(self.task, self.model, self.collated, self.examples.spread())
            for check in checks:
                check()
        self.preflight = self._preflight()

    def _preflight(self) -> Preflight:
        """The proof, or what an earlier start of this very run found; it is the same for the same model and
        versions."""
        path = RunFolder(self.folder).preflight_file  # its errors are numbers made from the data
        mixed = self.options.autocast is not None
        key = fingerprint(self.model, self.task, mixed, int(self.examples.lengths.max()))
        if (known := Findings.load(path, key)) is not None:
            self.engine.capture.adopt(known)
            return known.report
        losses = lambda features, **how: self.losses(self.collated(features), **how)
        precise = partial(losses, autocast=False) if mixed else None
        report = preflight(self.engine, losses, self.examples.spread(), precise, self.examples.longest)
        findings = self.engine.capture.findings
        assert findings is not None  # the preflight has ended
        findings.save(path, key)
        return report

    def check_frozen(self) -> None:
        """Raises an error of :mod:`dpft.errors`: something changed while training that does not train."""
        if self._frozen is not None:
            findings = self.engine.capture.findings
            self._frozen.check(() if findings is None else findings.caches)

    def _remember_frozen(self) -> None:
        self._frozen = FrozenState(self.model, [p for p in self.model.parameters() if not p.requires_grad])

    def _spent_engine(self) -> Engine:
        """An engine that has released what this folder's runs have."""
        engine = Engine(self.model, self.plan, self.randomness, before_release=self._before_release)
        engine.steps_released = self.releases.charged
        return engine

    def _opened_account(self, released: int) -> BudgetMeter | None:
        """All that can be refused is refused here, before the preflight; nothing is charged yet."""
        rows = as_stored(self.rows if self.options.account_rows is None else self.options.account_rows)
        rows = rows if self.options.ledger and isinstance(rows[0], Mapping) else None
        model = getattr(getattr(self.model, "config", None), "_name_or_path", "") or type(self.model).__name__
        about = About(rows, self.options.purpose, model=model)
        return BudgetMeter.of(self.options.ledger, self.plan, self.randomness, self.folder, released, about)

    def _before_release(self, number: int, steps: int = 1) -> None:
        if self.account is not None:
            self.account.check(number)
        self.releases.charge(number, steps)
