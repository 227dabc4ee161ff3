"""Freed memory waits for the next micro-batch, and goes back when a run ends."""

import json
import os
import subprocess
import sys

import pytest

from dpft.training import heap

# In a process of its own, because the heap of this one holds whatever the tests before left there.
PAGES_TAKEN = """
import json, resource
from dpft.training.heap import keep_freed_memory

def pages_taken():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    blocks = [bytearray(1 << 20) for _ in range(128)]
    while blocks:
        blocks.pop()
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1])

pages_taken()
with keep_freed_memory():
    pages_taken()
    inside, held = pages_taken(), resident()
print(json.dumps({"inside": inside, "given back": held - resident(), "afterwards": pages_taken()}))
"""
BLOCKS = 128 * (1 << 20) // os.sysconf("SC_PAGE_SIZE")  # in pages


def measured(**environment) -> dict:
    here = {name: value for name, value in os.environ.items() if name not in heap.CHOSEN}
    command = [sys.executable, "-c", PAGES_TAKEN]
    answer = subprocess.run(command, env=here | environment, capture_output=True, text=True, check=True)
    return json.loads(answer.stdout)


@pytest.mark.skipif(heap._glibc() is None, reason="glibc alone is told what to keep")
class TestKeptHeap:
    def test_memory_is_kept_inside_and_given_back_afterwards(self):
        found = measured()
        assert found["inside"] < 0.01 * BLOCKS
        assert found["given back"] > 0.9 * BLOCKS
        assert found["afterwards"] > 0.9 * BLOCKS

    def test_what_the_environment_asks_for_stands(self):
        assert measured(MALLOC_MMAP_THRESHOLD_="65536")["inside"] > 0.9 * BLOCKS


def test_another_c_library_is_left_alone(monkeypatch):
    monkeypatch.setattr(heap.ctypes, "CDLL", lambda name: object())
    with heap.keep_freed_memory():
        assert heap._glibc() is None
