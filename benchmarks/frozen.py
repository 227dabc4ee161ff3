"""A head over a frozen encoder, ten epochs of ICD-10 diagnoses, end to end: dpft against Opacus.

    pip install -e ".[demo]"; python benchmarks/frozen.py --json [--rows 4000] [--output FILE]

dpft    DPTrainer: the encoder's output is computed once for each diagnosis and kept, encrypted, as long as the run
opacus  PrivacyEngine.make_private with Poisson batches and BatchMemoryManager, hooks on the head alone

Each runs in a process of its own. Timed is everything from the loaded model to the last step: tokenizing, the
preflight, filling, training. Before that, both make the clipped sum of the same 64 diagnoses, which must agree.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time

from output import circumstances, deliver, options

os.environ.setdefault("HF_HUB_OFFLINE", "1")
BATCH, CLIP, LENGTH = 256, 1.0, 48


def loaded(count: int):
    import torch
    import transformers

    import dpft
    from dpft.workflows.demo import diagnoses, model_path

    torch.manual_seed(0)
    rows = [{"text": text, "label": label} for text, label in diagnoses()[:count]]
    labels = [f"chapter {i}" for i in range(1, 23)]
    model = transformers.AutoModelForSequenceClassification.from_pretrained(
        model_path(), num_labels=len(labels), hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0
    )
    tokenizer = transformers.AutoTokenizer.from_pretrained(model_path())
    task = dpft.SequenceClassification(tokenizer, labels, max_length=LENGTH)
    model = dpft.Subset('layers("classifier.*")').apply(model)
    return model.train(), task, rows


def of_dpft(count: int, epochs: int) -> dict:
    from transformers import TrainingArguments

    import dpft
    from dpft.gradients.engine import Engine

    model, task, rows = loaded(count)
    plan = dpft.Plan(
        noise_multiplier=1.0,
        sample_rate=BATCH / count,
        steps=epochs * count // BATCH,
        delta=1e-6,
        units=count,
        clip=dpft.FlatClip(CLIP),
    )
    some = task.collate(task.encode({key: [row[key] for row in rows[:64]] for key in rows[0]}))
    with Engine(model, plan) as engine:
        engine.accumulate(task.losses(model, some))
        total = engine._sum()
        sums = {p.name: p.view(total).clone() for p in engine.capture.map.trainables}
    since = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        settings = dict(output_dir=folder, report_to=[], disable_tqdm=True, save_strategy="no", logging_strategy="no")
        trainer = dpft.DPTrainer(
            model=model,
            args=TrainingArguments(**settings, learning_rate=1e-3),
            train_dataset=rows,
            plan=plan,
            task=task,
        )
        trainer.train()
    return {"seconds": time.perf_counter() - since, "kept": trainer.session.prefix.name, "sums": sums}


def of_opacus(count: int, epochs: int) -> dict:
    import torch
    from opacus import PrivacyEngine
    from opacus.utils.batch_memory_manager import BatchMemoryManager
    from torch.utils.data import DataLoader

    model, task, rows = loaded(count)
    some = task.collate(task.encode({key: [row[key] for row in rows[:64]] for key in rows[0]}))
    since = time.perf_counter()
    features = task.encode({key: [row[key] for row in rows] for key in rows[0]})
    loader = DataLoader(features, batch_size=BATCH, collate_fn=task.collate)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    model, optimizer, loader = PrivacyEngine().make_private(
        module=model, optimizer=optimizer, data_loader=loader, noise_multiplier=1.0, max_grad_norm=CLIP
    )
    task.losses(model, some).mean().backward()
    optimizer.clip_and_accumulate()
    sums = {n.removeprefix("_module."): p.summed_grad.clone() for n, p in model.named_parameters() if p.requires_grad}
    for parameter in optimizer.params:
        parameter.summed_grad = None
    optimizer.zero_grad()
    for _ in range(epochs):
        with BatchMemoryManager(data_loader=loader, max_physical_batch_size=64, optimizer=optimizer) as batches:
            for batch in batches:
                optimizer.zero_grad()
                task.losses(model, batch).mean().backward()
                optimizer.step()
    return {"seconds": time.perf_counter() - since, "sums": sums}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=4000)
    parser.add_argument("--epochs", type=int, default=10)
    options(parser)
    parser.add_argument("--system", nargs=2, metavar=("NAME", "FILE"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    import torch

    if arguments.system:
        found = {"dpft": of_dpft, "opacus": of_opacus}[arguments.system[0]](arguments.rows, arguments.epochs)
        return torch.save(found, arguments.system[1])
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        for system in ("dpft", "opacus"):
            file = f"{folder}/{system}.pt"
            settings = [f"--rows={arguments.rows}", f"--epochs={arguments.epochs}"]
            subprocess.run([sys.executable, __file__, *settings, "--system", system, file], check=True)
            found[system] = torch.load(file)
    sums = [found[system].pop("sums") for system in ("dpft", "opacus")]
    error = max(float((sums[0][name] - sums[1][name]).norm() / sums[1][name].norm()) for name in sums[1])
    result = {
        "opacus_over_dpft_time": found["opacus"]["seconds"] / found["dpft"]["seconds"],
        "clipped_sums_differ_by": error,
        "rows": arguments.rows,
        "epochs": arguments.epochs,
        **found,
        **circumstances(),
    }
    text = (
        f"opacus {found['opacus']['seconds']:.0f} s, dpft {found['dpft']['seconds']:.0f} s: "
        f"{result['opacus_over_dpft_time']:.1f} times; clipped sums differ by {error:.1e}"
    )
    deliver(result, arguments, text)


if __name__ == "__main__":
    main()
