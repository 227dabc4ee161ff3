"""Examples per second on real texts of very different lengths: private training beside plain training and Opacus.

    DPFT_DATA=... DPFT_MODELS=... python benchmarks/throughput.py --json [--set dialogues] [--batch 256]

SmolLM2-135M with LoRA; every system trains one step on the same ``--batch`` texts, with AdamW:

plain    transformers.Trainer + PEFT with its defaults: random micro-batches of 8, accumulated to the whole batch
opacus   hooks, with BatchMemoryManager(max_physical_batch_size=8), which cuts the batch as it comes
dpft     DPTrainer with its defaults
sorted   no privacy: plain backward passes over dpft's own micro-batches, cut from sorted texts by 1,024 padded tokens

Each is a process of its own, and they take turns of one micro-batch, so that a machine that drifts drifts for all:
plain, dpft and sorted, then Opacus and dpft once more, because plain and Opacus may need 16 GiB each. Time is
that of the step: sampling, collation, noise and update included; loading, preflight and tuning excluded. Memory is the
process's peak.
The floor is the time of ``sorted`` less the share of its tokens that are padding: what remains is what the texts cost.
"""

import argparse
import ctypes
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence

from output import circumstances, deliver, options

SETS = {
    "dialogues": ("mts_dialog/train.csv", "dialogue"),
    "notes": ("mts_dialog/train.csv", "section_text"),
    "appeals": ("nm_appeals/train.jsonl", "text"),
}
MICRO_BATCH = 8
SORTED_TOKENS = 1024


class Turns:
    """The clock of one system: it runs while it is the system's turn."""

    def __init__(self) -> None:
        self.seconds, self.examples, self._channel = 0.0, 0, sys.stdout
        sys.stdout = sys.stderr

    def begin(self) -> None:
        """Be ready, and wait for the first turn."""
        self._wait()

    def done(self, examples: int) -> None:
        """So many more examples went through the model; the next turn may be another's."""
        self.seconds += time.perf_counter() - self._since
        self.examples += examples
        self._wait()

    def end(self) -> None:
        self.seconds += time.perf_counter() - self._since
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        self._say(seconds=self.seconds, peak_memory_mib=peak)

    def _wait(self) -> None:
        if sys.platform == "linux":  # what is free goes back, or the systems that wait would fill the memory together
            ctypes.CDLL(None).malloc_trim(0)
        self._say(examples=self.examples)
        sys.stdin.readline()
        self._since = time.perf_counter()

    def _say(self, **facts) -> None:
        print(json.dumps(facts), file=self._channel, flush=True)


class Texts:
    """The model, the task and the batch that every system trains on."""

    def __init__(self, name: str, batch: int, max_length: int) -> None:
        import numpy as np
        import transformers

        import dpft
        from dpft.training.batches import Examples
        from dpft.training.data import read

        transformers.set_seed(0)
        file, column = SETS[name]
        path = os.path.join(os.environ["DPFT_MODELS"], "smollm2-135m")
        model = transformers.AutoModelForCausalLM.from_pretrained(path)
        self.task = dpft.CausalLM(transformers.AutoTokenizer.from_pretrained(path), text=column, max_length=max_length)
        self.model = dpft.Subset("lora(rank=8)").apply(model)
        rows = read(os.path.join(os.environ["DPFT_DATA"], file))
        self.rows = rows.select(np.random.default_rng(0).choice(len(rows), batch, replace=False))
        self.examples = Examples.encode(self.rows, self.task)

    def losses(self, model, batch: dict):
        """Those of training without dpft, which makes all logits (their cross-entropy is dpft's, which is faster than
        PyTorch's)."""
        from dpft.tasks.losses import token_losses, without_labels

        return token_losses(model(**without_labels(batch)).logits, batch["labels"], shift=True)

    @property
    def parameters(self) -> list:
        return [parameter for parameter in self.model.parameters() if parameter.requires_grad]


