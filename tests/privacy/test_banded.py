"""Noise that is correlated over steps: what is released, who is drawn when, and what it costs."""

import json
import math
from itertools import combinations

import dp_accounting
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import dpft
from dpft.audit.spending import audit_run
from dpft.audit.step import GAMES, WIDE, audit_step
from dpft.errors import GuaranteeError, PlanError, RecipeError
from dpft.gradients.engine import Engine
from dpft.ledger import Ledger
from dpft.privacy.events import Event, merged
from dpft.privacy.mechanisms.banded import BandedDpSgd
from dpft.privacy.noise import BandedNoise, FreshNoise, SeededRandomness
from dpft.privacy.plan import Plan
from dpft.recipe import Recipe
from dpft.subset import Subset
from dpft.tasks import LabelledTask
from dpft.workflows.train import train
from tests.support.recipes import changed
from tests.support.zoo import Case


def banded(bands=3, steps=10, sample_rate=0.1, **facts):
    return BandedDpSgd(**{"noise_multiplier": 1.0, "sample_rate": sample_rate, "steps": steps, "bands": bands, **facts})


def plan(bands=3, units=30, **facts):
    return Plan(mechanism=banded(bands, **facts), delta=1e-3, units=units)


def matrix(bands, steps):
    """C, from its definition."""
    column = banded(bands, sample_rate=0.01).column
    return np.array([[column[i - j] if 0 <= i - j < bands else 0.0 for j in range(steps)] for i in range(steps)])


def rows_of(stream, steps):
    return torch.stack([torch.cat([part.clone() for part in stream.following()]) for _ in range(steps)]).numpy()


# -- the matrix and the noise --------------------------------------------------------------------------------------


@given(bands=st.integers(1, 40), steps=st.integers(1, 60))
@settings(max_examples=40, deadline=None)
def test_the_matrix_is_banded_and_no_column_is_longer_than_one(bands, steps):
    c = matrix(bands, steps)
    lengths = np.linalg.norm(c, axis=0)
    assert np.allclose(np.tril(c), c) and np.allclose(np.triu(c, 1 - bands), c)
    assert (lengths <= 1 + 1e-12).all() and np.allclose(lengths[: max(0, steps - bands + 1)], 1)
    whole = np.array(banded(bands, sample_rate=0.01).column)
    assert np.allclose(np.convolve(whole, whole)[:bands], whole[0] ** 2)  # its square is 1/(1 - x)


@given(data=st.data(), bands=st.integers(1, 6), steps=st.integers(1, 24))
@settings(max_examples=60, deadline=None)
def test_a_unit_moves_what_is_released_by_what_is_charged(data, bands, steps):
    """Whatever turns it takes, of each round it moves one by the clip at most, and rounds share no row."""
    c, group = matrix(bands, steps), data.draw(st.integers(0, bands - 1))
    taken = data.draw(st.sets(st.sampled_from([t for t in range(steps) if t % bands == group] or [0])))
    taken = {t for t in taken if t % bands == group}
    gradients = {t: np.array(data.draw(st.lists(st.floats(-1, 1), min_size=3, max_size=3))) for t in taken}
    gradients = {t: g / max(1.0, np.linalg.norm(g)) for t, g in gradients.items()}
    moved = {t: np.outer(c[:, t], g) for t, g in gradients.items()}
    assert all(np.linalg.norm(m) <= 1 + 1e-9 for m in moved.values())
    assert all(not (moved[s] * moved[t]).any() for s, t in combinations(taken, 2))
    whole = np.linalg.norm(sum(moved.values(), np.zeros((steps, 3))))
    charged = sum(event.count for event in banded(bands, steps, 1 / bands).events())
    assert whole <= math.sqrt(charged) * (1 + 1e-9) and len(taken) <= charged


@pytest.mark.parametrize("bands", [1, 2, 3, 7])
def test_noise_is_that_of_the_inverse_matrix(bands, monkeypatch):
    monkeypatch.setattr("dpft.privacy.noise._CHUNK", 4)  # so that a row has several parts
    size, steps = 11, 9
    column = banded(bands).column
    z = rows_of(FreshNoise(size, SeededRandomness(1)), steps)
    y = rows_of(BandedNoise(size, SeededRandomness(1), torch.device("cpu"), column), steps)
    assert np.allclose(y, np.linalg.solve(matrix(bands, steps), z), rtol=0, atol=1e-12)
    assert (y == z).all() == (bands == 1)


def test_a_row_that_was_made_in_part_ends_the_stream():
    stream = BandedNoise(4, SeededRandomness(0), torch.device("cpu"), banded(2).column)
    next(stream.following())
    with pytest.raises(GuaranteeError, match="in part.*another stream"):
        next(stream.following())


