"""The sources of randomness: distribution with power, and nothing that could be replayed."""

import copy
import os
import pickle

import numpy as np
import pytest
import torch
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms
from scipy import stats

from dpft.privacy import noise
from dpft.privacy.chacha import DeviceStream
from dpft.privacy.noise import SecureRandomness, SeededRandomness
from dpft.privacy.sampling import PoissonSampler


def deviates(values, std, limit=5.0):
    """How the sample variance differs from ``std**2``, in its own standard errors; True beyond ``limit``."""
    variance = float((values**2).mean())
    return abs(variance - std**2) > limit * std**2 * (2 / len(values)) ** 0.5


def test_noise_has_the_stated_deviation_and_no_other():
    values = SeededRandomness(0).gaussian(20_000)
    assert not deviates(values, 1.0)
    assert deviates(values, 2 / 3) and deviates(values, 3 / 2)  # the test could fail


def test_noise_is_gaussian():
    values = SeededRandomness(1).gaussian(50_000).numpy()
    assert stats.kstest(values, "norm").pvalue > 1e-3
    assert stats.kstest(values * 1.05, "norm").pvalue < 1e-3  # the test could fail
    assert abs(stats.kurtosis(values)) < 0.15


def test_each_number_is_the_half_sum_of_four_gaussians():
    """T11: as in Holohan & Braghin 2021, section 5.1 with n = 2, from the cipher's stream and nothing else."""
    key, size = SeededRandomness(5)._key(), 1000
    stream = Cipher(algorithms.ChaCha20(key[:32], bytes(4) + key[32:]), mode=None).encryptor().update(bytes(32 * size))
    uniforms = (np.frombuffer(stream, dtype=np.uint64) >> np.uint64(11)).astype(float).reshape(2, 2, size) / 2**53
    radius, angle = np.sqrt(-2 * np.log1p(-uniforms[0])), 2 * np.pi * uniforms[1]
    first, second = radius * np.cos(angle), radius * np.sin(angle)
    expected = (first[0] + first[1] + np.roll(second[0] + second[1], 1)) / 2
    assert np.allclose(SeededRandomness(5).gaussian(size).numpy(), expected, rtol=0, atol=1e-12)


def test_no_draw_ends_before_its_time(monkeypatch):
    """A key's blocks are counted in 32 bits, so a count that starts at random would end a step in so many for want of
    noise."""
    monkeypatch.setattr(SecureRandomness, "_key", lambda self: b"\xff" * 44)
    assert torch.isfinite(SecureRandomness().gaussian(1000)).all()


