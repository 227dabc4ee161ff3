"""The store of private bytes: what is kept is encrypted and has no name."""

import os

import pytest

from dpft.privacy.store import EncryptedStore


def test_what_is_kept_is_encrypted_and_has_no_name(tmp_path):
    store = EncryptedStore(tmp_path)
    secret = b"the patient's name is Nguyen Thi Hoa" * 20
    for number in range(3):
        store.write(number, secret)
    assert [store.read(number) for number in (2, 0, 1)] == [secret] * 3
    assert not list(tmp_path.iterdir())
    on_disk = os.pread(store._file.fileno(), 10 * len(secret), 0)
    assert len(on_disk) == 3 * len(secret)
    parts = [on_disk[i * len(secret) : (i + 1) * len(secret)] for i in range(3)]
    assert b"Nguyen" not in on_disk and len(set(parts)) == 3
    # Key streams that repeated would cancel: the same content under two numbers must not XOR to a constant.
    assert len({a ^ b for a, b in zip(parts[0], parts[1], strict=True)}) > 100
    store.close()
    with pytest.raises(ValueError):
        store.read(0)
