"""What the entries say, read once and then only onwards: policies, runs and what each was charged.

::

    ledger    the first entry: the ledger's identity and public key
    dataset   a data set with its policy and fingerprint
    amend     a change of a policy
    run       who starts what, when and why; costs nothing
    charge    releases of one mechanism, before they happen (:mod:`dpft.privacy.events`)
    settle    how many of a run's charged releases count from then on; never more
    note      a warning worth keeping, such as data that changed
"""

import getpass
import math
import os
import platform
from collections.abc import Iterable
from dataclasses import dataclass, field
from datetime import datetime
from typing import NotRequired, TypedDict

from dpft.errors import LedgerError, PlanError
from dpft.ledger.chain import GENESIS, End, Entry, Facts, hash_of, head_text, signed
from dpft.ledger.fingerprint import Fingerprint, Stored
from dpft.privacy import composition
from dpft.privacy.adjacency import ADJACENCIES, Adjacency
from dpft.privacy.events import Event, merged

AMENDABLE = frozenset({"epsilon", "expires", "spenders"})  # of a policy; what else it says is how releases are priced


class Policy(TypedDict):
    """What a data set's account allows, and by what its releases are priced."""

    epsilon: float
    delta: float
    unit: str
    adjacency: Adjacency
    expires: str | None
    spenders: list[str]


class Amendment(TypedDict):
    """Changes of a policy."""

    epsilon: NotRequired[float]
    expires: NotRequired[str | None]
    spenders: NotRequired[list[str]]


@dataclass
class Reservation:
    """One run: the facts it was opened with, and what it was charged."""

    id: str
    facts: Facts
    charged: dict[Event, int] = field(default_factory=dict)  # by kind, with count 1
    settled: Facts | None = None

    @property
    def events(self) -> tuple[Event, ...]:
        """What it counts for: what was charged, or, once settled, what was executed of it."""
        if self.settled is None:
            return merged(kind.times(n) for kind, n in self.charged.items())
        left, found = self.settled["executed"], []
        for kind, n in self.charged.items():
            found.append(kind.times(min(n, left)))
            left -= found[-1].count
        return merged(event for event in found if event.count)

    @property
    def steps(self) -> int:
        return sum(event.count for event in self.events)


@dataclass
class DatasetRecord:
    """A data set's policy, fingerprint and runs, and the number of the last entry about it."""

    name: str
    policy: Policy
    fingerprint: Stored | None
    created: Facts
    runs: dict[str, Reservation] = field(default_factory=dict)
    notes: list[Facts] = field(default_factory=list)
    seq: int = 0

    @property
    def events(self) -> tuple[Event, ...]:
        return merged(event for run in self.runs.values() for event in run.events)

    def epsilon(self, events: Iterable[Event]) -> float:
        """ε of ``events`` together, at the policy's δ and adjacency."""
        return composition.epsilon(merged(events), self.policy["delta"], self.policy["adjacency"])


