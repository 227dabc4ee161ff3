"""ε of hundreds of different releases together, in a second: their privacy losses are added by one Fourier transform
each.

The privacy loss of a release is put on a grid by connecting the dots of its hockey-stick curve
(Doroshenko et al. 2022, section 4), which can only overstate it; the losses of all releases are added on that grid by
the fast Fourier transform (Koskela et al. 2020), in a window outside of which Chernoff's bound leaves next to nothing,
and that remainder is added to δ.

Before the transform each distribution is tilted: a loss x gets the weight e^(λx), and its total becomes 1 again. A sum
of losses has the product of the weights, so that the tilt is taken back at the end. At the right λ most of the tilted
mass lies near ε, and rounding is relative to δ, however small, and not to 1. What rounding may still do is bounded and
added to δ (:func:`_rounding`).
"""

import math
from dataclasses import dataclass, field
from functools import lru_cache, partial

import numpy as np
from numpy.typing import NDArray
from scipy.fft import irfft, next_fast_len, rfft
from scipy.special import ndtr, ndtri

from dpft.privacy.events import Event, Stated

Floats = NDArray[np.floating]

GRIDS = (1e-2, 3e-3, 1e-3, 3e-4, 1e-4, 3e-5, 1e-5, 3e-6, 1e-6, 3e-7, 1e-7)
AGREEMENT = 1e-3  # share of ε that a grid may overstate
REMAINS = 0.1  # of the last change, when a grid is refined: its error falls with its square
TAIL = 1e-4  # share of δ that the window, and each release's range, may leave outside
WRAPPED = 1e-7  # share of the tilted mass that may lie below the window, from where it counts as a larger loss
WIDER = 3.0  # than a window without tilt: then the tilt is too strong
LONGEST = 1 << 22  # numbers in a transform
LARGEST = 600.0  # of a privacy loss: beyond it nothing is protected, and e to its power overflows
UNIT = 2.0**-53  # relative error of one operation in float64
LAYER = 6.0  # such errors of a number in each layer of the transform: a complex product, its factor and a sum
MASS = 16.0  # such errors of a mass: the curve, its slopes, the tilt


def epsilon(events: tuple[Event, ...], delta: float) -> float:
    """ε at ``delta`` of all ``events`` together when a unit is added or removed, or zeroed out: an upper bound.

    Infinite where ε is so large that numbers overflow, or where ``delta`` is spent by failures alone.
    """
    removing = _refined(events, delta, adding=False)
    return max(removing, _refined(events, delta, adding=True, enough=removing))


def _refined(events: tuple[Event, ...], delta: float, *, adding: bool, enough: float = 0.0) -> float:
    """ε on a grid that is fine enough, or that shows it to be at most ``enough``."""
    best, usual = math.inf, spread(events)
    each = [event.figures for event in events]
    widest = max(figures.epsilon if isinstance(figures, Stated) else 1 / figures.noise_multiplier for figures in each)
    for grid in [grid for grid in GRIDS if grid <= widest] or GRIDS[-1:]:
        finer = epsilon_on(events, delta, grid, adding)
        if math.isinf(finer) and (grid <= usual or best < math.inf):
            return best
        if finer <= enough or (finer < math.inf and REMAINS * (best - finer) <= AGREEMENT * finer):
            return min(best, finer)
        best = min(best, finer)
    return best


def spread(events: tuple[Event, ...]) -> float:
    """About the standard deviation of one release's loss, on average: a grid that is coarser overstates all of it."""
    variance = 0.0
    for event in events:
        figures = event.figures
        if isinstance(figures, Stated):
            one = figures.epsilon**2
        else:
            signal = float(figures.noise_multiplier**-2)
            one = min(signal, figures.sample_rate**2 * math.expm1(min(signal, 700.0)))
        variance += event.count * one
    return math.sqrt(variance / sum(event.count for event in events))


