"""A trainer's account in the ledger: blocks of releases are charged before their first, and settled at the end."""

import hashlib
import json
import math
from dataclasses import replace
from itertools import accumulate, takewhile
from pathlib import Path

from dpft.errors import BudgetError, GuaranteeError, LedgerError
from dpft.ledger import About, Dataset
from dpft.privacy.noise import Randomness
from dpft.privacy.plan import Plan
from dpft.runs.folder import RunFolder
from dpft.runs.record import write_whole

BLOCKS = 20  # a run is charged in about so many blocks: what a crash may over-count is one of them


class BudgetMeter:
    """What a run in ``folder`` may release, by the data set's ledger.

    Raises:
        GuaranteeError: the folder's run was charged to another account or to none, or its noise can be made again from
            a seed.
        BudgetError, LedgerError: see :meth:`dpft.Dataset.open`; nothing is charged yet.
    """

    def __init__(
        self, dataset: Dataset, plan: Plan, randomness: Randomness, folder: Path, released: int, about: About
    ) -> None:
        if not randomness.private:
            raise GuaranteeError(
                "Noise from a seed protects nobody, so no ledger can pay for it: train without the ledger, or without "
                "the seed."
            )
        self._path = RunFolder(folder).account_file
        self.facts = {"ledger": dataset.ledger.id, "dataset": dataset.name}
        known = self._known(folder) if released else None
        if released and known is None:
            raise GuaranteeError(
                f"The run in {folder} has released {released:,} steps that no ledger was charged for: resume it "
                "without one."
            )
        self.dataset, self.plan, self.covered = dataset, plan, released
        resumed = None if known is None else known["run"]
        self.run = dataset.open(plan, replace(about, recipe=_recipe(folder)), resumed=resumed, released=released)
        self._before = self._last = released
        self.facts["run"] = self.run.id
        self.overlap = self.run.overlap

    @classmethod
    def of(
        cls, dataset: Dataset | None, plan: Plan, randomness: Randomness, folder: Path, released: int, about: About
    ) -> "BudgetMeter | None":
        """The run's account; None if no data set is charged, and none was before."""
        known = cls._known(folder) if released else None
        here = None if dataset is None else (dataset.ledger.id, dataset.name)
        if known is not None and (known["ledger"], known["dataset"]) != here:
            raise GuaranteeError(
                f"The run in {folder} is charged to {known['dataset']!r} in the ledger {known['ledger']}: resume it "
                "with that account."
            )
        return None if dataset is None else cls(dataset, plan, randomness, folder, released, about)

    @staticmethod
    def _known(folder: Path) -> dict[str, str] | None:
        """The account that an earlier start of the run was charged to."""
        path = RunFolder(folder).account_file
        return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None

    def charge_block(self) -> None:
        """Pay for the next releases: a block, or what fits of it.

        Raises:
            BudgetError: not one more release fits.
            LedgerError: the ledger cannot be written.
        """
        block = self._whole(math.ceil(self.plan.steps / BLOCKS), least=True)
        self._path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(self._path, json.dumps(self.facts))
        spanning = self.plan.events(1)[0].spanning
        try:
            self.run.charge(spanning(block).count)
        except BudgetError:
            block = self._whole(min(block, self.dataset.most_steps(self.plan)), least=False)
            if not block:
                raise
            self.run.charge(spanning(block).count)
        self.covered += block

    def _whole(self, steps: int, *, least: bool) -> int:
        """The least number of steps from ``steps`` on, or the most up to it, that ends with one of the mechanism's
        rounds."""
        ends = (end - self.covered for end in accumulate(self.plan.mechanism.rounds) if end > self.covered)
        if least:
            return next((end for end in ends if end >= steps), self.plan.steps - self.covered)
        return max(takewhile(lambda end: end <= steps, ends), default=0)

    def check(self, number: int) -> None:
        """To be called before release ``number``; raises GuaranteeError: it has not been paid for."""
        if number > self.covered:
            raise GuaranteeError(
                f"Release {number:,} was not charged to {self.dataset.name!r}, which has paid for {self.covered:,}."
            )
        self._last = number

    def settle(self) -> str | None:
        """Give back what this start charged and did not release; returns what went wrong, in which case all of it stays
        charged."""
        if not self.run.reserved:
            return None  # nothing was charged
        try:
            self.run.settle(self.plan.events(1)[0].spanning(self._last - self._before).count)
        except LedgerError as error:
            return f"The run's last block stays charged whole: {error}"
        return None


def _recipe(folder: Path) -> str:
    """By what the ledger's entry and the run's recipe are matched; empty without a recipe."""
    path = RunFolder(folder).recipe_file
    return f"sha256:{hashlib.sha256(path.read_bytes()).hexdigest()}" if path.exists() else ""