def plain(texts: Texts, turns: Turns) -> None:
    import transformers

    class Pauses(transformers.TrainerCallback):
        def on_train_begin(self, *_, **__) -> None:
            turns.begin()

        def on_substep_end(self, *_, **__) -> None:
            turns.done(MICRO_BATCH)

        def on_step_end(self, *_, **__) -> None:
            turns.end()

    arguments = transformers.TrainingArguments(
        **quiet(),
        per_device_train_batch_size=MICRO_BATCH,
        gradient_accumulation_steps=len(texts.examples) // MICRO_BATCH,
        max_steps=1,
        dataloader_pin_memory=False,
    )
    transformers.Trainer(
        model=texts.model,
        args=arguments,
        train_dataset=texts.examples.features,
        data_collator=texts.task.collate,
        callbacks=[Pauses()],
    ).train()


def opacus(texts: Texts, turns: Turns) -> None:
    import torch
    from opacus import GradSampleModule
    from opacus.optimizers import DPOptimizer
    from opacus.utils.batch_memory_manager import BatchMemoryManager

    batch = len(texts.examples)
    model = GradSampleModule(texts.model.train())
    optimizer = DPOptimizer(
        torch.optim.AdamW(texts.parameters, lr=1e-3), noise_multiplier=1.0, max_grad_norm=1.0, expected_batch_size=batch
    )
    loader = torch.utils.data.DataLoader(
        texts.examples.features, batch_size=batch, shuffle=True, collate_fn=texts.task.collate
    )
    turns.begin()
    with BatchMemoryManager(data_loader=loader, max_physical_batch_size=MICRO_BATCH, optimizer=optimizer) as batches:
        for part in batches:
            optimizer.zero_grad()
            texts.losses(model, part).mean().backward()
            optimizer.step()
            turns.done(len(part["labels"]))
    turns.end()


def dpft(texts: Texts, turns: Turns) -> None:
    import transformers

    import dpft

    batch = len(texts.examples)
    plan = dpft.Plan(noise_multiplier=1.0, sample_rate=1.0, steps=1, delta=1e-5, units=batch)
    losses, started, held = texts.task.losses, [], []

    def paused(model, part):
        if held:  # what began with the micro-batch before is finished when the next one begins
            turns.done(held.pop())
        if started:
            held.append(len(part["labels"]))
        return losses(model, part)

    class Clock(transformers.TrainerCallback):
        def on_train_begin(self, *_, **__) -> None:
            started.append(True)
            turns.begin()

        def on_step_end(self, *_, **__) -> None:
            turns.end()

    texts.task.losses = paused
    trainer = dpft.DPTrainer(
        model=texts.model,
        args=transformers.TrainingArguments(**quiet()),
        train_dataset=texts.rows,
        plan=plan,
        task=texts.task,
        callbacks=[Clock()],
    )
    trainer.train()


def without_padding(texts: Texts, turns: Turns) -> None:
    import torch

    from dpft.training.batches import plain_batches

    texts.model.train()
    optimizer = torch.optim.AdamW(texts.parameters, lr=1e-3)
    turns.begin()
    for part in plain_batches(texts.examples, texts.task, SORTED_TOKENS):
        texts.losses(texts.model, part).sum().backward()
        turns.done(len(part["labels"]))
    optimizer.step()
    turns.end()


SYSTEMS: dict[str, Callable] = {"plain": plain, "opacus": opacus, "dpft": dpft, "sorted": without_padding}
ROUNDS = [("plain", "dpft", "sorted"), ("opacus", "dpft")]  # who takes turns with whom


def quiet() -> dict:
    return dict(
        output_dir=tempfile.mkdtemp(),
        learning_rate=1e-3,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        logging_strategy="no",
    )


class Process:
    """One system at work on one set, a turn at a time."""

    def __init__(self, system: str, settings: list[str]) -> None:
        command = [sys.executable, __file__, "--system", system, *settings]
        self._errors = tempfile.TemporaryFile("w+")
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._errors, text=True
        )
        self.examples, self.found = 0, None

    def ready(self) -> None:
        line = self._process.stdout.readline()
        if not line:
            self._errors.seek(0)
            sys.exit(self._errors.read()[-2000:])
        answer = json.loads(line)
        self.examples = answer.get("examples", self.examples)
        if "seconds" in answer:
            self.found = answer
            self._process.kill()

    def turn(self) -> None:
        print("go", file=self._process.stdin, flush=True)
        self.ready()