class LedgerState:
    """The ledger's state after the entries read so far. The chain of hashes is checked on the way."""

    def __init__(self) -> None:
        self.seq, self.hash, self.last_time = 0, GENESIS, ""
        self.identity: Facts | None = None
        self.datasets: dict[str, DatasetRecord] = {}

    @property
    def founded(self) -> Facts:
        """The ledger's identity.

        Raises:
            LedgerError: no entry said it.
        """
        if self.identity is None:
            raise LedgerError(
                "The ledger does not begin with its identity, so its entries prove nothing: restore it from a backup "
                "or an export."
            )
        return self.identity

    def read(self, rows: list[Entry], end: End | None) -> None:
        """Go on with ``rows``.

        Raises:
            LedgerError: an entry, their order or the end is not what was once written.
        """
        for row in rows:
            self.add(row)
        self.check_end(end)

    def add(self, row: Entry) -> None:
        """Go on by one entry; raises LedgerError if it is not the next one, as it was written."""
        self._check(row)
        self._apply(row)
        self.seq, self.hash = row.seq, row.hash

    def check_end(self, end: End | None) -> None:
        """Raises LedgerError: these are not all entries, or the end is not the key's."""
        here = None if self.seq == 0 else (self.seq, self.hash)
        if (None if end is None else end[:2]) != here:
            raise LedgerError(
                f"The ledger ends at entry {self.seq}, and its signed end says otherwise: entries were removed or "
                "added outside of dpft; restore it from a backup or an export."
            )
        if end is not None and not signed(self.founded["public_key"], head_text(*end[:2]), end[2]):
            raise LedgerError(
                "The signature of the ledger's end is not its key's: restore it from a backup or an export."
            )

    def like(self, print_: Fingerprint | None) -> list[tuple[str, float, bool]]:
        """Every data set that was registered with rows: its name, the share that it has of these, and whether it is the
        same."""
        if print_ is None:
            return []
        known = ((name, dataset.fingerprint) for name, dataset in self.datasets.items())
        return [(name, print_.share(other), print_.same(other)) for name, other in known if other is not None]

    def _check(self, row: Entry) -> None:
        if (row.seq, row.previous) != (self.seq + 1, self.hash):
            raise LedgerError(
                f"Entry {row.seq} does not follow entry {self.seq}, so entries were removed, reordered or inserted "
                "outside of dpft: restore the ledger from a backup or an export."
            )
        if hash_of(row.seq, row.dataset, row.kind, row.body, row.previous) != row.hash:
            raise LedgerError(
                f"Entry {row.seq} is not what was once written, so someone changed it: restore the ledger from a "
                "backup or an export."
            )

    def _apply(self, row: Entry) -> None:
        facts = row.facts
        self.last_time = max(self.last_time, facts["at"])
        if row.kind == "ledger":
            self.identity = facts
            return
        if row.kind == "dataset":
            self.datasets[row.dataset] = DatasetRecord(row.dataset, facts["policy"], facts["fingerprint"], facts)
        dataset = self.datasets[row.dataset]
        dataset.seq = row.seq
        if row.kind == "amend":
            dataset.policy = dataset.policy | facts["policy"]
        elif row.kind == "run":
            dataset.runs[facts["run"]] = Reservation(facts["run"], facts)
        elif row.kind == "charge":
            event, run = charged(facts), dataset.runs[facts["run"]]
            if run.settled is not None:  # a run that goes on is open again, from what it had executed
                run.charged, run.settled = {before.one: before.count for before in run.events}, None
            run.charged[event.one] = run.charged.get(event.one, 0) + event.count
        elif row.kind == "settle":
            dataset.runs[facts["run"]].settled = facts
        elif row.kind == "note":
            dataset.notes.append(facts)


def charged(facts: Facts) -> Event:
    """The releases of a charge; 0.1 and 0.2 wrote their number beside them.

    Raises:
        PlanError: they are none that this version knows.
    """
    beside = {"count": facts["count"]} if "count" in facts else {}
    return Event.from_dict({**beside, **facts["event"]})


def seconds_back(now: str, last: str) -> float:
    """By how much ``now`` lies before ``last``; both are ISO times in UTC."""
    return (datetime.fromisoformat(last) - datetime.fromisoformat(now)).total_seconds() if last else 0.0


def checked_policy(policy: Policy) -> Policy:
    """A policy whose values make sense."""
    if not 0 < policy["epsilon"] < math.inf:
        raise PlanError(f"epsilon is {policy['epsilon']}: a budget must be a positive number, such as 8.")
    if not 0 < policy["delta"] < 1:
        raise PlanError(f"delta is {policy['delta']}, and a probability must be between 0 and 1: choose such as 1e-6.")
    if policy["adjacency"] not in ADJACENCIES:
        raise PlanError(f"adjacency is {policy['adjacency']!r}: choose one of {', '.join(ADJACENCIES)}.")
    return policy


def who() -> dict[str, str]:
    try:
        user = getpass.getuser()
    except (KeyError, OSError):  # no name for this user, as in many a container
        user = str(os.getuid())
    return {"user": user, "host": platform.node()}