def test_one_band_is_dp_sgd_bit_for_bit():
    torch.manual_seed(0)
    rows, weights = torch.randn(3, 4, 5), []
    facts = dict(noise_multiplier=1.0, sample_rate=0.1, steps=3)
    one, other = BandedDpSgd(bands=1, **facts), Plan(**facts, delta=1e-3).mechanism
    for mechanism in (one, other):
        model = nn.Linear(5, 1, bias=False)
        with Engine(model, Plan(mechanism=mechanism, delta=1e-3, units=30), SeededRandomness(7)) as engine:
            for step in rows:
                engine.accumulate(model(step).squeeze(1))
                engine.release()
                weights.append(model.weight.grad.clone())
    assert torch.equal(torch.cat(weights[:3]), torch.cat(weights[3:]))
    assert one.events() == other.events() and one.describe() == other.describe()
    assert one.running_noise == pytest.approx(math.sqrt((3 + 1) / 2))


def test_an_engine_releases_rows_of_the_inverse_times_the_clip():
    mechanism, width = banded(3, 6, clip=dpft.FlatClip(0.5)), 5
    model, found = nn.Linear(width, 1, bias=False), []
    with Engine(model, plan(3, steps=6, clip=dpft.FlatClip(0.5)), SeededRandomness(3)) as engine:
        for _ in range(6):
            engine.release()
            found.append(model.weight.grad[0].double().numpy() * engine.plan.expected_batch_size)
    z = rows_of(FreshNoise(width, SeededRandomness(3)), 6)
    # Chance between the steps is drawn by keys of its own.
    assert np.allclose(found, 0.5 * np.linalg.solve(matrix(3, 6), z), atol=1e-5)
    assert np.allclose(mechanism.evidence(np.array(found)), (matrix(3, 6).T @ (0.5 * z))[:4], atol=1e-5)


