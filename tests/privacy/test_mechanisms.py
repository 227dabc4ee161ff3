"""One contract for every mechanism: a file in the package is tested by being there."""

import json
import math
import pickle
from dataclasses import FrozenInstanceError, replace

import numpy as np
import pytest
import torch
from torch import nn

from dpft.errors import GuaranteeError, PlanError
from dpft.gradients.engine import Engine
from dpft.privacy import composition
from dpft.privacy.clipping import FlatClip
from dpft.privacy.mechanisms import Mechanism, made, mechanisms
from dpft.privacy.mechanisms.dp_sgd import DpSgd
from dpft.privacy.mechanisms.linear_head import Rows, Sums
from dpft.privacy.noise import FreshNoise, SeededRandomness
from dpft.privacy.plan import Plan

UNITS, WIDTH = 20, 5
EVERY = [kind.example() for kind in mechanisms().values()]
every_mechanism = pytest.mark.parametrize("mechanism", EVERY, ids=lambda mechanism: mechanism.name)


class Silent(SeededRandomness):
    """No noise, so that what is released is the clipped sum over the public number."""

    def gaussians(self, n, device=None):
        yield torch.zeros(n, dtype=torch.float64)


def plan(mechanism, **claim):
    return Plan(**{"mechanism": mechanism, "delta": 1e-5, "units": UNITS, **claim})


def engine_releases(mechanism, rows, randomness):
    """``(WIDTH,)`` of one step times B, for ``(n, WIDTH)`` unit gradients."""
    model = nn.Linear(WIDTH, 1, bias=False)
    with Engine(model, plan(mechanism), randomness) as engine:
        if len(rows):
            engine.accumulate(model(rows.float()).squeeze(1))
        engine.release()
    return {"gradient": model.weight.grad[0].double() * engine.plan.expected_batch_size}


def row_releases(mechanism, rows, randomness):
    """Each statistic of ``(n, WIDTH)`` rows times the declared number; each row is a unit."""
    labels = torch.arange(len(rows)) % 3
    how = dict(number=UNITS, randomness=randomness)
    made_of = {
        "mean": mechanism.mean(rows, None, **how),
        "second moment": mechanism.second_moment(rows, None, **how),
        "class means": mechanism.class_means(rows, labels, None, classes=3, **how),
        "class counts": mechanism.class_counts(labels, None, classes=3, **how),
    }
    return {name: one.value * UNITS for name, one in made_of.items()}


class ForcedSums(Sums):
    """Each release, by its place, and its sensitivity; the head goes on from a past of zeros, whatever the data."""

    def __init__(self, mechanism, randomness):
        super().__init__(mechanism.noise_multiplier, randomness)
        self.found, self.bounds = {}, {}

    def release(self, total, shape, sensitivity, steps=1):
        # The contract's events are of single steps: here each sum is one.
        self.found[f"sum {len(self.found)}"] = value = super().release(total, shape, sensitivity).flatten()
        self.bounds[f"sum {len(self.bounds)}"] = sensitivity
        return torch.full(shape, 0.1, dtype=torch.float64) if len(shape) < 2 else torch.zeros_like(value).view(shape)


def head_sums(mechanism, rows, randomness):
    labels, members = torch.arange(len(rows)) % 3, np.arange(len(rows))[:, None]
    sums = ForcedSums(mechanism, randomness)
    mechanism.fit(Rows(rows, labels, list(members), 3), sums, UNITS)
    assert len(sums.found) == len(mechanism.sums()) and sum(mechanism.sums()) == mechanism.steps
    return sums


def head_releases(mechanism, rows, randomness):
    return head_sums(mechanism, rows, randomness).found


RELEASES = {"gradients": engine_releases, "rows": row_releases, "head": head_releases}


def released(mechanism, rows, randomness):
    return RELEASES[mechanism.releases](mechanism, rows, randomness)


def sensitivities(mechanism):
    bound = mechanism.clip.sensitivity
    if mechanism.releases == "gradients":
        return {"gradient": bound}
    if mechanism.releases == "head":
        return head_sums(mechanism, torch.zeros(0, WIDTH), Silent(0)).bounds
    return {"mean": bound, "second moment": bound**2, "class means": bound, "class counts": 1.0}


def test_the_registry_finds_the_files_by_itself():
    assert {"dp-sgd", "dp-sgd-adaptive-clip", "dp-sgd-banded", "statistics", "head-descent"} <= set(mechanisms())
    assert all(name == kind.name and issubclass(kind, Mechanism) for name, kind in mechanisms().items())
    with pytest.raises(PlanError, match=r"no mechanism 'noise'.*dp-sgd"):
        made("noise")


