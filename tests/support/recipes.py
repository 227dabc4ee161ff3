"""Recipes of small models and small data: as tables, and on disk as a user has them."""

import csv

import transformers
from tokenizers import Tokenizer, models, pre_tokenizers

from tests.support.zoo import Case

GOOD = {
    "subset": "lora(rank=8) + head",
    "model": {"path": "model"},
    "task": {"name": "sequence_classification", "labels": ["a", "b"]},
    "data": {"train": "train.csv", "units": 1000},
    "privacy": {"epsilon": 3.0, "delta": 1e-5, "batch_size": 100, "steps": 10},
}

WORDS = ["<pad>", "<unk>", "<eos>"] + [f"w{i}" for i in range(57)]

VOCABULARY = ["<pad>", "<unk>", "<eos>", ".", "a", *"0123456789"]
NAMES = ["k" + a + b for a in "abcdefghijklmnopqr" for b in "abcdefghijklmnopqr"]
VOCABULARY += [*NAMES, "The", "access", "code", "of", "patient", "is"]


def changed(key, value):
    """GOOD with one key set, or removed if the value is None; ``key`` is dotted."""
    tables = {name: dict(table) if isinstance(table, dict) else table for name, table in GOOD.items()}
    *parents, last = key.split(".")
    table = tables
    for parent in parents:
        table = table.setdefault(parent, {})
    if value is None:
        del table[last]
    else:
        table[last] = value
    return tables


def classifier_in(folder):
    """A small model and small data on disk, as a user has them."""
    Case("bert").model.save_pretrained(folder / "model")
    raw = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=raw, pad_token="<pad>", unk_token="<unk>", eos_token="<eos>"
    ).save_pretrained(folder / "model")
    rows = [(" ".join(f"w{(i * j) % 57}" for j in range(1, 2 + i % 6)), "abc"[i % 3], f"p{i % 12}") for i in range(40)]
    for name, part in (("train.csv", rows), ("validation.csv", rows[:9])):
        write(folder / name, [("text", "label", "patient"), *part])
    return {
        "subset": "lora + head",
        "model": {"path": str(folder / "model")},
        "task": {"name": "sequence_classification", "labels": ["a", "b", "c"]},
        "data": {"train": str(folder / "train.csv"), "validation": str(folder / "validation.csv"), "units": 40},
        "privacy": {"epsilon": 3.0, "delta": 1e-3, "batch_size": 10, "steps": 4},
    }


def language_in(folder):
    """A recipe whose language model is small enough to learn its data by heart; both are on disk."""
    folder.mkdir(parents=True, exist_ok=True)
    config = transformers.GPT2Config(
        vocab_size=len(VOCABULARY), n_positions=64, n_embd=32, n_layer=1, n_head=2, eos_token_id=2, bos_token_id=2
    )
    transformers.set_seed(0)
    transformers.GPT2LMHeadModel(config).save_pretrained(folder / "model")
    raw = Tokenizer(models.WordLevel({word: i for i, word in enumerate(VOCABULARY)}, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Whitespace(), pre_tokenizers.Digits(True)])
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=raw, pad_token="<pad>", unk_token="<unk>", eos_token="<eos>"
    ).save_pretrained(folder / "model")
    rows = [(" ".join(NAMES[(i * j) % 90] for j in range(1, 6 + i % 6)),) for i in range(60)]
    for name, part in (("train.csv", rows[:40]), ("validation.csv", rows[40:])):
        write(folder / name, [("text",), *part])
    return {
        "subset": "all",
        "model": {"path": str(folder / "model")},
        "task": {"name": "causal_lm", "max_length": 40},
        "data": {"train": str(folder / "train.csv"), "validation": str(folder / "validation.csv"), "units": 40},
        "privacy": {"epsilon": 3.0, "delta": 1e-3, "batch_size": 10, "steps": 4},
        "optimizer": {"learning_rate": 0.01},
    }


def write(path, rows):
    with open(path, "w", newline="") as file:
        csv.writer(file).writerows(rows)
