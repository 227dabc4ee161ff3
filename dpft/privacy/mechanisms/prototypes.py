"""A head of class prototypes, for data of few units: a linear discriminant whose every sum is private.

Four sums over all units, features x within 1:

    class counts    1 in the place of the class     sensitivity 1     n, and the prior π = n / Σ n
    mean            x                               1                 m: features are centred
    class sums      (x-m) in the row of the class   r                 prototypes δ = sums / n, from m
    spread          min(q, v)                       v                 s²: the variance within a class

The discriminant is that of classes N(m + δ_k, s² I) with the prior π (Fisher 1936; Hastie, Tibshirani, Friedman 2009,
equation 4.10 with Σ = s² I, less what is the same for all classes):

    W_k = δ_k / s²        b_k = log π_k - W_kᵀm - W_kᵀδ_k / 2

The variance of the noise on m and on each number of δ_k is known, σ² r² / (steps · n_k²) for δ_k. To that comes what
chance makes of n_k units, (1 - ‖m‖²) / (d n_k). So m is shrunk towards zero, and prototypes towards their common mean m
(James & Stein 1961, :func:`.linear_head.kept_share`). The share that is kept of an error variance v_k is what is still
wrong with δ_k; a class that is not known well is as wide as N(m + δ_k, (s² + kept · v_k) I), and W_k has that in the
place of s².

s² is measured where the discriminant looks, along the prototypes: q = Σ_k a_k ((δ_k/‖δ_k‖)ᵀ (x - m - δ_y))² with a_k in
proportion to π_k ‖δ_k‖² and Σ a_k = 1. It is cut to v = max(1 - ‖m‖² - Σ π_k ‖δ_k‖², 0.01), the variance in all
directions together of features of length 1. r follows from ``‖m‖``, as in :mod:`.head_descent`.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Self

from dpft.privacy.mechanisms.linear_head import (
    Centre,
    Head,
    LinearHead,
    Rows,
    Sums,
    balanced,
    cross_moment,
    kept_share,
    output_sum,
)

if TYPE_CHECKING:
    from torch import Tensor

COUNTS, MEAN, SPREAD = 0.05, 0.2, 0.05  # shares of the steps; the rest are class sums
FEWEST = 4  # steps: one of each sum
LEAST = 0.01  # of v


@dataclass(frozen=True, kw_only=True)
class Prototypes(LinearHead):
    """A linear discriminant of noisy class means with one variance in all directions.

    It has the fewest numbers to learn, so it is the head where noise is large: few units for each class. Nothing is
    clipped by ``clip``.
    """

    name: ClassVar[str] = "head-prototypes"

    fewest: ClassVar[int] = FEWEST
    too_few: ClassVar[str] = f"and counts, mean, class sums and spread need {FEWEST}: plan about 20"

    def sums(self) -> tuple[int, ...]:
        counts, mean, spread = (max(1, round(share * self.steps)) for share in (COUNTS, MEAN, SPREAD))
        return counts, mean, self.steps - counts - mean - spread, spread

    @property
    def about(self) -> str:
        counts, mean, sums, spread = self.sums()
        return f"class counts ({counts}), mean ({mean}), class sums ({sums}) and spread ({spread}) of the features"

    @classmethod
    def example(cls) -> Self:
        return cls(noise_multiplier=1.0, steps=20)

    def fit(self, rows: Rows, sums: Sums, number: int) -> Head:
        import torch

        self._classes_alone(rows)
        count_steps, mean_steps, sum_steps, spread_steps = self.sums()
        counts = sums.release(lambda: output_sum(rows), (rows.classes,), 1.0, count_steps)
        mass = rows.mass(counts, number)
        counts = counts.clamp_min(max(1.0, 2 * self.noise_on(1.0, count_steps)))  # what noise alone may make of nobody
        prior = (counts / counts.sum()).unsqueeze(1)
        centre = self._centre(rows, sums, mass, mean_steps)
        shape = (rows.classes, len(centre.mean))
        totals = sums.release(lambda: cross_moment(rows, centre), shape, centre.radius, sum_steps)
        shifts = totals / counts.unsqueeze(1)
        sampling = max(LEAST, 1 - float(centre.mean.square().sum())) / shape[1] / counts
        variances = (self.noise_on(centre.radius, sum_steps) / counts) ** 2 + sampling
        kept = kept_share(shifts, variances)
        shifts = shifts * kept.unsqueeze(1)
        between = float((prior * shifts.square()).sum())
        most = max(LEAST, 1 - float(centre.mean.square().sum()) - between)
        total = lambda: spread_along(rows, centre, shifts, prior, most)
        spread = float(sums.release(total, (1,), most, spread_steps)) / mass
        spread = min(most, max(spread, most / shape[1]))
        weight = shifts / (spread + kept * variances).unsqueeze(1)
        bias = prior.log().squeeze(1) - weight @ centre.mean - (weight * shifts).sum(1) / 2
        if not rows.has_bias:
            # The best linear stand-in for a constant 1 is xᵀ(mmᵀ + s²I)⁻¹m, by least squares.
            weight = weight + torch.outer(bias, centre.mean / (centre.mean.square().sum() + most))
            bias = torch.zeros_like(bias)
        return Head(weight / rows.scale, balanced(rows, bias, prior.squeeze(1)))


def spread_along(rows: Rows, centre: Centre, shifts: "Tensor", prior: "Tensor", most: float) -> "Tensor":
    """``(1,)``: the sum over units of their mean min(q, v)."""
    along = prior.sqrt() * shifts
    along = along / along.norm().clamp_min(1e-30)  # its rows are √a_k δ_k / ‖δ_k‖

    def part(some: slice) -> "Tensor":
        within = centre.of(rows.bounded[some]) - rows.outputs(some) @ shifts
        squares = (within @ along.T).square().sum(1, keepdim=True)
        parts: Tensor = squares.clamp_max(most) * rows.weights[some]
        return parts.sum(0)

    return rows.total(part, (1,))
