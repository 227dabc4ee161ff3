"""One training with canaries in it, and who was there: dpft's own runs, and any command that trains
(Steinke et al. 2023).

The attacker sees the weights that are released and nothing else, and knows the model before training: a canary's score
is how much its loss fell. Coins are drawn by the operating system, lie where what trains does not look, and are read
for the scoring alone. A run that ended before it was scored is scored when the audit is started again.
"""

import json
import math
import shlex
import shutil
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from dpft.audit import canaries as made
from dpft.audit.canaries import Canaries, Planting
from dpft.audit.report import Audit, Claim, bound_epsilon, expected_power
from dpft.audit.scores import losses, trained
from dpft.errors import RecipeError
from dpft.privacy.plan import Plan
from dpft.recipe import Recipe, listed
from dpft.report import write_card
from dpft.runs import RunFolder
from dpft.tasks.task import Task
from dpft.training.data import load, load_public
from dpft.workflows.setup import load_model, set_up
from dpft.workflows.train import go_on_unless_interrupted, train

if TYPE_CHECKING:
    from transformers import TrainerCallback

SEES_WEIGHTS = "sees the released weights and the model before training, and chose the canaries"
BASELINE = "without-privacy"


@dataclass(frozen=True)
class Watch:
    """Who looks on: ``announce`` is told what begins, ``callbacks`` makes the trainer's callbacks of each training."""

    announce: Callable[[str], None] = lambda text: None
    callbacks: Callable[[], "Sequence[TrainerCallback]"] = lambda: ()


def audit_run(
    recipe: Recipe,
    output: Path | str,
    planting: Planting | None = None,
    *,
    significance: float = 0.05,
    baseline: bool = False,
    watch: Watch | None = None,
) -> Audit:
    """Train the recipe with canaries in its data, find out how well they can be told, and write ``audit.json`` and the
    card.

    It is a run like any other: in ``output`` lies what it released, its account is charged, and the canaries are
    declared as units beside the data's own. The coins are in ``output/private``.

    Args:
        planting: which canaries; by default a thousand.
        significance: the probability of a false alarm.
        baseline: also train without privacy, on the same canaries, which shows what the attack is worth. That model
            leaks: it, what it shows and the verdict that knows of it stay in ``output/private`` and in what this
            returns.

    Raises:
        DPFTError: as :func:`dpft.train`; before anything is charged.
    """
    folder, planting, watch = RunFolder(output), planting or Planting(), watch or Watch()
    Claim(recipe.privacy.delta, None, significance)  # is refused here if it cannot be one
    if folder.audit_file.exists():
        raise RecipeError(f"{output} holds an audit already: choose another folder.")
    if baseline and recipe.ledger.dataset is not None:
        raise RecipeError(
            f"A training without privacy would spend all of {recipe.ledger.dataset!r}, and a ledger is kept for it: "
            "audit without the baseline."
        )
    if not folder.finished:
        if folder.releases_file.exists():
            raise RecipeError(
                f"{output} holds a run that did not end, and what it released stays charged: choose another folder."
            )
        setup = set_up(recipe)
        planted = _made(recipe, setup.task, planting)
        plan = _with_canaries(recipe.plan(), planted)
        planted.save(folder.canaries_file)
        setup.account_rows, setup.train = setup.train, planted.planted(setup.train, recipe)
        claim = Claim(plan.delta, plan.epsilon if math.isfinite(plan.epsilon) else None, significance)
        watch.announce(expected_power(planting.canaries, claim, planting.repetitions))
        train(
            recipe,
            output,
            setup=setup,
            plan=plan,
            callbacks=watch.callbacks(),
            randomness=planting.randomness,
        )
        go_on_unless_interrupted(output)
    elif not folder.canaries_file.exists():
        raise RecipeError(f"{output} holds a run without canaries: choose another folder.")
    planted = Canaries.load(folder.canaries_file)
    run = folder.record()
    if not folder.is_of(recipe):
        raise RecipeError(f"{output} holds an audit of another recipe: give {folder.recipe_file} to score it.")
    if run.units != recipe.data.units + planted.units:
        raise RecipeError(
            f"The run in {output} went on without its canaries, so they show nothing: audit in another folder."
        )
    watch.announce("scoring the canaries")
    found = _judged(recipe, folder.weights, planted, Claim(run.delta, run.epsilon, significance))
    public = found.json()
    if baseline:
        found = found.with_power(_baseline(recipe, folder, planted, Claim(found.delta, None, significance), watch))
        folder.private_audit_file.write_text(json.dumps(found.json(), indent=2), encoding="utf-8")
    folder.audit_file.write_text(json.dumps(public, indent=2), encoding="utf-8")
    write_card(output)
    return found


