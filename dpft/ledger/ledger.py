"""Ledger, Dataset and Run: ask before spending, charge before releasing, settle afterwards.

    ledger = dpft.Ledger()                                            # or dpft.Ledger("postgresql://…")
    notes = ledger.create("notes", epsilon=8, delta=1e-6, unit="patient_id", rows=rows)
    trainer = dpft.DPTrainer(..., plan=plan, ledger=notes)

What is stored is what was released: noise, sampling rate and number. ε is always composed from all of it, for the data
set's δ, and does not subtract: there is no remaining ε, only the question what still fits.
"""

import json
import os
import uuid
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from datetime import UTC, date, datetime
from pathlib import Path
from typing import Any

from dpft.errors import LedgerError, PlanError
from dpft.ledger.chain import End, Entry, Facts, Key, head_text
from dpft.ledger.database import Store, data_folder, default_url
from dpft.ledger.dataset import SHARES, Dataset
from dpft.ledger.fingerprint import SHARED, Fingerprint, in_tenths, overlap
from dpft.ledger.state import LedgerState, checked_policy, seconds_back, who
from dpft.privacy.adjacency import Adjacency
from dpft.privacy.delta import too_large

# By how much two machines' clocks may differ. Entries' times are rounded down to the hour, because the time between two
# charges is the time that the data took; so a clock that is set back is noticed from the hour of the last entry on, and
# not within it.
CLOCK_SECONDS = 300.0