@every_mechanism
def test_events_compose_to_the_epsilon_of_the_plan(mechanism):
    planned = plan(mechanism)
    for steps in (1, mechanism.steps):
        composed = composition.epsilon(mechanism.events(steps), 1e-5)
        assert composed == pytest.approx(planned.epsilon_after(steps), rel=0.01)
        assert composed == pytest.approx(planned.epsilon_after(steps, exact=False))
        (event,) = mechanism.events(steps)
        assert event.count == math.ceil(steps / event.steps) and event == mechanism.events(1)[0].spanning(steps)
    assert planned.epsilon_after(0) == 0.0 and mechanism.events(0) == ()
    assert mechanism.events() == planned.events() == mechanism.events(mechanism.steps)


@every_mechanism
@pytest.mark.parametrize("adjacency", ["add-or-remove-one", "replace-one"])
def test_calibration_reaches_its_target(mechanism, adjacency):
    found = mechanism.calibrated(2.0, 1e-5, adjacency)
    assert 0.999 * 2.0 <= found.epsilon(found.steps, 1e-5, adjacency) <= 2.0
    assert replace(found, noise_multiplier=mechanism.noise_multiplier) == mechanism


@every_mechanism
def test_a_smaller_release_is_a_plan_too(mechanism):
    """T9: what a ledger prices and what is charged block by block are the same releases."""
    assert sum(mechanism.rounds) == mechanism.steps and min(mechanism.rounds) >= 1
    assert len(mechanism.rounds) == len(list(mechanism.rounds)) and mechanism.rounds[-1] == mechanism.rounds[0]
    with pytest.raises(IndexError):
        _ = mechanism.rounds[len(mechanism.rounds)]
    with pytest.raises(PlanError, match="steps"):
        replace(mechanism, steps=0)
    with pytest.raises(PlanError, match="noise"):
        replace(mechanism, noise_multiplier=-1.0)


@every_mechanism
def test_it_is_said_what_is_sampled_and_released(mechanism):
    words = mechanism.describe()
    assert words.sampler.startswith("Poisson" if mechanism.sample_rate < 1 else "none")
    for part in ("Gaussian", f"{mechanism.steps} ", f"noise multiplier {mechanism.noise_multiplier:g}"):
        assert part in words.mechanism
    claim = plan(mechanism).guarantee(1)
    assert mechanism.describe(1).mechanism in claim and words.sampler in claim
    assert "NOT PRIVATE" in plan(replace(mechanism, noise_multiplier=0.0)).guarantee()


@every_mechanism
def test_it_is_frozen_public_and_serialisable(mechanism):
    text = json.dumps(mechanism.to_dict())
    assert Mechanism.from_dict(json.loads(text)) == mechanism
    assert pickle.loads(pickle.dumps(mechanism)) == mechanism and hash(mechanism) == hash(replace(mechanism))
    with pytest.raises(FrozenInstanceError):
        mechanism.steps = 1


@every_mechanism
def test_the_sampler_is_the_one_that_is_accounted(mechanism):
    """T9."""
    sampler = mechanism.sampler(SeededRandomness(0))
    (event,) = mechanism.events(1)
    assert sampler.sample_rate == mechanism.sample_rate == event.sample_rate / event.steps
    draws = list(mechanism.batches(1000, SeededRandomness(1)))
    assert len(draws) == mechanism.steps
    drawn = sum(map(len, draws))
    expected = 1000 * mechanism.steps * mechanism.sample_rate
    assert abs(drawn - expected) <= 5 * math.sqrt(expected * (1 - mechanism.sample_rate))
    assert all((np.diff(draw) > 0).all() for draw in draws)


@every_mechanism
@pytest.mark.parametrize("units", [0, 7])
def test_the_noise_is_what_is_stated_also_on_nobody(mechanism, units):
    """T9, T7: the measured deviation accepts the stated one and rejects two thirds and three halves of it."""
    torch.manual_seed(0)
    rows = torch.randn(units, WIDTH) * 3
    silent, numbers = released(mechanism, rows, Silent(0)), {}
    for seed in range(150):
        for name, value in released(mechanism, rows, SeededRandomness(seed)).items():
            moved = value - silent[name]
            numbers.setdefault(name, []).append(
                moved[torch.triu(torch.ones_like(moved)) > 0] if moved.dim() == 2 else moved
            )
    for name, sensitivity in sensitivities(mechanism).items():
        every = torch.cat(numbers[name])
        first = getattr(mechanism, "column", (1.0,))[0]  # by which a first row of correlated noise is divided
        stated = sensitivity * mechanism.gradient_noise_multiplier / first
        allowed = 0.12 if len(every) > 150 else 0.25  # four standard errors of a single number
        assert float(every.square().mean().sqrt()) == pytest.approx(stated, rel=allowed), name