@dataclass(frozen=True, eq=False)
class _Loss:
    """A privacy loss on the grid: probability ``masses[i]`` of ``(first + i) · grid``, and ``infinite`` of infinity."""

    first: int
    masses: Floats
    infinite: float
    grid: float
    known: dict[float, float] = field(default_factory=dict)

    @property
    def losses(self) -> Floats:
        return (self.first + np.arange(len(self.masses))) * self.grid

    @property
    def variance(self) -> float:
        losses, total = self.losses, self.masses.sum()
        mean = (self.masses @ losses) / total
        return float(self.masses @ (losses - mean) ** 2 / total)

    def log_moment(self, order: float) -> float:
        """``log E[e^(order · loss)]`` without infinity, or a little more."""
        if order not in self.known:
            exponents = order * self.losses
            peak = float(max(exponents[0], exponents[-1]))
            self.known[order] = peak + math.log(float(self.masses @ np.exp(exponents - peak)) or 1e-300)
        return self.known[order]

    def tilted(self, order: float) -> Floats:
        with np.errstate(under="ignore"):
            tilted: Floats = self.masses * np.exp(order * self.losses - self.log_moment(order))
        return tilted


@lru_cache(maxsize=4096)
def _loss(event: Event, grid: float, adding: bool, reach: int) -> _Loss | None:
    """One release's loss, when a unit is removed or, ``adding``, when it is added; None if the grid is too fine for so
    wide a loss."""
    figures = event.figures
    if isinstance(figures, Stated):
        # Of all mechanisms with this (ε, δ), the randomised response that fails with δ loses most
        # (Kairouz et al. 2015).
        low, high = -figures.epsilon, figures.epsilon
        curve = partial(_randomised_response, epsilon=figures.epsilon, delta=figures.delta)
    else:
        sigma, q = figures
        least, largest = _mixture(-reach * sigma, sigma, q), _mixture(1 + reach * sigma, sigma, q)
        low, high = (-largest, -least) if adding else (least, largest)
        curve = partial(_hockey_stick, sigma=sigma, q=q, adding=adding)
    low, high = max(low, -LARGEST), min(high, LARGEST)  # what lies below counts as `low`, and above as infinite
    if high - low > LONGEST * grid:
        return None
    first = math.floor(low / grid)
    losses = np.arange(first, max(first + 1, math.ceil(high / grid)) + 1) * grid
    ratios, deltas = np.exp(losses), curve(losses)
    # Between grid points δ is taken to be linear in e^ε; its slopes' differences are the masses, weighted by e^-ε.
    steps = ratios[:-1] * math.expm1(grid)
    slopes = np.concatenate([[(deltas[0] - 1) / ratios[0]], np.diff(deltas) / steps, [0.0]])
    masses = np.maximum(np.diff(slopes), 0) * ratios
    return _Loss(first, masses, float(deltas[-1]), grid)


def _randomised_response(losses: Floats, epsilon: float, delta: float) -> Floats:
    """δ(ε) of randomised response on one bit that shows it with probability ``delta``."""
    truth = (1 - delta) / (1 + math.exp(-epsilon))
    above, below = 1 - np.exp(losses - epsilon), 1 - np.exp(losses + epsilon)
    shown: Floats = delta + truth * above.clip(0) + (1 - delta - truth) * below.clip(0)
    return shown


def _mixture(x: float, sigma: float, q: float) -> float:
    """The loss at outcome ``x``: log of N(1, σ²)'s mixture with N(0, σ²) over N(0, σ²)."""
    exponent = (2 * x - 1) / (2 * sigma**2)
    return exponent + math.log(q) if q == 1 or exponent > 700 else math.log1p(q * math.expm1(exponent))


def _hockey_stick(losses: Floats, sigma: float, q: float, adding: bool) -> Floats:
    """δ(ε) of one release in closed form (Balle & Wang 2018, with the mixture's threshold), at ε = ``losses``."""
    shift = np.expm1(-losses if adding else losses)
    inside = shift + q  # where the loss exceeds ε: beyond a threshold on the outcome, if this is positive
    with np.errstate(divide="ignore", invalid="ignore"):
        threshold = sigma**2 * np.log1p(np.maximum(shift / q, -1)) + 0.5
    if adding:
        below, below_far = ndtr(threshold / sigma), ndtr((threshold - 1) / sigma)  # of N(0, σ²) and N(1, σ²) below it
        return np.where(inside > 0, below - np.exp(losses) * ((1 - q) * below + q * below_far), 0.0).clip(0)
    above, above_far = ndtr(-threshold / sigma), ndtr((1 - threshold) / sigma)
    return np.where(inside > 0, q * above_far - inside * above, -shift).clip(0)


