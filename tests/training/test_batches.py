"""Logical batches: any size, little padding, units together."""

import itertools

import datasets
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dpft.errors import RecipeError
from dpft.gradients.engine import Engine
from dpft.privacy.noise import SecureRandomness, SeededRandomness
from dpft.privacy.sampling import PoissonSampler
from dpft.tasks import Encoded, LabelledTask
from dpft.tasks.losses import pad_features
from dpft.training.batches import Examples, Limits, LogicalBatches, check_units, cut

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
        encode(unit), TASK, sampler, steps=steps, limits=Limits(token_budget, max_examples=lambda tokens: most)
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


class Silent(SecureRandomness):
    """The real source with noise of zero, so that a release is the clipped sum over B."""

    def gaussians(self, n, device=None):
        yield torch.zeros(n, dtype=torch.float64)


class Windows:
    """One feature for each number of a row's text; a row's gradient is along its own axis."""

    def __init__(self, told=True):
        self.told = told

    def encode(self, rows):
        found = [(i, torch.tensor(int(word))) for i, text in enumerate(rows["text"]) for word in text.split()]
        features = [feature for _, feature in found]
        return Encoded(features, [i for i, _ in found]) if self.told else features

    def length(self, feature):
        return 1

    def collate(self, features):
        return {"x": 100 * torch.nn.functional.one_hot(torch.stack(features), 8).float()}


def clipped_sum(rows, plan, task):
    """What one step with every unit in it adds up to, before noise."""
    model = torch.nn.Linear(8, 1, bias=False)
    examples = Examples.encode(rows, task, plan.unit)
    sampler = PoissonSampler(1.0, plan.examples_per_unit, SeededRandomness(0))
    batches = LogicalBatches(examples, task, sampler, steps=1, limits=Limits(3, lambda tokens: 3))
    with Engine(model, plan, Silent()) as engine:
        for batch, units in batches.draw():
            engine.accumulate(model(batch["x"]).squeeze(1), units)
        engine.release()
    return model.weight.grad[0] * plan.expected_batch_size


@pytest.mark.parametrize(("unit", "most"), [("example", 1), ("patient", 2)])
def test_windows_of_one_row_move_the_sum_by_c_and_no_more(plan, unit, most):
    """T16: had each window been a unit, the row below would have moved it by 2 C."""
    rows = [{"text": f"{i} {i}", "patient": f"p{i}"} for i in range(6)]
    settings = plan(units=6, steps=1, sample_rate=1.0, unit=unit, examples_per_unit=most)
    moved = clipped_sum(rows, settings, Windows()) - clipped_sum(rows[:-1], settings, Windows())
    assert moved.norm() == pytest.approx(1.0, rel=1e-5) and moved[5] == pytest.approx(moved.norm())


def test_windows_belong_to_their_row_s_unit_in_every_chunk():
    """T16."""
    rows = [{"text": " ".join("7" * (i % 4)), "patient": f"p{i % 3}"} for i in range(1005)]
    examples = Examples.encode(rows, Windows(), "patient")
    assert len(examples) == sum(i % 4 for i in range(1005))
    assert sorted(map(len, examples.members)) == sorted(sum(i % 4 for i in range(p, 1005, 3)) for p in range(3))
    assert len(Examples.encode(rows, Windows()).members) == sum(i % 4 > 0 for i in range(1005))


@pytest.mark.parametrize("text", ["1 2", ""])
def test_features_that_are_not_one_a_row_are_refused_unless_each_names_its_row(text):
    """T16."""
    rows = [{"text": "1"}] * 1000 + [{"text": text}]
    with pytest.raises(RecipeError, match=f"made {len(text.split())} features of 1 rows"):
        Examples.encode(rows, Windows(told=False))


@pytest.mark.parametrize("owners", [[0, 1, 2], [0, 5], [0, -1], [0, 0.0]])
def test_features_name_rows_that_are_there(owners):
    task = Windows()
    task.encode = lambda rows: Encoded([torch.tensor(1)] * 2, owners)
    with pytest.raises(RecipeError, match=f"named {len(owners)} rows for 2 features of 2 rows"):
        Examples.encode([{"text": "1"}] * 2, task)


