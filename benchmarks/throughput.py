"""Examples per second of private training against plain training, on real dialogues of very different lengths.

    DPFT_DATA=... DPFT_MODELS=... python benchmarks/throughput.py --json

plain   transformers.Trainer + PEFT with its defaults: random micro-batches of 8, accumulated to the effective batch
dpft    DPTrainer, the same model, adapter, optimizer and expected batch; micro-batches sorted by length

Each runs in a process of its own, in turn (plain, dpft, plain, dpft, ...); ratios are of the medians. The time counted is that of
the training steps, sampling, collation and noise included, loading and preflight excluded; the memory is the process's peak.
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

from output import circumstances, deliver, options

DATA = "mts_dialog/train.csv"


class Clock:
    """Time spent in training steps, and how many examples went through the model in them."""

    def __init__(self):
        self.seconds, self.examples, self._since = 0.0, 0, 0.0

    def callback(self):
        from transformers import TrainerCallback

        clock = self

        class Steps(TrainerCallback):
            def on_train_begin(self, args, state, control, **_):
                clock._since = time.perf_counter()

            def on_step_end(self, args, state, control, **_):
                clock.seconds = time.perf_counter() - clock._since

        return Steps()


def measure(system: str, batch: int, steps: int, max_length: int) -> dict:
    import torch
    import transformers

    import dpft
    from dpft.training.data import read

    clock = Clock()
    transformers.set_seed(0)
    path = os.path.join(os.environ["DPFT_MODELS"], "smollm2-135m")
    model = transformers.AutoModelForCausalLM.from_pretrained(path)
    task = dpft.CausalLM(transformers.AutoTokenizer.from_pretrained(path), text="dialogue", max_length=max_length)
    rows = read(os.path.join(os.environ["DPFT_DATA"], DATA))
    model = dpft.Subset("lora(rank=8)").apply(model)
    common = dict(
        output_dir=tempfile.mkdtemp(),
        learning_rate=1e-3,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        logging_strategy="no",
    )
    if system == "plain":
        features = task.encode(rows[:])

        arguments = transformers.TrainingArguments(
            **common,
            per_device_train_batch_size=8,
            gradient_accumulation_steps=batch // 8,
            max_steps=steps,
            dataloader_pin_memory=False,
        )
        trainer = transformers.Trainer(
            model=model,
            args=arguments,
            train_dataset=features,
            data_collator=task.collate,
            callbacks=[clock.callback()],
        )
    else:
        plan = dpft.Plan(noise_multiplier=1.0, sample_rate=batch / len(rows), steps=steps, delta=1e-5, units=len(rows))
        trainer = dpft.DPTrainer(
            model=model,
            args=transformers.TrainingArguments(**common),
            train_dataset=rows,
            plan=plan,
            task=task,
            callbacks=[clock.callback()],
        )
        losses = task.losses

        def counted(model, batch):
            if trainer.engine is not None and trainer.preflight is not None:
                clock.examples += len(batch["labels"])
            return losses(model, batch)

        task.losses = counted
    trainer.train()
    if system == "plain":
        clock.examples = batch * steps
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return {
        "system": system,
        "examples": clock.examples,
        "seconds": clock.seconds,
        "examples_per_second": clock.examples / clock.seconds,
        "peak_memory_mib": peak,
        "torch": torch.__version__,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=32, help="effective batch, a multiple of 8")
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--max-length", type=int, default=1024)
    options(parser)
    parser.add_argument("--system", choices=["plain", "dpft"], help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.system:
        print(json.dumps(measure(arguments.system, arguments.batch, arguments.steps, arguments.max_length)))
        return
    missing = [name for name in ("DPFT_DATA", "DPFT_MODELS") if name not in os.environ]
    if missing:
        sys.exit(
            f"{' and '.join(missing)} must name the folders with {DATA} and smollm2-135m (see benchmarks/models.py)"
        )
    runs = []
    for _ in range(arguments.repeats):
        for system in ("plain", "dpft"):
            settings = [
                f"--batch={arguments.batch}",
                f"--steps={arguments.steps}",
                f"--max-length={arguments.max_length}",
            ]
            result = subprocess.run(
                [sys.executable, __file__, "--system", system, *settings], capture_output=True, text=True
            )
            if result.returncode:
                sys.exit(result.stderr)
            runs.append(json.loads(result.stdout.splitlines()[-1]))
            print(
                f"{system:<6} {runs[-1]['examples_per_second']:.3f} examples/s, peak {runs[-1]['peak_memory_mib']:,.0f} MiB",
                file=sys.stderr,
            )
    median = lambda system, key: statistics.median(run[key] for run in runs if run["system"] == system)
    found = {
        "dp_over_plain_throughput": median("dpft", "examples_per_second") / median("plain", "examples_per_second"),
        "dp_over_plain_peak_memory": median("dpft", "peak_memory_mib") / median("plain", "peak_memory_mib"),
        "runs": runs,
        "settings": {
            "data": DATA,
            "model": "smollm2-135m",
            "subset": "lora(rank=8)",
            "batch": arguments.batch,
            "steps": arguments.steps,
            "max_length": arguments.max_length,
        },
        **circumstances(),
    }
    text = f"dpft over plain: {found['dp_over_plain_throughput']:.2f} times the examples/s, {found['dp_over_plain_peak_memory']:.2f} times the peak memory"
    deliver(found, arguments, text)


if __name__ == "__main__":
    main()
