"""Training on a ledger's account: nothing is released that was not charged before."""

import hashlib
import json
import multiprocessing
import os
import signal

import pytest
import transformers
from click.testing import CliRunner

from dpft.cli import main
from dpft.errors import BudgetError, GuaranteeError, LedgerError
from dpft.ledger import About, Ledger
from dpft.privacy import composition
from dpft.privacy.composition import Event
from dpft.privacy.mechanisms.head_descent import HeadDescent
from dpft.privacy.noise import SecureRandomness, SeededRandomness
from dpft.privacy.plan import Plan
from dpft.recipe import Recipe
from dpft.training.data import read
from dpft.training.meter import BudgetMeter
from dpft.workflows.setup import make_trainer, set_up
from dpft.workflows.train import train


@pytest.fixture
def notes(recipe, tmp_path, monkeypatch):
    """The account of the recipe's data, with room for the recipe's run."""
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("DPFT_LEDGER", str(tmp_path / "ledger.db"))
    recipe["ledger"] = {"dataset": "notes", "purpose": "a test"}
    recipe["privacy"]["steps"] = 40  # blocks of two
    recipe["data"].pop("validation")
    return Ledger().create("notes", epsilon=4.0, delta=1e-3, rows=read(recipe["data"]["train"]))


class At(transformers.TrainerCallback):
    """Do something after a step."""

    def __init__(self, step, action):
        self.step, self.action = step, action

    def on_step_end(self, args, state, control, **_):
        if state.global_step == self.step:
            self.action()


def test_what_is_charged_ends_with_a_round(notes, tmp_path):
    """A head of some of its sums is no head, so all of them are one round."""
    head = Plan(mechanism=HeadDescent(noise_multiplier=20.0, steps=30), delta=1e-3, units=40, unit="example")
    steps = Plan(noise_multiplier=20.0, sample_rate=0.1, steps=30, delta=1e-3, units=40)
    for name, plan, blocks in (("head", head, [30]), ("steps", steps, [2, 4])):
        account = BudgetMeter(notes, plan, SecureRandomness(), tmp_path / name, 0, About())
        for covered in blocks:
            account.charge_block()
            assert account.covered == covered
        account.settle()


def test_a_run_is_charged_in_blocks_and_settled(recipe, notes, tmp_path):
    seen = []
    look = At(5, lambda: seen.append(notes.ledger.refresh() and notes.curve()[0]))
    folder = train(Recipe.parse(recipe), tmp_path / "run", callbacks=[look])
    assert seen[0]["steps"] == 6 and not seen[0]["settled"]
    (done,) = notes.curve()
    assert done["steps"] == 40 and done["settled"] and done["purpose"] == "a test" and "model" in done["model"]
    assert done["recipe"] == f"sha256:{hashlib.sha256((folder / 'recipe.toml').read_bytes()).hexdigest()}"
    found = json.loads((folder / "run.json").read_text())["ledger"]
    assert found["run"] == done["run"] and found["spent"] == notes.spent() <= found["budget"] == 4.0
    for card in ("card.md", "card.html"):
        assert "Counted across runs" in (folder / card).read_text()


def test_without_a_ledger_the_card_says_so(recipe, tmp_path):
    folder = train(Recipe.parse(recipe), tmp_path / "run")
    assert "Nothing across runs is counted" in (folder / "card.md").read_text()
    assert json.loads((folder / "run.json").read_text())["ledger"] is None


def test_what_does_not_fit_is_refused_before_anything_is_charged(recipe, notes, tmp_path):
    notes.spend([Event(1, None, None, 2.5, 0.0)], purpose="earlier")
    (tmp_path / "recipe.toml").write_text(Recipe.parse(recipe).to_toml())
    result = CliRunner().invoke(main, ["train", str(tmp_path / "recipe.toml"), "--output", str(tmp_path / "run")])
    assert result.exit_code == 3 and "above its budget of 4" in result.output and "of 40 steps fit" in result.output
    assert len(notes.curve()) == 1 and not (tmp_path / "run" / "releases.json").exists()


def test_a_run_ends_cleanly_at_the_block_that_no_longer_fits(recipe, notes, tmp_path):
    """Someone else spends while it runs."""
    elsewhere = lambda: Ledger().dataset("notes").spend([Event(1, None, None, 2.2, 0.0)], purpose="meanwhile")
    folder = train(Recipe.parse(recipe), tmp_path / "run", callbacks=[At(9, elsewhere)])
    run = json.loads((folder / "run.json").read_text())
    assert 10 <= run["released_steps"] < 40 and run["interrupted"] and "do not fit" in run["halted"]
    assert notes.spent() <= 4.0
    assert notes.record.runs[run["ledger"]["run"]].steps == run["released_steps"]
    assert not notes.fits([Event(1, *(run["events"][0][key] for key in ("noise_multiplier", "sample_rate")))])
    assert "do not fit" in (folder / "card.md").read_text()


def test_of_a_block_that_no_longer_fits_only_what_is_charged_may_be_released(tmp_path, monkeypatch):
    """Room for 400 releases: a block of 20, 365 of another run, and of the next block the 15 that are left."""
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "home"))
    room = composition.epsilon((Event(400, 20.0, 1.0),), 1e-3) * (1 + 1e-6)
    notes = Ledger(str(tmp_path / "ledger.db")).create("notes", epsilon=room, delta=1e-3)
    plan = Plan(noise_multiplier=20.0, sample_rate=1.0, steps=400, delta=1e-3)
    account = BudgetMeter(notes, plan, SecureRandomness(), tmp_path / "run", released=0, about=About())
    account.charge_block()
    notes.spend([Event(365, 20.0, 1.0)], purpose="meanwhile")
    account.charge_block()
    assert account.covered == notes.record.runs[account.run.id].steps == 35
    account.check(35)
    with pytest.raises(GuaranteeError, match="Release 36 was not charged"):
        account.check(36)
    with pytest.raises(BudgetError, match="0 do"):
        account.charge_block()


