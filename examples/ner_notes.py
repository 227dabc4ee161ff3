"""Learn to tag ages, doses and dates in clinical notes privately: write the data and a recipe for `dpft train`.

    DPFT_DATA=... DPFT_MODELS=... python examples/ner_notes.py --output ner
    dpft train ner/recipe.toml --output ner/run

The tags follow from the public rules below and from no annotator: a model learns to copy the rules. A note is a unit.
"""

import argparse
import csv
import json
import os
import re
from pathlib import Path

MONTH = "(?:January|February|March|April|May|June|July|August|September|October|November|December)"
RULES = {
    "AGE": r"\d{1,3}[- ](?:year|month|week|day)s?[- ]old\b",
    "DOSE": r"\d+(?:\.\d+)? ?(?:mg|mcg|ml|cc|units?|milligrams?|micrograms?)\b",
    "DATE": rf"\d{{1,2}}/\d{{1,2}}/\d{{2,4}}\b|{MONTH}(?: \d{{1,2}}\b(?!/),?)?(?: (?:19|20)\d\d)?\b|(?:19|20)\d\d\b",
}
RULE = re.compile(r"\b(?:" + "|".join(f"(?P<{name}>{rule})" for name, rule in RULES.items()) + ")")
WORD = re.compile(r"\w+(?:[-/.]\w+)*|[^\w\s]")
LABELS = ["O", *(f"{prefix}-{name}" for name in RULES for prefix in "BI")]


def tagged(text: str) -> dict[str, list[str]]:
    """Words, and a tag for each: B- where a match begins, I- where it goes on."""
    words, tags, found = list(WORD.finditer(text)), [], list(RULE.finditer(text))
    for word in words:
        match = next((m for m in found if m.start() < word.end() and word.start() < m.end()), None)
        tags.append("O" if match is None else f"{'B' if word.start() <= match.start() else 'I'}-{match.lastgroup}")
    return {"words": [word[0] for word in words], "tags": tags}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("ner"))
    output = parser.parse_args().output
    output.mkdir(parents=True, exist_ok=True)
    for part in ("train", "validation"):
        with open(Path(os.environ["DPFT_DATA"]) / "mts_dialog" / f"{part}.csv", encoding="utf-8", newline="") as file:
            rows = [json.dumps(tagged(row["section_text"])) + "\n" for row in csv.DictReader(file)]
        (output / f"{part}.jsonl").write_text("".join(rows), encoding="utf-8")
    (output / "recipe.toml").write_text(
        RECIPE.format(folder=output.resolve(), labels=json.dumps(LABELS)), encoding="utf-8"
    )


RECIPE = """subset = "lora(rank=8, last_blocks=1) + head"
model.path = "$DPFT_MODELS/minilm-l6"
task = {{name = "token_classification", tokens = "words", max_length = 64, labels = {labels}}}
data = {{train = "{folder}/train.jsonl", validation = "{folder}/validation.jsonl", units = 1201}}
privacy = {{epsilon = 3.0, delta = 1e-4, batch_size = 128, steps = 100, clip_norm = 0.1}}
optimizer.learning_rate = 0.01
"""

if __name__ == "__main__":
    main()