def audit_command(
    command: Sequence[str],
    recipe: Recipe,
    output: Path | str,
    claim: Claim,
    planting: Planting | None = None,
    *,
    announce: Callable[[str], None] = lambda text: None,
) -> Audit:
    """Audit any training: plant canaries in a copy of the recipe's data, run a command on it, and score what it leaves.

    The copy is deleted afterwards. Columns that the task does not read are empty in canaries.

    The command names ``{data}``, the file to train on, and ``{out}``, the folder where it must leave the model
    (``save_pretrained`` of the model or of a PEFT adapter). The recipe says what the data and the model are; its
    privacy is not used.

    Args:
        claim: what the command claims for one row.

    Raises:
        RecipeError: the command lacks a place, fails, or leaves no model.
    """
    output, planting = Path(output).resolve(), planting or Planting()
    text = " ".join(command)
    if "{data}" not in text or "{out}" not in text:
        raise RecipeError(
            "The command must name {data}, the file that it trains on, and {out}, the folder for its model, such as: "
            "python train.py {data} {out}."
        )
    if output.exists() and any(output.iterdir()):
        raise RecipeError(f"{output} is not empty: choose another folder.")
    rows, _ = load(recipe, validation=False)
    task, _ = load_model(recipe)
    planted = _made(recipe, task, planting)
    folder = RunFolder(output)
    planted.save(folder.canaries_file)
    csv = listed(recipe.data.train)[0].endswith(".csv")
    seen = output / "seen"  # all that the command is told of
    data, left = seen / f"data.{'csv' if csv else 'jsonl'}", seen / "trained"
    seen.mkdir(mode=0o700)
    left.mkdir()
    whole = planted.planted(rows, recipe)
    announce(expected_power(planting.canaries, claim, planting.repetitions))
    words = [word.replace("{data}", str(data)).replace("{out}", str(left)) for word in command]
    try:
        whole.to_csv(data) if csv else whole.to_json(data)
        with open(folder.command_log, "wb") as log:
            try:
                code = subprocess.run(words, stdout=log, stderr=subprocess.STDOUT).returncode
            except OSError as error:
                raise RecipeError(f"The command {words[0]} cannot be run ({error.strerror}): fix its name.") from error
    finally:
        data.unlink(missing_ok=True)
    if code:
        said = folder.command_log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
        raise RecipeError(
            f"{shlex.join(words[:3])} ... ended with {code} ({said[-1] if said else 'it said nothing'}): see "
            f"{folder.command_log}."
        )
    announce("scoring the canaries")
    found = _judged(recipe, left, planted, claim)
    folder.audit_file.write_text(json.dumps({"command": words, **found.json()}, indent=2), encoding="utf-8")
    return found


def _made(recipe: Recipe, task: Task, planting: Planting) -> Canaries:
    """Canaries that can be judged; what cannot is refused here, before anything is charged."""
    found = made.make(planting, recipe, task, load_public(recipe))
    made.features(found.canaries, recipe, task)
    return found


def _with_canaries(plan: Plan, planted: Canaries) -> Plan:
    """The plan for the data's units and the canaries'; sampling and noise stay what they were."""
    return plan if plan.units is None else plan.changed(units=plan.units + planted.units)


def _judged(recipe: Recipe, weights: Path, planted: Canaries, claim: Claim) -> Audit:
    task, before = load_model(recipe)
    features = made.features(planted.canaries, recipe, task)
    scores = losses(before, task, features)
    scores -= losses(trained(before, recipe, weights), task, features)
    return bound_epsilon(
        scores,
        planted.included,
        claim,
        repetitions=planted.repetitions,
        threat_model=SEES_WEIGHTS,
        canary=planted.kind,
    )


def _baseline(recipe: Recipe, audited: RunFolder, planted: Canaries, claim: Claim, watch: Watch) -> float:
    """The lower bound that the same attack proves for a training without noise and clipping."""
    folder, plain = RunFolder(audited.private / BASELINE), recipe.without_privacy()
    if not folder.finished or folder.record().interrupted:
        shutil.rmtree(folder.path, ignore_errors=True)  # what was cut off is worth nothing and spent nothing more
        setup = set_up(plain)
        setup.train = planted.planted(setup.train, plain)
        watch.announce("training without privacy, to know what the attack is worth")
        plan = _with_canaries(plain.plan(), planted)
        train(plain, folder.path, setup=setup, plan=plan, callbacks=watch.callbacks())
        go_on_unless_interrupted(folder.path)
    watch.announce("scoring the canaries")
    found = _judged(plain, folder.weights, planted, claim)
    folder.audit_file.write_text(json.dumps(found.json(), indent=2), encoding="utf-8")
    write_card(folder.path)
    return found.epsilon_lower_bound
