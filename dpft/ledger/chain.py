"""What makes an entry provable: canonical bytes, a chain of hashes, signatures, and the key that made them.

Entry n's hash covers its content and the hash of entry n - 1, so that no entry can be edited, inserted, reordered or
dropped without changing every later hash; the key's signature covers the last one
(Haber & Stornetta 1991; Ed25519, RFC 8032).
"""

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat

from dpft.errors import LedgerError

GENESIS = "0" * 64  # the hash before the first entry
Facts = dict[str, Any]  # of an entry, as JSON has them
End = tuple[int, str, str]  # the last entry's number and hash, and the key's signature of both


@dataclass(frozen=True)
class Entry:
    """One row of the ledger: ``body`` is canonical JSON, ``hash`` and ``signature`` are hexadecimal."""

    seq: int
    dataset: str
    kind: str
    body: str
    previous: str
    hash: str
    signature: str

    @property
    def facts(self) -> Facts:
        facts: Facts = json.loads(self.body)
        return facts


def canonical(facts: Mapping[str, Any]) -> str:
    """The one way in which facts are written."""
    return json.dumps(facts, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)


def hash_of(seq: int, dataset: str, kind: str, body: str, previous: str) -> str:
    return hashlib.sha256(canonical({"at": [seq, dataset, kind, body, previous]}).encode()).hexdigest()


class Key:
    """A ledger's signing key, kept in a file that only its owner reads."""

    def __init__(self, private: Ed25519PrivateKey) -> None:
        self._private = private
        self.public = private.public_key().public_bytes(Encoding.Raw, PublicFormat.Raw).hex()

    @classmethod
    def new(cls) -> "Key":
        return cls(Ed25519PrivateKey.generate())

    @classmethod
    def read(cls, path: Path) -> "Key":
        try:
            return cls(Ed25519PrivateKey.from_private_bytes(bytes.fromhex(path.read_text(encoding="utf-8").strip())))
        except FileNotFoundError:
            raise LedgerError(
                f"The ledger's signing key is not at {path}, so nothing can be charged: copy it there from whoever "
                "made the ledger, or name its file in DPFT_LEDGER_KEY."
            ) from None
        except (OSError, ValueError) as error:
            raise LedgerError(f"The signing key {path} cannot be read ({error}): fix the file.") from error

    def write(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        raw = self._private.private_bytes(Encoding.Raw, PrivateFormat.Raw, NoEncryption()).hex()
        with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w", encoding="utf-8") as file:
            file.write(raw + "\n")
            file.flush()
            os.fsync(file.fileno())
        if hasattr(
            os, "O_DIRECTORY"
        ):  # its name, too, is on disk before the first charge that it signs; Windows has no handle for that
            folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
            try:
                os.fsync(folder)
            finally:
                os.close(folder)

    def sign(self, text: str) -> str:
        return self._private.sign(text.encode()).hex()

    @property
    def secret(self) -> bytes:
        """32 bytes for keyed fingerprints, derived from the key and useless for signing."""
        raw = self._private.private_bytes(Encoding.Raw, PrivateFormat.Raw, NoEncryption())
        return hashlib.sha256(b"dpft fingerprint" + raw).digest()

    def entry(self, seq: int, dataset: str, kind: str, facts: Facts, previous: str) -> Entry:
        body = canonical(facts)
        digest = hash_of(seq, dataset, kind, body, previous)
        return Entry(seq, dataset, kind, body, previous, digest, self.sign(digest))


def signed(public: str, text: str, signature: str) -> bool:
    """Whether the key ``public`` (hexadecimal) signed ``text``, and ``signature`` is written in the one way that dpft
    writes."""
    try:
        raw = bytes.fromhex(signature)
        Ed25519PublicKey.from_public_bytes(bytes.fromhex(public)).verify(raw, text.encode())
        return raw.hex() == signature
    except (InvalidSignature, ValueError):
        return False


def head_text(seq: int, digest: str) -> str:
    """What is signed as the ledger's end, so that dropping its last entries shows."""
    return f"head {seq} {digest}"
