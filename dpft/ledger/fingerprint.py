"""Recognising data without keeping any of it: keyed hashes of columns and rows, whatever their order, names, file or
format.

Of each column the ledger keeps a hash of all its values, in no order, and, where they are texts that differ, a sketch:
the least of their hashes under many orders (MinHash, Broder 1997), hashed again so that only equality shows. All hashes
are keyed with the ledger's secret (HMAC-SHA256): without it nobody can test whether a record is in the set. No number
of rows follows from what is kept.

Data are *the same* if all columns of one are columns of the other and these could not agree by chance. A constant
column and a counter say nothing and are left out. What columns that agree say together is counted in bits: a label with
two classes has a few, a text has thousands. So sets that share a label or a public text, and have other columns beside
it, are not the same.
"""

import hashlib
import hmac
import json
import math
from collections import Counter
from collections.abc import Iterable, Mapping
from functools import cached_property
from typing import Any, NotRequired, TypedDict

import numpy as np
from numpy.typing import NDArray

from dpft.ledger.values import MISSING, canonical_value, is_text

SHARED = 0.1  # overlap from which two sets have data in common
HASHES = 128  # in a sketch: overlaps are estimated to 1/sqrt(128), 9 points
CHANCE_BITS = 64.0  # that columns in common must say together
TEXTS = 0.25  # share of a column's values that differ and are no numbers or dates, from which it has a sketch
TEXT_BITS = 16.0  # that one of many different texts says
_WIDTH = 16  # bytes of a value's hash


class StoredColumn(TypedDict):
    """What the ledger keeps of a column."""

    digest: str
    sketch: NotRequired[list[int]]


class Stored(TypedDict):
    """What the ledger keeps of data. Version 0.1.0 kept the number of ``rows`` and no columns."""

    digest: str
    sketch: list[int]
    columns: NotRequired[list[StoredColumn]]
    rows: NotRequired[int]


class Fingerprint:
    """Of rows, each a mapping of columns to values.

    Attributes:
        stored: what the ledger keeps.
        rows: how many there are; not kept.
    """

    def __init__(self, rows: Iterable[Mapping[str, Any]], secret: bytes) -> None:
        self._secret, self.rows = secret, 0
        self._old_rows: list[bytes] = []
        columns: dict[str, _Column] = {}
        for row in rows:
            values = {str(name): row[name] for name in row}
            for name in values.keys() - columns.keys():
                columns[name] = _Column(self.rows, secret)
            for name, column in columns.items():
                column.add(values.get(name))
            self._old_rows.append(_old_row(row, secret))
            self.rows += 1
        varied = [column for column in columns.values() if not column.constant] or list(columns.values())
        telling = [column for column in varied if not column.counter] or varied
        self._bits: dict[str, float] = {}
        kept: list[StoredColumn] = []
        for column in telling:
            digest = column.digest()
            self._bits[digest] = self._bits.get(digest, 0.0) + column.bits()
            kept.append({"digest": digest})
            if column.texts:
                kept[-1]["sketch"] = _sketch(column.numbers, secret)
        self.stored: Stored = {
            "digest": _keyed(secret, b"rows" + np.sort(self._sums(varied)).tobytes()),
            "sketch": _sketch(self._sums(telling), secret),
            "columns": sorted(kept, key=lambda column: column["digest"]),
        }

    def _sums(self, columns: list["_Column"]) -> NDArray[np.uint64]:
        """One number for each row: the sum of its values' hashes, whatever the columns' names and order."""
        return sum((column.numbers for column in columns), np.zeros(self.rows, dtype=np.uint64))

    def same(self, stored: Stored) -> bool:
        """Whether ``stored`` is of these rows, but for order, names, formats, and columns that only one of them has."""
        if "columns" not in stored:
            return stored["digest"] == self._old["digest"]
        if stored["digest"] == self.stored["digest"]:
            return True
        mine, others = (Counter(c["digest"] for c in one["columns"]) for one in (self.stored, stored))
        both = mine & others
        bits = sum(self._bits[digest] for digest in both)
        return (not mine - both or not others - both) and bits >= CHANCE_BITS

    def share(self, stored: Stored) -> float:
        """About how many of the rows, or of a text column's values, of either set are in both, from 0 to 1."""
        if self.same(stored):
            return 1.0
        return overlap(self.stored if "columns" in stored else self._old, stored)

    @property
    def _old(self) -> Stored:
        """As version 0.1.0 made and stored it."""
        digests = sorted(self._old_rows)
        whole = hmac.new(self._secret, b"".join(digests), hashlib.sha256).hexdigest()
        return {"rows": len(digests), "digest": whole, "sketch": _old_sketch(digests, self._secret)}


