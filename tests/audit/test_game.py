"""Audits of whole trainings: what leaks is found, what is private is not accused, and nothing is lost on the way."""

import json
import sys
from pathlib import Path

import pytest
import transformers

from dpft.audit.canaries import Planting
from dpft.audit.game import Watch, audit_command, audit_run
from dpft.audit.report import Claim, describe
from dpft.errors import RecipeError
from dpft.ledger import Ledger
from dpft.privacy.mechanisms import Mechanism
from dpft.recipe import Recipe
from dpft.workflows.train import train

CLAIM = Claim(delta=1e-3, epsilon=1.0)


@pytest.fixture
def heart(language):
    """A recipe under which a training without privacy learns its canaries by heart."""
    language["privacy"] |= {"epsilon": 1.0, "steps": 60, "batch_size": 30}
    language["data"].pop("validation")
    return language


def test_a_private_training_is_not_accused_and_a_plain_one_is_seen_through(heart, tmp_path):
    output = tmp_path / "run"
    found = audit_run(Recipe.parse(heart), output, Planting(canaries=100, kind="random-tokens"), baseline=True)
    assert found.epsilon_lower_bound < 1 < found.power and found.verdict == "consistent"
    assert found.claimed == pytest.approx(1.0, abs=2e-3) and found.ceiling > 1.5
    run = json.loads((output / "run.json").read_text())
    assert run["units"] == 40 + 50 and run["expected_batch_size"] == pytest.approx(30 / 40 * 90)
    card = (output / "card.md").read_text()
    assert "## Audited" in card and found.verdict == "consistent" and "never proves one" in card
    shown = json.loads((output / "audit.json").read_text())
    assert shown["power"] is None and f"{found.power:.3f}" not in card  # what a leaking model shows is not published
    assert json.loads((output / "private" / "audit.json").read_text())["power"] == found.power
    assert "Which canaries were in the data?" in (output / "card.html").read_text()
    plain = output / "private" / "without-privacy"
    assert "NOT PRIVATE" in (plain / "card.md").read_text() and "nothing is judged" in (plain / "card.md").read_text()


def test_noise_that_is_not_there_is_a_violation(heart, tmp_path, monkeypatch):
    """T6, T7 from outside: the claim is as ever, and the noise is a thousandth of it."""
    true = Mechanism.noise_std
    monkeypatch.setattr(Mechanism, "noise_std", lambda self, clip: true(self, clip) / 1000)
    heart["privacy"]["epsilon"] = 0.5
    found = audit_run(Recipe.parse(heart), tmp_path / "run", Planting(canaries=100))
    assert found.verdict == "VIOLATION" and found.epsilon_lower_bound > 0.5 and found.canary == "random-tokens"
    assert 'class="warn"' in (tmp_path / "run" / "card.html").read_text()


def test_the_scoring_can_be_done_again_but_not_the_training(language, tmp_path):
    output = tmp_path / "run"
    first = audit_run(Recipe.parse(language), output, Planting(canaries=20, kind="new-token"))
    with pytest.raises(RecipeError, match="holds an audit already"):
        audit_run(Recipe.parse(language), output, Planting(canaries=20))
    (output / "audit.json").unlink()
    before = (output / "releases.json").read_bytes()
    assert audit_run(Recipe.parse(language), output, Planting(canaries=20)) == first
    assert (output / "releases.json").read_bytes() == before
    assert not any("included" in path.read_text() for path in output.glob("*.json") if path.name != "audit.json")
    (output / "audit.json").unlink()
    other = {**language, "optimizer": {"learning_rate": 0.02}}
    with pytest.raises(RecipeError, match="another recipe"):
        audit_run(Recipe.parse(other), output)
    run = json.loads((output / "run.json").read_text())
    (output / "run.json").write_text(json.dumps({**run, "units": 40}))
    with pytest.raises(RecipeError, match="went on without its canaries"):
        audit_run(Recipe.parse(language), output)
    (output / "run.json").unlink()
    with pytest.raises(RecipeError, match="did not end"):
        audit_run(Recipe.parse(language), output, Planting(canaries=20))


