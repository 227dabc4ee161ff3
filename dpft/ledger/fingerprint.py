"""Recognising data without keeping any of it: keyed hashes of rows, whatever their order, file or format.

The fingerprint of a set is the hash of its rows' hashes. Its sketch is the least of them under many orders (MinHash,
Broder 1997), whose overlap estimates how many rows two sets share. All hashes are keyed with the ledger's secret (HMAC-SHA256):
without it nobody can test whether a record is in the set.
"""

import hashlib
import hmac
import json
from collections.abc import Iterable, Mapping

import numpy as np

HASHES = 128  # in a sketch: overlaps are estimated to 1/sqrt(128), 9 points


def fingerprint(rows: Iterable[Mapping], secret: bytes) -> dict:
    """``{"rows": n, "digest": hex, "sketch": [HASHES numbers]}`` of rows, each a mapping of columns to values."""
    digests = sorted(_row(row, secret) for row in rows)
    whole = hmac.new(secret, b"".join(digests), hashlib.sha256).hexdigest()
    return {"rows": len(digests), "digest": whole, "sketch": _sketch(digests, secret)}


def overlap(one: dict, other: dict) -> float:
    """About how many of the rows of either set are in both, from 0 to 1."""
    if one["digest"] == other["digest"]:
        return 1.0
    if not one["rows"] or not other["rows"]:
        return 0.0
    same = sum(a == b for a, b in zip(one["sketch"], other["sketch"], strict=True))
    return same / HASHES


def _row(row: Mapping, secret: bytes) -> bytes:
    """16 bytes; numbers that a CSV file has as text hash as that text."""
    text = json.dumps({str(k): None if row[k] is None else str(row[k]) for k in row}, sort_keys=True)
    return hmac.new(secret, text.encode(), hashlib.sha256).digest()[:16]


def _sketch(digests: list[bytes], secret: bytes) -> list[int]:
    if not digests:
        return [0] * HASHES
    values = np.frombuffer(b"".join(digests), dtype=np.uint64)[::2]
    stream = hashlib.shake_256(secret + b"sketch").digest(16 * HASHES)
    odd, shift = np.frombuffer(stream, dtype=np.uint64).reshape(2, HASHES)
    with np.errstate(over="ignore"):
        return [int((values * (a | np.uint64(1)) + b).min() >> np.uint64(12)) for a, b in zip(odd, shift, strict=True)]
