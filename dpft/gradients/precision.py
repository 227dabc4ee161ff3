"""At least float32 where a unit's bound depends on it, and float64 for sums over units, whatever the model computes in.

A unit's norm and its part of the sum are often computed by different products. bfloat16 and TF32 keep 8 and 11 bits. If
one of the products were rounded to them, the unit could exceed the clip's bound by more than float32 allows.

A float32 sum rounds differently with and without a unit, which can move it by more than the clip (Casacuberta,
Shoemate, Vadhan, Wagaman 2022). So the rounding of a unit's clipped gradient depends on no other unit, and all are
added in float64. The sum of n units of clip C then differs from the true sum by less than 2**-53 · n² · C. For a
million units that is a millionth of C.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch import Tensor


def at_least_float32(tensor: Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)


def precise(tensor: Tensor) -> Tensor:
    """The same values in at least float32. Integers stay integers."""
    return tensor.to(at_least_float32(tensor)) if tensor.is_floating_point() else tensor


def precise_bmm(a: Tensor, b: Tensor) -> Tensor:
    """``(B, m, k)`` times ``(B, k, n)``. Products of half-precision numbers are exact and summed in float32."""
    if a.is_cuda and at_least_float32(a) != a.dtype and _bmm_widens():
        return torch.bmm(a, b, out_dtype=torch.float32)  # without a copy
    return torch.bmm(precise(a), precise(b))


@cache
def _bmm_widens() -> bool:
    return hasattr(torch.ops.aten.bmm, "dtype")  # PyTorch 2.8


TOGETHER = 1 << 18  # numbers converted to float64 at a time on a CPU, so that they stay in its cache
DEVICE_TOGETHER = 1 << 26  # the same on another device


def summing_device(device: torch.device) -> torch.device:
    """The device of sums: that of the model, or the CPU if the model's device has no float64."""
    return torch.device("cpu") if device.type == "mps" else device


def add_rows(total: Tensor, rows: Tensor, factors: Tensor) -> None:
    """``total`` ``(n,)`` ``+= Σ_i factors[i] · rows[i]`` of ``(B, n)`` rows, in float64.

    Args:
        total, factors: float64, on the device of the sums.
    """
    numbers = DEVICE_TOGETHER if rows.is_cuda else TOGETHER
    width = max(1, numbers // max(1, len(rows)))
    for start in range(0, rows.shape[1], width):
        part = slice(start, start + width)
        total[part].addmv_(rows[:, part].to(total).T, factors)


@contextmanager
def full_precision() -> Iterator[None]:
    """Compute float32 matrix products in float32, even where TF32 or bfloat16 is allowed for them
    (``TrainingArguments.tf32``)."""
    every: tuple[Any, ...] = (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul)  # type: ignore[attr-defined]
    backends = [backend for backend in every if hasattr(backend, "fp32_precision")]  # PyTorch 2.9
    allowed = [backend.fp32_precision for backend in backends]
    try:
        before = torch.get_float32_matmul_precision()
    except RuntimeError:  # a backend has a setting of its own, and PyTorch forbids to mix the two
        before = None
    try:
        if before is not None:
            torch.set_float32_matmul_precision("highest")
        for backend in backends:
            backend.fp32_precision = "ieee"
        yield
    finally:
        if before is not None:
            torch.set_float32_matmul_precision(before)
        for backend, precision in zip(backends, allowed, strict=True):
            backend.fp32_precision = precision