def test_a_ledger_that_is_lost_ends_the_run_and_keeps_the_charge(recipe, notes, tmp_path, monkeypatch):
    def lose():
        monkeypatch.setattr("dpft.ledger.database.Store.append", lost)

    def lost(*_):
        raise LedgerError("The server is gone.")

    folder = train(Recipe.parse(recipe), tmp_path / "run", callbacks=[At(3, lose)])
    run = json.loads((folder / "run.json").read_text())
    assert run["released_steps"] == 4 and "stays charged whole" in run["halted"]


def test_a_release_that_was_not_charged_is_refused(recipe, notes, tmp_path):
    trainer = make_trainer(set_up(Recipe.parse(recipe)), tmp_path / "run")
    steal = At(2, lambda: setattr(trainer.session.account, "charge_block", lambda: None))
    trainer.add_callback(steal)
    with pytest.raises(GuaranteeError, match="Release 5 was not charged"):
        trainer.train()
    assert trainer.session.engine.steps_released == trainer.session.releases.charged == 4


def killed(recipe, folder):
    train(Recipe.parse(recipe), folder, callbacks=[At(7, lambda: os.kill(os.getpid(), signal.SIGKILL))])


def test_a_killed_run_stays_reserved_and_goes_on_as_the_same_run(recipe, notes, tmp_path):
    recipe["run"] = {"save_steps": 2}
    child = multiprocessing.get_context("spawn").Process(target=killed, args=(recipe, tmp_path / "run"))
    child.start()
    child.join(120)
    assert child.exitcode == -signal.SIGKILL
    released = json.loads((tmp_path / "run" / "releases.json").read_text())["charged"]
    notes.ledger.refresh()
    assert released == 7 and notes.curve()[0]["steps"] == 8 and not notes.curve()[0]["settled"]
    with pytest.raises(GuaranteeError, match="resume it with that account"):
        train(Recipe.parse({**recipe, "ledger": {}}), tmp_path / "run", resume=True)
    train(Recipe.parse(recipe), tmp_path / "run", resume=True)
    (done,) = notes.curve()
    assert (
        notes.spent() <= notes.policy["epsilon"] and done["settled"] and done["steps"] == 41
    )  # the release that was reserved when it was killed stays counted


def test_what_no_ledger_can_pay_for_is_refused(recipe, notes, tmp_path):
    with pytest.raises(GuaranteeError, match="Noise from a seed"):
        train(Recipe.parse(recipe), tmp_path / "seeded", randomness=SeededRandomness(0))
    loose = {**recipe, "ledger": {}, "run": {"save_steps": 2}}

    def stop():
        raise RuntimeError("power cut")

    with pytest.raises(RuntimeError, match="power cut"):
        train(Recipe.parse(loose), tmp_path / "loose", callbacks=[At(5, stop)])
    with pytest.raises(GuaranteeError, match="that no ledger was charged for"):
        train(Recipe.parse({**loose, "ledger": recipe["ledger"]}), tmp_path / "loose", resume=True)
    recipe["data"]["validation"] = recipe["data"]["train"]
    (tmp_path / "recipe.toml").write_text(Recipe.parse(recipe).to_toml())
    result = CliRunner().invoke(main, ["compare", str(tmp_path / "recipe.toml"), "--output", str(tmp_path / "sweep")])
    assert result.exit_code == 1 and "--private-only" in result.output
    assert notes.spent() == 0


def test_a_sweep_is_charged_run_by_run(recipe, notes, tmp_path):
    recipe["data"]["validation"] = recipe["data"]["train"]
    recipe["privacy"]["steps"] = 4
    (tmp_path / "recipe.toml").write_text(Recipe.parse(recipe).to_toml())
    command = ["compare", str(tmp_path / "recipe.toml"), "--output", str(tmp_path / "sweep"), "--private-only"]
    result = CliRunner().invoke(main, [*command, "--epsilon", "1", "--epsilon", "2"])
    assert result.exit_code == 0, result.output
    notes.ledger.refresh()
    assert [run["steps"] for run in notes.curve()] == [4, 4] and 2 < notes.spent() < 3


def test_the_account_may_be_named_on_the_command_line(recipe, notes, tmp_path):
    recipe["ledger"] = {"dataset": "notes"}
    other = Ledger(str(tmp_path / "other.db")).create("notes", epsilon=9.0, delta=1e-3)
    (tmp_path / "recipe.toml").write_text(Recipe.parse(recipe).to_toml())
    command = ["train", str(tmp_path / "recipe.toml"), "--output", str(tmp_path / "run"), "--purpose", "by hand"]
    result = CliRunner().invoke(main, [*command, "--ledger", str(tmp_path / "other.db")])
    assert result.exit_code == 0 and "'notes' has spent ε = " in result.output, result.output
    other.ledger.refresh()
    assert other.curve()[0]["purpose"] == "by hand" and not notes.curve()


def test_other_data_are_refused(recipe, notes, tmp_path):
    lines = (tmp_path / "train.csv").read_text().splitlines()
    (tmp_path / "train.csv").write_text("\n".join([lines[0], *(f"w{i} w5,a,q{i}" for i in range(40))]))
    with pytest.raises(LedgerError, match="nothing in common"):
        train(Recipe.parse(recipe), tmp_path / "run")
    with pytest.raises(BudgetError):
        notes.spend([Event(1, None, None, 9.0, 0.0)], purpose="x")
