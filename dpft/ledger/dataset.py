"""One data set's account, and one run's: ask what fits, charge before releasing, settle afterwards."""

import math
import uuid
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from datetime import UTC, date, datetime
from typing import TYPE_CHECKING, Any, Unpack

from dpft.errors import BudgetError, GuaranteeError, LedgerError
from dpft.ledger.chain import Facts
from dpft.ledger.fingerprint import SHARED, Fingerprint, in_tenths
from dpft.ledger.state import AMENDABLE, Amendment, DatasetRecord, Policy, checked_policy, who
from dpft.privacy import composition
from dpft.privacy.delta import check_delta
from dpft.privacy.events import Event, merged
from dpft.privacy.plan import Plan
from dpft.privacy.rounding import rounded_up

if TYPE_CHECKING:
    from dpft.ledger.ledger import Ledger

ACCOUNTANT = "dpft-fft"  # who computes the figures that are stored; `verify` asks another
CHANGED = "data_changed"
SHARES = "data_shared"
PRICED = (0.7, 1.0, 1.5, 2.0, 4.0)  # noise multipliers that a dashboard prices


@dataclass(frozen=True)
class About:
    """What a run says of itself when it begins.

    Args:
        rows: its data, which are compared with those that were registered; nothing of them is stored.
        purpose, recipe, model: words for the record.
    """

    rows: Iterable[Mapping[str, Any]] | None = None
    purpose: str = ""
    recipe: str = ""
    model: str = ""


