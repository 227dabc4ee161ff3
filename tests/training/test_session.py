"""Whatever DPTrainer has, a loop of one's own has too."""

import pytest
import torch

import dpft
from dpft.errors import BudgetError, GuaranteeError, RecipeError
from dpft.ledger import Ledger
from dpft.privacy.noise import SeededRandomness
from dpft.subset import Subset
from dpft.tasks import LabelledTask
from dpft.workflows.setup import without_dropout


@pytest.fixture
def make(case, plan, tmp_path):
    def session(folder="run", subset="lora + head", model=None, task=None, **fields):
        made = case("bert")
        model = model or Subset(subset).apply(made.model)
        fields = {"token_budget": 64, "plan": plan(units=30, steps=6), "rows": made.examples * 10, **fields}
        rows, task = fields.pop("rows"), task or LabelledTask(made.batch)
        return dpft.Session(model, fields.pop("plan"), task, rows, tmp_path / folder, **fields)

    return session


def optimizer_of(session):
    return torch.optim.AdamW([p for p in session.model.parameters() if p.requires_grad], lr=0.01)


def trained(session, steps=None, opened=None):
    optimizer = optimizer_of(session)
    with opened or session:
        for draw in session.draws(optimizer):
            session.step(draw)
            optimizer.step()
            if session.engine.steps_released == steps:
                break
    return optimizer


