"""Time and memory of a training step, private over plain, for dpft and its peers.

    DPFT_MODELS=... python benchmarks/speed.py --json [--output FILE] [--work NAME] [--system NAME] [--device cuda]

Each system runs in a process of its own and is timed against plain training in another, in turn (A B A B): one
micro-batch (forward, backward, clipping) and one update (noise, AdamW). A step is an effective batch of 256 examples,
so its time is ``256 / examples`` micro-batches and one update; the ratio is the median over the pairs, its spread their
quartiles. Memory is the process's peak resident set, libraries included; beside it stands the peak of what PyTorch
allocates, which does not depend on what the C library's allocator keeps. Before it is timed, a system's clipped sum is
compared with a loop of plain backward passes: what is not exact is disqualified and its row says so.

Systems: dpft on plain's micro-batches; dpft on those that it chooses itself; Opacus with hooks, with ghost clipping,
with functorch; opake, where it is installed. dpft draws its noise from a cryptographic generator, as always; the others
from PyTorch's. On a GPU the work is Llama-like models of 1 and 7 billion parameters in bfloat16; their clipped sums are
compared in float32, several micro-batches are timed together, and memory is what PyTorch allocates there. Variants,
which run when they are named, are what else could be done: every gradient of a large weight made, none made, bf16
autocast (timed though it is not exact), and plain training compiled.
"""

import argparse
import gc
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, replace
from functools import partial
from itertools import accumulate
from pathlib import Path

from output import circumstances, deliver, options
from systems import SYSTEMS, VARIANTS, Work, trainable

TOLERANCE = 1e-4
TIMES = 4  # micro-batches timed together on a GPU, which works on while the next is prepared

WORK = {
    f"{name}, T={tokens}": Work(model, subset, tokens, examples)
    for name, model, subset, shapes in [
        ("encoder LoRA", "minilm", "lora(rank=8) + head", [(128, 32)]),
        ("encoder head only", "minilm", "head", [(128, 32)]),
        ("GPT-2 LoRA", "gpt2", "lora(rank=8)", [(128, 4), (512, 2)]),
        ("GPT-2 norms", "gpt2", "norms", [(128, 4), (512, 2)]),
        ("GPT-2 bias", "gpt2", "bias", [(128, 4), (512, 2)]),
        ("GPT-2 sparse 1 %", "gpt2", "sparse(fraction=0.01)", [(128, 4)]),
        ("GPT-2 all linear", "gpt2", 'layers("*.c_*")', [(128, 4), (512, 2)]),
    ]
    for tokens, examples in shapes
}
GPU_WORK = {
    f"Llama {size} LoRA, T={tokens}": Work(
        f"llama-{size.lower()}", "lora(rank=8)", tokens, 4096 // tokens, device="cuda", dtype="bfloat16"
    )
    for size in ("1B", "7B")
    for tokens in (512, 2048)
}


# -- one system at one work, in a process of its own -------------------------------------------------------------------


def serve(system: str, work: Work) -> None:
    """Do what standard input says, a line at a time: ``sum PATH``, ``time``, ``parameters``, ``flops``, ``peak``,
    ``allocated``."""
    import warnings

    import torch

    if work.device == "cuda":  # while others still compute; on a CPU what is imported counts as memory
        import opacus  # noqa: F401
        import transformers  # noqa: F401

        import dpft  # noqa: F401
    warnings.simplefilter("ignore")
    channel, sys.stdout = sys.stdout, sys.stderr
    make = (SYSTEMS | VARIANTS)[system]
    worker = None
    for line in sys.stdin:
        word, _, rest = line.strip().partition(" ")
        try:
            if word == "sum":
                exact = make(replace(work, dtype="float32"))
                torch.save(exact.clipped_sum(), rest)
                exact.close()
                exact, answer = None, {}
                give_back(work)
            elif word == "allocated":
                answer = {"mib": allocated(partial(make, work)) / 2**20}
            else:
                worker = worker or make(work)
                answer = ANSWERS[word](worker, work)
        except Exception as error:  # noqa: BLE001  (a peer may raise anything: its row says what)
            text = str(error).strip()
            answer = {"error": f"{type(error).__name__}: {text.splitlines()[0][:200] if text else ''}"}
        print(json.dumps(answer), file=channel, flush=True)


def time_of(worker, work: Work) -> dict:
    if work.device == "cpu":
        return {"micro_batch": timed(worker.micro_batch), "update": timed(worker.update)}
    import torch

    def synchronized(action: Callable[[], None], times: int) -> float:
        torch.cuda.synchronize()
        seconds = timed(lambda: ([action() for _ in range(times)], torch.cuda.synchronize()))
        return seconds / times

    synchronized(worker.micro_batch, 1)  # what was given back is asked for again
    torch.cuda.reset_peak_memory_stats()
    found = {"micro_batch": synchronized(worker.micro_batch, TIMES), "update": synchronized(worker.update, 1)}
    give_back(work)
    return found