class Dataset:
    """One data set's account; from :meth:`Ledger.dataset` or :meth:`Ledger.create`."""

    def __init__(self, ledger: "Ledger", name: str) -> None:
        self.ledger, self.name = ledger, name

    @property
    def record(self) -> DatasetRecord:
        return self.ledger._state.datasets[self.name]

    @property
    def policy(self) -> Policy:
        return self.record.policy

    def spent(self) -> float:
        """ε at the data set's δ of everything charged so far, by PLD."""
        self.ledger.refresh()
        return self._epsilon(())

    def second_opinion(self) -> float:
        """The same by Rényi DP."""
        return composition.epsilon_rdp(self.record.events, self.policy["delta"], self.policy["adjacency"])

    def curve(self) -> list[Facts]:
        """ε after each run, in the order in which they began: ``{"run", "at", "by", "purpose", "steps",
        "epsilon"}``."""
        self.ledger.refresh()
        found: list[Facts] = []
        events: tuple[Event, ...] = ()
        for run in self.record.runs.values():
            events = merged((*events, *run.events))
            epsilon = self.record.epsilon(events)
            facts = {key: run.facts.get(key) for key in ("at", "by", "purpose", "recipe", "model")}
            found.append(
                {"run": run.id, **facts, "steps": run.steps, "settled": run.settled is not None, "epsilon": epsilon}
            )
        return found

    def fits(self, plan: Plan | Iterable[Event]) -> bool:
        """Whether everything charged so far and all of ``plan`` stay within the budget."""
        return self.after(plan) <= self.policy["epsilon"]

    def after(self, plan: Plan | Iterable[Event]) -> float:
        """The ε that would be spent after all of ``plan``."""
        self.ledger.refresh()
        return self._epsilon(_events(plan))

    def most_steps(self, plan: Plan) -> int:
        """How many of the plan's steps fit; zero if none does."""
        self.ledger.refresh()
        return self._steps_that_fit(plan, plan.steps)

    def least_noise(self, plan: Plan) -> float | None:
        """The least noise multiplier, to 0.1 %, with which all of the plan's steps fit; None if even much noise does
        not."""
        self.ledger.refresh()

        def fits(log_noise: float) -> bool:
            return self.fits(plan.changed(noise_multiplier=math.exp(log_noise)))

        low, high = math.log(0.3), math.log(1e4)
        if not fits(high):
            return None
        while high - low > 1e-3:
            middle = (low + high) / 2
            low, high = (low, middle) if fits(middle) else (middle, high)
        return math.exp(high)

    def prices(self, sample_rate: float = 0.01, steps: int = 500) -> list[Facts]:
        """What a run of so many steps would cost at several noise multipliers:
        ``{"noise_multiplier", "alone", "after", "fits"}``."""
        found = []
        for noise in PRICED:
            event = Event(steps, noise, sample_rate)
            alone = self.record.epsilon([event])
            after = self.after([event])
            facts = {"noise_multiplier": noise, "alone": alone, "after": after, "fits": after <= self.policy["epsilon"]}
            found.append({"sample_rate": sample_rate, "steps": steps, **facts})
        return found

    def open(self, plan: Plan, about: About | None = None, *, resumed: str | None = None, released: int = 0) -> "Run":
        """Begin a run, or go on with the one called ``resumed``, of which so many steps are ``released``; nothing is
        charged yet.

        Raises:
            BudgetError: not all of the plan fits; says what ε it would reach and the largest plan that fits.
            GuaranteeError: the plan protects another unit, or under another adjacency, than the account is kept for;
                the account's δ is not below one over the plan's units; or ``resumed`` was charged for other noise or
                another rate.
            LedgerError: the policy forbids it, or the rows are other data.
        """
        policy, about = self.policy, about or About()
        for name in ("unit", "adjacency"):
            if getattr(plan, name) != policy[name]:
                raise GuaranteeError(
                    f"The plan's {name} is {getattr(plan, name)!r}, and the account of {self.name!r} is kept for "
                    f"{policy[name]!r}, so its budget would not cover the run: use the same."
                )
        check_delta(
            policy["delta"],
            plan.units,
            subject=f"The delta of the account {self.name!r}",
            error=GuaranteeError,
            way_out="open an account with a delta below one over the number of units",
        )
        left = max(0, plan.steps - released)
        if left or resumed is None:
            self._check_policy()
        warning = None if about.rows is None else self._recognise(about.rows)
        event = _event(plan)
        if resumed is not None and resumed not in self.record.runs:
            raise LedgerError(
                f"The account of {self.name!r} knows no run {resumed}: resume with the ledger it was started with."
            )
        if resumed is not None and set(self.record.runs[resumed].charged) - {event}:
            raise GuaranteeError(
                f"Run {resumed} of {self.name!r} was charged for other releases than this plan's, and what it gives "
                "back could be theirs: resume it with the same noise and rate, or start another run."
            )
        # A run that goes on ends at the last block that fits; a new one is refused unless all of it does.
        if not self.fits([event.spanning(left if resumed is None else min(left, 1))]):
            raise BudgetError(self._refusal(plan, left, resumed is not None))
        run = Run(self, resumed or uuid.uuid4().hex[:12], event, event.spanning(plan.steps).count)
        run.overlap = warning
        if resumed is None:
            run.opening = {
                "purpose": about.purpose,
                "recipe": about.recipe,
                "model": about.model,
                "steps": plan.steps,
                "units": plan.units,
            }
        return run

    def spend(self, events: Iterable[Event], *, purpose: str) -> float:
        """Record what was, or will be, released by other means, such as another tool; returns the ε spent after it.

        Raises:
            BudgetError: it does not fit.
        """
        self._check_policy()
        events = merged(events)
        if not self.fits(events):
            raise BudgetError(
                f"That would take {self.name!r} to ε = {rounded_up(self.after(events), 4)} of "
                f"{self.policy['epsilon']:g} at δ = {self.policy['delta']:g}: spend less."
            )
        run = Run(self, uuid.uuid4().hex[:12], events[0], 0)
        run.opening = {"purpose": purpose, "recipe": "", "model": "", "steps": sum(event.count for event in events)}
        try:
            for event in events:
                run.event, run.steps = event.one, event.count
                run.charge(event.count)
        except BudgetError:  # somebody else spent meanwhile: nothing may be released, and nothing is charged
            if run.reserved:
                run.settle(0)
            raise
        run.settle(sum(event.count for event in events))
        return self.spent()

    def amend(self, **changes: Unpack[Amendment]) -> None:
        """Change the policy's ``epsilon``, ``expires`` or ``spenders``; the entry says who did and when.

        Raises:
            LedgerError: another key, such as delta, which would give another price to what was released long ago.
            BudgetError: the new ε is below what is spent.
        """
        fixed = sorted(set(changes) - AMENDABLE)
        if fixed:
            raise LedgerError(
                f"The {', '.join(fixed)} of {self.name!r} cannot be amended, because all that was released was priced "
                "by them: open another account."
            )
        policy = checked_policy({**self.policy, **changes})
        spent = self.spent()
        if policy["epsilon"] < spent:
            raise BudgetError(
                f"{self.name!r} has spent ε = {rounded_up(spent)} already: a budget cannot be lowered below that."
            )
        self.ledger._append(self.name, "amend", lambda book: {"policy": changes})

    def _epsilon(self, more: tuple[Event, ...]) -> float:
        return self.record.epsilon((*self.record.events, *more))

    def _steps_that_fit(self, plan: Plan, most: int) -> int:
        """How many of ``most`` steps of the plan fit; where one release spans several, all of them."""
        event = _event(plan)
        return min(most, event.steps * self._room(event, event.spanning(most).count))

    def _room(self, event: Event, most: int) -> int:
        """The largest count of ``event``, up to ``most``, that fits."""

        def fits(count: int) -> bool:
            return self._epsilon((event.times(count),)) <= self.policy["epsilon"]

        if fits(most):
            return most
        low, high = 0, most
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if fits(middle) else (low, middle)
        return low

    def _check_policy(self) -> None:
        policy, user = self.policy, who()["user"]
        if policy["expires"] and datetime.now(UTC).date() > date.fromisoformat(policy["expires"]):
            raise LedgerError(
                f"The access to {self.name!r} ended on {policy['expires']}: ask for its policy to be amended."
            )
        if policy["spenders"] and user not in policy["spenders"]:
            raise LedgerError(
                f"{user} may not spend the budget of {self.name!r}: its policy names {', '.join(policy['spenders'])}."
            )

    def _recognise(self, rows: Iterable[Mapping[str, Any]]) -> float | None:
        """None if the rows are those that were registered; else about the share that still is, in tenths."""
        known = self.record.fingerprint
        found = Fingerprint(rows, self.ledger.key.secret)
        if known is not None and found.same(known):
            return None
        for other, _, same in self.ledger._state.like(found):
            if same and other != self.name:
                raise LedgerError(f"These rows are the data set {other!r}, not {self.name!r}: name that one.")
        if known is None:
            return None
        share = found.share(known)
        if share < SHARED:
            raise LedgerError(
                f"These rows have nothing in common with those that {self.name!r} was created from: name another data "
                "set, or create one."
            )
        return in_tenths(share)

    def _refusal(self, plan: Plan, left: int, resumed: bool) -> str:
        policy, most = self.policy, self._steps_that_fit(plan, left)
        ways = [f"at most {most:,} of {left:,} steps fit" if most else "not one step fits"]
        noise = None if resumed else self.least_noise(plan.changed(steps=left))
        if noise is not None:
            ways.append(f"all of them with a noise multiplier of {rounded_up(noise, 4)}")
        would = self._epsilon(plan.events(left))
        return (
            f"The run would take {self.name!r} from ε = {rounded_up(self._epsilon(()), 4)} to {rounded_up(would, 4)}, "
            f"above its budget of {policy['epsilon']:g} at δ = {policy['delta']:g}: {', or '.join(ways)}."
        )


