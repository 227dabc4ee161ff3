"""Heads from sums over all units: each sum against plain loops, its bound for each unit, its noise, and its price."""

import math
from dataclasses import replace

import dp_accounting
import numpy as np
import pytest
import torch
from dp_accounting.rdp import RdpAccountant
from hypothesis import given, settings
from hypothesis import strategies as st

from dpft.errors import GuaranteeError, PlanError
from dpft.privacy.clipping import AutoClip, FlatClip
from dpft.privacy.mechanisms.every_unit import symmetric, upper_triangle
from dpft.privacy.mechanisms.head_descent import HeadDescent
from dpft.privacy.mechanisms.least_squares import LeastSquares
from dpft.privacy.mechanisms.linear_head import Rows, Sums, kept_share
from dpft.privacy.mechanisms.prototypes import Prototypes
from dpft.privacy.noise import SeededRandomness
from tests.support.heads import (
    CLASSES,
    NUMBER,
    UNITS,
    WIDTH,
    every_head,
    nobody,
    noisy,
    rows,
    silent,
    with_and_without,
)


def test_short_rows_are_summed_in_float64():
    """T21: what float32 holds is summed to the last bit of float64."""
    data = replace(rows(units=[[i] for i in range(12)]), scale=4.0)
    _, sums = silent(LeastSquares(noise_multiplier=1e-3, steps=20), data)
    exact = (data.features.double() / 4).sum(0)
    assert torch.equal(sums.totals[1], exact)


@pytest.mark.parametrize("mechanism", [Prototypes.example(), HeadDescent.example()], ids=lambda one: one.name)
def test_classes_are_not_learned_from_real_targets(mechanism):
    with pytest.raises(GuaranteeError, match="head-least-squares"):
        silent(mechanism, rows(real=True))


# -- what one unit can do ------------------------------------------------------------------------------------------


def beside(data, features, labels):
    """The data with one unit more."""
    start, extra = len(data.features), len(features)
    return replace(
        data,
        features=torch.cat([data.features, features.to(data.features.dtype)]),
        labels=torch.cat([data.labels, labels]),
        members=[*data.members, np.arange(start, start + extra)],
    )


def moved(mechanism, data, features, labels):
    """By what a unit moves each release under the same past, over the stated sensitivity."""
    _, without = noisy(mechanism, data, seed=3)  # a past that the unit is strange to
    head, again = silent(mechanism, beside(data, features, labels), without.values)
    assert [how for how in again.how] == without.how  # sensitivities and steps are public
    assert torch.isfinite(head.weight).all() and torch.isfinite(head.bias).all()
    both = zip(again.totals, without.totals, without.how, strict=True)
    return [float((one - other).norm()) / sensitivity for one, other, (sensitivity, _) in both]


STRANGERS = {
    "long": torch.tensor([-1e6, 0, 0, 0]),
    "across": torch.tensor([0, 1e3, -2e3, 0]),
    "huge": torch.tensor([0, 0, 3e38, 3e38]),
    "tiny": torch.tensor([0, 0, 0, 1e-30]),
    "zero": torch.zeros(4),
    "nan": torch.tensor([0, math.nan, 0, 0]),
    "inf": torch.tensor([math.inf, 0, 0, 0]),
}


@every_head
@settings(max_examples=40, deadline=None)
@given(
    st.integers(0, 1000),
    st.sampled_from(sorted(STRANGERS)),
    st.integers(0, CLASSES - 1),
    st.sampled_from([1, 2, 50]),
    st.booleans(),
    st.sampled_from([0.05, 1.0, 20.0]),
    st.sampled_from([1, 3]),
)
def test_no_unit_moves_a_sum_by_more_than_is_stated(
    mechanism, seed, stranger, label, count, has_bias, sigma, rows_per_unit
):
    """T6, T16: whoever it is and however many rows it has, under the same past at every step."""
    mechanism = replace(mechanism, noise_multiplier=sigma)
    data = rows(seed, has_bias=has_bias, rows_per_unit=rows_per_unit)
    features = STRANGERS[stranger].expand(count, WIDTH)
    for ratio in moved(mechanism, data, features, torch.full((count,), label)):
        assert ratio <= 1 + 1e-6