def test_an_interrupt_ends_the_whole_audit_which_can_be_scored_later(language, tmp_path):
    class Interrupt(transformers.TrainerCallback):
        def on_step_end(self, args, state, control, **_):
            raise KeyboardInterrupt

    audit = lambda: audit_run(
        Recipe.parse(language),
        tmp_path / "run",
        Planting(canaries=20),
        baseline=True,
        watch=Watch(callbacks=lambda: [Interrupt()]),
    )
    language["data"].pop("validation", None)
    with pytest.raises(KeyboardInterrupt):
        audit()
    assert not (tmp_path / "run" / "private" / "without-privacy").exists()
    assert audit_run(Recipe.parse(language), tmp_path / "run", Planting(canaries=20)).claimed < 3


def test_a_run_without_canaries_cannot_be_scored(language, tmp_path):
    train(Recipe.parse(language), tmp_path / "run")
    with pytest.raises(RecipeError, match="without canaries"):
        audit_run(Recipe.parse(language), tmp_path / "run")


def test_an_audited_run_is_charged(language, tmp_path):
    recipe = Recipe.parse(language)
    from dpft.training.data import load

    url = str(tmp_path / "ledger.sqlite")
    account = Ledger(url).create("notes", epsilon=8, delta=1e-3, rows=load(recipe)[0])
    recipe = Recipe.parse({**language, "ledger": {"url": url, "dataset": "notes"}})
    with pytest.raises(RecipeError, match="without the baseline"):
        audit_run(recipe, tmp_path / "run", Planting(canaries=20), baseline=True)
    assert account.spent() == 0
    found = audit_run(recipe, tmp_path / "run", Planting(canaries=20))
    assert account.spent() == pytest.approx(found.claimed, rel=5e-3)
    private = json.loads((tmp_path / "run" / "private" / "run.json").read_text())
    assert private["overlap"] is None  # canaries are no change


SCRIPT = """
import csv, sys, torch, transformers
data, out, steps = sys.argv[1], sys.argv[2], int(sys.argv[3])
tokenizer = transformers.AutoTokenizer.from_pretrained(sys.argv[4])
model = transformers.AutoModelForCausalLM.from_pretrained(sys.argv[4])
rows = [row["text"] for row in csv.DictReader(open(data))]
batch = tokenizer([row + " <eos>" for row in rows], return_tensors="pt", padding=True)
labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
for _ in range(steps):
    optimizer.zero_grad()
    model(**batch, labels=labels).loss.backward()
    optimizer.step()
model.save_pretrained(out)
"""


def test_any_command_can_be_audited(language, tmp_path):
    script = tmp_path / "train.py"
    script.write_text(SCRIPT)
    recipe, model = Recipe.parse(language), language["model"]["path"]
    command = [sys.executable, str(script), "{data}", "{out}"]
    found = audit_command([*command, "60", model], recipe, tmp_path / "a", CLAIM, Planting(canaries=100))
    assert found.verdict == "VIOLATION" and "contradicts the claim" in describe(found)
    assert json.loads((tmp_path / "a" / "audit.json").read_text())["command"][-1] == model
    said = []
    planting = Planting(canaries=100)
    idle = audit_command([*command, "0", model], recipe, tmp_path / "b", CLAIM, planting, announce=said.append)
    assert f"which can show ε up to {idle.ceiling:.3g}" in said[0]
    assert idle.verdict == "uninformative" and idle.auc == 0.5


@pytest.mark.parametrize(
    ("command", "said"),
    [
        (["python", "train.py"], "must name {data}"),
        (
            [sys.executable, "-c", "print('no such column'); raise SystemExit(3)", "{data}", "{out}"],
            "ended with 3 .no such",
        ),
        ([sys.executable, "-c", "", "{data}", "{out}"], "holds no model"),
        (["no-such-program", "{data}", "{out}"], "cannot be run"),
    ],
)
def test_a_command_that_leaves_nothing_is_named(language, tmp_path, command, said):
    with pytest.raises(RecipeError, match=said):
        audit_command(command, Recipe.parse(language), tmp_path / "audit", CLAIM, Planting(canaries=20))


def test_the_coins_are_not_in_what_the_command_sees(language, tmp_path):
    script = (
        "import pathlib, sys; data = pathlib.Path(sys.argv[1]); print(sorted(p.name for p in data.parent.rglob('*')))"
    )
    with pytest.raises(RecipeError, match="holds no model"):
        command = [sys.executable, "-c", script, "{data}", "{out}"]
        audit_command(command, Recipe.parse(language), tmp_path / "audit", CLAIM, Planting(canaries=20))
    seen = Path(tmp_path / "audit" / "command.log").read_text()
    assert "canaries.json" not in seen and "data.csv" in seen
    assert not list((tmp_path / "audit").rglob("data.csv"))  # the copy of private data does not stay
