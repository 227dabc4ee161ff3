"""A run that learns a head from sums over all units, over features that are made once."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dpft.errors import BudgetError, RecipeError
from dpft.privacy.mechanisms.linear_head import Head, LinearHead, Rows, Sums
from dpft.privacy.plan import Plan
from dpft.runs.sums import KeptSums
from dpft.subset.evaluating import evaluating
from dpft.tasks.losses import class_losses, without_labels
from dpft.tasks.own_loss import check_own_loss
from dpft.tasks.task import Task, made_up
from dpft.training.batches import EVALUATION_TOKENS, check_units, cut
from dpft.training.features import OutputLayer, check_isolated, features_of, output_layer
from dpft.training.session import Session

SAME = 1e-3  # of the largest singular value: hints that say the same count once


class HeadSession(Session):
    """One private run of a :class:`~dpft.privacy.mechanisms.linear_head.LinearHead`.

        session = dpft.HeadSession(model, plan, task, rows, "run")
        session.solve()                # the model's own output layer now holds the head
        print(session.guarantee)

    Everything but the output layer stays as it is.

    Args:
        plan: its mechanism is a head's, such as ``Plan.calibrate(mechanism="head-descent", steps=64, ...)``.
        rows_per_unit: see :class:`~dpft.privacy.mechanisms.linear_head.Rows`; public.
        features: what another session made of the same model and rows (:attr:`features`); by default they are made.
        **options: see :class:`SessionOptions`; of speed and memory none matters here.

    Guarantee:
        See :class:`Session`. Each sum is kept in the folder as it is released. A run that was killed goes on from there
        to the same head, and what was released before is neither computed nor charged again.
    """

    def __init__(  # noqa: PLR0913  (what a session takes, and what a head's rows are)
        self,
        model: nn.Module,
        plan: Plan,
        task: Task,
        rows: Any,
        folder: Path | str,
        *,
        rows_per_unit: int = 1,
        features: Rows | None = None,
        **options: Any,
    ) -> None:
        super().__init__(model, plan, task, rows, folder, **options)
        self.rows_per_unit, self.features = rows_per_unit, features

    @property
    def released(self) -> int:
        """As how many steps what was released counts."""
        return self.releases.charged

    @property
    def trainable_parameters(self) -> int:
        """Of the output layer."""
        return sum(p.numel() for p in self.model.parameters() if p.requires_grad)

    @property
    def guarantee(self) -> str:
        """See :attr:`Session.guarantee`."""
        self.releases.check()
        return self.plan.claim(self.released, private=self.randomness.private)

    def solve(self, *, go_on: bool = False, checks: Sequence[Callable[[], None]] = ()) -> OutputLayer:
        """Make the features, learn the head, and put it into the model's output layer.

        Args:
            go_on: with a run that the folder holds.
            checks: more of what could fail, such as an evaluation's first rows.

        Raises:
            BudgetError: the folder holds a run, and ``go_on`` is not given; or the ledger has no room for all of it.
            DPFTError: see :mod:`dpft.errors`; nothing is charged by an error before the first release.
        """
        mechanism = self.plan.mechanism
        if not isinstance(mechanism, LinearHead):
            raise RecipeError(f"The mechanism {mechanism.name!r} learns no head by itself: use Session for it.")
        number = round(self.plan.expected_batch_size)
        with self.releases.held(), self._account(go_on):
            self.options.tell("say", "checks")
            head = self._checked(checks)
            self.features = self.features or self._made_features(head)
            rows = replace(self.features, rows_per_unit=self.rows_per_unit, balance=getattr(self.task, "balance", 0.0))
            basis = self._span(head)
            if basis is not None:
                rows = spanned(rows, basis)
            self.pay()
            with KeptSums(self.folder) as kept:
                known = kept.known(mechanism.sums(), self.released)
                sums = Sums(
                    self.plan.noise_multiplier,
                    self.randomness,
                    before=self._before,
                    known=known,
                    keep=kept.keep,
                )
                found = mechanism.fit(rows, sums, number)
            put(head, found if basis is None else found._replace(weight=found.weight @ basis.double()))
        return head

    def pay(self) -> None:
        """Have the ledger pay for all of it; raises BudgetError: it does not fit."""
        if self.account is not None and self.account.covered < self.plan.steps:
            self.account.charge_block()

    @contextmanager
    def _account(self, go_on: bool) -> Iterator[None]:
        if self.released and not go_on:
            raise BudgetError(
                f"{self.folder} holds a run that has released {self.released:,} steps, and starting over would spend "
                "its budget again unseen: go on with it, or choose another folder."
            )
        self.releases.check()
        self.account = self._opened_account(self.released)
        try:
            yield
        finally:
            self._end()

    def _before(self, steps: int) -> None:
        """Count a release, as ``steps`` steps, before it happens."""
        last = self.released + steps
        self._before_release(last, steps)
        self.options.tell("released", last, self.plan, self.randomness.private)

    def _checked(self, checks: Sequence[Callable[[], None]]) -> OutputLayer:
        """The output layer, when all that could fail was tried; nothing was paid for."""
        check_units(self.examples, self.plan)
        some = self.examples.spread()
        with evaluating(self.model), torch.no_grad():
            check_own_loss(self.task, self.model, self.collated, some)
            batch = self.collated(some)
            head = output_layer(self.model, batch)
            logits, labels = self.model(**without_labels(batch)).logits, batch["labels"]
            one_label = labels.dim() == 1 and not labels.is_floating_point()
            if not one_label or not torch.allclose(self.losses(batch), class_losses(logits, labels), rtol=1e-3):
                raise RecipeError(
                    f"{type(self.task).__name__} does not learn one label for each example by cross-entropy, and a "
                    'head by itself learns nothing else: choose privacy.method = "dp-sgd".'
                )
            check_isolated(lambda few: features_of(self.model, head, self.collated(few)), some)
        for check in checks:
            check()
        return head

    def _span(self, head: OutputLayer) -> Tensor | None:
        """``(h, d)``: an orthonormal basis of the span of the hints' features; None if the task has no hints."""
        hints = self.task.hinted() if hasattr(self.task, "hinted") else ()
        if not hints:
            return None
        with evaluating(self.model), torch.no_grad():
            features = torch.cat([features_of(self.model, head, self.collated([one])) for one in hints])
        _, sizes, directions = torch.linalg.svd(features.double(), full_matrices=False)
        return directions[sizes > SAME * sizes[0]].float()

    def _made_features(self, head: OutputLayer) -> Rows:
        """Every example's features and label."""
        examples = self.examples
        made = made_up(self.task)
        features = torch.empty(len(examples), head.layer.in_features)
        labels = torch.empty(len(examples), dtype=torch.long)
        done = 0
        with evaluating(self.model), torch.no_grad():
            # Made-up rows tell how long features are: a public number, which real ones may exceed and are cut to.
            scale = float(features_of(self.model, head, self._prepared(made)).norm(dim=1).max())
            for places in cut(examples.costs, range(len(examples)), token_budget=EVALUATION_TOKENS):
                batch = self.collated([examples.features[place] for place in places])
                features[places] = features_of(self.model, head, batch)
                labels[places] = batch["labels"].cpu()
                done += len(places)
                self.options.tell("say", f"features {done / len(examples):.0%}")  # how many there are is private
        return Rows(features, labels, examples.members, head.layer.out_features, scale, head.layer.bias is not None)


def spanned(rows: Rows, basis: Tensor) -> Rows:
    """The rows by their features' coordinates in an orthonormal ``(h, d)`` basis, where none is longer than before."""
    return replace(rows, features=rows.features @ basis.T)


def put(head: OutputLayer, found: Head) -> None:
    """Write what was learned into the layer."""
    with torch.no_grad():
        head.layer.weight.copy_(found.weight)
        if head.layer.bias is not None:
            head.layer.bias.copy_(found.bias)
