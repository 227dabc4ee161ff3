"""float32 where a bound depends on it, whatever the model computes in.

A unit's norm and its part of the sum are often computed by different products. If one of them were rounded to bfloat16 or TF32,
which keep 8 and 11 bits, the unit could exceed the clip's bound by more than float32 ever lets it.
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


@contextmanager
def full_precision():
    """Matrix products of float32 in float32, though TF32 or bfloat16 were allowed for them (``TrainingArguments.tf32``)."""
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
