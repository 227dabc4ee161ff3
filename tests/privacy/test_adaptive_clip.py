"""The clip follows a quantile of norms, by what was released alone, and pays for it."""

import math

import pytest
import torch
from torch import nn

from dpft.errors import GuaranteeError, PlanError
from dpft.gradients.engine import Engine
from dpft.privacy.clipping import AutoClip, FlatClip, PerLayerClip
from dpft.privacy.mechanisms.adaptive_clip import RANGE, AdaptiveClip
from dpft.privacy.noise import SeededRandomness
from dpft.privacy.plan import Plan


def adaptive(**facts):
    return AdaptiveClip(**{"noise_multiplier": 1.0, "sample_rate": 0.5, "steps": 40, "clip": FlatClip(1.0), **facts})


def stepped(mechanism, batches, units=8, seed=None, **claim):
    """The clips after each step of an engine on batches of ``(n, 3)`` unit gradients."""
    model, clips = nn.Linear(3, 1, bias=False), []
    plan = Plan(mechanism=mechanism, delta=1e-3, units=units, **claim)
    with Engine(model, plan, SeededRandomness(seed or 0)) as engine:
        for rows in batches:
            if len(rows):
                engine.accumulate(model(rows).squeeze(1), claim.get("unit") and ["a", "a", "b"][: len(rows)])
            engine.release()
            clips.append(engine.clip.clip_norm)
    return clips


@pytest.mark.parametrize("share", [0.5, 0.01, 1e-4])
@pytest.mark.parametrize("z", [0.5, 1.0, 8.0])
def test_the_noise_of_gradients_is_that_of_theorem_one(z, share):
    """T18: gradients and quantile together are one Gaussian of noise multiplier z."""
    mechanism = adaptive(noise_multiplier=z, quantile_share=share)
    sigma_b, z_gradient = mechanism.tally_noise, mechanism.gradient_noise_multiplier
    assert z_gradient == pytest.approx((z**-2 - (2 * sigma_b) ** -2) ** -0.5) and z_gradient > z
    assert (2 * sigma_b) ** -2 == pytest.approx(share * z**-2)
    assert mechanism.events(1)[0].noise_multiplier == z


def test_the_figures_of_the_paper():
    """With σ_b = B/20 and B = 100, z = 1: z_Δ = (1 - 1/100)^(-1/2) (Andrew et al. 2021)."""
    mechanism = adaptive(quantile_share=0.01)
    assert mechanism.tally_noise == pytest.approx(5.0)
    assert mechanism.gradient_noise_multiplier == pytest.approx(1.00504, abs=1e-5)


def test_one_step_is_the_geometric_update_by_the_public_batch_size():
    """T8: B = 4 though three units are drawn; two of them are within the clip."""
    rows = torch.tensor([[0.5, 0, 0], [0, 1.0, 0], [0, 0, 9.0]])
    (found,) = stepped(adaptive(noise_multiplier=0.0, clip_rate=0.3, quantile=0.9), [rows])
    share = (0.5 + 0.5 - 0.5) / 4 + 0.5
    assert found == pytest.approx(math.exp(-0.3 * (share - 0.9)))


def test_a_draw_of_nobody_moves_the_clip_by_noise_alone():
    """T9."""
    (quiet,) = stepped(adaptive(noise_multiplier=0.0, quantile=0.5), [torch.zeros(0, 3)])
    (noisy,) = stepped(adaptive(quantile=0.5), [torch.zeros(0, 3)], seed=1)
    assert quiet == 1.0 and noisy != 1.0


def test_the_released_clip_has_the_noise_that_is_stated():
    mechanism = adaptive(quantile_share=0.5, steps=400, clip_rate=1.0)
    clips = [1.0, *stepped(mechanism, [torch.zeros(0, 3)] * 400)]
    tallies = torch.tensor([math.log(a / b) * 4 for a, b in zip(clips, clips[1:], strict=False)])
    assert float(tallies.std()) == pytest.approx(mechanism.tally_noise, rel=0.15)


def test_the_clip_finds_the_quantile():
    torch.manual_seed(0)
    batches = [torch.nn.functional.normalize(torch.randn(50, 3)) * torch.linspace(0.1, 10, 50)[:, None]] * 120
    mechanism = adaptive(quantile=0.8, steps=120, noise_multiplier=0.5)
    clips = stepped(mechanism, batches, units=100)
    assert clips[-1] == pytest.approx(8.0, rel=0.15)
    batches = [batch * 1e-2 for batch in batches]
    assert stepped(mechanism, batches, units=100)[-1] == pytest.approx(0.08, rel=0.15)


