"""float32 where a unit's bound depends on it, and float64 where units are added up, whatever the model computes in.

A unit's norm and its part of the sum are often computed by different products. If one of them were rounded to bfloat16
or TF32, which keep 8 and 11 bits, the unit could exceed the clip's bound by more than float32 ever lets it.

A sum in float32 is rounded in another way with and without a unit, which can move it by more than the clip
(Casacuberta, Shoemate, Vadhan, Wagaman 2022). So a unit's clipped gradient is rounded by itself alone, and all are
added in float64: n units of a clip C then differ from their true sum by less than 2**-53 · n² · C, a millionth of C for
a million units.
"""

from contextlib import contextmanager
from functools import cache

import torch
from torch import Tensor


def at_least_float32(tensor: Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)


def precise(tensor: Tensor) -> Tensor:
    """The same values in at least float32; whole numbers stay what they are."""
    return tensor.to(at_least_float32(tensor)) if tensor.is_floating_point() else tensor


def precise_bmm(a: Tensor, b: Tensor) -> Tensor:
    """``(B, m, k)`` times ``(B, k, n)``: products of half-precision numbers, exact and added up in float32."""
    if a.is_cuda and at_least_float32(a) != a.dtype and _bmm_widens():
        return torch.bmm(a, b, out_dtype=torch.float32)  # copies nothing
    return torch.bmm(precise(a), precise(b))


@cache
def _bmm_widens() -> bool:
    return hasattr(torch.ops.aten.bmm, "dtype")  # PyTorch 2.8


TOGETHER = 1 << 18  # numbers widened to float64 at a time on a processor, in whose cache they stay
DEVICE_TOGETHER = 1 << 26


def summing_device(device: torch.device) -> torch.device:
    """Where sums lie: beside the model, or on the processor where the model's device has no float64."""
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
def full_precision():
    """Matrix products of float32 in float32, though TF32 or bfloat16 were allowed for them
    (``TrainingArguments.tf32``)."""
    backends = (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul)
    backends = [backend for backend in backends if hasattr(backend, "fp32_precision")]  # PyTorch 2.9
    allowed = [backend.fp32_precision for backend in backends]
    try:
        before = torch.get_float32_matmul_precision()
    except RuntimeError:  # a backend's own setting is in use, and this one is not to be mixed with it
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
