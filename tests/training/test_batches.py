"""Logical batches: any size, little padding, units together."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dpft.privacy.noise import SeededRandomness
from dpft.privacy.sampling import PoissonSampler
from dpft.tasks.task import LabelledTask, pad_features
from dpft.training.batches import Examples, LogicalBatches, cut

TASK = LabelledTask(lambda features: pad_features(features, 0, token_labels=True))


@settings(deadline=None)
@given(
    st.lists(st.tuples(st.integers(1, 60), st.integers(0, 12)), max_size=60),
    st.integers(16, 200),
    st.integers(1, 20),
)
def test_every_cut_keeps_every_example_once_and_units_together(examples, budget, most):
    lengths, units = [e[0] for e in examples], [e[1] for e in examples]
    groups = cut(lengths, units, token_budget=budget, max_examples=lambda tokens: most)
    order = [int(i) for group in groups for i in group]
    assert sorted(order) == list(range(len(examples)))
    runs = [
        units[i]
        for i, before in zip(order, [None, *order], strict=False)
        if before is None or units[i] != units[before]
    ]
    assert len(runs) == len(set(runs))
    for group in groups:
        assert len(group) <= most
        assert len(group) == 1 or max(lengths[i] for i in group) * len(group) <= budget


@settings(deadline=None)
@given(st.lists(st.integers(1, 40), min_size=1, max_size=9), st.integers(16, 120), st.integers(0, 40))
def test_no_other_cut_costs_less(lengths, budget, overhead):
    cost = lambda groups: sum(max(group) * len(group) + overhead for group in groups)
    fits = lambda group: len(group) == 1 or max(group) * len(group) <= budget
    found = [[lengths[i] for i in g] for g in cut(lengths, range(len(lengths)), token_budget=budget, overhead=overhead)]
    ordered, best = sorted(lengths, reverse=True), float("inf")
    for size in range(len(lengths)):
        for places in itertools.combinations(range(1, len(lengths)), size):
            groups = [ordered[a:b] for a, b in zip((0, *places), (*places, len(lengths)), strict=True)]
            best = min(best, cost(groups)) if all(map(fits, groups)) else best
    assert cost(found) == best


def test_sorting_by_length_saves_padding():
    lengths = np.random.default_rng(0).lognormal(4, 0.8, 500).astype(int) + 1
    padded = lambda groups: sum(lengths[g].max() * len(g) for g in groups)
    by_length = cut(lengths, range(500), token_budget=1024)
    at_random = [np.arange(i, min(i + 16, 500)) for i in range(0, 500, 16)]
    assert padded(at_random) > 1.8 * padded(by_length)
    assert padded(by_length) < 1.15 * lengths.sum()


ROWS = [
    {"input_ids": [i % 7 + 1] * (i % 5 + 1), "labels": [1] * (i % 5 + 1), "patient": f"p{i % 4}"} for i in range(20)
]


def encode(unit):
    rows = [{key: value for key, value in row.items() if key != "patient" or unit != "example"} for row in ROWS]
    task = LabelledTask(lambda features: pad_features(features, 0, token_labels=True))
    return Examples.encode(rows, task, unit)


def test_units_are_grouped_by_their_column():
    """T16."""
    examples = encode("patient")
    assert len(examples.members) == 4
    assert sorted(i for group in examples.members for i in group) == list(range(20))
    assert all(len({ROWS[i]["patient"] for i in group}) == 1 for group in examples.members)


def drawn_batches(unit, sampler, *, steps, token_budget, most):
    return LogicalBatches(
        encode(unit), TASK, sampler, steps=steps, token_budget=token_budget, max_examples=lambda tokens: most
    )


@pytest.mark.parametrize("rate", [1e-12, 0.3, 1.0])
def test_planned_steps_are_executed_steps_whatever_is_drawn(rate):
    """T9: an empty draw is a step, neither skipped nor padded with a fake record."""
    batches = drawn_batches("example", PoissonSampler(rate, 1, SeededRandomness(0)), steps=7, token_budget=20, most=4)
    drawn = [sum(len(units) for _, units in batch) for batch in batches]
    assert len(drawn) == len(batches) == 7
    assert {1e-12: sum(drawn) == 0, 0.3: len(set(drawn)) > 1, 1.0: set(drawn) == {20}}[rate]


def test_a_unit_gives_at_most_its_share():
    """T16."""
    batches = drawn_batches("patient", PoissonSampler(1.0, 2, SeededRandomness(0)), steps=5, token_budget=8, most=4)
    for batch in batches:
        units = [unit for _, micro in batch for unit in micro]
        assert sorted(units) == [0, 0, 1, 1, 2, 2, 3, 3]


def test_no_two_draws_are_the_same_shuffle():
    """T9: an epoch of shuffled batches would draw every unit once; Poisson draws some twice and some never."""
    batches = drawn_batches("example", PoissonSampler(0.2, 1, SeededRandomness(1)), steps=5, token_budget=64, most=9)
    counts = np.bincount([unit for batch in batches for _, micro in batch for unit in micro], minlength=20)
    assert counts.min() == 0 and counts.max() > 1


def test_the_preflight_sees_examples_of_several_lengths():
    lengths = [len(e["input_ids"]) for e in encode("example").spread(3)]
    assert lengths == [1, 2, 3]  # the longest would cost the most


def test_the_preflight_sees_several_lengths_however_the_rows_are_sorted():
    """T2: among rows that are all as long nothing is padded."""
    lengths = np.array([16] * 200 + [5, 7, 40, 12])
    examples = Examples(range(len(lengths)), lengths, np.arange(len(lengths)).reshape(-1, 1))
    assert lengths[examples.spread()].tolist() == [5, 7, 12] and lengths[examples.longest] == 40


def test_how_many_examples_a_draw_has_on_average(plan):
    examples = Examples(range(9), np.ones(9), [np.arange(6), np.array([6]), np.array([7, 8])])
    assert examples.expected(plan(sample_rate=0.5, units=3, examples_per_unit=2)) == 0.5 * (2 + 1 + 2)
