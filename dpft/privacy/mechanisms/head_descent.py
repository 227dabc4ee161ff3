"""A head by preconditioned descent over full batches, every sum of it private.

Four kinds of sums over all units, features x within 1 (Dwork et al. 2014 for the second moment; Mehta et al. 2022,
arXiv:2211.13403, for why the feature covariance is the right preconditioner under privacy):

    class counts    1 in the place of the class     sensitivity 1     the bias begins at their logarithm
    mean            x                               1                 m: features are centred
    second moment   upper triangle of (x-m)(x-m)ᵀ   r²                λ, V: their spread in every direction
    gradients       clip((p - y) z̃ᵀ)                C                 z = (x-m) V(λ+γ)^(-1/2) / R, z̃ = (z, 1/R)

In z every direction is about as wide, so one rate serves all, and no direction drowns in noise that is the same for
all. R is the length that whitened features have on average, so that |z| is about 1; longer ones are cut. r follows from
``|m|``: features of length 1 lie on average √(1-|m|²) from their mean. Of a noisy m a part is kept (James & Stein
1961). All of m, λ, V, R and r are released or follow from what is.
"""

import math
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, ClassVar, NamedTuple, Self

from dpft.privacy.clipping import FlatClip
from dpft.privacy.mechanisms.every_unit import bounded, symmetric, upper_triangle
from dpft.privacy.mechanisms.linear_head import (
    CHUNK,
    Head,
    LinearHead,
    Rows,
    Sums,
    balanced,
    output_sum,
    second_moment,
    unit_sums,
)

if TYPE_CHECKING:
    from torch import Tensor

COUNTS, MEAN, MOMENT = 0.02, 0.02, 0.18  # shares of the steps
FEWEST = 5  # steps: one of each sum, and a second gradient
SCARCE = 5.0  # γ over the trace is (5 d / N)², within RIDGES: the fewer units there are for each direction, the more
RIDGES = (5e-4, 0.1)
SHORTEST = 0.1  # the least R, where noise hides every direction
RATE, MOMENTUM, TAIL = 1.2, 0.9, 1 / 3  # of the descent; the mean of the last third of the iterates is the head
QUIET = 0.014  # noise of a mean gradient, over C, up to which the whole rate is used
OUTER = 1 << 24  # numbers of the outer products that are held at a time, where units have several rows


class Whitening(NamedTuple):
    """``z = (x - mean) @ basis``, cut to length 1; ``constant`` is the coordinate of the bias."""

    mean: "Tensor"
    basis: "Tensor"
    constant: float


