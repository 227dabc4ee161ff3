"""The store of private bytes: what is kept is encrypted and has no name."""

import os

import pytest

from dpft.privacy.encrypted_file import EncryptedStore


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


def test_no_two_contents_share_a_block_of_key_stream(tmp_path):
    """Zeros encrypted are the key stream itself: of 8 contents of 20 blocks each, all 160 blocks differ."""
    store = EncryptedStore(tmp_path)
    for number in range(8):
        store.write(number, bytes(20 * 16))
    assert store.read(7) == bytes(20 * 16)
    stream = os.pread(store._file.fileno(), 8 * 20 * 16, 0)
    assert len({stream[start : start + 16] for start in range(0, len(stream), 16)}) == 160
    store.close()
