"""The engine's own step, attacked from inside."""

import pytest

from dpft.audit.step import audit_step, describe
from dpft.errors import PlanError
from dpft.gradients.engine import Engine
from dpft.privacy.clipping import AutoClip, FlatClip, PerLayerClip
from dpft.privacy.mechanisms import Mechanism
from dpft.privacy.mechanisms.adaptive_clip import AdaptiveClip
from dpft.privacy.plan import Plan


def plan(sigma, clip=None):
    return Plan(noise_multiplier=sigma, sample_rate=0.01, steps=10, delta=1e-5, clip=clip or FlatClip(0.7))


@pytest.mark.parametrize(("sigma", "clip"), [(0.5, None), (1.0, AutoClip(2.0)), (2.0, None)])
def test_the_step_leaks_what_it_claims(sigma, clip):
    found = audit_step(plan(sigma, clip), steps=2000)
    assert found.mu == pytest.approx(1 / sigma, abs=5 * (4 / found.trials) ** 0.5)  # five standard errors
    assert found.verdict == "consistent" and found.mu_lower_bound <= 1 / sigma
    assert found.epsilon_lower_bound < found.epsilon_claimed and "no proof" in describe(found)
    assert found.noise == pytest.approx(1.0, abs=0.03) and max(found.games.values()) <= 1 / sigma and not found.problems


def adaptive(**facts):
    clip = FlatClip(0.7)
    return Plan(
        mechanism="dp-sgd-adaptive-clip",
        noise_multiplier=1.0,
        sample_rate=0.01,
        steps=10,
        delta=1e-5,
        clip=clip,
        **facts,
    )


@pytest.mark.parametrize("shares", ["equal", "size"])
def test_clipping_by_layers_leaks_what_it_claims(shares):
    found = audit_step(plan(1.0, PerLayerClip(0.7, shares)), steps=1000)
    assert found.verdict == "consistent" and found.noise == pytest.approx(1.0, abs=0.04)


@pytest.mark.parametrize("quantile", [0.5, 0.9])
def test_a_clip_that_adapts_leaks_what_it_claims(quantile):
    found = audit_step(adaptive(quantile_share=0.5, quantile=quantile), steps=2000)
    assert found.verdict == "consistent" and not found.problems
    assert found.mu == pytest.approx(0.5**0.5, abs=0.05)  # half of what is charged; the quantile has the other half
    assert found.noise == pytest.approx(1.0, abs=0.03) and "clip" in found.games


def test_a_quantile_without_noise_is_a_violation(monkeypatch):
    monkeypatch.setattr(AdaptiveClip, "tally_noise", 1e-9)
    monkeypatch.setattr(AdaptiveClip, "gradient_noise_multiplier", 1.0)
    found = audit_step(adaptive(), steps=1000)
    assert found.verdict == "VIOLATION" and found.games["clip"] > 1


def test_a_quantile_that_is_not_charged_is_a_violation(monkeypatch):
    """T15."""
    monkeypatch.setattr(AdaptiveClip, "gradient_noise_multiplier", 1.0)
    found = audit_step(adaptive(quantile_share=0.2), steps=1000)
    assert found.verdict == "VIOLATION" and "together" in found.problems[0]


def test_a_mechanism_without_steps_is_refused_by_name():
    statistics = Plan(mechanism="statistics", noise_multiplier=1.0, steps=1, delta=1e-5)
    with pytest.raises(PlanError, match="'statistics' releases rows"):
        audit_step(statistics)


def test_noise_that_is_too_small_is_a_violation(monkeypatch):
    """T7: as if it were divided by the square root of micro-batches."""
    true = Mechanism.noise_std
    monkeypatch.setattr(Mechanism, "noise_std", lambda self, clip: true(self, clip) * 2 / 3)
    found = audit_step(plan(1.0), steps=2000)
    assert found.verdict == "VIOLATION" and found.mu == pytest.approx(1.5, rel=0.05)


def test_a_bound_on_gradients_that_does_not_hold_is_a_violation(monkeypatch):
    """T6: the noise follows a clip that the gradients do not obey."""
    monkeypatch.setattr(FlatClip, "factors", lambda self, norms: 2 * self.clip_norm / norms)
    assert audit_step(plan(1.0), steps=2000).verdict == "VIOLATION"


def test_an_empty_step_without_noise_is_a_violation(monkeypatch):
    """T9: what the main game cannot see, because its steps are never empty."""
    release = Engine.release

    def silent(self):
        empty = self._total is None
        release(self)
        for parameter in self.capture.map.model.parameters():
            if empty:
                parameter.grad.zero_()

    monkeypatch.setattr(Engine, "release", silent)
    found = audit_step(plan(1.0), steps=1000)
    assert found.verdict == "VIOLATION" and found.games["alone"] > 1 and "empty" in describe(found)


def test_too_much_noise_is_not_what_was_planned(monkeypatch):
    true = Mechanism.noise_std
    monkeypatch.setattr(Mechanism, "noise_std", lambda self, clip: true(self, clip) * 1.2)
    found = audit_step(plan(1.0), steps=1000)
    assert found.problems == [f"the released noise is {found.noise:.3f} of what is planned"]


def test_a_plan_without_noise_cannot_be_audited():
    with pytest.raises(PlanError, match="give it noise"):
        audit_step(plan(0.0))