def give_back(work: Work) -> None:
    """Free GPU memory, which the other system may need."""
    import torch

    if work.device == "cuda":
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.synchronize()


def peak(worker, work: Work) -> dict:
    import torch

    step_of_two(worker)
    if work.device == "cpu":
        return {"mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024}
    return {"mib": torch.cuda.max_memory_allocated() / 2**20}


ANSWERS = {
    "time": time_of,
    "peak": peak,
    "parameters": lambda worker, work: {"parameters": sum(p.numel() for p in trainable(worker.model).values())},
    "flops": lambda worker, work: {"flops": counted(worker.micro_batch), **rates()},
}


def timed(action: Callable[[], None]) -> float:
    since = time.perf_counter()
    action()
    return time.perf_counter() - since


def step_of_two(worker) -> None:
    """A step as its memory sees it: from the second micro-batch on, the gradients of those before are held as well."""
    worker.micro_batch()
    worker.micro_batch()
    worker.update()


def allocated(make: Callable) -> int:
    """The most bytes that PyTorch holds at once, from before the model is made to the end of the second step."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        worker = make()
        for _ in range(2):
            step_of_two(worker)
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    changes = [event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]
    return max(accumulate(changes))


def counted(action: Callable[[], None]) -> int:
    """Multiplications and additions of matrix products, each counted."""
    from torch.utils.flop_counter import FlopCounterMode

    counter = FlopCounterMode(display=False)
    with counter:
        action()
    return counter.get_total_flops()


def rates() -> dict:
    """What this machine does at best: operations of a matrix product, and bytes moved, in a second."""
    import torch

    a, b, large = torch.randn(1024, 768), torch.randn(768, 3072), torch.randn(1 << 24)
    out = torch.empty_like(large)
    product = min(timed(lambda: a @ b) for _ in range(10))
    move = min(timed(lambda: out.copy_(large)) for _ in range(5))
    return {"flops_per_second": 2 * 1024 * 768 * 3072 / product, "bytes_per_second": 8 * len(large) / move}


# -- pairs of processes ------------------------------------------------------------------------------------------------


class Failed(Exception):
    """A system's process answered with an error, or ended."""


class Process:
    """One system at one work, as a context."""

    def __init__(self, system: str, work: Work) -> None:
        command = [sys.executable, __file__, "--serve", system, json.dumps(asdict(work))]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        )

    def __enter__(self) -> "Process":
        return self

    def __exit__(self, *_) -> None:
        self.end()

    def end(self) -> None:
        self._process.kill()
        self._process.wait()

    def ask(self, line: str) -> dict:
        print(line, file=self._process.stdin, flush=True)
        answer = self._process.stdout.readline()
        if not answer:
            raise Failed(f"the process ended with {self._process.wait()}, out of memory perhaps")
        found = json.loads(answer)
        if "error" in found:
            raise Failed(found["error"])
        return found


def compare(system: str, name: str, truth: dict, plain_allocated: float, folder: Path, repeats: int) -> dict:
    """One row."""
    work = WORK[name]
    row = empty_row(system, name)
    try:
        with Process(system, work) as other:
            other.ask(f"sum {folder / 'sum.pt'}")
        if not judged(row, folder / "sum.pt", truth):
            return row
        with Process("plain", work) as plain, Process(system, work) as other:
            row |= paired(plain, other, work, repeats)
        with Process(system, work) as other:
            row["allocated_mib"], row["plain_allocated_mib"] = other.ask("allocated")["mib"], plain_allocated
            row["allocated_over_plain"] = row["allocated_mib"] / plain_allocated
    except Failed as failure:
        row["error"] = str(failure)
    return row


def empty_row(system: str, name: str) -> dict:
    row = {"system": system, "work": name, "exact": None, "error": None, "time_over_plain": None}
    return row | {"time_quartiles": None, "memory_over_plain": None, "seconds": None, "max_relative_error": None}


def judged(row: dict, path: Path, truth: dict) -> bool:
    """Whether the row's system is to be timed: its clipped sum is the true one, or it is a variant."""
    error = relative_error(path, truth)
    row |= {"exact": error < TOLERANCE, "max_relative_error": error}
    return row["exact"] or row["system"] in VARIANTS


def paired(plain: Process, other: Process, work: Work, repeats: int) -> dict:
    for process in (plain, other):
        process.ask("time")  # warm up
    pairs = [(plain.ask("time"), other.ask("time")) for _ in range(repeats)]
    ratios = [step_time(b, work) / step_time(a, work) for a, b in pairs]
    row = {
        "time_over_plain": statistics.median(ratios),
        "time_quartiles": statistics.quantiles(ratios, n=4)[::2] if repeats > 1 else None,
        "seconds": statistics.median(step_time(b, work) for _, b in pairs),
        "plain_seconds": statistics.median(step_time(a, work) for a, _ in pairs),
        "update_seconds": statistics.median(b["update"] for _, b in pairs),
        "mib": other.ask("peak")["mib"],
        "plain_mib": plain.ask("peak")["mib"],
    }
    return row | {"memory_over_plain": row["mib"] / row["plain_mib"]}


