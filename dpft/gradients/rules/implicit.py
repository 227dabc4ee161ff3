"""Per-example gradients that can be clipped and summed without being materialised."""

from abc import ABC, abstractmethod

import torch
from torch import Tensor


class ImplicitGradient(ABC):
    """The gradients ``(B, m, n)`` of one weight for each of B examples, in a smaller form."""

    @property
    @abstractmethod
    def shape(self) -> torch.Size:
        """``(B, m, n)``"""

    @property
    @abstractmethod
    def norm_is_cheaper(self) -> bool:
        """Whether computing the norms alone is cheaper than materialising the gradients."""

    @abstractmethod
    def materialize(self) -> Tensor:
        """``(B, m, n)``"""

    def write(self, destination: Tensor) -> None:
        """Materialise them in ``destination`` ``(B, m, n)``."""
        destination.copy_(self.materialize())

    @abstractmethod
    def squared_norms(self) -> Tensor:
        """``(B,)``"""

    @abstractmethod
    def add_to(self, total: Tensor, factors: Tensor) -> None:
        """``total`` ``(m, n)`` ``+= Σ_i factors[i] · g_i``.

        Both are float64. Rounding of one example depends on no other.
        """

    @abstractmethod
    def with_zeroed(self, examples: Tensor) -> "ImplicitGradient":
        """The same with zeros for the examples where ``examples`` ``(B,)`` is true."""


def materialize(gradient: Tensor | ImplicitGradient) -> Tensor:
    return gradient.materialize() if isinstance(gradient, ImplicitGradient) else gradient


def write(gradient: Tensor | ImplicitGradient, destination: Tensor) -> None:
    """Materialise it in ``destination`` ``(B, *shape)``."""
    if isinstance(gradient, ImplicitGradient):
        gradient.write(destination)
    else:
        destination.copy_(gradient)