def test_a_release_that_failed_begins_another_stream(monkeypatch):
    """Its row is missing, and the groups go on in turn: with the rest, units of one group would be too close."""
    model = nn.Linear(5, 1, bias=False)
    with Engine(model, plan(3), SeededRandomness(3)) as engine:
        engine.release()
        before = engine._noise
        with monkeypatch.context() as patched:
            patched.setattr(engine, "_close_open_unit", lambda: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                engine.release()
        engine.release()
        assert engine.steps_released == 3 and engine._noise is not before


# -- who is drawn ------------------------------------------------------------------------------------------------


def test_a_step_takes_its_group_alone_and_a_unit_once_in_a_round():
    """T9."""
    mechanism = banded(4, steps=40, sample_rate=0.2)
    drawn = np.zeros((40, 300), dtype=bool)
    for step, units in enumerate(mechanism.batches(300, SeededRandomness(0))):
        drawn[step, units] = True
    taken = [set(np.flatnonzero(drawn[group::4].any(axis=0))) for group in range(4)]
    assert all(not one & other for one, other in combinations(taken, 2))
    assert all(drawn[start : start + 4].sum(axis=0).max() <= 1 for start in range(37))  # wherever four steps begin
    sizes = [len(one) for one in taken]
    assert sum(sizes) == 300 and min(sizes) > 50  # at rate 0.8 in ten turns each unit was drawn
    rate, allowed = drawn.mean(), 5 * math.sqrt(0.8 * 0.2 / 3000) / 4
    assert rate == pytest.approx(0.2, abs=allowed)


def test_another_unit_moves_nobody():
    """Groups are drawn unit by unit, from one stream: those of the first units are the same beside one more."""
    first, second = (list(banded(4, steps=1, sample_rate=0.25).batches(n, SeededRandomness(5)))[0] for n in (99, 100))
    assert set(first) == set(second) - {99}


def test_whose_turn_it_is_must_be_known():
    sampler = banded().sampler(SeededRandomness(0))
    with pytest.raises(GuaranteeError, match="whose turn"):
        sampler.units(10)
    released = [0]
    sampler = sampler.following(lambda: released[0])
    sampler.units(10)
    with pytest.raises(GuaranteeError, match="11 units.*10 were put into groups"):
        sampler.units(11)


# -- what it costs -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("bands", "steps", "rounds"), [(4, 100, 25), (4, 101, 26), (7, 3, 1), (1, 5, 5)])
def test_a_run_is_as_many_sampled_gaussians_as_it_has_rounds(bands, steps, rounds):
    """T18: composed by dp-accounting from the theorem's own event."""
    mechanism = banded(bands, steps, 0.02, noise_multiplier=0.9)
    assert mechanism.events() == (Event(rounds, 0.9, bands * 0.02, steps=bands),)
    assert len(mechanism.rounds) == rounds and sum(mechanism.rounds) == steps and max(mechanism.rounds[:]) <= bands
    if steps != 101:
        return
    known = dp_accounting.SelfComposedDpEvent(
        dp_accounting.PoissonSampledDpEvent(bands * 0.02, dp_accounting.GaussianDpEvent(0.9)), rounds
    )
    accountant = dp_accounting.pld.PLDAccountant().compose(known)
    assert mechanism.epsilon(steps, 1e-5, exact=False) == pytest.approx(accountant.get_epsilon(1e-5), rel=2e-3)


def test_an_event_keeps_how_many_steps_it_spans():
    event = Event(2, 1.0, 0.4, steps=4)
    assert event.to_dict()["steps"] == 4 and Event.from_dict(json.loads(json.dumps(event.to_dict()))) == event
    assert "steps" not in Event(2, 1.0, 0.4).to_dict()
    assert merged([event, Event(1, 1.0, 0.4), event]) == (Event(1, 1.0, 0.4), event.times(4))
    assert [event.spanning(n).count for n in (0, 1, 4, 5)] == [0, 1, 1, 2]
    for wrong in (0, 2.0):
        with pytest.raises(PlanError, match="steps"):
            Event.from_dict({**event.to_dict(), "steps": wrong})


def test_too_many_bands_are_refused():
    with pytest.raises(PlanError, match=r"bands is 6 and sample_rate 0.2.*1.2"):
        banded(6, sample_rate=0.2)
    with pytest.raises(PlanError, match="bands is 0"):
        banded(0)
    assert banded(49, sample_rate=1 / 49).events()[0].sample_rate == pytest.approx(1)


def test_a_plan_is_calibrated():
    how = dict(delta=1e-6, units=70_000, batch_size=512, mechanism="dp-sgd-banded", bands=4)
    found = Plan.calibrate(epsilon=8, steps=1094, **how)
    assert (
        7.99 <= found.epsilon <= 8
        and found.noise_multiplier > Plan.calibrate(epsilon=8, steps=1094, **{**how, "bands": 1}).noise_multiplier
    )
    most = Plan.calibrate(epsilon=8, noise_multiplier=found.noise_multiplier, **how)
    assert most.steps % 4 == 0 and most.steps >= 1094 and most.epsilon <= 8


TABLE = [  # docs/guides/plans.md: bands, and the noise on the sum of all steps beside DP-SGD's at the same ε and δ
    (8, 512, {2: 0.82, 4: 0.70, 8: 0.61, 16: 0.55, 32: 0.52}),
    (8, 8192, {2: 0.93, 4: 0.90, 8: 0.89}),
    (3, 512, {8: 0.74}),
    (1, 512, {8: 1.03}),
    (1, 8192, {8: 1.30}),
]


@pytest.mark.parametrize(("epsilon", "batch_size", "expected"), TABLE)
def test_when_bands_pay(epsilon, batch_size, expected):
    """70,000 units, 8 passes, δ = 1e-6."""

    def noise(bands):
        how = dict(units=70_000, batch_size=batch_size, steps=round(8 * 70_000 / batch_size), delta=1e-6)
        mechanism = Plan.calibrate(epsilon=epsilon, mechanism="dp-sgd-banded", bands=bands, **how).mechanism
        return mechanism.running_noise

    alone = noise(1)
    assert {bands: noise(bands) / alone for bands in expected} == pytest.approx(expected, abs=0.006)


@pytest.mark.parametrize(("bands", "steps"), [(1, 5), (3, 10), (4, 4)])
def test_the_running_noise_is_that_of_the_inverse_matrix(bands, steps):
    sums = np.tril(np.ones((steps, steps))) @ np.linalg.inv(matrix(bands, steps))
    known = 1.5 * math.sqrt((sums**2).sum() / steps)
    assert banded(bands, steps, noise_multiplier=1.5).running_noise == pytest.approx(known)


# -- the audit ---------------------------------------------------------------------------------------------------


def test_the_audit_finds_what_is_claimed(monkeypatch):
    """The attacker undoes the correlation, and sees each canary by all rows that it shows in."""
    narrow = {name: game for name, game in GAMES.items() if game.width < WIDE}  # parts of a row have a test above
    monkeypatch.setattr("dpft.audit.step.GAMES", narrow)
    found = audit_step(plan(4, steps=100, noise_multiplier=0.8), steps=600)
    assert found.verdict == "consistent" and not found.problems and found.games
    assert found.mu == pytest.approx(1 / 0.8, abs=5 * (4 / found.trials) ** 0.5)
    assert found.noise == pytest.approx(1.0, abs=5 / (2 * found.trials) ** 0.5)


def test_the_audit_finds_a_matrix_that_is_too_long(monkeypatch):
    """Its noise is too small by as much, which the main game finds."""
    column = banded(4).column
    monkeypatch.setattr(BandedDpSgd, "noise", lambda self, *where: BandedNoise(*where, [1.3 * c for c in column]))
    monkeypatch.setattr("dpft.audit.step.GAMES", {})
    found = audit_step(plan(4, steps=100), steps=300)
    assert found.verdict == "VIOLATION" and found.noise == pytest.approx(1 / 1.3, abs=0.1)


# -- a run -------------------------------------------------------------------------------------------------------


@pytest.fixture
def session(tmp_path):
    def make(folder="run", planned=None, **fields):
        case = Case("bert")
        model = Subset("head").apply(case.model)
        planned = planned or plan(3, units=30, steps=11)
        return dpft.Session(
            model, planned, LabelledTask(case.batch), case.examples * 10, tmp_path / folder, token_budget=64, **fields
        )

    return make


def steps_of(session, most, opened=None):
    with opened or session:
        for draw in session.draws():
            session.step(draw)
            if session.engine.steps_released == most:
                break


def test_a_run_goes_on_in_a_new_round_and_the_ledger_pays_by_rounds(session, tmp_path):
    """Noise is kept nowhere, so the round in which a run stopped is charged whole and ends there (decision 4)."""
    account = Ledger(str(tmp_path / "ledger.db")).create("notes", epsilon=500, delta=1e-3)
    first = session(ledger=account)
    steps_of(first, 4)
    first.save_checkpoint(tmp_path / "run" / "checkpoint-4")
    (run,) = account.record.runs.values()
    assert first.releases.charged == 4 and run.steps == 2
    assert first.guarantee == first.plan.guarantee(4)
    second = session(ledger=account)
    with second.open(tmp_path / "run" / "checkpoint-4"):
        second.load_checkpoint(tmp_path / "run" / "checkpoint-4")
        assert second.engine.steps_released == 6  # two of the round are lost
        for draw in second.draws():
            second.step(draw)
    assert second.releases.charged == 11 and second.guarantee == second.plan.guarantee()
    (run,) = account.record.runs.values()
    assert run.steps == 4 and run.events == second.plan.events()


def test_a_budget_that_ends_pays_for_whole_rounds(session, tmp_path):
    whole = plan(3, units=30, steps=60)
    account = Ledger(str(tmp_path / "ledger.db")).create("notes", epsilon=1.01 * whole.epsilon, delta=1e-3)
    assert account.most_steps(whole) == 60
    first = session(planned=whole, ledger=account)
    with first:
        for draw in first.draws():
            first.step(draw)
            if first.engine.steps_released == 2:  # somebody else spends of the same account
                account.open(plan(3, units=30, steps=36)).charge(12)
    assert 2 < first.engine.steps_released < 60 and first.engine.steps_released % 3 == 0 and "notes" in first.halted
    assert account.spent() <= 1.01 * whole.epsilon


def test_a_batch_that_was_drawn_for_another_step_is_refused(session):
    one = session()
    with one:
        early = [one.batches().draw() for _ in range(20)]
        full = [draw for draw in early if draw._groups]
        one.step(full[0])
        with pytest.raises(GuaranteeError, match="drawn when 0 steps were released, and is used after 1"):
            one.step(full[1])
        assert one.engine.steps_released == 1


def test_a_recipe_trains_by_bands(recipe, tmp_path):
    recipe["privacy"] |= {"bands": 3, "steps": 7}
    folder = train(Recipe.parse(recipe), tmp_path / "run")
    run = json.loads((folder / "run.json").read_text())
    assert run["epsilon"] <= 3 and run["released_steps"] == 7
    assert [(event["count"], event["sample_rate"], event["steps"]) for event in run["events"]] == [(3, 0.75, 3)]
    assert "one of 3 groups" in run["guarantee"] and "correlated over 3 steps" in (folder / "card.md").read_text()
    assert audit_run(folder).problems == []
    event = Event.from_dict(json.loads((folder / "releases.json").read_text())["mechanism"]["event"])
    assert event == Event(1, run["events"][0]["noise_multiplier"], 0.75, steps=3)


@pytest.mark.parametrize(
    ("tables", "message"),
    [
        ({"clipping": "adaptive"}, "moves the clip from step to step"),
        ({"plan": "auto", "batch_size": None, "steps": None}, "privacy.bands is set, and privacy.plan"),
        ({"method": "head-descent", "batch_size": None}, "privacy.bands is set, which privacy.method"),
        ({"bands": 11}, "privacy.bands is 11.*lower bands to 10 at most"),
    ],
)
def test_bands_are_refused_where_they_make_no_sense(tables, message):
    good = changed("subset", "head" if "method" in tables else "lora")
    privacy = {**good["privacy"], "bands": 4, **tables}
    tables = {**good, "privacy": {key: value for key, value in privacy.items() if value is not None}}
    with pytest.raises(RecipeError, match=message):
        Recipe.parse(tables)
    baseline = Recipe.parse(changed("privacy.bands", 4)).without_privacy()
    assert baseline.privacy.bands is None and baseline.plan().mechanism.name == "dp-sgd"
