"""Descent over centred features that are not whitened: the head where a second moment would be mostly noise.

:mod:`.head_descent` pays for the features' second moment and divides by it. With a few thousand units that sum says
little, and its ridge leaves no direction at the size it had. Here three kinds of sums are released:

    class counts    1 in the place of the class     1                 n, and the prior: where the constants begin
    mean            x                               1                 m: features are centred
    gradients       clip((p - y) z̃ᵀ)                C                 z = (x-m) / r, z̃ = (z, c)

r is what bounds ``x - m``, and follows from ``‖m‖``, as in :mod:`.head_descent`. c is small, because a large constant
takes the gradient's length from the features, and constants begin at the prior.

The rate falls with the noise ν = σ √(number of weights) / N, because what it leaves in the weights grows with rate × ν.
The rule was fitted to eleven pairs of data and ε, of texts and pictures (docs/decisions/0005-heads.md).
"""

from typing import TYPE_CHECKING, ClassVar

from dpft.privacy.mechanisms.head_descent import HeadDescent, Whitening

if TYPE_CHECKING:
    from dpft.privacy.mechanisms.linear_head import Rows, Sums

COUNTS, MEAN = 0.02, 0.1  # shares of the steps
CONSTANT = 0.25  # c
RATE, POWER, FASTEST = 2.0, 0.7, 24.0  # the rate is RATE / ν^POWER, and never above FASTEST


class HeadCentred(HeadDescent):
    """Full-batch descent on the cross-entropy, over centred features."""

    name: ClassVar[str] = "head-centred"
    shares: ClassVar[tuple[float, ...]] = (COUNTS, MEAN)
    too_few: ClassVar[str] = "and counts, mean and gradients need 5: plan about 64"

    @property
    def about(self) -> str:
        counts, mean = self.statistics
        return (
            f"class counts ({counts}) and mean ({mean}) of the features, {self.gradients} full-batch gradients with "
            f"FlatClip at {self.clip.sensitivity:g}"
        )

    def _whitening(self, rows: "Rows", sums: "Sums", number: float) -> Whitening:
        """Centred, and at the length that bounds them."""
        import torch

        centre = self._centre_if_constant(rows, sums, number, self.statistics[1])
        return Whitening(centre.mean, torch.eye(len(centre.mean), dtype=torch.float64) / centre.radius, CONSTANT)

    def _rate(self, noise: float, whitening: Whitening) -> float:
        return min(FASTEST, RATE / noise**POWER if noise else FASTEST)