def overlap(one: Stored, other: Stored) -> float:
    """The same of two that are stored: what rows have in common or, if nothing, what any two text columns have."""
    if one["digest"] == other["digest"]:
        return 1.0
    if ("columns" in one) != ("columns" in other):
        return 0.0  # a version's hashes say nothing to another's
    rows = _common(one["sketch"], other["sketch"]) if _rows_kept(one) and _rows_kept(other) else 0.0
    if rows >= SHARED:
        return rows
    return max([rows, *(_common(mine, theirs) for mine in _sketches(one) for theirs in _sketches(other))])


def in_tenths(share: float) -> float:
    """A share that may be published: no single row moves it, but at a few steps."""
    return min(0.9, round(share, 1))


def _sketches(stored: Stored) -> list[list[int]]:
    return [column["sketch"] for column in stored.get("columns", ()) if "sketch" in column]


def _rows_kept(stored: Stored) -> bool:
    return bool(stored["columns"] if "columns" in stored else stored["rows"])


def _common(one: list[int], other: list[int]) -> float:
    return sum(a == b for a, b in zip(one, other, strict=True)) / HASHES


class _Column:
    """A column's values, as keyed hashes."""

    def __init__(self, missing: int, secret: bytes) -> None:
        self._secret = secret
        self._hashes = bytearray(_hash(secret, MISSING) * missing)
        self._words = 0
        self._integers = missing == 0
        self._low, self._high = math.inf, -math.inf

    def add(self, value: object) -> None:
        text = canonical_value(value)
        self._hashes += _hash(self._secret, text)
        self._words += is_text(text)
        self._integers = self._integers and text.removeprefix("-").isdecimal()
        if self._integers:
            self._low, self._high = min(self._low, int(text)), max(self._high, int(text))

    @property
    def numbers(self) -> NDArray[np.uint64]:
        """Eight bytes of each hash, as ``(rows,)`` numbers."""
        return np.frombuffer(bytes(self._hashes), dtype=np.uint64)[::2]

    @cached_property
    def counts(self) -> NDArray[np.int64]:
        """How often each distinct value stands there; to be asked for when all rows are added."""
        return np.unique(self.numbers, return_counts=True)[1]

    @property
    def constant(self) -> bool:
        return len(self.counts) < 2

    @property
    def counter(self) -> bool:
        """Whether it numbers the rows, from anywhere on and in any order."""
        rows = len(self.numbers)
        return self._integers and len(self.counts) == rows and self._high - self._low == rows - 1

    @property
    def texts(self) -> bool:
        rows = len(self.numbers)
        return self._words >= rows / 2 and len(self.counts) >= TEXTS * rows

    def bits(self) -> float:
        """About log2 of how unlikely another set has the same column.

        Of a short alphabet, by how unlikely the same counts are in another sample of the same distribution (Stirling).
        """
        if self.texts:
            return TEXT_BITS * len(self.counts)
        return float(np.log2(2 * math.pi * self.counts).sum() - math.log2(2 * math.pi * self.counts.sum())) / 2

    def digest(self) -> str:
        hashes = np.sort(np.frombuffer(bytes(self._hashes), dtype=f"S{_WIDTH}"))
        return _keyed(self._secret, b"column" + hashes.tobytes())


def _hash(secret: bytes, text: str) -> bytes:
    return hmac.digest(secret, text.encode("utf-8", "surrogatepass"), "sha256")[:_WIDTH]


def _keyed(secret: bytes, content: bytes) -> str:
    return hmac.digest(secret, content, "sha256").hex()


def _sketch(numbers: NDArray[np.uint64], secret: bytes) -> list[int]:
    """Hashes of the least numbers: the least themselves would tell how many there are."""
    if not len(numbers):
        return [0] * HASHES
    least = _least(numbers, secret)
    named = (hmac.digest(secret, f"{i}/{value}".encode(), "sha256") for i, value in enumerate(least))
    return [int.from_bytes(digest[:6], "big") for digest in named]


def _least(numbers: NDArray[np.uint64], secret: bytes) -> list[int]:
    stream = hashlib.shake_256(secret + b"sketch").digest(16 * HASHES)
    odd, shift = np.frombuffer(stream, dtype=np.uint64).reshape(2, HASHES)
    with np.errstate(over="ignore"):
        return [int((numbers * (a | np.uint64(1)) + b).min() >> np.uint64(12)) for a, b in zip(odd, shift, strict=True)]


def _old_row(row: Mapping[str, Any], secret: bytes) -> bytes:
    text = json.dumps({str(k): None if row[k] is None else str(row[k]) for k in row}, sort_keys=True)
    return hmac.new(secret, text.encode(), hashlib.sha256).digest()[:16]


def _old_sketch(digests: list[bytes], secret: bytes) -> list[int]:
    if not digests:
        return [0] * HASHES
    return _least(np.frombuffer(b"".join(digests), dtype=np.uint64)[::2], secret)
