"""Proving a ledger, from its database or from an export, without trusting who wrote it."""

import json
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from dpft.errors import LedgerError
from dpft.ledger.chain import End, Entry, canonical, signed
from dpft.ledger.database import Store
from dpft.ledger.state import AMENDABLE, DatasetRecord, LedgerState
from dpft.privacy import composition
from dpft.privacy.rounding import rounded_up

FORMAT = "dpft-ledger"
AGREEMENT = 5e-3  # relative difference of two accountants' ε that grids explain


@dataclass
class Findings:
    """What was checked, and what is wrong."""

    entries: int = 0
    public_key: str = ""
    figures: int = 0
    problems: list[str] = field(default_factory=list)

    @property
    def verified(self) -> bool:
        return not self.problems


def verify(
    rows: list[Entry],
    end: End | None,
    *,
    public_key: str | None = None,
    figures: bool = True,
    progress: Callable[[int, int], None] = lambda done, of: None,
) -> Findings:
    """Check every hash and signature, and compose every stored ε again, by dp-accounting.

    Args:
        public_key: whose ledger it must be; by default that which the first entry names, which proves that nothing was
            changed since, and not whose it is.
        figures: whether to compose; takes about half a second for each run.
    """
    found, book = Findings(), LedgerState()
    for i, row in enumerate(rows):
        try:
            book.add(row)
            if canonical(row.facts) != row.body:
                raise LedgerError(f"Entry {row.seq} is not written as dpft writes.")
            if not signed(book.founded["public_key"], row.hash, row.signature):
                raise LedgerError(f"Entry {row.seq} is not signed by the ledger's key.")
            if row is rows[-1]:
                book.check_end(end)
        except LedgerError as error:
            found.problems.append(str(error))
            return found
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            found.problems.append(f"Entry {row.seq} cannot be read ({type(error).__name__}: {error}).")
            return found
        if row.kind == "amend":
            found.problems += _amendment(row)
        if figures and row.kind == "settle":
            found.problems += _figure(book.datasets[row.dataset], row)
            found.figures += 1
            progress(i + 1, len(rows))
        found.entries += 1
    if not rows:
        found.problems.append("There is no entry: the ledger is empty, or all of it was removed.")
        return found
    found.public_key = book.founded["public_key"]
    if public_key is not None and public_key != found.public_key:
        found.problems.append(f"The ledger is signed by {found.public_key[:16]}…, and {public_key[:16]}… was expected.")
    for dataset in book.datasets.values():
        found.problems += _policy_kept(dataset)
    return found


def _amendment(row: Entry) -> list[str]:
    """Nobody changes by what the releases so far are priced."""
    fixed = sorted(set(row.facts["policy"]) - AMENDABLE)
    if not fixed:
        return []
    return [
        f"Entry {row.seq} amends the {', '.join(fixed)} of {row.dataset!r}, which re-prices what was released before."
    ]


def _figure(dataset: DatasetRecord, row: Entry) -> list[str]:
    """A settlement's ε against another accountant's."""
    policy, stored = dataset.policy, row.facts["epsilon"]
    known = composition.reference(dataset.events, policy["delta"], policy["adjacency"])
    if math.isinf(known):  # dp-accounting does not serve so small a δ, so little noise or so large an ε
        known = dataset.epsilon(dataset.events)
    if math.isclose(stored, known, rel_tol=AGREEMENT, abs_tol=1e-4):
        return []
    return [
        f"Entry {row.seq} says that {dataset.name!r} had spent ε = {stored:.5g}; its events compose to "
        f"{rounded_up(known, 5)}."
    ]


def _policy_kept(dataset: DatasetRecord) -> list[str]:
    spent = dataset.epsilon(dataset.events)
    if spent <= dataset.policy["epsilon"]:
        return []
    return [f"{dataset.name!r} has spent ε = {rounded_up(spent, 4)} of {dataset.policy['epsilon']:g}."]


def export(store: Store, path: Path) -> int:
    """Write all entries and the end as JSON lines; returns the number of entries."""
    rows, end = store.after(0)
    path.write_bytes(_lines(rows, end).encode())
    return len(rows)


def _lines(rows: list[Entry], end: End | None) -> str:
    last = {"format": FORMAT, "end": list(end) if end else None}
    return "".join(canonical(facts) + "\n" for facts in (*map(vars, rows), last))


def read_export(path: Path) -> tuple[list[Entry], End | None]:
    """The entries and the end of an export.

    Raises:
        LedgerError: it is not byte for byte as an export is written.
    """
    try:
        text = path.read_bytes().decode()
        lines = [json.loads(line) for line in text.split("\n")[:-1]]
        rows, last = [Entry(**line) for line in lines[:-1]], lines[-1]
        end = tuple(last["end"]) if last["end"] else None
        exact = _lines(rows, end)
    except (OSError, ValueError, TypeError, KeyError, IndexError, AttributeError) as error:
        raise LedgerError(f"{path} is not an export of a ledger ({type(error).__name__}): export it again.") from error
    if text != exact:
        raise LedgerError(f"{path} is not as dpft writes exports, so it was changed: export the ledger again.")
    return rows, end


def restore(path: Path, store: Store, *, public_key: str | None = None) -> Findings:
    """Import an export that verifies into an empty store; the signing key is not part of it."""
    rows, end = read_export(path)
    found = verify(rows, end, public_key=public_key, figures=False)
    if found.verified and end is not None:
        store.restore(rows, end)
    return found
