"""The token budget is measured, and measuring it changes nothing but speed and memory."""

import psutil
import pytest
import torch
from torch import nn

from dpft.training import heap, tuning
from dpft.training.tuning import Room, SavedBytes, fastest_budget, workspace

GIB = 1 << 30


class Machine:
    """Takes ``call + n · example`` seconds for a micro-batch of n examples, and keeps the sizes that it was given."""

    def __init__(self, monkeypatch, call, example):
        self.call, self.example, self.now, self.sizes = call, example, 0.0, []
        self.model = nn.Linear(1000, 1)
        monkeypatch.setattr(tuning, "_now", lambda model: self.now)

    def losses(self, n):
        self.sizes.append(n)
        return self.model(torch.ones(n, 1000)).squeeze(1)  # keeps 4,000 bytes for each example

    def accumulate(self, losses):
        self.now += self.call + len(losses) * self.example

    def fastest(self, tokens, **limits):
        return self.found(tokens, **limits).tokens

    def found(self, tokens, most=1 << 20, memory=GIB, **limits):
        room = Room(tokens=tokens, most=most, memory=memory, **limits)
        return fastest_budget(self.losses, self.accumulate, self.model, room)


@pytest.mark.parametrize(
    ("call", "example", "tokens", "budget"),
    [
        (0.0, 1e-3, 128, 128),  # nothing is gained by a second example
        (1e-3, 1e-3, 16, 256),  # 8 examples cost 1.125 each, 16 cost 1.06, 32 cost 1.03
        (1.0, 1e-9, 128, 1 << 17),  # every call costs the same, as on a GPU that is far from full
        (1.0, 1e-9, 512, 1 << 17),  # however long the examples
        (1.0, 1e-9, 1 << 20, 1 << 20),  # one example fills it
    ],
)
def test_the_smallest_budget_that_is_about_as_fast_as_any(monkeypatch, call, example, tokens, budget):
    assert Machine(monkeypatch, call, example).fastest(tokens) == budget


@pytest.mark.parametrize(("call", "example", "overhead"), [(0.0, 1e-3, 0), (1e-3, 1e-3, 16), (8e-3, 1e-3, 128)])
def test_what_a_micro_batch_costs_beside_its_tokens(monkeypatch, call, example, overhead):
    """In tokens, of which an example has 16."""
    assert Machine(monkeypatch, call, example).found(16).overhead == pytest.approx(overhead, abs=1e-6)


def test_where_tokens_cost_nothing_micro_batches_are_whole(monkeypatch):
    assert Machine(monkeypatch, 1.0, 0.0).found(16).overhead == 1 << 17


def test_one_doubling_without_gain_does_not_end_the_search(monkeypatch):
    """As was seen of an encoder at 128 tokens: slow alone, no faster by twos, and half as slow by eights."""
    machine = Machine(monkeypatch, 0.0, 0.0)
    times = {1: 0.080, 2: 0.079, 4: 0.060, 8: 0.049, 16: 0.048, 32: 0.048}
    machine.accumulate = lambda losses: setattr(machine, "now", machine.now + len(losses) * times[len(losses)])
    assert machine.fastest(128) == 8 * 128


def test_a_budget_fits_the_memory(monkeypatch):
    machine = Machine(monkeypatch, 1.0, 1e-9)
    assert machine.fastest(16, memory=100 * 4000) == 1024  # 64 examples fit, 128 would not
    assert max(machine.sizes) == 64


def test_a_budget_holds_no_more_examples_than_the_engine_takes(monkeypatch):
    machine = Machine(monkeypatch, 1.0, 1e-9)
    machine.fastest(16, most=20)
    assert max(machine.sizes) == 20


@pytest.mark.parametrize(("draw", "budget"), [(5, 128), (128, 128), (129, 256), (3000, 4096)])
def test_nothing_larger_is_tried_than_the_first_budget_that_holds_a_draw(monkeypatch, draw, budget):
    machine = Machine(monkeypatch, 1.0, 1e-9)
    assert machine.fastest(16, draw=draw) == budget
    assert max(machine.sizes) == budget // 16


def test_what_does_not_fit_after_all_is_not_taken(monkeypatch):
    """A backward pass takes more than what its forward pass kept; how much more shows when it is tried."""
    machine = Machine(monkeypatch, 1.0, 1e-9)

    def accumulate(losses):
        if len(losses) > most:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        machine.now += 1.0

    machine.accumulate, most = accumulate, 40
    assert machine.fastest(16) == 512
    most = 1
    assert machine.fastest(16) == 16
    most = 0
    with pytest.raises(torch.OutOfMemoryError):
        machine.fastest(16)


def test_a_gpu_makes_more_gradients_at_a_time():
    """LoRA on 7 billion parameters trains 20 million: 80 MB for each example, and three examples leave a GPU idle."""
    assert workspace(torch.device("cuda"), 80 * GIB) == 10 * GIB
    assert workspace(torch.device("cuda"), GIB) == workspace(torch.device("cpu"), 80 * GIB) == GIB // 4


def test_what_a_forward_pass_keeps_is_counted_once_and_without_the_model():
    model, x = nn.Linear(10, 10, bias=False), torch.ones(4, 10)
    saved = SavedBytes(model)
    with saved:
        model(x).exp().sum() + model(x).sum()
    assert saved.bytes == 4 * 40 + 4 * 40  # x, which both uses share, and exp's result


def test_a_system_that_does_not_say_what_memory_is_free_is_no_error(monkeypatch):
    """Windows has no ``os.sysconf``; where psutil knows nothing either, little is assumed."""
    monkeypatch.delattr("os.sysconf", raising=False)
    assert 0 < tuning.free_memory(torch.device("cpu")) < psutil.virtual_memory().total
    monkeypatch.setattr(psutil, "virtual_memory", lambda: (_ for _ in ()).throw(FileNotFoundError("/proc/meminfo")))
    assert tuning.free_memory(torch.device("cpu")) == 2 * GIB


@pytest.mark.parametrize("missing", [TypeError("no library None"), OSError("not found")])
def test_a_system_without_glibc_keeps_no_heap_and_trains(monkeypatch, missing):
    """``ctypes.CDLL(None)`` is a TypeError on Windows."""
    monkeypatch.setattr("ctypes.CDLL", lambda name: (_ for _ in ()).throw(missing))
    with heap.keep_freed_memory():
        assert heap._glibc() is None


@pytest.mark.parametrize(("tokens", "fits"), [(3, 5), (196, 5), (16, 1), (3, 0)])
def test_no_more_is_tried_than_one_example_says_will_fit(monkeypatch, tokens, fits):
    """As of pictures, of which 42 were tried before the memory was looked at."""
    machine = Machine(monkeypatch, 1.0, 1e-9)
    memory = int(tuning.BACKWARD * 4000 * (fits + 0.5))
    assert machine.fastest(tokens, memory=memory) == tokens * max(1, fits if tokens == 3 or fits == 1 else 4)
    assert max(machine.sizes) <= max(1, fits)
