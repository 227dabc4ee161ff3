"""Time and memory of a training step, private over plain, for dpft and its peers.

    DPFT_MODELS=... python benchmarks/speed.py --json [--output FILE] [--work NAME] [--system NAME]

Each system runs in a process of its own and is timed against plain training in another, in turn (A B A B): one micro-batch
(forward, backward, clipping) and one update (noise, AdamW). A step is an effective batch of 256 examples, so its time is
``256 / examples`` micro-batches and one update; the ratio is the median over the pairs, its spread their quartiles. Memory
is the process's peak resident set, libraries included; beside it stands the peak of what PyTorch allocates, which does not
depend on what the C library's allocator keeps. Before it is timed, a system's clipped sum is compared with a loop
of plain backward passes: what is not exact is disqualified and its row says so.

Systems: dpft on plain's micro-batches; dpft on those that it chooses itself; Opacus with hooks, with ghost clipping, with
functorch; opake, where it is installed. dpft draws its noise from a cryptographic generator, as always; the others from
PyTorch's. Variants, which run when they are named, are what else could be done: every gradient of a large weight made, none
made, bf16 autocast (timed though it is not exact), and plain training compiled.
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from itertools import accumulate
from pathlib import Path

from output import circumstances, deliver, options

os.environ.setdefault("HF_HUB_OFFLINE", "1")
CLIP = 1.0
EFFECTIVE = 256  # examples in a step
TOLERANCE = 1e-4
LEARNING_RATE = 1e-4


@dataclass(frozen=True)
class Work:
    """A model, what trains, and a micro-batch of ``examples`` sequences of ``tokens``."""

    model: str
    subset: str
    tokens: int
    examples: int
    layers: int = 12  # of GPT-2


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


# -- one system at one work, in a process of its own -----------------------------------------------------------------------


def made(work: Work):
    """The model with its subset, one batch, and ``losses(model, batch) -> (B,)``."""
    import torch
    import transformers
    from torch.nn.functional import cross_entropy

    import dpft
    from dpft.tasks.task import class_losses

    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(1)
    if work.model == "minilm":
        path = os.path.join(os.environ["DPFT_MODELS"], "minilm-l6")
        none = dict(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
        model = transformers.AutoModelForSequenceClassification.from_pretrained(path, num_labels=22, **none)
    else:
        none = dict(resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)
        model = transformers.GPT2LMHeadModel(transformers.GPT2Config(n_layer=work.layers, **none))
        with_linear(model)
    model = dpft.Subset(work.subset).apply(model)
    with torch.no_grad():  # a fresh LoRA's B is zero, and so would be half of the gradients that are compared
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.01 * torch.randn(parameter.shape, generator=generator)
    ids = torch.randint(1000, 20000, (work.examples, work.tokens), generator=generator)
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if work.model == "minilm":
        batch["labels"] = torch.randint(22, (work.examples,), generator=generator)
        losses = lambda model, batch: class_losses(forward(model, batch), batch["labels"])
    else:
        batch["labels"] = ids
        each = partial(cross_entropy, reduction="none")  # nothing is padded
        losses = lambda model, batch: each(forward(model, batch)[:, :-1].mT, batch["labels"][:, 1:]).mean(1)
    return model.train(), batch, losses


def with_linear(model) -> None:
    """GPT-2's Conv1D layers as nn.Linear, of the same values, so that every system has its rule for them."""
    from torch import nn
    from transformers.pytorch_utils import Conv1D

    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, Conv1D):
                linear = nn.Linear(*child.weight.shape)
                linear.weight.data, linear.bias.data = child.weight.data.T.contiguous(), child.bias.data
                setattr(module, name, linear)


def forward(model, batch):
    from dpft.tasks.task import _without_labels

    return model(**_without_labels(batch)).logits


def cut(batch: dict, size: int) -> list[dict]:
    examples = len(batch["labels"])
    return [{k: v[i : i + size] for k, v in batch.items()} for i in range(0, examples, size)]


def trainable(model) -> dict:
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


class Plain:
    def __init__(self, work: Work) -> None:
        import torch

        self.model, self.batch, self.losses = made(work)
        self.optimizer = torch.optim.AdamW(trainable(self.model).values(), lr=LEARNING_RATE)

    def micro_batch(self) -> None:
        (self.losses(self.model, self.batch).sum() / EFFECTIVE).backward()

    def update(self) -> None:
        self.optimizer.step()
        self.optimizer.zero_grad()

    def clipped_sum(self) -> dict:
        """By brute force, example by example."""
        import torch

        parameters = trainable(self.model)
        total = {name: torch.zeros_like(parameter) for name, parameter in parameters.items()}
        for part in cut(self.batch, 1):
            gradients = torch.autograd.grad(self.losses(self.model, part)[0], list(parameters.values()))
            norm = torch.stack([gradient.double().norm() for gradient in gradients]).norm()  # float32 would lose 5e-5
            for name, gradient in zip(parameters, gradients, strict=True):
                total[name].add_(gradient, alpha=float((CLIP / norm).clamp(max=1.0)))
        return total


