"""The Gaussian mechanism in closed form, from the least noise to the most, and the bound that follows for any of its
uses.

A Gaussian of sensitivity 1 and noise σ is μ-GDP with μ = 1/σ, and releases compose to ``sqrt(Σ μ²)`` (Dong et al. 2022,
Corollary 3.3): without sampling this is exact.
"""

import math

from scipy.optimize import brentq
from scipy.special import bdtrc, erfcx

FARTHEST = 37.0  # standard deviations below which e^(z²/2) stays within the range of numbers


def log_delta(z: float, mu: float) -> float:
    """log δ at ``ε = μ·z + μ²/2`` (Balle & Wang 2018, Theorem 8), without a difference of large numbers.

    With ``Φ(-z) = e^(-z²/2)·erfcx(z/√2)/2`` the factor e^ε of the theorem's second term cancels.
    """
    root = math.sqrt(2)
    return math.log(max(0.5 * (erfcx(z / root) - erfcx((z + mu) / root)), 1e-300)) - z * z / 2


def epsilon(mu: float, delta: float) -> float:
    """ε of a μ-GDP Gaussian at ``delta``, above its exact value by less than 1e-6 of it for μ above 1e-6.

    Args:
        mu: sensitivity over noise, from 0 on.
        delta: in (0, 1).
    """
    if mu == 0:
        return 0.0
    low, target = max(-mu / 2, -FARTHEST), math.log(delta)
    if log_delta(low, mu) <= target:
        return 0.0
    z = float(brentq(lambda z: log_delta(z, mu) - target, low, 60.0, xtol=1e-12))
    z += 1e-11 + 1e-14 / mu  # what the search and the difference of the two erfcx leave open
    return max(0.0, mu * (z + mu / 2)) * (1 + 1e-12)


def mu_for(target: float, delta: float) -> float:
    """The μ at which a Gaussian spends ``target`` at ``delta``."""
    return math.exp(brentq(lambda log_mu: epsilon(math.exp(log_mu), delta) - target, math.log(1e-9), math.log(1e3)))


def draws(count: int, sample_rate: float, failure: float) -> int:
    """How often a unit is drawn in ``count`` Poisson samples, at most, but for a probability of ``failure``."""
    if sample_rate == 1 or bdtrc(count - 1, count, sample_rate) > failure:
        return count
    low, high = -1, count - 1  # more than `high` draws have a probability of at most `failure`
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if _more(middle, count, sample_rate) <= failure else (middle, high)
    return high


def _more(k: int, count: int, sample_rate: float) -> float:
    return -math.expm1(count * math.log1p(-sample_rate)) if k == 0 else float(bdtrc(k, count, sample_rate))


def revealed(releases: list[tuple[float, float, int]], delta: float) -> float:
    """ε at ``delta`` of Poisson-sampled Gaussians when an attacker is told which samples the unit was in.

    An upper bound for every noise, rate and number, and close where noise is so little that the releases tell it
    anyway.

    Args:
        releases: ``(noise_multiplier, sample_rate, count)`` with noise above 0.
    """
    sampled = any(rate < 1 for _, rate, _ in releases)
    mu, failure = revealed_mu(releases, delta / 2)
    return epsilon(mu, delta - failure if sampled else delta)


def revealed_mu(releases: list[tuple[float, float, int]], failure: float) -> tuple[float, float]:
    """μ of the same, but for a probability of at most ``failure``, and that probability: 0 where nothing is sampled."""
    sampled = sum(rate < 1 for _, rate, _ in releases)
    share = failure / sampled if sampled else 0.0
    signal = math.fsum(draws(count, rate, share) / noise**2 for noise, rate, count in releases)
    return math.sqrt(signal), failure if sampled else 0.0


def delta(value: float, mu: float) -> float:
    """δ of a μ-GDP Gaussian at ε = ``value``, of either sign."""
    if mu == 0:
        return -math.expm1(min(value, 0.0))
    z = value / mu - mu / 2
    if z < -FARTHEST:
        return 1.0
    return math.exp(log_delta(z, mu)) if z < FARTHEST else 0.0
