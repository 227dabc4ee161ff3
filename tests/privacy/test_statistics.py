"""Statistics of rows: exact against brute force, bounded for each unit, noised before any rounding."""

import math

import pytest
import torch

from dpft.errors import GuaranteeError, PlanError
from dpft.privacy.clipping import AutoClip, FlatClip
from dpft.privacy.mechanisms.statistics import Statistics
from dpft.privacy.noise import SeededRandomness

C, CLASSES, NUMBER = 0.8, 4, 12
UNITS = ["a", "b", "a", "c", "a", "b", "d"]
STATISTICS = ["mean", "second_moment", "class_means", "class_counts"]


def data(seed=0, n=7):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, 3, generator=generator), torch.randint(CLASSES, (n,), generator=generator)


def statistic(name, rows, labels, units, noise=0.0, seed=0):
    statistics = Statistics(noise_multiplier=noise, steps=1, clip=FlatClip(C))
    how = dict(number=NUMBER, randomness=SeededRandomness(seed))
    if name == "class_counts":
        return statistics.class_counts(labels, units, classes=CLASSES, **how)
    if name == "class_means":
        return statistics.class_means(rows, labels, units, classes=CLASSES, **how)
    return getattr(statistics, name)(rows, units, **how)


def contribution(name, rows, labels):
    """What one unit adds, by its definition."""
    parts = []
    for row, label in zip(rows.double(), labels, strict=True):
        row = row * min(1.0, C / float(row.norm())) if torch.isfinite(row).all() else torch.zeros_like(row)
        place = torch.nn.functional.one_hot(label, CLASSES).double()
        shapes = {"mean": row, "second_moment": torch.outer(row, row), "class_counts": place}
        parts.append(shapes[name] if name in shapes else torch.outer(place, row))
    return torch.stack(parts).mean(0)


def brute_force(name, rows, labels, units):
    members = {unit: [i for i, one in enumerate(units) if one == unit] for unit in units}
    return sum(contribution(name, rows[rows_of], labels[rows_of]) for rows_of in members.values()) / NUMBER


@pytest.mark.parametrize("name", STATISTICS)
@pytest.mark.parametrize("units", [UNITS, None], ids=["units of several rows", "rows"])
def test_it_is_the_sum_of_what_each_unit_adds(name, units):
    rows, labels = data()
    rows[1] *= 1e-3  # shorter than the bound
    wanted = brute_force(name, rows, labels, units or list(range(len(rows))))
    found = statistic(name, rows, labels, units)
    assert found.value.dtype == torch.float64 and found.value.shape == wanted.shape
    torch.testing.assert_close(found.value, wanted, rtol=1e-12, atol=1e-15)
    assert (found.event.count, found.event.noise_multiplier, found.event.sample_rate) == (1, 0.0, 1.0)


@pytest.mark.parametrize("name", STATISTICS)
def test_noise_is_added_to_the_sum_before_anything_is_rounded(name):
    """T11: what is released is the noisy sum over the public number, to the last bit."""
    rows, labels = data()
    exact = statistic(name, rows, labels, UNITS).value * NUMBER
    found = statistic(name, rows, labels, UNITS, noise=0.7, seed=5).value * NUMBER
    sensitivity = {"second_moment": C**2, "class_counts": 1.0}.get(name, C)
    above = torch.triu_indices(3, 3)
    flat = [x[above[0], above[1]] if name == "second_moment" else x.flatten() for x in (exact, found)]
    noise = SeededRandomness(5).gaussian(len(flat[0])) * 0.7 * sensitivity
    torch.testing.assert_close(flat[1], flat[0] + noise, rtol=1e-12, atol=1e-14)
    assert not torch.equal(flat[1], flat[1].float().double())
    if name == "second_moment":
        assert torch.equal(found, found.T)


@pytest.mark.parametrize("name", STATISTICS)
@pytest.mark.parametrize("count", [1, 2, 50])
def test_a_unit_moves_a_statistic_by_its_sensitivity_at_most_however_many_rows_it_has(name, count):
    """T16: a unit adds the mean of its clipped rows. Rows all alike reach the bound."""
    rows, labels = data(1)
    row = torch.tensor([0.0, 5.0, 0.0])
    for stranger, classes in ((row.expand(count, 3), torch.zeros(count, dtype=torch.long)), data(2, count)):
        both = torch.cat([rows, stranger]), torch.cat([labels, classes])
        beside = statistic(name, *both, [*UNITS, *["stranger"] * count]).value
        moved = (beside - statistic(name, rows, labels, UNITS).value) * NUMBER
        reached = float((moved.triu() if name == "second_moment" else moved).norm())
        bound = {"second_moment": C**2, "class_counts": 1.0}.get(name, C)
        assert reached <= bound * (1 + 1e-9)
        if stranger.data_ptr() == row.data_ptr():
            assert reached == pytest.approx(bound)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_row_that_is_not_finite_adds_zero(value):
    """T12."""
    rows, labels = data()
    rows[3, 1] = value
    for name in ("mean", "second_moment", "class_means"):
        found = statistic(name, rows, labels, UNITS).value
        torch.testing.assert_close(found, brute_force(name, rows, labels, UNITS), rtol=1e-12, atol=1e-15)


def test_the_true_number_of_rows_and_units_divides_nothing():
    """T8: twice the others' rows is twice the sum over the same number."""
    rows, labels = data()
    one = statistic("mean", rows, labels, UNITS).value
    both = statistic("mean", torch.cat([rows, rows]), labels, [*UNITS, *[unit + "'" for unit in UNITS]]).value
    torch.testing.assert_close(both, 2 * one)


@pytest.mark.parametrize("name", STATISTICS)
def test_nobody_at_all_is_noise_alone(name):
    """T9."""
    rows, labels = data()
    found = statistic(name, rows[:0], labels[:0], [], noise=1.0).value
    assert found.shape == statistic(name, rows, labels, UNITS).value.shape and bool((found != 0).all())


def test_rounded_rows_of_any_type_are_summed_in_float64():
    """T21."""
    rows = torch.full((4096, 1), 2.0**-13, dtype=torch.bfloat16)
    rows = torch.cat([torch.tensor([[0.5]], dtype=torch.bfloat16), rows])
    found = Statistics(noise_multiplier=0.0).mean(rows, None, number=1).value
    assert float(found[0]) == 1.0


def test_what_cannot_be_bounded_or_divided_is_refused():
    statistics, (rows, labels) = Statistics(noise_multiplier=1.0), data()
    with pytest.raises(GuaranteeError, match=r"rows has shape \(7,\)"):
        statistics.mean(rows[:, 0], None, number=7)
    with pytest.raises(GuaranteeError, match="2 units were given for 7 rows"):
        statistics.mean(rows, ["a", "b"], number=7)
    with pytest.raises(PlanError, match="number is 0"):
        statistics.mean(rows, None, number=0)
    with pytest.raises(GuaranteeError, match="below classes"):
        statistics.class_counts(labels, None, classes=1, number=7)
    with pytest.raises(PlanError, match="FlatClip"):
        Statistics(noise_multiplier=1.0, clip=AutoClip())