class Run:
    """One run's account: :meth:`charge` before releasing, :meth:`settle` at the end; both count events."""

    def __init__(self, dataset: Dataset, identity: str, event: Event, steps: int) -> None:
        self.dataset, self.id, self.event, self.steps = dataset, identity, event, steps
        self.opening: Facts | None = None  # what is written about a new run with its first charge
        self.overlap: float | None = None  # of changed data with the data that was registered
        self.reserved = 0  # releases charged through this object
        self._room, self._valid_at = 0, -1  # how many more releases fit, as of which entry about the data set

    def charge(self, count: int) -> None:
        """Reserve ``count`` more releases; they may happen when this returns.

        Raises:
            BudgetError: they do not fit.
            LedgerError: the charge could not be written, so nothing may be released.
        """
        if self.overlap is not None:
            self._write("note", about=CHANGED, overlap=self.overlap)
            self.overlap = None
        while True:
            if self._valid_at != self.dataset.record.seq or count > self._room:
                self.dataset.ledger.refresh()
                self._valid_at = self.dataset.record.seq
                self._room = self.dataset._room(self.event, max(count, self.steps))
            if count > self._room:
                raise BudgetError(
                    f"{count:,} more releases do not fit into the budget of {self.dataset.name!r}, ε = "
                    f"{self.dataset.policy['epsilon']:g} at δ = {self.dataset.policy['delta']:g}: {self._room:,} do."
                )
            if self.opening is not None:
                if not self._write("run", self._valid_at, **self.opening):
                    continue
                self.opening, self._valid_at = None, self.dataset.record.seq
            if self._write("charge", self._valid_at, event=self.event.times(count).to_dict()):
                self.reserved += count
                self._room -= count
                self._valid_at = self.dataset.record.seq
                return

    def _write(self, kind: str, valid_at: int | None = None, **facts: Any) -> bool:
        """Add an entry about this run, unless others wrote about the data set since entry ``valid_at``."""
        name, facts = self.dataset.name, {"run": self.id, **facts}
        current = lambda book: facts if valid_at in (None, book.datasets[name].seq) else None
        return self.dataset.ledger._append(name, kind, current)

    def settle(self, executed: int) -> None:
        """Say how many of the releases charged through this object happened; the others no longer count.

        What was charged to the run before it was resumed, or by a copy of it, stays as it is.

        Raises:
            GuaranteeError: more than was charged.
        """
        if not 0 <= executed <= self.reserved:
            raise GuaranteeError(
                f"Run {self.id} executed {executed:,} releases and was charged {self.reserved:,}: charge before "
                "releasing."
            )
        self.dataset.ledger.refresh()
        settled = False
        while (
            not settled
        ):  # the figure is of the very moment: if others write while it is composed, it is composed again
            record = self.dataset.record
            left = record.runs[self.id].steps - (self.reserved - executed)
            runs = {**record.runs, self.id: replace(record.runs[self.id], settled={"executed": left})}
            epsilon = record.epsilon(event for run in runs.values() for event in run.events)
            settled = self._write("settle", record.seq, executed=left, epsilon=epsilon, accountant=ACCOUNTANT)
        self.reserved = executed


def _event(plan: Plan) -> Event:
    """One of the plan's releases."""
    (event,) = plan.events(1)
    return event


def _events(plan: Plan | Iterable[Event]) -> tuple[Event, ...]:
    return plan.events() if isinstance(plan, Plan) else tuple(plan)
