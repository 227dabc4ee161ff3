"""Per-example gradients that need not be made to be clipped and added up."""

from abc import ABC, abstractmethod

import torch
from torch import Tensor


class ImplicitGradient(ABC):
    """The gradients ``(B, m, n)`` of one weight for each of B examples, in a form that is smaller than they are."""

    @property
    @abstractmethod
    def shape(self) -> torch.Size:
        """``(B, m, n)``"""

    @property
    @abstractmethod
    def norm_is_cheaper(self) -> bool:
        """Whether the norms alone are cheaper than making the gradients."""

    @abstractmethod
    def materialize(self) -> Tensor:
        """``(B, m, n)``"""

    def write(self, destination: Tensor) -> None:
        """Make them at ``destination`` ``(B, m, n)``."""
        destination.copy_(self.materialize())

    @abstractmethod
    def squared_norms(self) -> Tensor:
        """``(B,)`` squared norms."""

    @abstractmethod
    def add_to(self, total: Tensor, factors: Tensor) -> None:
        """``total`` ``(m, n)`` ``+= Σ_i factors[i] · g_i``; both are float64, and each example is rounded by itself
        alone."""

    @abstractmethod
    def with_zeroed(self, examples: Tensor) -> "ImplicitGradient":
        """The same with zeros for the examples ``(B,)`` that are true."""


def materialize(gradient: Tensor | ImplicitGradient) -> Tensor:
    return gradient.materialize() if isinstance(gradient, ImplicitGradient) else gradient


def write(gradient: Tensor | ImplicitGradient, destination: Tensor) -> None:
    """Make it in its place ``(B, *shape)``."""
    if isinstance(gradient, ImplicitGradient):
        gradient.write(destination)
    else:
        destination.copy_(gradient)