@every_head
@with_and_without
@pytest.mark.parametrize("count", [1, 50])
@pytest.mark.parametrize(("sigma", "shift"), [(1.0, 0.0), (0.05, 2.0)], ids=["wide", "close together"])
def test_the_worst_unit_moves_each_sum_by_what_is_stated(mechanism, has_bias, count, sigma, shift):
    """So that the test above has power, and no noise is wasted."""
    mechanism = replace(mechanism, noise_multiplier=sigma)
    data = rows(units=[[row] for row in range(NUMBER)] if shift else UNITS, has_bias=has_bias)
    data = replace(data, features=data.features + torch.tensor([shift, 0, 0, 0]))  # so that r is much less than 1
    worst = [0.0] * len(mechanism.sums())
    for stranger in ("long", "across", "huge"):
        for label in range(CLASSES):
            features = STRANGERS[stranger].expand(count, WIDTH)
            ratios = moved(mechanism, data, features, torch.full((count,), label))
            worst = [max(pair) for pair in zip(worst, ratios, strict=True)]
    least = 1 if isinstance(mechanism, LeastSquares) else None  # λ_min moves by less where others hold it
    for place, ratio in enumerate(worst):
        if least is None or place != 2:
            assert ratio >= 0.9, place


def test_a_unit_moves_the_least_spread_by_what_is_stated_where_one_direction_is_empty():
    features = torch.eye(WIDTH)[:3].repeat(4, 1) * 1e3
    data = replace(rows(units=[[i] for i in range(12)], has_bias=False), features=features)
    ratios = moved(LeastSquares.example(), data, torch.eye(WIDTH)[3:] * 1e3, torch.zeros(1, dtype=torch.long))
    assert ratios[2] == pytest.approx(1.0, rel=1e-5)


def test_a_real_target_is_bounded():
    data = rows(real=True)
    for target in (torch.full((1, CLASSES), 1e6), torch.full((1, CLASSES), math.nan)):
        assert max(moved(LeastSquares.example(), data, STRANGERS["long"][None], target)) <= 1 + 1e-6


@every_head
def test_a_unit_of_many_rows_counts_once(mechanism):
    """T16: fifty copies of a row are that row."""
    mechanism = replace(mechanism, clip=FlatClip(4.0))  # of which a gradient is shorter
    data, row, label = rows(), torch.tensor([[0.5, -0.25, 0.0, 0.125]]), torch.tensor([1])
    _, past = noisy(mechanism, data)
    _, one = silent(mechanism, beside(data, row, label), past.values)
    _, many = silent(mechanism, beside(data, row.expand(50, -1), label.expand(50)), past.values)
    for first, second in zip(one.totals, many.totals, strict=True):
        torch.testing.assert_close(first, second, rtol=1e-9, atol=1e-9)


@every_head
def test_rows_count_alike_up_to_a_public_number(mechanism):
    """T16: of four rows a unit each counts as a quarter; fifty count as one row's whole."""
    mechanism = replace(mechanism, clip=FlatClip(4.0))
    data, row, label = rows(rows_per_unit=4), torch.tensor([[0.5, -0.25, 0.0, 0.125]]), torch.tensor([1])
    _, past = noisy(mechanism, data)
    _, without = silent(mechanism, data, past.values)
    added = []
    for count in (1, 2, 4, 50):
        _, sums = silent(mechanism, beside(data, row.expand(count, -1), label.expand(count)), past.values)
        added.append([one - other for one, other in zip(sums.totals, without.totals, strict=True)])
    for place, kind in enumerate(mechanism.sums()):
        if isinstance(mechanism, LeastSquares) and place == 2:
            continue  # an eigenvalue does not add up
        one, two, four, many = (each[place] for each in added)
        for found, share in ((two, 2), (four, 4), (many, 4)):
            torch.testing.assert_close(found, one * share, rtol=1e-9, atol=1e-9, msg=f"sum {place} of {kind} steps")


def test_what_frequent_classes_gain_by_their_number_can_be_taken_out():
    """At balance 1 the constants differ by the logarithm of the released shares."""
    mechanism = Prototypes(noise_multiplier=0.1, steps=20)
    head, sums = noisy(mechanism, rows())
    even, _ = noisy(mechanism, rows(balance=1.0))
    prior = mechanism._prior(sums.values[0], mechanism.sums()[0]).log()
    assert torch.equal(head.weight, even.weight)
    torch.testing.assert_close(head.bias - even.bias, prior - prior.mean())