def epsilon_on(events: tuple[Event, ...], delta: float, grid: float, adding: bool) -> float:
    """ε at ``delta`` on one grid, an upper bound on each."""
    releases = sum(event.count for event in events)
    reach = max(9, math.ceil(-float(ndtri(TAIL * delta / releases))))
    losses = ((event.count, _loss(event.one, grid, adding, reach)) for event in events)
    counted = [(count, loss) for count, loss in losses if loss is not None]
    if len(counted) < len(events):
        return math.inf
    infinite = -math.expm1(sum(n * math.log1p(-min(loss.infinite, 1 - 1e-16)) for n, loss in counted))
    left = delta - infinite - TAIL * delta
    if left <= 0:
        return math.inf
    return _composed_at(counted, delta, left, grid)


@dataclass(frozen=True, eq=False)
class _Tilt:
    """The weight e^(order · loss) under which losses are added; ``log_moment`` is log of the sum's total weight."""

    order: float
    log_moment: float

    @property
    def log_peak(self) -> float:
        """log of the largest (1 - e^-x) · e^(-order·x) over x > 0: what of a mass counts for δ
        (Canonne et al. 2020)."""
        return -math.log1p(self.order) - self.order * math.log1p(1 / self.order)

    def bound(self, delta: float) -> float:
        """ε at ``delta`` by this moment alone, as in Rényi DP."""
        return (self.log_moment + self.log_peak - math.log(delta)) / self.order


class _Moments:
    """log moments of the sum, by order."""

    def __init__(self, counted: list[tuple[int, _Loss]]) -> None:
        self.counted = counted

    def at(self, order: float) -> float:
        return sum(n * loss.log_moment(order) for n, loss in self.counted)

    def best(self, delta: float) -> _Tilt:
        """The tilt that bounds ε most closely, to a factor of 1.2."""
        variance = sum(n * loss.variance for n, loss in self.counted) or 1e-300
        power = round(math.log2(2 * math.log(1 / delta) / variance) / 2)  # as if the sum were normal
        best = self.tilt(2.0**power)
        for factor in (2, 0.5, 1.4, 0.7, 1.2, 0.85):
            while (other := self.tilt(best.order * factor)).bound(delta) < best.bound(delta):
                best = other
        return best

    def tilt(self, order: float) -> _Tilt:
        return _Tilt(order, self.at(order))

    def tails(self, tilt: _Tilt, delta: float) -> tuple[float, float, float]:
        """The losses beyond which lie: below ``WRAPPED`` of the tilted mass, above as much, above ``TAIL * delta`` of
        all."""
        order, rest = tilt.order, tilt.log_moment + math.log(WRAPPED)
        low = max((rest - self.at(order * (1 - f))) / (order * f) for f in (0.5, 1, 2))
        high = min((self.at(order * (1 + f)) - rest) / (order * f) for f in (0.25, 0.5, 1))
        return low, high, (tilt.log_moment - math.log(TAIL * delta)) / order


def _composed_at(counted: list[tuple[int, _Loss]], delta: float, left: float, grid: float) -> float:
    """ε of the sum of all losses, each ``n`` times, where ``left`` of ``delta`` may be spent."""
    moments = _Moments(counted)
    tilt = moments.best(delta)
    _, high, enough = moments.tails(tilt, delta)
    while (
        high > WIDER * enough and tilt.order > 1e-3
    ):  # rare large losses outweigh all others at once: a little less, then
        tilt = moments.tilt(tilt.order * 0.85)
        high = moments.tails(tilt, delta)[1]
    while (found := _under(tilt, moments, delta, left, grid)) is None:
        tilt = moments.tilt(tilt.order / 2)
    return found