def test_a_plain_loop_trains_and_claims(make):
    session = make()
    before = [p.detach().clone() for p in session.model.parameters() if p.requires_grad]
    assert session.guarantee == "Nothing was released."
    trained(session)
    after = [p for p in session.model.parameters() if p.requires_grad]
    assert not any(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert session.guarantee == session.plan.guarantee() and session.preflight is not None
    assert session.releases.charged == session.plan.steps
    assert session.evaluate(session.rows)["examples"] == 30


def test_releases_outlive_the_session(make):
    trained(make(), steps=2)
    with pytest.raises(BudgetError, match="has released 2 steps.*Session.open.*from_start=True"):
        trained(make())
    again = make()
    trained(again, opened=again.open(from_start=True))
    assert again.engine.steps_released == 6 and again.guarantee == again.plan.guarantee()
    with pytest.raises(GuaranteeError, match="noise_multiplier = 1.0"):
        other = make(plan=dpft.Plan(noise_multiplier=0.5, sample_rate=0.5, steps=9, delta=1e-3, units=30))
        trained(other, opened=other.open(from_start=True))


def test_a_checkpoint_of_a_plain_loop_goes_on_elsewhere(make, tmp_path):
    first = make()
    optimizer = trained(first, steps=3)
    first.save_checkpoint(tmp_path / "run" / "checkpoint-3", optimizer)
    names = {path.name for path in (tmp_path / "run" / "checkpoint-3").iterdir()}
    assert names == {"trainable.safetensors", "optimizer.pt", "releases.json", "trainer_state.json"}

    second, folder = make(folder="other"), tmp_path / "run" / "checkpoint-3"
    again = optimizer_of(second)
    with second.open(folder):
        second.load_checkpoint(folder, again)
        for a, b in zip(first.model.parameters(), second.model.parameters(), strict=True):
            assert torch.equal(a, b) or not a.requires_grad
        assert [s["step"] for s in again.state.values()] == [s["step"] for s in optimizer.state.values()]
        steps = 0
        for draw in second.draws(again):
            second.step(draw)
            again.step()
            steps += 1
    assert steps == 3 and second.engine.steps_released == second.releases.charged == 6


def test_the_ledger_pays_and_ends_a_plain_loop(make, tmp_path, plan):
    whole = plan(units=30, steps=40)
    account = Ledger(str(tmp_path / "ledger.db")).create("notes", epsilon=1.01 * whole.epsilon, delta=1e-3)
    session = make(ledger=account, purpose="a plain loop", plan=whole)
    optimizer = optimizer_of(session)
    with session:
        for draw in session.draws(optimizer):
            session.step(draw)
            if session.engine.steps_released == 5:  # somebody else spends of the same account
                account.open(plan(units=30, steps=20)).charge(20)
    assert 5 < session.engine.steps_released <= 20 and "notes" in session.halted
    assert account.spent() <= 1.01 * whole.epsilon
    assert next(iter(account.record.runs.values())).steps == session.engine.steps_released


def test_what_was_not_released_is_given_back(make, tmp_path, plan):
    account = Ledger(str(tmp_path / "ledger.db")).create("notes", epsilon=50, delta=1e-3)
    trained(make(ledger=account, plan=plan(units=30, steps=60)), steps=4)
    assert next(iter(account.record.runs.values())).steps == 4


@pytest.mark.parametrize("kind", ["lbfgs", "no step"])
def test_an_optimizer_that_cannot_step_is_found_before_the_first_charge(make, tmp_path, kind):
    account = Ledger(str(tmp_path / "ledger.db")).create("notes", epsilon=50, delta=1e-3)
    session = make(ledger=account)
    trainable = [p for p in session.model.parameters() if p.requires_grad]

    class Unable(torch.optim.SGD):
        def step(self, closure=None):
            raise ValueError("not today")

    optimizer = torch.optim.LBFGS(trainable) if kind == "lbfgs" else Unable(trainable, lr=0.1)
    with pytest.raises(RecipeError, match="optimizer"), session:
        next(session.draws(optimizer))
    assert session.releases.charged == 0 and not account.spent()


def test_a_loss_that_is_not_the_models_own_is_refused(make):
    session = make()
    session.model.config.problem_type = "multi_label_classification"
    with pytest.raises(RecipeError, match="own loss"), session:
        pass
    assert session.releases.charged == 0


def test_a_kept_prefix_and_its_absence_give_the_same_weights(make):
    kept, whole = (
        make(folder=how, subset="head", frozen_prefix=how, randomness=SeededRandomness(3)) for how in ("on", "off")
    )
    for session in (kept, whole):
        session.model.eval()
        for module in session.model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        trained(session)
    assert kept.prefix is not None and whole.prefix is None
    for a, b in zip(kept.model.parameters(), whole.model.parameters(), strict=True):
        torch.testing.assert_close(a, b)


def test_two_sessions_do_not_share_a_folder(make):
    with make(), pytest.raises(GuaranteeError, match="Another process trains"), make():
        pass


class Steady(LabelledTask):
    """Has a chance that changes nothing."""

    def draw(self, features, random):
        return dict(features)


def test_several_draws_are_averaged_inside_their_unit(make, case):
    """Draws that are all the same give the very step that one draw gives, under any clip."""
    weights = []
    for draws in (1, 3):
        made = case("bert")
        without_dropout(made.model)
        session = make(
            f"draws-{draws}",
            model=Subset("head").apply(made.model),
            task=Steady(made.batch),
            randomness=SeededRandomness(5),
            draws=draws,
        )
        optimizer = torch.optim.SGD([p for p in session.model.parameters() if p.requires_grad], lr=1.0)
        with session:
            for draw in session.draws(optimizer):
                units = [unit for _, some in draw for unit in some]
                assert all(units.count(unit) == draws for unit in units)
                session.step(draw)
                optimizer.step()
        weights.append([p.detach().clone() for p in session.model.parameters() if p.requires_grad])
    for one, other in zip(*weights, strict=True):
        assert torch.allclose(one, other, atol=1e-5)


def test_draws_without_a_chance_or_that_add_up_are_refused(make, case):
    with pytest.raises(RecipeError, match="3 draws of each example were asked for"):
        trained(make(draws=3))
    adding = dpft.Plan(noise_multiplier=1.0, sample_rate=0.5, steps=6, delta=1e-3, units=30, unit_gradient="sum")
    with pytest.raises(RecipeError, match="count as so many examples in a sum"):
        trained(make(task=Steady(case("bert").batch), plan=adding, draws=3))
