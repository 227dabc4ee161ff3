"""T20: the chance inside a step is secret, fresh and leaves no trace."""

import random
import zlib

import numpy as np
import pytest
import torch

from dpft.privacy.chance import StepChance
from dpft.privacy.noise import SecureRandomness, SeededRandomness


def draws():
    return (torch.rand(3).tolist(), np.random.rand(3).tolist(), [random.random() for _ in range(3)])


def seeded(seed=42):
    torch.manual_seed(seed)
    np.random.seed(seed)
    random.seed(seed)


def test_no_generator_follows_from_the_published_seed():
    found = []
    for _ in range(2):
        seeded()
        with StepChance(SecureRandomness()) as chance:
            found.append(draws())
            chance.renew()
            found.append(draws())
    for kind in range(3):
        assert len({tuple(one[kind]) for one in found}) == 4


def test_afterwards_the_generators_are_what_they_were():
    seeded()
    wanted = draws()
    seeded()
    with StepChance(SecureRandomness()):
        draws()
    assert draws() == wanted


def test_the_state_has_more_secret_bits_than_can_be_searched():
    """torch's own seed has 32 bits on a processor; a state that one of them makes could be found from what was
    drawn."""
    with StepChance(SecureRandomness()):
        words = torch.get_rng_state().numpy().view(np.uint32)[6 : 6 + 2 * 624 : 2].copy()
        state = random.getstate()[1][:-1]
        numpy = np.random.get_state()[1]
    for some in (words, np.array(state, dtype=np.uint32), numpy):
        assert len(set(some.tolist())) > 620 and len(zlib.compress(some.tobytes())) > 2400  # no structure
    torch.manual_seed(int(words[0]))
    assert (torch.get_rng_state().numpy().view(np.uint32)[6 : 6 + 2 * 624 : 2] != words).mean() > 0.99


def test_what_is_drawn_is_uniform():
    with StepChance(SecureRandomness()):
        for numbers in (
            torch.rand(20_000).numpy(),
            np.random.rand(20_000),
            np.array([random.random() for _ in range(20_000)]),
        ):
            assert abs(numbers.mean() - 0.5) < 5 / np.sqrt(12 * 20_000)
            assert abs(numbers.var() - 1 / 12) < 5 * np.sqrt(1 / 180 / 20_000)


def test_somebody_who_seeds_the_generator_is_noticed():
    with StepChance(SecureRandomness()) as chance:
        assert chance.is_kept
        torch.rand(3)
        assert chance.is_kept
        torch.manual_seed(42)
        assert not chance.is_kept
        chance.renew()
        assert chance.is_kept


def test_engines_of_one_process_hold_the_generators_together_in_whatever_order_they_leave():
    seeded()
    wanted = draws()
    seeded()
    one, other = StepChance(SecureRandomness()), StepChance(SecureRandomness())
    one.__enter__()
    with other:
        one.renew()
        assert one.is_kept and other.is_kept
    assert one.is_kept
    with other:
        one.__exit__()
        assert other.is_kept and draws() != wanted
    assert draws() == wanted


def test_what_a_seeded_source_beside_it_draws_is_no_secret_of_a_private_one():
    with StepChance(SecureRandomness()) as private, StepChance(SeededRandomness(5)) as known:
        assert known.is_kept and not private.is_kept
        private.renew()
        assert known.is_kept and private.is_kept


def test_a_seeded_source_gives_the_same_chance_and_the_same_noise_however_often_it_is_renewed():
    found = []
    for renewals in (1, 1, 3):
        source = SeededRandomness(5)
        with StepChance(source) as chance:
            first = draws()
            for _ in range(renewals):
                chance.renew()
        found.append((first, source.gaussian(4).tolist()))
    assert found[0] == found[1] and found[0][1] == found[2][1]


@pytest.mark.parametrize("size", [0, 1, 1250])
def test_words_are_uniform_and_never_twice_the_same(size):
    source = SecureRandomness()
    one, other = source.words(size), source.words(size)
    assert one.dtype == np.uint32 and len(one) == size
    assert size < 2 or (one != other).any()