def test_units_name_each_row_once():
    """T16: a unit without rows would make one of two rows look like two units."""
    features, labels = torch.zeros(2, 3), torch.zeros(2, dtype=torch.long)
    for members in ([[0, 1], []], [[0], [0]], [[0]], [[0], [1], [1]]):
        with pytest.raises(GuaranteeError, match="name each row once"):
            Rows(features, labels, [np.array(unit, dtype=np.int64) for unit in members], 2)


def test_rows_that_do_not_fit_are_refused():
    members = [np.array([0]), np.array([1])]
    features, labels = torch.zeros(2, 3), torch.zeros(2, dtype=torch.long)
    for wrong in ((features[0], labels), (features, labels[:1]), (features, labels.float())):
        with pytest.raises(GuaranteeError, match="features of shape"):
            Rows(*wrong, members, 2)
    with pytest.raises(GuaranteeError, match="rows_per_unit is 0"):
        Rows(features, labels, members, 2, rows_per_unit=0)
    for facts in (dict(rows_per_unit=2), dict(balance=0.5)):
        with pytest.raises(GuaranteeError, match="targets"):
            Rows(features, torch.zeros(2, 1), members, 1, **facts)
    with pytest.raises(GuaranteeError, match="balance is 0.5, and the head has no constant"):
        Rows(features, labels, members, 2, has_bias=False, balance=0.5)
    for label in (-1, 2):
        with pytest.raises(GuaranteeError, match="none of the 2 classes"):
            Rows(features, torch.tensor([0, label]), members, 2)


@pytest.mark.parametrize("most", [1, 5, 1000])
def test_chunks_of_units_give_the_same_gradients(monkeypatch, most):
    module = "dpft.privacy.mechanisms."
    whole, _ = noisy(HeadDescent.example(), rows())
    monkeypatch.setattr(module + "head_descent.OUTER", most * CLASSES * (WIDTH + 1))
    monkeypatch.setattr(module + "linear_head.CHUNK", 5)
    monkeypatch.setattr(module + "head_descent.CHUNK", 5)
    parts, _ = noisy(HeadDescent.example(), rows())
    torch.testing.assert_close(whole.weight, parts.weight, rtol=1e-9, atol=1e-12)


# -- noise ---------------------------------------------------------------------------------------------------------


@every_head
def test_each_release_has_fresh_noise_of_what_it_is_charged(mechanism):
    """T7, T10: every number of every release has noise of its own, of σ · sensitivity / √steps."""
    mechanism = replace(mechanism, noise_multiplier=0.7)
    runs = []
    for seed in range(60):
        _, sums = noisy(mechanism, rows(), seed)
        parts = zip(sums.values, sums.totals, sums.how, strict=True)
        runs.append([(one - exact) / (0.7 * s / math.sqrt(w)) for one, exact, (s, w) in parts])
    for place in range(len(runs[0])):
        noise = torch.stack([run[place].flatten() for run in runs])
        assert float(noise.square().mean()) == pytest.approx(1.0, abs=6 * math.sqrt(2 / noise.numel())), place
        together = float(noise.mean(1).square().mean()) * noise.shape[1]  # of a mean of independent numbers
        assert together == pytest.approx(1.0, abs=6 * math.sqrt(2 / len(noise))), place
    flat = torch.stack([torch.cat([part.flatten() for part in run]) for run in runs])
    assert len(flat.unique()) == flat.numel()  # no number is used twice, in one run or in two
    alike = flat.T @ flat / len(flat)
    assert float((alike - alike.diag().diag()).abs().max()) < 6 / math.sqrt(len(flat)) + 0.2


@every_head
def test_noise_is_added_to_the_sum_before_anything_is_rounded(mechanism):
    """T11."""
    mechanism = replace(mechanism, noise_multiplier=0.7)
    _, sums = noisy(mechanism, rows(), seed=5)
    drawn = SeededRandomness(5)
    for value, exact, (sensitivity, steps) in zip(sums.values, sums.totals, sums.how, strict=True):
        noise = drawn.gaussian(exact.numel()).view(exact.shape)
        assert torch.equal(value, exact + noise * (0.7 * sensitivity / steps**0.5))