@dataclass(frozen=True, kw_only=True)
class HeadDescent(LinearHead):
    """Full-batch descent on the cross-entropy, over whitened features.

    Attributes:
        clip: C, on one unit's gradient, whose length is at most √2 where features are within 1.
    """

    name: ClassVar[str] = "head-descent"
    shares: ClassVar[tuple[float, ...]] = (COUNTS, MEAN, MOMENT)  # of the steps; the rest are gradients

    fewest: ClassVar[int] = FEWEST
    too_few: ClassVar[str] = f"and counts, mean, second moment and gradients need {FEWEST}: plan about 70"

    @property
    def statistics(self) -> tuple[int, ...]:
        """As how many steps each sum before the gradients is released: counts, mean and second moment."""
        return tuple(max(1, round(share * self.steps)) for share in self.shares)

    @property
    def gradients(self) -> int:
        """How many gradients are released."""
        return self.steps - sum(self.statistics)

    def sums(self) -> tuple[int, ...]:
        return (*self.statistics, *[1] * self.gradients)

    @property
    def about(self) -> str:
        counts, mean, moment = self.statistics
        return (
            f"class counts ({counts}), mean ({mean}) and second moment ({moment}) of the features, "
            f"{self.gradients} full-batch gradients with FlatClip at {self.clip.sensitivity:g}"
        )

    @classmethod
    def example(cls) -> Self:
        return cls(noise_multiplier=1.0, steps=20, clip=FlatClip(0.5))

    def fit(self, rows: Rows, sums: Sums, number: int) -> Head:
        import torch

        self._classes_alone(rows)
        counts = self.statistics[0]
        seen = sums.release(lambda: output_sum(rows), (rows.classes,), 1.0, counts)
        mass = rows.mass(seen, number)
        prior = self._prior(seen, counts)
        whitening = self._whitening(rows, sums, mass)
        width = whitening.basis.shape[1]
        whole = (whitened(rows, whitening), rows.labels.long())
        shape = (rows.classes, width + rows.has_bias)
        weights = torch.zeros(shape, dtype=torch.float64)
        if rows.has_bias:
            weights[:, width] = (prior.log() - prior.log().mean()) / whitening.constant
        velocity, mean, tail = torch.zeros_like(weights), torch.zeros_like(weights), 0
        rate = self._rate(self.noise_multiplier * math.sqrt(weights.numel()) / mass, whitening)
        for step in range(self.gradients):
            total = partial(self._gradient, rows, *whole, weights)
            gradient = sums.release(total, shape, self.clip.sensitivity)
            velocity = MOMENTUM * velocity + gradient / mass
            weights = weights - rate * velocity
            if step >= min(self.gradients - 1, self.gradients * (1 - TAIL)):
                mean, tail = mean + weights, tail + 1
        weights = mean / tail
        directions = weights[:, :width] @ whitening.basis.T
        bias = (
            weights[:, width] * whitening.constant if rows.has_bias else torch.zeros(rows.classes, dtype=torch.float64)
        )
        return Head(directions / rows.scale, balanced(rows, bias - directions @ whitening.mean, prior))

    def _rate(self, noise: float, whitening: Whitening) -> float:
        """The rate where the noise on a mean gradient is so long, over C."""
        return RATE / whitening.constant**2 * min(1.0, QUIET / noise if noise else 1.0)

    def _whitening(self, rows: Rows, sums: Sums, number: float) -> Whitening:
        import torch

        _, mean_steps, moment_steps = self.statistics
        width = rows.features.shape[1]
        centre = self._centre_if_constant(rows, sums, number, mean_steps)
        size, bound = width * (width + 1) // 2, centre.radius**2
        released = sums.release(lambda: upper_triangle(second_moment(rows, centre)), (size,), bound, moment_steps)
        spread, directions = torch.linalg.eigh(symmetric(released / number, width))
        spread = spread.clamp_min(0.0)
        noise = self.noise_on(bound, moment_steps) / number
        # Noise alone has eigenvalues up to 2 s √d (Wigner 1955): directions that it may have made are not blown up.
        scarce = min(max((SCARCE * width / number) ** 2, RIDGES[0]), RIDGES[1])
        ridge = max(scarce * float(spread.sum()), noise * math.sqrt(width), 1e-12)
        basis = directions / (spread + ridge).sqrt()
        average = max(SHORTEST, math.sqrt(float((spread / (spread + ridge)).sum())))
        return Whitening(centre.mean, basis / average, 1 / average)

    def _gradient(self, rows: Rows, features: "Tensor", labels: "Tensor", weights: "Tensor") -> "Tensor":
        """``(K, d')``: the sum over units of their clipped gradients, each the sum of its rows' by their weights."""
        import torch

        def errors(some: "slice | Tensor") -> tuple["Tensor", "Tensor"]:
            inputs = features[some].double()
            error = (inputs @ weights.T).softmax(1)
            error[torch.arange(len(inputs)), labels[some]] -= 1
            return error * rows.weights[some], inputs

        if rows.alone:

            def part(some: slice) -> "Tensor":
                error, inputs = errors(some)
                factors = self.clip.factors(error.norm(dim=1, keepdim=True) * inputs.norm(dim=1, keepdim=True))
                return (error * factors).T @ inputs

            return rows.total(part, tuple(weights.shape))
        total = torch.zeros_like(weights)
        for some, units in rows.units(max(1, OUTER // weights.numel())):
            error, inputs = errors(some)
            if int(units[-1]) == 0:  # one unit, which may have more rows than whose products fit
                gradients = (error.T @ inputs).unsqueeze(0)
            else:
                gradients = unit_sums(error.unsqueeze(2) * inputs.unsqueeze(1), units)
            factors = self.clip.factors(gradients.flatten(1).norm(dim=1))
            total += torch.einsum("ukd,u->kd", gradients, factors)
        return total


def whitened(rows: Rows, whitening: Whitening) -> "Tensor":
    """``(n, d')`` float32: whitened features of length at most 1, and the coordinate of the bias if there is one."""
    import torch

    parts = []
    for part in rows.bounded.split(CHUNK):
        features = bounded((part.double() - whitening.mean) @ whitening.basis, 1.0)
        if rows.has_bias:
            features = torch.cat([features, features.new_full((len(features), 1), whitening.constant)], 1)
        parts.append(features.float())
    width = whitening.basis.shape[1] + rows.has_bias
    return torch.cat(parts) if parts else torch.zeros(0, width)
