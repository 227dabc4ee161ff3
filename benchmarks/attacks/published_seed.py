"""Does the published seed help to tell whether a record was there? Black-box trainings with dropout, judged by their
weights alone.

The attacker has the recipe with its seed, the model before training, and two data sets that differ by one text; sees
the weights after one step with every unit in it, and nothing else. It trains on both data sets itself, without noise
and with the same seed, and says which of the two clipped sums the released weights are nearer to: those of one training
each, and the means of several. If dropout's masks follow from the seed, a text that leaves shifts the masks of all
others, and the sums lie many times the clip apart.

    python -m benchmarks.attacks.published_seed --trials 200 --output benchmarks/results/published_seed.json
"""

import argparse
import json
import random
import tempfile
from pathlib import Path

import torch
from transformers import TrainingArguments

from dpft import DPTrainer, Plan, SecureRandomness, Subset
from dpft.audit.bounds import many_runs
from dpft.tasks import LabelledTask
from tests.support.zoo import Case

UNITS, LONG, SEED, DELTA = 256, 25, 42, 1e-3
OWN = 8  # trainings of the attacker's own on each data set


class Silent(SecureRandomness):
    """The attacker's own training, which adds no noise."""

    def gaussians(self, n, device=None):
        yield torch.zeros(n, dtype=torch.float64)


def texts() -> list[dict]:
    """The first is the one in question."""
    source = random.Random(0)
    lengths = [LONG, *(source.randint(5, 20) for _ in range(UNITS - 1))]
    ids = [[source.randint(3, 59) for _ in range(length)] for length in lengths]
    return [{"input_ids": one, "labels": list(one)} for one in ids]


def released(rows: list[dict], randomness=None) -> torch.Tensor:
    """The sum of clipped gradients and noise that one training's weights show: they moved by it, over B."""
    case = Case("gpt2")
    model = Subset("all").apply(case.model)
    before = torch.cat([p.detach().flatten().double() for p in model.parameters()])
    plan = Plan(noise_multiplier=1.0, sample_rate=1.0, steps=1, delta=DELTA, units=UNITS)
    with tempfile.TemporaryDirectory() as folder:
        args = TrainingArguments(
            folder, seed=SEED, optim="sgd", learning_rate=1.0, lr_scheduler_type="constant", save_strategy="no",
            logging_strategy="no", report_to=[], disable_tqdm=True, use_cpu=True,
        )  # fmt: skip
        DPTrainer(
            model=model, args=args, train_dataset=rows, task=LabelledTask(case.batch), plan=plan, randomness=randomness, token_budget=1024
        ).train()  # fmt: skip
    return UNITS * (before - torch.cat([p.detach().flatten().double() for p in model.parameters()]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--trials", type=int, default=200)
    parser.add_argument("--output", type=Path)
    given = parser.parse_args()
    rows = texts()
    own = [[released(some, Silent()) for _ in range(OWN)] for some in (rows, rows[1:])]
    guesses = {"one training": [sums[0] for sums in own], f"means of {OWN}": [sum(sums) / OWN for sums in own]}
    errors = {name: [0, 0] for name in guesses}  # of those with the text, and of those without
    for trial in range(given.trials):
        there = trial % 2 == 0
        seen = released(rows if there else rows[1:])
        for name, (with_it, without) in guesses.items():
            nearer = bool((seen - with_it).norm() < (seen - without).norm())
            errors[name][not there] += nearer != there
        print(f"\r{trial + 1} trainings, told wrong {errors}", end="", flush=True)
    with_it = (given.trials + 1) // 2
    plan = Plan(noise_multiplier=1.0, sample_rate=1.0, steps=1, delta=DELTA, units=UNITS)
    found = {"trials": given.trials, "epsilon_claimed": round(plan.epsilon, 3), "delta": DELTA, "attacks": {}}
    for name, (missed, alarms) in errors.items():
        bound = many_runs(alarms, given.trials - with_it, missed, with_it, DELTA)
        found["attacks"][name] = {
            "told_right": given.trials - missed - alarms,
            "sums_apart_in_clips": round(float((guesses[name][0] - guesses[name][1]).norm()), 3),
            "epsilon_lower_bound": round(bound.epsilon_lower_bound, 3),
        }
    print("\n" + json.dumps(found, indent=2))
    if given.output:
        given.output.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