def _under(tilt: _Tilt, moments: _Moments, delta: float, left: float, grid: float) -> float | None:
    """The same by one tilt; None where it moves the losses away from ε."""
    low, *highs = moments.tails(tilt, delta)
    high = max(highs)
    if high > LARGEST or high - low > min(LARGEST, LONGEST * grid):
        return math.inf
    low, high = math.floor(low / grid), math.ceil(high / grid)
    size = next_fast_len(max(16, high - low + 1), real=True)
    spectrum, start = np.ones(size // 2 + 1, dtype=complex), 0
    for n, loss in moments.counted:
        start += n * loss.first
        power = rfft(_folded(loss.tilted(tilt.order), size))
        while n:  # its n-th power by squaring, ten times faster than complex powers
            if n & 1:
                spectrum *= power
            n >>= 1
            if n:
                np.multiply(power, power, out=power)
    masses = np.maximum(np.roll(irfft(spectrum, size), (start - low) % size), 0)
    return _at_delta(masses, low * grid, grid, tilt, left, _rounding(moments.counted, tilt, size, grid))


def _folded(masses: Floats, size: int) -> Floats:
    """Longer losses wrap around, as everything in the transform does."""
    if len(masses) <= size:
        return np.pad(masses, (0, size - len(masses)))
    folded: Floats = np.pad(masses, (0, -len(masses) % size)).reshape(-1, size).sum(0)
    return folded


def _rounding(counted: list[tuple[int, _Loss]], tilt: _Tilt, size: int, grid: float) -> float:
    """What errors of the tilted masses can add to δ(ε), at most, times e^(order · ε - log_moment).

    Each layer of a transform adds at most ``LAYER`` units to any number of the spectrum (Higham 2002, section 24.1); a
    power multiplies that by its exponent, and no number exceeds 1. By Parseval's theorem the masses' error has at most
    the 2-norm ``releases · layers``; by Cauchy and Schwarz it weighs that times the 2-norm of
    ``(1 - e^-x) · e^(-order·x)``, whose square is an integral over x > 0 in closed form, and its largest value for the
    sum in its place. A mass's own error counts with each release.
    """
    releases = 1 + sum(n for n, _ in counted)
    widest = max(tilt.order * float(np.abs(loss.losses[[0, -1]]).max()) for _, loss in counted)
    integral = 1 / (2 * tilt.order * (2 * tilt.order + 1) * (tilt.order + 1))
    weight = math.sqrt(integral / grid + math.exp(2 * tilt.log_peak))
    return releases * UNIT * (LAYER * math.log2(size) * weight + MASS + widest)


def _at_delta(masses: Floats, low: float, grid: float, tilt: _Tilt, delta: float, rounding: float) -> float | None:
    """The least ε >= 0 with ``Σ (1 - e^(ε - loss)) · mass <= delta`` over the losses above ε; None if it lies below
    ``low``.

    All masses are times e^(order · low - log_moment), which keeps them in the range of numbers; so is δ, and what
    rounding may add.
    """
    first = max(0, math.ceil(-low / grid - 0.5))
    losses = np.arange(first, len(masses)) * grid  # from `low` on
    untilt = np.exp(-tilt.order * losses)
    target = delta * math.exp(min(tilt.order * low - tilt.log_moment, 700.0))
    above = np.cumsum((masses[first:] * untilt)[::-1])[::-1]
    # δ at each grid point: Σ_{k > i} (1 - e^-grid) · e^(loss_i - loss_{k - 1}) · above_k, in which nothing cancels
    later = np.cumsum((above * np.exp(-losses))[::-1])[::-1]
    spent = np.append(later[1:], 0.0) * -math.expm1(-grid) * np.exp(losses + grid) * (1 + 4 * len(masses) * UNIT)
    fits = np.flatnonzero(spent + rounding * untilt <= target)
    if not len(fits):
        return math.inf
    i = int(fits[0])
    if i == 0:
        return None if low > grid else 0.0
    # Between two grid points the same masses lie above ε, so ε follows from them exactly.
    room = target - rounding * untilt[i - 1] - spent[i]
    within = above[i] - spent[i]
    step = math.log1p(-room / within) if 0 < room < within else 0.0
    return float(max(0.0, low + losses[i] + max(step, -grid)))