@every_mechanism
def test_no_unit_moves_what_is_released_by_more_than_its_sensitivity(mechanism):
    """The worst neighbours that are tried come close to the bound, so that the measure has power."""
    torch.manual_seed(1)
    worst = dict.fromkeys(sensitivities(mechanism), 0.0)
    others = torch.randn(6, WIDTH)
    strangers = [torch.randn(WIDTH) * scale for scale in (1e-3, 1.0, 1e6)]
    strangers += [torch.eye(WIDTH)[0] * 9.0, torch.full((WIDTH,), torch.nan), torch.full((WIDTH,), torch.inf)]
    without = released(mechanism, others, Silent(0))
    for stranger in strangers:
        beside = released(mechanism, torch.cat([others, stranger.unsqueeze(0)]), Silent(0))
        for name, value in beside.items():
            moved = (value - without[name]).triu() if name == "second moment" else value - without[name]
            assert torch.isfinite(moved).all()
            worst[name] = max(worst[name], float(moved.norm()))
    for name, sensitivity in sensitivities(mechanism).items():
        assert worst[name] <= sensitivity * (1 + 1e-5), name
        if mechanism.releases != "head":  # of these, test_linear_head.py tries the worst at each step
            assert worst[name] >= 0.9 * sensitivity, name


@every_mechanism
def test_the_parts_of_a_release_are_what_is_charged(mechanism):
    """In units of its noise a unit moves the sum by 1/z and a tally by 1/(2σ), together by what the event says."""
    (event,) = mechanism.events(1)
    tally = 0.5 / mechanism.tally_noise if mechanism.tally_noise else 0.0
    assert math.hypot(1 / mechanism.gradient_noise_multiplier, tally) == pytest.approx(1 / event.noise_multiplier)
    assert mechanism.mu == pytest.approx(1 / event.noise_multiplier)
    assert mechanism.noise_std(FlatClip(3.0)) == pytest.approx(3.0 * mechanism.gradient_noise_multiplier)


@every_mechanism
def test_noise_streams_are_never_saved(mechanism):
    """T10."""
    stream = mechanism.noise(4, SeededRandomness(0), torch.device("cpu"))
    first, second = (torch.cat([part.clone() for part in stream.following()]) for _ in range(2))
    assert first.dtype == torch.float64 and not torch.equal(first, second)
    for refused in (stream, FreshNoise(1, SeededRandomness(0))):
        with pytest.raises(TypeError, match="never saved"):
            pickle.dumps(refused)


@every_mechanism
def test_an_engine_follows_only_what_releases_gradients(mechanism):
    if mechanism.releases == "gradients":
        assert Engine(nn.Linear(2, 1), plan(mechanism)).clip == mechanism.clip
    else:
        with pytest.raises(GuaranteeError, match=mechanism.name):
            Engine(nn.Linear(2, 1), plan(mechanism))


# -- the plan ------------------------------------------------------------------------------------------------------


def test_a_plan_is_made_of_a_mechanism_or_of_its_facts():
    facts = dict(noise_multiplier=1.0, sample_rate=0.1, steps=4, clip=FlatClip(0.5))
    whole = Plan(mechanism=DpSgd(**facts), delta=1e-5)
    assert whole == Plan(**facts, delta=1e-5) == Plan(mechanism="dp-sgd", **facts, delta=1e-5)
    changed = replace(whole, noise_multiplier=2.0, units=100)
    assert changed.mechanism == DpSgd(**{**facts, "noise_multiplier": 2.0}) and changed.units == 100
    assert replace(whole, mechanism="dp-sgd", **facts) == whole
    with pytest.raises(TypeError):
        Plan(**facts, delta=1e-5, quantile=0.5)


def test_a_plan_calibrates_any_mechanism():
    how = dict(epsilon=2.0, delta=1e-5, units=1000, batch_size=100)
    adaptive = Plan.calibrate(**how, steps=20, mechanism="dp-sgd-adaptive-clip", quantile=0.8)
    assert adaptive.mechanism.quantile == 0.8 and 0.998 * 2 <= adaptive.epsilon <= 2
    assert adaptive.noise_multiplier == Plan.calibrate(**how, steps=20).noise_multiplier
    assert adaptive.noise_std > adaptive.noise_multiplier