@every_head
def test_the_sums_cost_what_the_events_say(mechanism):
    """T18: σ of each sum is σ/√w, and dp-accounting gives the same ε for the sums as for the events."""
    parts = [mechanism.noise_multiplier / math.sqrt(steps) for steps in mechanism.sums()]
    (event,) = mechanism.events()
    assert sum(part**-2 for part in parts) == pytest.approx(event.count / event.noise_multiplier**2)
    assert event.sample_rate == 1.0 and event.count == mechanism.steps == sum(mechanism.rounds)
    quiet = replace(mechanism, noise_multiplier=8.0)
    accountant = RdpAccountant()
    accountant.compose(
        dp_accounting.ComposedDpEvent([dp_accounting.GaussianDpEvent(8 / math.sqrt(w)) for w in quiet.sums()])
    )
    whole = RdpAccountant()
    whole.compose(dp_accounting.SelfComposedDpEvent(dp_accounting.GaussianDpEvent(8.0), quiet.steps))
    assert accountant.get_epsilon(1e-5) == pytest.approx(whole.get_epsilon(1e-5), rel=1e-6)
    together = dp_accounting.pld.PLDAccountant()
    together.compose(
        dp_accounting.ComposedDpEvent([dp_accounting.GaussianDpEvent(8 / math.sqrt(w)) for w in quiet.sums()])
    )
    assert quiet.epsilon(quiet.steps, 1e-5) == pytest.approx(together.get_epsilon(1e-5), rel=2e-3)


@every_head
@pytest.mark.parametrize("steps", [5, 7, 20, 68, 500])
def test_steps_are_shared_among_the_sums(mechanism, steps):
    assert sum(replace(mechanism, steps=steps).sums()) == steps and min(replace(mechanism, steps=steps).sums()) >= 1
    assert torch.isfinite(noisy(replace(mechanism, steps=steps), rows())[0].weight).all()


@every_head
def test_what_cannot_be_planned_is_refused(mechanism):
    for facts in (dict(steps=3), dict(steps=0), dict(noise_multiplier=-1.0), dict(clip=AutoClip())):
        with pytest.raises(PlanError, match="steps is|noise_multiplier is|clip is"):
            replace(mechanism, **facts)


# -- resuming ------------------------------------------------------------------------------------------------------


def unreadable():
    raise AssertionError("the data were looked at for a known release")


@every_head
@pytest.mark.parametrize("done", [0, 1, 2, 3, None])
def test_a_resumed_head_is_the_same_and_charges_nothing_twice(mechanism, done):
    """T15: what is known is neither summed nor charged again."""
    kept, charged = [], []
    randomness = SeededRandomness(0)
    sums = Sums(mechanism.noise_multiplier, randomness, before=charged.append, keep=kept.append)
    whole = mechanism.fit(rows(), sums, NUMBER)
    assert charged == list(mechanism.sums()) and len(kept) == len(charged)
    done = len(kept) if done is None else done
    later, more, again = SeededRandomness(0), [], []
    for value in kept[:done]:
        later.gaussian(value.numel())
    sums = Sums(
        mechanism.noise_multiplier,
        later,
        before=again.append,
        known=[value.flatten() for value in kept[:done]],
        keep=more.append,
    )
    head = mechanism.fit(rows(), sums, NUMBER)
    assert torch.equal(head.weight, whole.weight) and torch.equal(head.bias, whole.bias)
    assert again == list(mechanism.sums())[done:] and len(more) == len(again)


@every_head
@pytest.mark.parametrize("rows_per_unit", [1, 3])
def test_data_are_not_looked_at_for_what_is_known(mechanism, rows_per_unit, monkeypatch):
    kept, data = [], rows(rows_per_unit=rows_per_unit)
    whole = mechanism.fit(data, Sums(1.0, SeededRandomness(0), keep=kept.append), NUMBER)
    for private in ("weights", "alone", "total", "outputs", "units"):
        monkeypatch.setattr(Rows, private, property(lambda self: unreadable()))
    again = mechanism.fit(replace(data), Sums(1.0, None, known=kept), NUMBER)
    assert torch.equal(whole.weight, again.weight) and torch.equal(whole.bias, again.bias)


