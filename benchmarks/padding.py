"""How many tokens padding adds: random batches against the token-budget cut, on the real sets in DPFT_DATA.

DPFT_DATA=... DPFT_MODELS=... python benchmarks/padding.py --json
"""

import argparse
import os

import numpy as np
from output import deliver, options
from transformers import AutoTokenizer

from dpft.training.batches import cut
from dpft.training.data import read

SETS = {
    "mts_dialog dialogues": ("mts_dialog/train.csv", "dialogue"),
    "mts_dialog notes": ("mts_dialog/train.csv", "section_text"),
    "nm_appeals paragraphs": ("nm_appeals/train.jsonl", "text"),
    "uit_vsfc feedback": ("uit_vsfc/train.csv", "text"),
}


def measure(file: str, column: str, tokenizer, *, batch: int, token_budget: int, logical: int) -> dict:
    """Padded tokens per true token, over one pass in random logical batches."""
    texts = read(os.path.join(os.environ["DPFT_DATA"], file))[column]
    lengths = np.array(
        [len(ids) for ids in tokenizer([text or " " for text in texts], truncation=True, max_length=1024)["input_ids"]]
    )
    order = np.random.default_rng(0).permutation(len(lengths))
    at_random = sum(
        int(lengths[order[i : i + batch]].max()) * len(order[i : i + batch]) for i in range(0, len(order), batch)
    )
    by_length = 0
    for start in range(0, len(order), logical):
        drawn = lengths[order[start : start + logical]]
        by_length += sum(
            int(drawn[group].max()) * len(group) for group in cut(drawn, range(len(drawn)), token_budget=token_budget)
        )
    true = int(lengths.sum())
    return {
        "examples": len(lengths),
        "tokens": true,
        "random": at_random / true,
        "sorted": by_length / true,
        "random_over_sorted": at_random / by_length,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=16, help="size of a random micro-batch")
    parser.add_argument("--token-budget", type=int, default=1024)
    parser.add_argument("--logical", type=int, default=256, help="examples of a logical batch")
    options(parser)
    arguments = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(os.path.join(os.environ["DPFT_MODELS"], "smollm2-135m"))
    rows = []
    for name, (file, column) in SETS.items():
        found = measure(
            file,
            column,
            tokenizer,
            batch=arguments.batch,
            token_budget=arguments.token_budget,
            logical=arguments.logical,
        )
        rows.append({"set": name, **found})
        if not arguments.json:
            print(
                f"{name:<24} {found['tokens']:>10,} tokens; padded to {found['random']:.2f}x at random, "
                f"{found['sorted']:.2f}x sorted: {found['random_over_sorted']:.2f} times fewer"
            )
    found = {
        "rows": rows,
        "batch": arguments.batch,
        "token_budget": arguments.token_budget,
        "logical_batch": arguments.logical,
    }
    deliver(found, arguments)


if __name__ == "__main__":
    main()
