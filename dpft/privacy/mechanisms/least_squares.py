"""A head by least squares: sufficient statistics with an adaptive ridge (AdaSSP, Wang 2018, arXiv:1803.02596).

Five sums over all units, features x within 1, outputs y within 1. A class is the output 1 in its place; real targets
are cut to length 1:

    outputs         y                               sensitivity 1     ȳ: what the head says at m
    mean            x                               1                 m: features are centred
    least spread    λ_min of Σ (x-m)(x-m)ᵀ          r²                how much ridge the data need
    second moment   upper triangle of (x-m)(x-m)ᵀ   r²                G
    cross moment    y (x-m)ᵀ                        r                 B

A unit's part of the second moment is positive semidefinite and its trace is at most r². So it moves the least
eigenvalue by no more than that (Weyl 1912). The last three are Wang's Algorithm 2 on centred features, of which the
bound ‖X‖ is r and the bound ‖Y‖ is 1. His noise is √(log(6/δ)) / (ε/3) times the sensitivity. Here it is σ/√steps times
the sensitivity: s₁ on the least eigenvalue, s₂ on each number of the second moment. With the probability ρ = 0.05 that
a bound fails:

    λ̃ = max(0, noisy λ_min - s₁ √(2 log(1/ρ)))          at most λ_min, with probability 1 - ρ
    λ = max(0, κ s₂ √(d log(2 d²/ρ)) - λ̃)
    θ = B (G + λ I)⁻¹

Two things differ from the paper; both follow from releases, so they cost nothing. κ is 1/4 and not 1: the paper's ridge
is for the worst case, and a quarter of it, about s₂ √d, was better on all data that were tried. Negative eigenvalues of
G are set to zero, because only noise makes them.

The head says ȳ + θ (x - m). For classes that is a probability, and too near to ȳ because of the ridge. It is
multiplied by the public number 2.3 log(4 K) to be a logit, which was chosen on data of 3, 4 and 22 classes. Without a
constant m is zero, r is 1 and ȳ is left out.
"""

import math
from dataclasses import dataclass
from functools import cache
from typing import ClassVar, Self

from dpft.privacy.mechanisms.every_unit import symmetric, upper_triangle
from dpft.privacy.mechanisms.linear_head import (
    Head,
    LinearHead,
    Rows,
    Sums,
    balanced,
    cross_moment,
    output_sum,
    second_moment,
)

OUTPUTS, MEAN, LEAST, CROSS = 0.02, 0.03, 0.02, 0.3  # shares of the steps; the rest are the second moment
FEWEST = 5  # steps: one of each sum
FAILURE = 0.05  # ρ
RIDGE = 0.25  # κ
SHARPNESS = 2.3  # of logits; see above


@dataclass(frozen=True, kw_only=True)
class LeastSquares(LinearHead):
    """Ridge regression on classes or on real targets. Nothing is clipped by ``clip``."""

    name: ClassVar[str] = "head-least-squares"

    fewest: ClassVar[int] = FEWEST
    too_few: ClassVar[str] = (
        f"and outputs, mean, least spread, second moment and cross moment need {FEWEST}: plan about 50"
    )

    def sums(self) -> tuple[int, ...]:
        outputs, mean, least, cross = (max(1, int(share * self.steps)) for share in (OUTPUTS, MEAN, LEAST, CROSS))
        return outputs, mean, least, self.steps - outputs - mean - least - cross, cross

    @property
    def about(self) -> str:
        outputs, mean, least, moment, cross = self.sums()
        return (
            f"outputs ({outputs}), mean ({mean}), least spread ({least}) and second moment ({moment}) of the features, "
            f"and their cross moment with the outputs ({cross})"
        )

    @classmethod
    def example(cls) -> Self:
        return cls(noise_multiplier=1.0, steps=20)

    def fit(self, rows: Rows, sums: Sums, number: int) -> Head:
        import torch

        output_steps, mean_steps, least_steps, moment_steps, cross_steps = self.sums()
        total = sums.release(lambda: output_sum(rows), (rows.classes,), 1.0, output_steps)
        mass = rows.mass(total, number)
        average = total / mass
        if not rows.has_bias:
            average = torch.zeros_like(average)
        centre = self._centre_if_constant(rows, sums, mass, mean_steps)
        width, bound = len(centre.mean), centre.radius**2
        exact = cache(lambda: second_moment(rows, centre))  # for two sums; private
        least = float(sums.release(lambda: torch.linalg.eigvalsh(exact())[:1], (1,), bound, least_steps))
        size = width * (width + 1) // 2
        moment = symmetric(sums.release(lambda: upper_triangle(exact()), (size,), bound, moment_steps), width)
        cross = sums.release(lambda: cross_moment(rows, centre), (rows.classes, width), centre.radius, cross_steps)
        least = max(0.0, least - self.noise_on(bound, least_steps) * math.sqrt(2 * math.log(1 / FAILURE)))
        noise = self.noise_on(bound, moment_steps)
        ridge = max(0.0, RIDGE * noise * math.sqrt(width * math.log(2 * width**2 / FAILURE)) - least)
        spread, directions = torch.linalg.eigh(moment)
        # Noise makes eigenvalues negative, and those of a moment are not. Without noise they may all be zero.
        spread = (spread.clamp_min(0.0) + ridge).clamp_min(max(1e-9 * float(spread.abs().max()), 1e-12))
        weight = (cross @ directions / spread) @ directions.T
        bias = average - weight @ centre.mean
        sharpness = 1.0 if rows.real else SHARPNESS * math.log(4 * rows.classes)
        return Head(weight * sharpness / rows.scale, balanced(rows, bias * sharpness, self._prior(total, output_steps)))