class OfDPFT:
    def __init__(self, work: Work) -> None:
        import torch

        import dpft
        from dpft.gradients.engine import Engine

        self.work = work
        self.model, self.batch, self.losses = made(work)
        self.optimizer = torch.optim.AdamW(trainable(self.model).values(), lr=LEARNING_RATE)
        plan = dpft.Plan(
            noise_multiplier=1.0,
            sample_rate=EFFECTIVE / 1e6,
            steps=10**6,
            delta=1e-7,
            units=10**6,
            clip=dpft.FlatClip(CLIP),
        )
        self.engine = Engine(self.model, plan)
        self.engine.attach()

    def micro_batch(self) -> None:
        for part in cut(self.batch, self.engine.max_examples(self.work.tokens)):
            self.engine.accumulate(self.losses(self.model, part))

    def update(self) -> None:
        self.engine.release()
        self.optimizer.step()

    def clipped_sum(self) -> dict:
        self.micro_batch()
        total = self.engine._sum()
        found = {slot.name: slot.view(total).clone() for slot in self.engine.capture.slots}
        self.engine.discard()
        return found


class OfAuto(OfDPFT):
    """With the micro-batch that a run chooses for itself (``token_budget="auto"``), no larger than plain's."""

    def __init__(self, work: Work) -> None:
        from dpft.training.tuning import fastest_budget, free_memory

        super().__init__(work)
        first = lambda n: {name: values[:n] for name, values in self.batch.items()}
        budget = fastest_budget(
            lambda n: self.losses(self.model, first(n)),
            lambda losses: (self.engine.accumulate(losses), self.engine.discard()),
            model=self.model,
            tokens=work.tokens,
            most=min(work.examples, self.engine.max_examples(work.tokens)),
            memory=free_memory(next(self.model.parameters()).device),
        )
        self.size = max(1, budget.tokens // work.tokens)

    def micro_batch(self) -> None:
        for part in cut(self.batch, self.size):
            self.engine.accumulate(self.losses(self.model, part))


class OfVariant(OfDPFT):
    """With another choice between making the gradient of a large weight and taking its norm alone."""

    def __init__(self, work: Work, operations_per_number: float) -> None:
        from dpft.gradients.rules import linear

        linear.OPERATIONS_PER_NUMBER = operations_per_number
        super().__init__(work)


class OfBF16(OfDPFT):
    def __init__(self, work: Work) -> None:
        import torch

        super().__init__(work)
        precise = self.losses

        def losses(model, batch):
            with torch.autocast("cpu", torch.bfloat16):
                return precise(model, batch)

        self.losses = losses


class Compiled(Plain):
    def __init__(self, work: Work) -> None:
        super().__init__(work)
        self.model.compile()


class OfOpacus:
    def __init__(self, work: Work, **settings) -> None:
        import torch

        wrapper, optimizer = self.classes()
        model, self.batch, self.losses = made(work)
        self.model = wrapper(model, loss_reduction="sum", **settings)
        self.optimizer = optimizer(
            torch.optim.AdamW(trainable(model).values(), lr=LEARNING_RATE),
            noise_multiplier=1.0,
            max_grad_norm=CLIP,
            expected_batch_size=EFFECTIVE,
            loss_reduction="sum",
        )

    def classes(self) -> tuple[type, type]:
        from opacus.grad_sample import GradSampleModule
        from opacus.optimizers import DPOptimizer

        return GradSampleModule, DPOptimizer

    def backward(self) -> None:
        self.losses(self.model, self.batch).sum().backward()

    def micro_batch(self) -> None:
        self.backward()
        self.optimizer.signal_skip_step(True)
        self.optimizer.step()
        self.optimizer.zero_grad()

    def update(self) -> None:
        self.optimizer.add_noise()
        self.optimizer.original_optimizer.step()
        self.forget()

    def forget(self) -> None:
        for parameter in self.optimizer.params:
            parameter.summed_grad = parameter.grad = None

    def clipped_sum(self) -> dict:
        self.micro_batch()
        found = {n.removeprefix("_module."): p.summed_grad.clone() for n, p in trainable(self.model).items()}
        self.forget()
        return found


class OfGhost(OfOpacus):
    def classes(self) -> tuple[type, type]:
        from opacus.grad_sample.grad_sample_module_fast_gradient_clipping import GradSampleModuleFastGradientClipping
        from opacus.optimizers.optimizer_fast_gradient_clipping import DPOptimizerFastGradientClipping

        return GradSampleModuleFastGradientClipping, DPOptimizerFastGradientClipping

    def backward(self) -> None:
        from opacus.utils.fast_gradient_clipping_utils import DPTensorFastGradientClipping

        losses = self.losses(self.model, self.batch)
        DPTensorFastGradientClipping(self.model, self.optimizer, losses, loss_reduction="sum").backward()


class OfOpake:
    def __init__(self, work: Work) -> None:
        import torch
        from opake.dpsgd.clipping import clipped_grad
        from opake.dpsgd.noise import gaussian_noise
        from opake.patches import apply_model_patches, apply_runtime_patches
        from opake.random import key

        apply_runtime_patches()
        self.model, self.batch, losses = made(work)
        apply_model_patches(self.model)
        self.parameters = trainable(self.model)
        self.optimizer = torch.optim.AdamW(self.parameters.values(), lr=LEARNING_RATE)
        names = list(self.batch)

        def loss(parameters, *values):
            part = {name: value.unsqueeze(0) for name, value in zip(names, values, strict=True)}
            model = lambda **inputs: torch.func.functional_call(self.model, parameters, (), inputs)
            return losses(model, part)[0]

        self.gradient, self.clip_state = clipped_grad(
            loss, clipping_norm=CLIP, batch_argnums=tuple(range(1, 1 + len(names))), normalize_by=1.0
        )
        self.noise, self.noise_state = gaussian_noise(noise_multiplier=1.0, key=key(42))

    def micro_batch(self) -> None:
        parameters = {name: parameter.detach() for name, parameter in self.parameters.items()}
        found, self.clip_state = self.gradient(parameters, *self.batch.values(), state=self.clip_state)
        self.total = found  # the same object for every micro-batch: opake's own loop adds them up outside

    def update(self) -> None:
        noisy, self.noise_state = self.noise(self.total, self.noise_state)
        for name, parameter in self.parameters.items():
            parameter.grad = noisy.pytree[name] / EFFECTIVE
        self.optimizer.step()

    def clipped_sum(self) -> dict:
        self.micro_batch()
        return {name: gradient.clone() for name, gradient in self.total.pytree.items()}


SYSTEMS: dict[str, Callable] = {
    "plain": Plain,
    "dpft": OfDPFT,
    "dpft auto": OfAuto,
    "opacus hooks": OfOpacus,
    "opacus ghost": partial(OfGhost, max_grad_norm=CLIP, use_ghost_clipping=True),
    "opacus functorch": partial(OfOpacus, force_functorch=True),
    "opake": OfOpake,
}
VARIANTS: dict[str, Callable] = {
    "dpft, all made": partial(OfVariant, operations_per_number=0),
    "dpft, none made": partial(OfVariant, operations_per_number=1e12),
    "dpft, bf16": OfBF16,
    "plain, compiled": Compiled,
}


def serve(system: str, work: Work) -> None:
    """Do what standard input says, a line at a time: ``sum PATH``, ``time``, ``parameters``, ``flops``, ``peak``, ``allocated``."""
    import warnings

    import torch

    warnings.simplefilter("ignore")
    channel, sys.stdout = sys.stdout, sys.stderr
    make = lambda: (SYSTEMS | VARIANTS)[system](work)
    worker = None
    for line in sys.stdin:
        word, _, rest = line.strip().partition(" ")
        try:
            worker = worker or (make() if word != "allocated" else None)
            if word == "allocated":
                answer = {"mib": allocated(make) / 2**20}
            elif word == "sum":
                torch.save(worker.clipped_sum(), rest)
                answer = {}
            elif word == "time":
                answer = {"micro_batch": timed(worker.micro_batch), "update": timed(worker.update)}
            elif word == "parameters":
                answer = {"parameters": sum(parameter.numel() for parameter in trainable(worker.model).values())}
            elif word == "flops":
                answer = {"flops": counted(worker.micro_batch), **rates()}
            else:
                answer = {"mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024}
        except Exception as error:  # noqa: BLE001  (a peer may raise anything: its row says what)
            text = str(error).strip()
            answer = {"error": f"{type(error).__name__}: {text.splitlines()[0][:200] if text else ''}"}
        print(json.dumps(answer), file=channel, flush=True)


def timed(action: Callable[[], None]) -> float:
    since = time.perf_counter()
    action()
    return time.perf_counter() - since


def allocated(make: Callable) -> int:
    """The most bytes that PyTorch holds at once, from before the model is made to the end of the second step."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        worker = make()
        for _ in range(2):
            worker.micro_batch()
            worker.micro_batch()
            worker.update()
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


# -- pairs of processes ----------------------------------------------------------------------------------------------------


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
    row = {"system": system, "work": name, "exact": None, "error": None, "time_over_plain": None}
    row |= {"time_quartiles": None, "memory_over_plain": None, "seconds": None, "max_relative_error": None}
    try:
        with Process(system, work) as other:
            other.ask(f"sum {folder / 'sum.pt'}")
        error = relative_error(folder / "sum.pt", truth)
        row |= {"exact": error < TOLERANCE, "max_relative_error": error}
        if not row["exact"] and system in SYSTEMS:
            return row
        with Process("plain", work) as plain, Process(system, work) as other:
            for process in (plain, other):
                process.ask("time")  # warm up
            pairs = [(plain.ask("time"), other.ask("time")) for _ in range(repeats)]
            ratios = [step_time(b, work) / step_time(a, work) for a, b in pairs]
            row["time_over_plain"] = statistics.median(ratios)
            row["time_quartiles"] = statistics.quantiles(ratios, n=4)[::2] if repeats > 1 else None
            row["seconds"] = statistics.median(step_time(b, work) for _, b in pairs)
            row["plain_seconds"] = statistics.median(step_time(a, work) for a, _ in pairs)
            row["update_seconds"] = statistics.median(b["update"] for _, b in pairs)
            row["mib"], row["plain_mib"] = other.ask("peak")["mib"], plain.ask("peak")["mib"]
            row["memory_over_plain"] = row["mib"] / row["plain_mib"]
        with Process(system, work) as other:
            row["allocated_mib"], row["plain_allocated_mib"] = other.ask("allocated")["mib"], plain_allocated
            row["allocated_over_plain"] = row["allocated_mib"] / plain_allocated
    except Failed as failure:
        row["error"] = str(failure)
    return row


def step_time(parts: dict, work: Work) -> float:
    """Seconds for an effective batch, by its parts."""
    return parts["micro_batch"] * EFFECTIVE / work.examples + parts["update"]


def relative_error(path: Path, truth: dict) -> float:
    """‖sum − truth‖ / ‖truth‖ over all parameters; infinite if they are not the same."""
    import torch

    found = torch.load(path)
    if found.keys() != truth.keys():
        return float("inf")
    difference = torch.stack([(found[name].float() - truth[name]).norm() for name in truth]).norm()
    return float(difference / torch.stack([value.norm() for value in truth.values()]).norm())


def collect(works: Sequence[str], systems: Sequence[str], repeats: int) -> list[dict]:
    import torch

    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for work in works:
            with Process("plain", WORK[work]) as plain:
                plain.ask(f"sum {folder}/truth.pt")
            with Process("plain", WORK[work]) as plain:
                plain_allocated = plain.ask("allocated")["mib"]
            truth = torch.load(f"{folder}/truth.pt")
            for system in systems:
                rows.append(compare(system, work, truth, plain_allocated, Path(folder), repeats))
                print(described(rows[-1]), file=sys.stderr, flush=True)
    return rows


def described(row: dict) -> str:
    name = f"{row['work']:28} {row['system']:17}"
    if row["error"]:
        return f"{name} {row['error']}"
    off = "" if row["exact"] else f", clipped sum off by {row['max_relative_error']:.1e}"
    if row["time_over_plain"] is None:
        return f"{name} disqualified{off}"
    low, high = row["time_quartiles"] or (row["time_over_plain"],) * 2
    memory = f"memory {row['memory_over_plain']:.3f} ({row['allocated_over_plain']:.3f} of what PyTorch allocates)"
    return f"{name} time {row['time_over_plain']:.3f} ({low:.3f} to {high:.3f}), {memory}{off}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", action="append", metavar="TEXT", help="only work whose name contains this")
    parser.add_argument("--system", action="append", choices=[s for s in SYSTEMS | VARIANTS if s != "plain"])
    parser.add_argument("--repeats", type=int, default=7, help="timed pairs")
    options(parser)
    parser.add_argument("--serve", nargs=2, metavar=("SYSTEM", "WORK"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.serve:
        return serve(arguments.serve[0], Work(**json.loads(arguments.serve[1])))
    if "DPFT_MODELS" not in os.environ:
        sys.exit("DPFT_MODELS must name the folder with minilm-l6 (see benchmarks/models.py)")
    works = [name for name in WORK if not arguments.work or any(text in name for text in arguments.work)]
    if not works:
        sys.exit(f"No work's name contains {' or '.join(arguments.work)}: there are {', '.join(WORK)}.")
    rows = collect(works, arguments.system or [s for s in SYSTEMS if s != "plain"], arguments.repeats)
    deliver({"rows": rows, "repeats": arguments.repeats, **circumstances()}, arguments)


if __name__ == "__main__":
    main()
