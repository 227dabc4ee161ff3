"""The sums of a head, attacked from inside."""

import math

import pytest
import torch

from dpft.audit import head_step
from dpft.audit.step import audit_step, describe
from dpft.errors import PlanError
from dpft.privacy.mechanisms import mechanisms
from dpft.privacy.mechanisms.linear_head import Centre, Sums
from dpft.privacy.noise import Randomness
from dpft.privacy.plan import Plan

HEADS = sorted(name for name, kind in mechanisms().items() if kind.releases == "head")
every_head = pytest.mark.parametrize("name", HEADS)


def plan(name, sigma=2.0, steps=20):
    return Plan(mechanism=name, noise_multiplier=sigma, steps=steps, delta=1e-5)


@every_head
def test_a_run_leaks_what_it_claims(name):
    found = audit_step(plan(name), steps=15_000)
    assert found.verdict == "consistent" and not found.problems
    assert found.mu_claimed == pytest.approx(2.0) and found.mu_lower_bound <= found.mu_claimed
    assert found.mu == pytest.approx(found.mu_claimed, rel=0.25)
    assert found.noise == pytest.approx(1.0, abs=0.05) and set(found.games) == set(head_step.GAMES)
    assert "One run" in describe(found) and "runs" in describe(found)


@pytest.mark.parametrize("sigma", [0.1, 500.0])
def test_the_noise_is_measured_as_it_is_planned(sigma):
    mechanism = plan("head-prototypes", sigma).mechanism
    noise, problems = head_step.noise_of([head_step.play(mechanism, head_step.GAMES["long"], False) for _ in range(30)])
    assert noise == pytest.approx(1.0, abs=0.1) and not problems


@every_head
@pytest.mark.parametrize("game", sorted(head_step.GAMES))
def test_a_canary_leaks_nearly_all_that_is_claimed_and_no_more(name, game):
    mechanism = plan(name, sigma=math.sqrt(20) / 2).mechanism
    leaks = [head_step.play(mechanism, head_step.GAMES[game], there).leak for there in [True, False] * 5]
    assert max(leaks) <= 2.0 * (1 + 1e-5)
    assert game != "long" or max(leaks) > 1.8


def test_a_plan_without_noise_cannot_be_audited():
    with pytest.raises(PlanError, match="give it noise"):
        audit_step(plan(HEADS[0], sigma=0.0))


@every_head
def test_features_that_are_not_cut_are_a_violation(name, monkeypatch):
    """T6."""
    whole = lambda rows, length: torch.where(rows.isfinite(), rows, 0.0)
    monkeypatch.setattr("dpft.privacy.mechanisms.linear_head.bounded", whole)
    assert audit_step(plan(name), steps=1000).verdict == "VIOLATION"


@every_head
def test_too_little_noise_is_a_violation(name, monkeypatch):
    """T7."""
    true = Randomness.gaussian
    monkeypatch.setattr(Randomness, "gaussian", lambda self, n: true(self, n) * 2 / 3)
    found = audit_step(plan(name), steps=1000)
    assert found.verdict == "VIOLATION" and found.noise == pytest.approx(2 / 3, rel=0.1)


@every_head
def test_noise_that_numbers_share_is_a_violation(name, monkeypatch):
    """T10: one draw for all classes."""
    true = Randomness.gaussian
    monkeypatch.setattr(Randomness, "gaussian", lambda self, n: true(self, 1).expand(n))
    found = audit_step(plan(name), steps=1000)
    assert found.verdict == "VIOLATION" and "two numbers of a release have noise in common" in found.problems


def test_noise_that_steps_share_is_a_violation(monkeypatch):
    """T10."""
    true, drawn = Sums.release, {}

    def release(self, total, shape, sensitivity, steps=1):
        gaussian = self._randomness.gaussian
        self._randomness.gaussian = lambda n: drawn.setdefault((id(self), n), gaussian(n))
        return true(self, total, shape, sensitivity, steps)

    monkeypatch.setattr(Sums, "release", release)
    found = audit_step(plan("head-descent"), steps=1000)
    assert found.verdict == "VIOLATION" and "two releases have noise in common" in found.problems


@every_head
def test_a_feature_that_is_not_finite_is_a_violation(name, monkeypatch):
    """T12."""
    scaled = lambda rows, length: rows * (length / rows.norm(dim=1, keepdim=True)).clamp_max(1.0)
    monkeypatch.setattr("dpft.privacy.mechanisms.linear_head.bounded", scaled)
    found = audit_step(plan(name), steps=1000)
    assert found.verdict == "VIOLATION" and any("not finite" in problem for problem in found.problems)


def test_a_unit_of_many_rows_that_counts_many_times_is_a_violation(monkeypatch):
    """T16."""
    ones = property(lambda self: torch.ones(len(self.features), 1, dtype=torch.float64))
    monkeypatch.setattr("dpft.privacy.mechanisms.linear_head.Rows.weights", ones)
    found = audit_step(plan("head-prototypes"), steps=1000)
    assert found.verdict == "VIOLATION" and any("many rows moves" in problem for problem in found.problems)


def test_a_centre_without_noise_is_a_violation(monkeypatch):
    """T7: what a mechanism takes from the data without a release, an attacker reads from what follows."""
    true = Centre.of
    monkeypatch.setattr(Centre, "of", lambda self, features: true(self, features) * (1 + 20 * (len(features) > 9)))
    assert audit_step(plan("head-least-squares"), steps=1000).verdict == "VIOLATION"