def take_turns(systems: Sequence[str], settings: list[str]) -> dict[str, dict]:
    """What each found: its seconds and its peak memory."""
    at_work = {system: Process(system, settings) for system in systems}
    for process in at_work.values():
        process.ready()
    while waiting := [process for process in at_work.values() if process.found is None]:
        min(waiting, key=lambda process: process.examples).turn()
    return {system: process.found for system, process in at_work.items()}


def compare(name: str, batch: int, max_length: int) -> dict:
    """One set: who did how much in what time."""
    settings = ["--set", name, "--batch", str(batch), "--max-length", str(max_length)]
    first, second = (take_turns(systems, settings) for systems in ROUNDS)
    found = second | first  # dpft beside plain, but for the ratio to Opacus
    seconds = {system: found[system]["seconds"] for system in SYSTEMS}
    memory = {system: found[system]["peak_memory_mib"] for system in SYSTEMS}
    tokens, padded = padding(name, batch, max_length)
    floor = seconds["sorted"] * tokens / padded
    return {
        "set": name,
        "examples": batch,
        "tokens": tokens,
        "seconds": seconds,
        "examples_per_second": {system: batch / time for system, time in seconds.items()},
        "peak_memory_mib": memory,
        "floor_seconds": floor,
        "dp_over_plain_throughput": seconds["plain"] / seconds["dpft"],
        "dp_over_opacus_throughput": second["opacus"]["seconds"] / second["dpft"]["seconds"],
        "dp_over_floor_time": seconds["dpft"] / floor,
        "dp_over_plain_peak_memory": memory["dpft"] / memory["plain"],
        "dp_over_opacus_peak_memory": memory["dpft"] / memory["opacus"],
    }


def padding(name: str, batch: int, max_length: int) -> tuple[int, int]:
    """The batch's true tokens, and those of the sorted micro-batches."""
    from dpft.training.batches import cut

    lengths = Texts(name, batch, max_length).examples.lengths
    groups = cut(lengths, range(batch), token_budget=SORTED_TOKENS)
    return int(lengths.sum()), sum(int(lengths[group].max()) * len(group) for group in groups)


def described(row: dict) -> str:
    return (
        f"{row['set']:<10} dpft {row['examples_per_second']['dpft']:.2f} examples/s: "
        f"{row['dp_over_plain_throughput']:.2f} times plain at {row['dp_over_plain_peak_memory']:.2f} of its memory, "
        f"{row['dp_over_opacus_throughput']:.2f} times Opacus at {row['dp_over_opacus_peak_memory']:.2f}; "
        f"{row['dp_over_floor_time']:.2f} times the floor's time"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--set", action="append", choices=list(SETS))
    parser.add_argument("--batch", type=int, default=256, help=f"texts in the step, a multiple of {MICRO_BATCH}")
    parser.add_argument("--max-length", type=int, default=1024)
    options(parser)
    parser.add_argument("--system", choices=list(SYSTEMS), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    missing = [name for name in ("DPFT_DATA", "DPFT_MODELS") if name not in os.environ]
    if missing:
        sys.exit(
            f"{' and '.join(missing)} must name the folders with the sets and smollm2-135m (see benchmarks/models.py)"
        )
    sets = arguments.set or list(SETS)
    if arguments.system:
        turns = Turns()
        return SYSTEMS[arguments.system](Texts(sets[0], arguments.batch, arguments.max_length), turns)
    rows = []
    for name in sets:
        rows.append(compare(name, arguments.batch, arguments.max_length))
        print(described(rows[-1]), file=sys.stderr, flush=True)
    first = {key: rows[0][key] for key in ("dp_over_plain_throughput", "dp_over_plain_peak_memory")}
    settings = {"model": "smollm2-135m", "subset": "lora(rank=8)", "max_length": arguments.max_length}
    deliver({**first, "rows": rows, "settings": settings, **circumstances()}, arguments)


if __name__ == "__main__":
    main()