def step_time(parts: dict, work: Work) -> float:
    """Seconds for an effective batch, by its parts."""
    return parts["micro_batch"] * work.micro_batches + parts["update"]


def relative_error(path: Path, truth: dict) -> float:
    """‖sum − truth‖ / ‖truth‖ over all parameters; infinite if they are not the same."""
    import torch

    found = torch.load(path, map_location="cpu")
    if found.keys() != truth.keys():
        return float("inf")
    difference = torch.stack([(found[name].float() - truth[name]).norm() for name in truth]).norm()
    return float(difference / torch.stack([value.norm() for value in truth.values()]).norm())


def collect(works: Sequence[str], systems: Sequence[str], repeats: int) -> Iterator[dict]:
    import torch

    with tempfile.TemporaryDirectory() as folder:
        for work in works:
            with Process("plain", WORK[work]) as plain:
                plain.ask(f"sum {folder}/truth.pt")
            with Process("plain", WORK[work]) as plain:
                plain_allocated = plain.ask("allocated")["mib"]
            truth = torch.load(f"{folder}/truth.pt")
            for system in systems:
                yield compare(system, work, truth, plain_allocated, Path(folder), repeats)


def collect_on_gpu(works: Sequence[str], systems: Sequence[str], repeats: int) -> Iterator[dict]:
    """The same, where a process that starts costs more than one that waits and what it holds can be given back."""
    import torch

    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        started = {
            (work, system): stack.enter_context(Process(system, GPU_WORK[work]))
            for work in works
            for system in ("plain", *systems)
        }
        for work in works:
            plain = started[work, "plain"]
            plain.ask(f"sum {folder}/truth.pt")
            truth = torch.load(f"{folder}/truth.pt", map_location="cpu")
            for system in systems:
                row, other = empty_row(system, work), started[work, system]
                try:
                    other.ask(f"sum {folder}/sum.pt")
                    if judged(row, Path(folder, "sum.pt"), truth):
                        row |= paired(plain, other, GPU_WORK[work], repeats)
                except Failed as failure:
                    row["error"] = str(failure)
                other.end()
                yield row
            plain.end()


def described(row: dict) -> str:
    name = f"{row['work']:28} {row['system']:17}"
    if row["error"]:
        return f"{name} {row['error']}"
    off = "" if row["exact"] else f", clipped sum off by {row['max_relative_error']:.1e}"
    if row["time_over_plain"] is None:
        return f"{name} disqualified{off}"
    low, high = row["time_quartiles"] or (row["time_over_plain"],) * 2
    memory = f"memory {row['memory_over_plain']:.3f}"
    if "allocated_over_plain" in row:
        memory += f" ({row['allocated_over_plain']:.3f} of what PyTorch allocates)"
    return f"{name} time {row['time_over_plain']:.3f} ({low:.3f} to {high:.3f}), {memory}{off}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", action="append", metavar="TEXT", help="only work whose name contains this")
    parser.add_argument("--system", action="append", choices=[s for s in SYSTEMS | VARIANTS if s != "plain"])
    parser.add_argument("--repeats", type=int, default=7, help="timed pairs")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    options(parser)
    parser.add_argument("--serve", nargs=2, metavar=("SYSTEM", "WORK"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.serve:
        return serve(arguments.serve[0], Work(**json.loads(arguments.serve[1])))
    table, rows_of = (GPU_WORK, collect_on_gpu) if arguments.device == "cuda" else (WORK, collect)
    if arguments.device == "cpu" and "DPFT_MODELS" not in os.environ:
        sys.exit("DPFT_MODELS must name the folder with minilm-l6 (see benchmarks/models.py)")
    works = [name for name in table if not arguments.work or any(text in name for text in arguments.work)]
    if not works:
        sys.exit(f"No work's name contains {' or '.join(arguments.work)}: there are {', '.join(table)}.")
    systems = arguments.system or [s for s in SYSTEMS if s != "plain"]
    found = {"rows": [], "repeats": arguments.repeats, **circumstances(arguments.device)}
    for row in rows_of(works, systems, arguments.repeats):
        found["rows"].append(row)
        print(described(row), file=sys.stderr, flush=True)
        if arguments.output:  # what was measured is not lost if the rest fails
            arguments.output.write_text(json.dumps(found, indent=2) + "\n")
    deliver(found, arguments)


if __name__ == "__main__":
    main()