@every_head
@pytest.mark.parametrize("lost", [0, 1, 2, 3])
@pytest.mark.parametrize("rows_per_unit", [1, 3])
def test_a_release_that_was_counted_and_lost_is_zero_and_is_not_made_again(mechanism, lost, rows_per_unit):
    """T15: charged before its noise was drawn, it is never drawn."""
    charged, kept = [], []
    known = [None] * (lost + 1)
    sums = Sums(1.0, SeededRandomness(0), before=charged.append, known=known, keep=kept.append)
    head = mechanism.fit(rows(rows_per_unit=rows_per_unit), sums, NUMBER)
    assert charged == list(mechanism.sums())[lost + 1 :] and len(kept) == len(charged)
    assert torch.isfinite(head.weight).all() and torch.isfinite(head.bias).all()


def test_a_release_is_charged_before_its_data_are_read():
    order = []
    kept = lambda value: order.append("kept")
    sums = Sums(1.0, SeededRandomness(0), before=order.append, keep=kept)
    sums.release(lambda: order.append("read") or torch.zeros(2, dtype=torch.float64), (2,), 1.0, 4)
    assert order == [4, "read", "kept"]


# -- data at their edges -------------------------------------------------------------------------------------------


def finite(mechanism, data, number=NUMBER):
    for seed in range(5):
        head, sums = noisy(mechanism, data, seed, number)
        assert head.weight.shape == (CLASSES, data.features.shape[1]) and head.bias.shape == (CLASSES,)
        assert torch.isfinite(head.weight).all() and torch.isfinite(head.bias).all()
        assert all(torch.isfinite(value).all() for value in sums.values)


@every_head
@with_and_without
@pytest.mark.parametrize("width", [1, 2, 4])
@pytest.mark.parametrize("sigma", [0.0, 1.0, 1e4])
def test_nobody_gives_a_finite_head(mechanism, has_bias, width, sigma):
    """T9: noise is all that is released of nobody."""
    mechanism = replace(mechanism, noise_multiplier=sigma)
    finite(mechanism, nobody(width, has_bias=has_bias))
    if sigma:
        assert all((value != 0).all() for value in noisy(mechanism, nobody(width))[1].values)


@every_head
@with_and_without
@pytest.mark.parametrize("sigma", [0.0, 1.0])
def test_data_at_their_edges_give_a_finite_head(mechanism, has_bias, sigma):
    mechanism, data = replace(mechanism, noise_multiplier=sigma), rows(has_bias=has_bias)
    for features in (data.features * 1e30, data.features * 0, data.features * math.inf, data.features[:, :1]):
        finite(mechanism, replace(data, features=features))
    finite(mechanism, replace(data, labels=torch.zeros_like(data.labels)))  # two classes are absent
    finite(mechanism, replace(data, labels=data.labels.to(torch.uint8)))
    finite(mechanism, replace(data, features=data.features.bfloat16()))
    finite(mechanism, data, number=1)


@every_head
@with_and_without
def test_many_units_are_told_apart(mechanism, has_bias):
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(CLASSES, (3000,), generator=generator)
    features = torch.eye(CLASSES, 8)[labels] + 0.3 * torch.randn(3000, 8, generator=generator) + torch.eye(8)[7]
    data = Rows(features * 40, labels, list(np.arange(3000)[:, None]), CLASSES, scale=70.0, has_bias=has_bias)
    head, _ = noisy(replace(mechanism, noise_multiplier=4.0), data, number=3000)
    logits = features.double() * 40 @ head.weight.T + head.bias
    assert float((logits.argmax(1) == labels).double().mean()) > 0.9
    assert float(torch.nn.functional.cross_entropy(logits, labels)) < 0.75 * math.log(CLASSES)


def test_helpers():
    matrix = torch.randn(4, 4, dtype=torch.float64)
    matrix = matrix + matrix.T
    assert torch.equal(symmetric(upper_triangle(matrix), 4), matrix)
    assert float(kept_share(torch.tensor([2.0, 0, 0, 0], dtype=torch.float64), 0.5)) == 0.75
    assert float(kept_share(torch.tensor([0.1, 0, 0, 0], dtype=torch.float64), 0.5)) == 0.0
    assert float(kept_share(torch.tensor([0.1, 0.0], dtype=torch.float64), 5.0)) == 1.0
    assert FlatClip(1.0) == HeadDescent(noise_multiplier=1.0, steps=9).clip
