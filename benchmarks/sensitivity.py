"""By how much one unit moves the clipped sum of a real model, and how much of that is other units' rounding.

Two sums are taken over the same private draw, with and without one text, as a run takes them: sorted, cut into
micro-batches, clipped, added up. What is left when the text's own clipped gradient is taken off is how far all others
moved, because their micro-batches are cut in other places and products of another shape are rounded in another way. The
sum itself adds nothing to it.

    python -m benchmarks.sensitivity --models models --output benchmarks/results/sensitivity.json
"""

import argparse
import json
import platform
from pathlib import Path

import torch
import transformers

from dpft import Engine, Examples, Plan, SecureRandomness, SequenceClassification, Subset
from dpft.demo import diagnoses
from dpft.tasks import CausalLM
from dpft.training.batches import cut

LABELS = [f"chapter {i}" for i in range(1, 23)]


class Silent(SecureRandomness):
    def gaussians(self, n, device=None):
        yield torch.zeros(n, dtype=torch.float64)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", type=Path, default=Path("models"))
    parser.add_argument("--output", type=Path)
    given = parser.parse_args()
    found = []
    for model, subset, dtype, units in (
        ("minilm-l6", "lora(rank=8) + head", "float32", 10_000),
        ("minilm-l6", "lora(rank=8) + head", "bfloat16", 1_000),
        ("minilm-l6", "last_blocks(1) + head", "float32", 2_000),
        ("smollm2-135m", "lora(rank=8)", "float32", 100),
        ("smollm2-135m", "lora(rank=8)", "bfloat16", 100),
    ):
        found.append(measured(given.models / model, subset, dtype, units))
        print(json.dumps(found[-1]), flush=True)
    if given.output:
        facts = {"torch": torch.__version__, "machine": f"{platform.machine()}, {torch.get_num_threads()} threads"}
        given.output.write_text(json.dumps({**facts, "rows": found}, indent=2) + "\n", encoding="utf-8")


def measured(path: Path, subset: str, dtype: str, units: int) -> dict:
    transformers.set_seed(0)
    tokenizer = transformers.AutoTokenizer.from_pretrained(path)
    rows = [{"text": text, "label": label} for text, label in diagnoses()[:units]]
    if "minilm" in path.name:
        kind, task = (
            transformers.AutoModelForSequenceClassification,
            SequenceClassification(tokenizer, LABELS, max_length=48),
        )
        model = kind.from_pretrained(path, num_labels=len(LABELS), dtype=dtype)
    else:
        kind, task = transformers.AutoModelForCausalLM, CausalLM(tokenizer, max_length=64)
        model = kind.from_pretrained(path, dtype=dtype)
    model = Subset(subset).apply(model)
    for parameter in model.parameters():
        if parameter.requires_grad:  # a fresh adapter's zeros would leave half of it without a gradient
            parameter.data += 0.01 * torch.randn(parameter.shape).to(parameter)
    model.eval()
    examples = Examples.encode(rows, task)
    plan = Plan(noise_multiplier=1.0, sample_rate=1.0, steps=9, delta=1e-9, units=units)
    with Engine(model, plan, Silent()) as engine:

        def clipped_sum(places: list[int]) -> torch.Tensor:
            lengths = examples.lengths[places]
            for group in cut(lengths, range(len(places)), token_budget=1024, max_examples=engine.max_examples):
                batch = task.collate([examples.features[places[i]] for i in group])
                engine.accumulate(task.losses(model, batch))
            total = engine._sum().clone()
            engine.discard()
            return total

        everyone = list(range(units))
        leaves = int(examples.lengths.argmax())  # the longest, which shifts where all others are cut
        whole, without = clipped_sum(everyone), clipped_sum([i for i in everyone if i != leaves])
        own = clipped_sum([leaves])
    moved = whole - without
    return {
        "model": path.name,
        "subset": subset,
        "dtype": dtype,
        "units": units,
        "moved_by_one_unit": round(float(moved.norm()), 7),
        "others_moved": float(f"{float((moved - own).norm()):.2g}"),
    }


if __name__ == "__main__":
    main()
