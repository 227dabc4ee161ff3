"""Gradients by plain autograd, and how far others are from them."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dpft.gradients.capture import HALF, Capture
from dpft.gradients.capture_map import TrainableParameter

Losses = Callable[[list[Any]], Tensor]  # of examples, collated and passed through the model: (B,)

TOLERANCE = 1e-4  # relative error that float32 arithmetic explains
SHARES = (1.0, -2.0, 0.5, 2.0, -1.0, -0.5, 2.0, 1.0, -2.0, -0.5)  # of a sum, of one example after another
FLOOR = 1e-2  # a parameter's error is relative to at least this share of the whole gradient's norm


@dataclass(frozen=True)
class Reference:
    """What plain backward passes gave.

    Attributes:
        error: the largest relative difference between an example alone and the same one beside others.
        norms: ``(B,)``, of each example's gradient.
        combined: by the numbers of a batch's examples, their gradients in one combination ``(P,)``.
    """

    error: float
    norms: Tensor
    combined: dict[tuple[int, ...], Tensor]


def weights_for(norms: Tensor) -> Tensor:
    """Coefficients that give gradients of these norms about the same share of their sum; the same at each call.

    They are ±½, ±1 or ±2 over the norm, so that no coupling has a reason to cancel. They are powers of two, so that an
    example's part of a backward pass is rounded as without them: deep models amplify rounding a thousandfold.
    """
    shares = torch.tensor([SHARES[i % len(SHARES)] for i in range(len(norms))])
    norms = norms.clamp_min(1e-3 * norms.max()).clamp_min(1e-30)
    return shares.to(norms) * 2.0 ** -norms.log2().round()


def plain_gradient(capture: Capture, loss: Tensor) -> Tensor:
    """``(P,)`` by one plain backward pass, through a graph that others may share. Call it while paused."""
    for trainable in capture.map.trainables:
        trainable.parameter.grad = None
    if loss.requires_grad:
        loss.backward(retain_graph=True)
    flat = torch.zeros(capture.map.size, dtype=torch.float32, device=loss.device)
    capture.collect_grads(flat)
    return flat


def worst_parameter(capture: Capture, found: Tensor, expected: Tensor) -> tuple[TrainableParameter, float]:
    """The parameter with the largest relative error in a ``(P,)`` gradient, and that error."""
    worst, largest = capture.map.trainables[0], 0.0
    floor = FLOOR * expected.norm()
    for trainable in capture.map.trainables:
        wanted = expected[trainable.slice]
        error = float((found[trainable.slice] - wanted).norm() / torch.maximum(wanted.norm(), floor).clamp_min(1e-30))
        if is_worse(error, largest):
            worst, largest = trainable, error
    return worst, largest


def is_worse(error: float, than: float) -> bool:
    """Whether an error is the larger; NaN is larger than any number, and no later error takes its place."""
    return not math.isnan(than) and not error <= than


def relative_error(losses: Tensor, expected: Tensor) -> float:
    return float(((losses - expected).abs() / expected.abs().clamp_min(1e-2)).max())


def floating_tensors(model: nn.Module) -> list[Tensor]:
    """The model's floating-point parameters and buffers."""
    return [tensor for tensor in (*model.parameters(), *model.buffers()) if tensor.is_floating_point()]


def half_tensors(model: nn.Module) -> list[Tensor]:
    """Those of them that have half precision."""
    return [tensor for tensor in floating_tensors(model) if tensor.dtype in HALF]


def size_of(example: Any) -> int:
    """The length of the example's longest feature."""
    if not isinstance(example, dict):
        return 0
    several = [value for value in example.values() if hasattr(value, "__len__") and getattr(value, "shape", None) != ()]
    return max(map(len, several), default=0)
