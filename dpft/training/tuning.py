"""How many tokens a micro-batch should hold: timed on the machine at hand, because the cut changes speed and memory alone.

On two CPU cores one example of 128 tokens is as fast as any batch of them and needs the least memory; short examples are
faster together; a GPU wants as much as its memory holds.
"""

import os
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn

SMALLEST, LARGEST = 128, 1 << 17
WORTH = 0.95  # a budget twice as large must make an example at least 5 % faster
LONG = 1.0  # seconds from which a micro-batch is timed once and not twice
SECONDS = 10.0  # after which the best so far is taken


def fastest_budget(
    losses: Callable[[int], Tensor],
    accumulate: Callable[[Tensor], None],
    *,
    model: nn.Module,
    tokens: int,
    most: int,
    memory: int,
) -> int:
    """The smallest token budget whose double would gain less than 5 %, or would not fit.

    Args:
        losses: ``losses(n)``, ``(n,)``, of n equal examples of ``tokens`` tokens.
        accumulate: what a step does with them.
        most: how many examples a micro-batch may hold at all.
        memory: bytes that a forward pass may keep.
    """

    def timed(n: int) -> tuple[float, int]:
        since, saved = _now(model), SavedBytes(model)
        with saved:
            found = losses(n)
        accumulate(found)
        return _now(model) - since, saved.bytes

    budget, best, started = SMALLEST, float("inf"), time.perf_counter()
    timed(1)  # what only a first pass does is not counted
    for doubled in (SMALLEST << k for k in range((LARGEST // SMALLEST).bit_length())):
        n = min(max(1, doubled // tokens), most)
        seconds, kept = timed(n)
        if seconds < LONG:
            seconds = min(seconds, timed(n)[0])
        if seconds / n > WORTH * best:
            break
        budget, best = doubled, seconds / n
        if 2 * kept > memory or n == most or time.perf_counter() - started > SECONDS:
            break
    return budget


def free_memory(device: torch.device) -> int:
    """Bytes that may be used: four fifths of what the GPU, or half of what the machine, has free."""
    if device.type == "cuda":
        return int(0.8 * torch.cuda.mem_get_info(device)[0])
    try:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
    except (ValueError, OSError):  # no such figure on this system
        return 4 << 30


class SavedBytes(torch.autograd.graph.saved_tensors_hooks):
    """Counts the bytes that forward passes keep for their backward pass, the model's own tensors aside."""

    def __init__(self, model: nn.Module) -> None:
        own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
        self._seen, self.bytes = own, 0
        super().__init__(self._count, lambda tensor: tensor)

    def _count(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self._seen:
            self._seen.add(storage.data_ptr())
            self.bytes += storage.nbytes()
        return tensor


def _now(model: nn.Module) -> float:
    if next(model.parameters()).device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()