def test_the_stream_on_a_device_is_the_ciphers():
    """T10: bit for bit that of OpenSSL, from one part to the next."""
    key, nonce = bytes(range(100, 132)), bytes(range(240, 252))
    device, processor = DeviceStream(key, nonce, torch.device("cpu")), noise._Stream(key, nonce)
    for size in (8, 24, 4096):
        found, expected = torch.empty(2, 2, size // 4, dtype=torch.float64), torch.empty(size, dtype=torch.float64)
        device.fill(found)
        processor.fill(expected)
        assert torch.equal(found.view(-1), expected) and len(expected.unique()) == size


def test_noise_made_on_a_device_is_the_same_draw(monkeypatch):
    monkeypatch.setattr(noise, "_CHUNK", 64)
    expected = SeededRandomness(5).gaussian(1000)
    monkeypatch.setattr(noise, "_Stream", lambda *key: DeviceStream(*key, torch.device("cpu")))
    assert torch.equal(SeededRandomness(5).gaussian(1000), expected)


def test_noise_is_not_porous():
    """T11: a sampler in float32 repeats itself, which tells an attacker what noise cannot have been added; this one
    does not."""
    n = 1 << 19
    assert len(torch.randn(n).unique()) < n - 1000  # the test could fail
    assert len(SecureRandomness().gaussian(n).unique()) == n


def test_numbers_are_independent():
    values = SeededRandomness(2).gaussian(100_000).numpy()
    for lag in (1, 2, 3, len(values) // 2):
        assert abs(np.corrcoef(values[:-lag], values[lag:])[0, 1]) < 5 / len(values[:-lag]) ** 0.5


@pytest.mark.parametrize("n", [1, 2, 3, 1000])
def test_any_number_of_values(n):
    assert torch.isfinite(SecureRandomness().gaussian(n)).all() and len(SecureRandomness().gaussian(n)) == n


def test_chunks_do_not_repeat(monkeypatch):
    monkeypatch.setattr(noise, "_CHUNK", 16)
    values = SecureRandomness().gaussian(100)
    assert len(set(values.tolist())) == 100


def test_secure_noise_cannot_be_replayed():
    """T10: seeding every global generator changes nothing, and two sources share nothing."""
    draws = []
    for _ in range(2):
        torch.manual_seed(42)
        np.random.seed(42)
        draws += [SecureRandomness().gaussian(8), SecureRandomness().gaussian(8)]
    assert len({tuple(draw.tolist()) for draw in draws}) == 4


@pytest.mark.parametrize("source", [SecureRandomness(), SeededRandomness(0)])
def test_a_source_is_never_saved(source):
    """T10."""
    for save in (pickle.dumps, copy.deepcopy):
        with pytest.raises(TypeError, match="never saved"):
            save(source)


def test_only_the_secure_source_is_private():
    assert SecureRandomness.private and not SeededRandomness.private


def test_a_seed_reproduces():
    assert torch.equal(SeededRandomness(3).gaussian(5), SeededRandomness(3).gaussian(5))


def test_every_unit_is_drawn_at_the_public_rate():
    """T9: counts are binomial per unit and per draw; a fixed-size or shuffled sampler has no spread."""
    sampler = PoissonSampler(0.1, 1, SeededRandomness(0))
    draws = np.zeros((2000, 200), dtype=bool)
    for row in draws:
        row[sampler.units(200)] = True
    sizes = draws.sum(1)
    assert abs(sizes.mean() - 20) < 5 * (18 / 2000) ** 0.5
    assert not deviates(torch.tensor(sizes - 20.0), 18**0.5)
    per_unit = draws.sum(0)
    assert stats.chisquare(per_unit, np.full(200, per_unit.mean())).pvalue > 1e-3
    assert abs(np.corrcoef(draws[:-1, 0], draws[1:, 0])[0, 1]) < 0.12  # yesterday's draw says nothing about today's


def test_draws_may_be_empty_or_full():
    assert len(PoissonSampler(1e-9, 1, SecureRandomness()).units(50)) == 0
    assert len(PoissonSampler(1.0, 1, SecureRandomness()).units(50)) == 50


def test_a_unit_gives_at_most_its_share_of_examples():
    sampler = PoissonSampler(0.5, 3, SeededRandomness(0))
    members = np.arange(10, 20)
    seen = [sampler.examples(members) for _ in range(400)]
    assert all(len(set(chosen)) == 3 and set(chosen) <= set(members) for chosen in map(list, seen))
    counts = np.bincount(np.concatenate(seen) - 10, minlength=10)
    assert stats.chisquare(counts).pvalue > 1e-3
    assert sampler.examples(np.array([5, 6])).tolist() == [5, 6]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
def test_a_fork_makes_other_noise():
    """T10: a key and a counter of the process would be copied, and both would go on alike, number by number."""
    source = SecureRandomness()
    source.gaussian(2)
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        os.write(write, source.gaussian(3).numpy().tobytes() + source.words(3).tobytes())
        os._exit(0)
    os.waitpid(child, 0)
    theirs = os.read(read, 100)
    ours = source.gaussian(3).numpy().tobytes() + source.words(3).tobytes()
    assert len(theirs) == len(ours) == 36
    assert not set(np.frombuffer(theirs, np.uint32)) & set(np.frombuffer(ours, np.uint32))