def test_a_unit_counts_once_by_the_norm_of_all_its_rows():
    """T16: the mean of a's rows is 0.5 long, though one of them is longer than the clip."""
    rows = torch.tensor([[3.0, 0, 0], [-2.0, 0, 0], [5.0, 0, 0]])
    mechanism = adaptive(noise_multiplier=0.0, examples_per_unit=2)
    (found,) = stepped(mechanism, [rows], unit="patient")
    assert found == pytest.approx(math.exp(-0.2 * ((0.5 - 0.5) / 4 + 0.5 - 0.5)))
    (found,) = stepped(mechanism, [rows[:2]], unit="patient")
    assert found == pytest.approx(math.exp(-0.2 * 0.5 / 4))


@pytest.mark.parametrize("stranger", [0.0, 0.3, 1.0, 1e6, math.inf, math.nan])
def test_a_unit_moves_the_tally_by_half(stranger):
    """Counting 1 instead of ±1/2 would need twice the noise; what is not finite counts nothing (T12)."""
    rows = torch.tensor([[0.5, 0, 0], [0, 9.0, 0]])
    mechanism = adaptive(noise_multiplier=0.0, clip_rate=1.0)
    batches = [rows], [torch.cat([rows, torch.tensor([[0, 0, stranger]])])]
    (without,), (beside,) = (stepped(mechanism, batch) for batch in batches)
    assert abs(math.log(without / beside)) * 4 == pytest.approx(0.5 if math.isfinite(stranger) else 0.0, abs=1e-9)


def test_the_noise_follows_the_clip_as_it_moves():
    """T6: the first step's noise is z_Δ·C, the second's z_Δ times the next C."""
    mechanism = adaptive(quantile_share=0.3, clip_rate=1.0, quantile=1.0)
    model = nn.Linear(4000, 1, bias=False)
    with Engine(model, Plan(mechanism=mechanism, delta=1e-3, units=8), SeededRandomness(3)) as engine:
        for _ in range(3):
            clip = engine.clip.clip_norm
            engine.release()
            found = float(model.weight.grad.std() * 4)
            assert found == pytest.approx(mechanism.gradient_noise_multiplier * clip, rel=0.06)
        assert engine.clip.clip_norm != 1.0


def test_a_release_that_fails_moves_no_clip(monkeypatch):
    """T22."""
    model = nn.Linear(3, 1, bias=False)
    with Engine(model, Plan(mechanism=adaptive(), delta=1e-3, units=8)) as engine:
        engine.accumulate(model(torch.ones(2, 3)).squeeze(1))
        with monkeypatch.context() as patched:
            patched.setattr(engine._guard, "release", lambda gradients: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                engine.release()
        assert engine.clip == FlatClip(1.0) and float(engine._tally) == 0.0


def test_the_clip_stays_within_the_range_of_numbers():
    mechanism = adaptive(clip=FlatClip(2.0))
    assert mechanism.next_clip(FlatClip(1e-7), 1e9, 1.0) == FlatClip(2.0 / RANGE)
    assert mechanism.next_clip(FlatClip(1e7), -1e9, 1.0) == FlatClip(2.0 * RANGE)


def test_a_checkpoint_keeps_the_clip_and_nothing_that_noise_follows_from():
    plan = Plan(mechanism=adaptive(), delta=1e-3, units=8)
    with Engine(nn.Linear(3, 1), plan) as engine:
        engine.release()
        kept, clip = engine.released_numbers, engine.clip
    assert kept == {"clip": {"rule": "FlatClip", "clip_norm": clip.clip_norm}}
    other = Engine(nn.Linear(3, 1), plan)
    other.take_up(kept)
    assert other.clip == clip
    with pytest.raises(GuaranteeError, match="holds no clip"):
        other.take_up({})
    with other:
        other.accumulate(other.capture.map.model(torch.ones(1, 3)).squeeze(1))
        with pytest.raises(GuaranteeError, match="middle of a step"):
            other.take_up(kept)
        other.discard()
        other.take_up(kept)
    plain = Engine(nn.Linear(3, 1), Plan(noise_multiplier=1.0, sample_rate=0.5, steps=1, delta=1e-3, units=8))
    assert plain.released_numbers == {}


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (dict(quantile=1.1), "quantile"),
        (dict(clip_rate=0.0), "clip_rate"),
        (dict(quantile_share=0.0), "quantile_share"),
        (dict(quantile_share=1.0), "quantile_share"),
        (dict(clip=AutoClip()), "FlatClip"),
        (dict(clip=PerLayerClip()), "FlatClip"),
    ],
)
def test_a_field_out_of_range_is_refused_by_name(change, named):
    with pytest.raises(PlanError, match=named):
        adaptive(**change)
