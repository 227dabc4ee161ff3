"""Private bytes on disk for the length of a run, which nobody else can read and nothing outlives."""

import os
import tempfile
import weakref
from pathlib import Path

from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes


class EncryptedStore:
    """Byte strings by number, each written once and read often.

    The file has no name, so the operating system forgets it when the process ends, however it ends; its content is
    encrypted under a key that exists in this process alone.
    """

    def __init__(self, folder: Path) -> None:
        self._key = os.urandom(32)
        self._file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115  (without a name from the start; closed by close())
        weakref.finalize(self, self._file.close)  # a run that failed may not have closed it
        self._places: dict[int, tuple[int, int]] = {}
        self._end = 0

    def write(self, number: int, content: bytes) -> None:
        self._file.write(self._cipher(number).encryptor().update(content))
        self._places[number] = (self._end, len(content))
        self._end += len(content)

    def read(self, number: int) -> bytes:
        start, size = self._places[number]
        self._file.seek(start)
        content = self._file.read(size)
        self._file.seek(0, os.SEEK_END)
        return self._cipher(number).decryptor().update(content)

    def close(self) -> None:
        self._file.close()
        self._key = b""

    def _cipher(self, number: int) -> Cipher[modes.CTR]:
        """AES in counter mode; each number has counters of its own, so no two contents share key stream."""
        return Cipher(algorithms.AES(self._key), modes.CTR(number.to_bytes(8, "big") + bytes(8)))