class Ledger:
    """The account of all data sets at ``url``: a SQLite file's path, or a ``postgresql://`` URL.

    Args:
        url: by default ``DPFT_LEDGER``, or a file in the user's data folder.
        create: whether to make the ledger and its key if there is none.

    Guarantee:
        Every charge is on disk, chained and signed, before :meth:`Run.charge` returns, and is granted only if all that
        was ever charged to the data set, composed, stays within its ε; concurrent writers queue.

    Raises:
        LedgerError: the store cannot be used, an entry was tampered with, or the signing key is missing.
    """

    def __init__(self, url: str | None = None, *, create: bool = True) -> None:
        self.store = Store(url or default_url(), create=create)
        self._state = LedgerState()
        self._key: Key | None = None
        self.refresh()
        if self._state.identity is None:
            if not create:
                raise LedgerError(f"{self.store} holds no ledger yet: create a data set in it first.")
            self._found()
        self._check_anchor()

    def __str__(self) -> str:
        return str(self.store)

    def close(self) -> None:
        self.store.close()

    @property
    def id(self) -> str:
        return str(self._state.founded["id"])

    @property
    def public_key(self) -> str:
        """Hexadecimal; who holds it can verify the ledger, and an export of it, anywhere."""
        return str(self._state.founded["public_key"])

    def refresh(self) -> LedgerState:
        """Read what others wrote since."""
        self._state.read(*self.store.after(self._state.seq))
        return self._state

    # -- data sets -----------------------------------------------------------------------------------------------

    def datasets(self) -> list["Dataset"]:
        return [Dataset(self, name) for name in self.refresh().datasets]

    def dataset(self, name: str) -> "Dataset":
        """Raises LedgerError if there is none of that name."""
        known = self.refresh().datasets
        if name not in known:
            have = f"it has {', '.join(known)}" if known else "it has none yet"
            raise LedgerError(f"The ledger {self} has no data set {name!r}: {have}; see dpft ledger create.")
        return Dataset(self, name)

    def create(  # noqa: PLR0913  (each is what a user types, by its name)
        self,
        name: str,
        *,
        epsilon: float,
        delta: float,
        unit: str = "example",
        adjacency: Adjacency = "add-or-remove-one",
        expires: date | None = None,
        spenders: Iterable[str] = (),
        rows: Iterable[Mapping[str, Any]] | None = None,
    ) -> "Dataset":
        """Open a data set's account.

        Args:
            epsilon, delta: all that may ever be spent on it, composed.
            unit: whose privacy it is, as in a recipe's ``data.unit``.
            expires: after that day nothing more is charged.
            spenders: users who may spend; by default everyone who can write to the ledger.
            rows: the data, recognised later by a keyed fingerprint; nothing of them is stored.

        Raises:
            LedgerError: the name is taken, or the same data has an account under another name.
            PlanError: the policy cannot be one.
        """
        policy = checked_policy(
            {
                "epsilon": epsilon,
                "delta": delta,
                "unit": unit,
                "adjacency": adjacency,
                "expires": None if expires is None else expires.isoformat(),
                "spenders": sorted(spenders),
            }
        )
        print_ = None if rows is None else Fingerprint(rows, self.key.secret)
        if print_ is not None and unit == "example" and too_large(delta, print_.rows):  # the number of rows is private
            raise PlanError(
                f"delta is {delta:g}, not below one over the number of rows, which permits publishing one whole: "
                "choose a smaller one."
            )
        shared: list[tuple[str, float]] = []

        def facts(book: LedgerState) -> Facts:
            if name in book.datasets:
                raise LedgerError(f"The ledger has a data set {name!r} already: choose another name.")
            like = book.like(print_)
            for other, _, same in like:
                if same:
                    raise LedgerError(
                        f"These rows are the data set {other!r} already, and two accounts would spend one budget "
                        "twice: use that name."
                    )
            shared[:] = [(other, share) for other, share, _ in like if share >= SHARED]
            return {"policy": policy, "fingerprint": print_ and print_.stored}

        self._append(name, "dataset", facts)
        for other, share in shared:
            self._note_shared(name, other, share)
        return Dataset(self, name)

    def _note_shared(self, name: str, other: str, share: float) -> None:
        self._append(name, "note", lambda book: {"about": SHARES, "with": other, "overlap": in_tenths(share)})

    def shared(self, name: str) -> list[tuple[str, float]]:
        """Other data sets that seem to hold some of the same rows or texts, with the share of them in common, in
        tenths."""
        datasets = self.refresh().datasets
        found = {note["with"]: note["overlap"] for note in datasets[name].notes if note["about"] == SHARES}
        mine = datasets[name].fingerprint
        for other, record in datasets.items():
            if mine is not None and record.fingerprint is not None and other not in (name, *found):
                share = overlap(mine, record.fingerprint)
                if share >= SHARED:
                    found[other] = in_tenths(share)
        return list(found.items())

    # -- entries -------------------------------------------------------------------------------------------------

    @property
    def key(self) -> Key:
        if self._key is None:
            self._key = Key.read(self._key_path())
        if self._state.identity is not None:
            if self._key.public != self.public_key:
                raise LedgerError(
                    f"The key in {self._key_path()} is not the one that signs {self}: name the right one in "
                    "DPFT_LEDGER_KEY."
                )
        return self._key

    def _key_path(self) -> Path:
        given = os.environ.get("DPFT_LEDGER_KEY")
        return Path(given) if given else _key_folder() / f"{self.id}.key"

    def _found(self) -> None:
        """Begin the ledger with its identity; of two that begin at once, the second finds the first's."""
        given = os.environ.get("DPFT_LEDGER_KEY")
        key = Key.read(Path(given)) if given and Path(given).exists() else Key.new()
        identity = {"id": str(uuid.uuid4()), "public_key": key.public, "format": 1}
        path = Path(given) if given else _key_folder() / f"{identity['id']}.key"
        if not path.exists():
            key.write(path)
        self._key = key
        if not self._append("", "ledger", lambda book: None if book.seq else identity):
            self._key = None
            if not given:
                path.unlink()

    def _append(self, dataset: str, kind: str, facts_for: Callable[[LedgerState], Facts | None]) -> bool:
        """Add one entry; ``facts_for(book)`` sees the book as it is under the lock, and may refuse by raising or by
        None."""
        key = self.key

        def make(rows: list[Entry], end: End | None) -> tuple[Entry, str] | None:
            self._state.read(rows, end)
            facts = facts_for(self._state)
            if facts is None:
                return None
            now = datetime.now(UTC).isoformat(timespec="microseconds")
            behind = seconds_back(now, self._state.last_time)
            if behind > CLOCK_SECONDS:
                raise LedgerError(
                    f"This machine's clock says {now[:16]}, {behind:,.0f} seconds before the ledger's last entry: set "
                    "it right, so that who spent what when stays true."
                )
            at = now if kind == "dataset" else f"{now[:13]}:00:00+00:00"
            facts = {**facts, "at": max(at, self._state.last_time), "by": who()}
            entry = key.entry(self._state.seq + 1, dataset, kind, facts, self._state.hash)
            return entry, key.sign(head_text(entry.seq, entry.hash))

        added = self.store.append(make, self._state.seq)
        if added is None:
            self.refresh()
            return False
        entry, signature = added
        self._state.read([entry], (entry.seq, entry.hash, signature))
        self._write_anchor()
        return True

    # -- the anchor: how far this machine has seen the ledger, so that an older copy put in its place shows ------------

    def _anchor_path(self) -> Path:
        return _key_folder() / f"{self.id}.head"

    def _write_anchor(self) -> None:
        temporary = self._anchor_path().with_suffix(f".{os.getpid()}.tmp")
        with suppress(OSError):  # a second line of defence, which must not stop a run whose charge is on disk
            temporary.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            temporary.write_text(json.dumps({"seq": self._state.seq, "hash": self._state.hash}), encoding="utf-8")
            os.replace(temporary, self._anchor_path())

    def _check_anchor(self) -> None:
        try:
            seen = json.loads(self._anchor_path().read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return
        known = self.store.after(seen["seq"] - 1)[0]
        if not known or known[0].hash != seen["hash"]:
            raise LedgerError(
                f"This machine has seen {seen['seq']:,} entries of {self}, and now it holds others or fewer: an older "
                f"copy was put in its place; restore the newest, or delete {self._anchor_path()} if this is meant."
            )


def _key_folder() -> Path:
    return data_folder() / "keys"