def units_of(ids, rows=None):
    """How many rows each unit has."""
    rows = rows or [{"text": "1", "patient": one} for one in ids]
    return sorted(map(len, Examples.encode(rows, Windows(), "patient").members))


def test_a_unit_s_rows_are_one_unit_however_far_apart():
    """T16: rows are encoded a thousand at a time."""
    rows = [{"text": str(i % 2), "patient": "p" if i in (0, 1000, 2001) else f"q{i}"} for i in range(2002)]
    assert units_of(None, rows) == [1] * 1999 + [3]


@pytest.mark.parametrize(
    "ids",
    [
        [torch.tensor(7), torch.tensor(7), 8],
        [np.int64(7), 7, np.int32(8)],
        np.array([7, 7, 8]),
        [np.str_("7"), "7", "007"],
        ["1E5", "1E5", "100000"],
        [b"\x00", b"\x00", b"0"],
    ],
)
def test_units_are_told_by_value(ids):
    """T16: a tensor is equal to no other, and numbers of one value may be two texts."""
    assert units_of(ids) == [1, 2]


@pytest.mark.parametrize("form", ["torch", "numpy", None])
def test_units_of_a_formatted_data_set_are_told_by_value(form):
    rows = datasets.Dataset.from_dict({"text": ["1"] * 6, "patient": [1, 2, 1, 2, 1, 3]}).with_format(form)
    assert units_of(None, rows) == [1, 2, 3]


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (None, "row 3 has no 'patient'"),
        (float("nan"), "row 3 has no 'patient'"),
        (torch.tensor(float("nan")), "row 3 has no 'patient'"),
        ("  ", "row 3 has no 'patient'"),
        (7.0, "row 3 has a float in unit column 'patient'"),
        (torch.tensor(7.0), "row 3 has a float in unit column 'patient'"),
        (["P1", "P2"], "row 3 has a list in unit column 'patient', but it belongs to one unit"),
        ({"id": 1}, "row 3 has an object in unit column 'patient'"),
        (True, "row 3 has true or false in unit column 'patient'"),
        ("7", "row 3 has a text in unit column 'patient', but earlier rows have a whole number"),
    ],
)
def test_what_names_no_unit_is_refused_with_its_row(value, said):
    """T16."""
    with pytest.raises(RecipeError, match=said):
        units_of([7, 8, value])


def test_a_unit_column_that_is_not_there_is_named():
    with pytest.raises(RecipeError, match="no column 'doctor': they have text, patient"):
        Examples.encode([{"text": "1", "patient": "p"}], Windows(), "doctor")


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ([], "nothing to learn from"),
        ([("1", "p")], "row 1 is a value of type tuple"),
        ([{"text": "1"}, {"text": "1", "more": 2}], "row 2 has other columns"),
    ],
)
def test_rows_that_are_none_are_refused(rows, said):
    with pytest.raises(RecipeError, match=said):
        Examples.encode(rows, Windows())


class SingleRows(torch.utils.data.Dataset):
    def __len__(self):
        return 1500

    def __getitem__(self, i):
        assert 0 <= i < 1500
        return {"text": "1", "patient": torch.tensor(i % 3)}


def test_a_data_set_of_single_rows_is_encoded_too():
    assert units_of(None, SingleRows()) == [500] * 3


@pytest.mark.parametrize(("declared", "fits"), [(19, False), (20, True), (80, True), (81, False)])
def test_a_plan_s_units_are_refused_beyond_a_factor_of_two(plan, declared, fits):
    """T17: δ below 1/units can be had by declaring few."""
    examples = Examples.encode([{"text": "1"}] * 40, Windows())
    if fits:
        check_units(examples, plan(units=declared))
    else:
        with pytest.raises(RecipeError, match=f"declares {declared} units, but the data has about 40"):
            check_units(examples, plan(units=declared))


def test_a_plan_s_units_are_compared_with_units_and_not_with_rows(plan):
    """100 rows of 10 people: a plan for 100 people has a tenth of its sampling rate for each."""
    examples = Examples([{}] * 100, np.ones(100, dtype=np.int64), np.arange(100).reshape(10, 10))
    check_units(examples, plan(units=10))
    with pytest.raises(RecipeError, match="declares 100 units, but the data has about 10"):
        check_units(examples, plan(units=100))
