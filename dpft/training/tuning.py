"""How many tokens a micro-batch should hold: timed on the machine at hand, because the cut changes speed and memory
alone.

On two CPU cores one example of 128 tokens is as fast as any batch of them and needs the least memory; short examples
are faster together; a GPU wants as much as its memory holds.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import psutil
import torch
from torch import Tensor, nn

from dpft.gradients.engine import WORKSPACE_BYTES
from dpft.training.batches import OVERHEAD

SMALLEST, LARGEST = 128, 1 << 17
WORTH = 0.95  # a larger budget must make an example at least 5 % faster
DOUBLINGS = 2  # without such a gain end the search: a single one may be the machine's mood
ENOUGH = 0.3  # seconds for which micro-batches of one size are timed; the fastest counts
SECONDS = 10.0  # after which nothing larger is tried
BACKWARD = 1.5  # times what a forward pass keeps, a micro-batch takes at its peak: 1.0 to 1.5 for ViT-S, by what trains
UNKNOWN_MEMORY = 1 << 31  # bytes, where the system does not say what is free


class TokenBudget(NamedTuple):
    """``tokens`` of a micro-batch, and the tokens' worth of time (``overhead``) that each costs beside its own."""

    tokens: int
    overhead: float = OVERHEAD


@dataclass(frozen=True, kw_only=True)
class Room:
    """What a micro-batch of equal examples may take.

    Attributes:
        tokens: of each example.
        most: how many examples it may hold at all.
        memory: bytes.
        draw: tokens that a logical batch is expected to have: a larger budget would seldom be filled.
    """

    tokens: int
    most: int
    memory: int
    draw: float = LARGEST


def fastest_budget(
    losses: Callable[[int], Tensor], accumulate: Callable[[Tensor], object], model: nn.Module, room: Room
) -> TokenBudget:
    """The smallest token budget that is within 5 % of the fastest that fits.

    One example is tried first, whatever it takes. What it keeps tells how many fit ``memory``: no more are tried.

    Args:
        losses: ``losses(n)``, ``(n,)``, of n equal examples.
        accumulate: what a step does with them.

    Raises:
        torch.OutOfMemoryError: a single example does not fit.
    """

    def passed(n: int) -> tuple[float, int]:
        """Seconds, and the bytes kept of each example, those shared by all included."""
        since, saved = _now(model), SavedBytes(model)
        with saved:
            found = losses(n)
        accumulate(found)
        return _now(model) - since, -(-saved.bytes // n)

    def timed(n: int) -> tuple[float, int]:
        """Seconds for each example, and the bytes kept of it."""
        times: list[float] = []
        while sum(times) < ENOUGH and len(times) < 10:
            seconds, kept = passed(n)
            times.append(seconds)
        return min(times) / n, kept

    tokens, most = room.tokens, room.most
    started, idle = time.perf_counter(), 0
    tried: dict[int, float] = {}
    _, kept = passed(1)  # what only a first pass does is not timed
    smallest = max(SMALLEST, tokens)
    for budget in (smallest << k for k in range(max(1, (LARGEST // smallest).bit_length()))):
        fitting = max(1, int(room.memory / (BACKWARD * max(kept, 1))))
        if tried and fitting * tokens < budget:
            break
        budget = min(budget, fitting * tokens)
        n = min(budget // tokens, most)
        best = min(tried.values(), default=float("inf"))
        try:
            tried[budget], kept = timed(n)
        except torch.OutOfMemoryError:
            break
        idle = 0 if tried[budget] <= WORTH * best else idle + 1
        full = budget >= room.draw or n == most
        if full or idle == DOUBLINGS or time.perf_counter() - started > SECONDS:
            break
    if not tried:  # one example fits, and no more were tried with success
        return TokenBudget(tokens)
    best = min(tried.values())
    budget = min(budget for budget, seconds in tried.items() if WORTH * seconds <= best)
    return TokenBudget(budget, _overhead({min(b // tokens, most): seconds for b, seconds in tried.items()}, tokens))


def _overhead(each: dict[int, float], tokens: int) -> float:
    """From seconds for each example, by the examples of a micro-batch: seconds = overhead + slope · tokens, by least
    squares.

    Relative errors are alike, so each equation is divided by its left side.
    """
    if len(each) < 2:
        return OVERHEAD
    examples, seconds = np.array(list(each)), np.array(list(each.values()))
    whole = examples * seconds
    left = np.stack([np.ones(len(whole)), examples * tokens], 1) / whole[:, None]
    fixed, slope = np.linalg.lstsq(left, np.ones(len(whole)), rcond=None)[0]
    return float(np.clip(fixed / slope if slope > 0 else LARGEST, 0, LARGEST))


def workspace(device: torch.device, memory: int) -> int:
    """Bytes for gradients that must be made of each example: a GPU is fast only with many examples at a time."""
    return max(WORKSPACE_BYTES, memory // 8) if device.type == "cuda" else WORKSPACE_BYTES


def free_memory(device: torch.device) -> int:
    """Bytes that may be used: four fifths of what the GPU, or half of what the machine, has free. Never raises without
    a GPU."""
    if device.type == "cuda":
        return int(0.8 * torch.cuda.mem_get_info(device)[0])
    try:
        return psutil.virtual_memory().available // 2
    except Exception:  # it reads what systems keep in many places, and says of none how that fails
        return UNKNOWN_MEMORY


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
