"""Clippings of a recipe, from its table to the card: per layer, and at a quantile that is learned and paid for."""

import json

import pytest

from dpft.errors import GuaranteeError, RecipeError
from dpft.ledger import Ledger
from dpft.privacy.clipping import FlatClip, PerLayerClip
from dpft.privacy.composition import Event
from dpft.recipe import Recipe
from dpft.workflows.setup import make_trainer, set_up
from dpft.workflows.train import train
from tests.support.recipes import changed


def adaptive(recipe, **privacy):
    recipe["privacy"] |= {"clipping": "adaptive", "clip_norm": 0.5, "clip_quantile": 0.7, "clip_budget": 0.2, **privacy}
    recipe["run"] = {"token_budget": 128, "save_steps": 1}
    return Recipe.parse(recipe)


def test_a_clip_that_adapts_is_charged_printed_and_kept(recipe, tmp_path):
    """T15: the ledger is charged for gradients and quantile together."""
    account = Ledger(str(tmp_path / "ledger.db")).create("notes", epsilon=8.0, delta=1e-3)
    recipe["ledger"] = {"dataset": "notes", "url": str(tmp_path / "ledger.db")}
    made = adaptive(recipe)
    plan, folder = made.plan(), train(made, tmp_path / "run")
    run = json.loads((folder / "run.json").read_text())
    assert plan.epsilon <= 3.0 and run["epsilon"] == plan.epsilon
    account.ledger.refresh()
    (charged,) = account.record.events
    assert charged == Event(4, plan.noise_multiplier, plan.sample_rate) == plan.events()[0]
    assert plan.mechanism.gradient_noise_multiplier > 1.1 * plan.noise_multiplier
    for text in (run["guarantee"], (folder / "card.md").read_text(), (folder / "card.html").read_text()):
        assert "FlatClip at 0.5 at first, then at the 0.7 quantile of norms" in text
    kept = [json.loads((folder / f"checkpoint-{n}" / "released.json").read_text()) for n in (3, 4)]
    assert kept[0] != kept[1] and all(set(one) == {"clip"} for one in kept)


class Killed(Exception):
    pass


@pytest.fixture
def killed(recipe, tmp_path):
    """A recipe whose run was killed after its second step, and where."""
    made = adaptive(recipe)
    trainer = make_trainer(set_up(made), tmp_path / "run")
    step = trainer.training_step

    def until_the_third(*args):
        if trainer.state.global_step == 2:
            raise Killed
        return step(*args)

    trainer.training_step = until_the_third
    with pytest.raises(Killed):
        trainer.train()
    (tmp_path / "run" / "recipe.toml").write_text(made.to_toml())
    return recipe, tmp_path / "run", trainer.session.engine.clip


def test_a_resumed_run_takes_the_clip_up_again(killed, monkeypatch):
    recipe, folder, clip = killed
    assert clip != FlatClip(0.5)
    taken = []
    from dpft.gradients.engine import Engine

    true = Engine.take_up
    monkeypatch.setattr(Engine, "take_up", lambda self, numbers: (true(self, numbers), taken.append(self.clip)))
    train(Recipe.parse(recipe), folder, resume=True)
    assert taken == [clip]
    assert json.loads((folder / "run.json").read_text())["released_steps"] == 4


def test_a_checkpoint_without_the_clip_is_refused(killed):
    recipe, folder, _ = killed
    (folder / "checkpoint-2" / "released.json").unlink()
    with pytest.raises(GuaranteeError, match="holds no clip"):
        train(Recipe.parse(recipe), folder, resume=True)


@pytest.mark.parametrize("change", [{"clip_quantile": 0.6}, {"clip_rate": 0.1}, {"clip_budget": 0.1}])
def test_one_claim_covers_one_way_to_move_the_clip(killed, change):
    recipe, folder, _ = killed
    with pytest.raises(GuaranteeError, match="one claim would not cover both"):
        train(adaptive(recipe, **change), folder, resume=True)


@pytest.mark.parametrize("shares", ["equal", "size"])
def test_clipping_by_layers_runs(recipe, tmp_path, shares):
    recipe["privacy"] |= {"clipping": "per-layer", "clip_norm": 0.5, "clip_shares": shares, "steps": 2}
    folder = train(Recipe.parse(recipe), tmp_path / "run")
    run = json.loads((folder / "run.json").read_text())
    assert run["clip"] == {"rule": "PerLayerClip", "clip_norm": 0.5}
    assert "PerLayerClip at 0.5" in (folder / "card.md").read_text()


@pytest.mark.parametrize(
    ("key", "value"),
    [("clip_shares", "size"), ("clip_quantile", 0.9), ("clip_rate", 0.1), ("clip_budget", 0.1)],
)
def test_a_setting_that_no_clipping_uses_is_refused_by_name(key, value):
    """T23."""
    with pytest.raises(RecipeError, match=f"privacy.{key} is .*flat.* does not use"):
        Recipe.parse(changed(f"privacy.{key}", value))


def test_the_baseline_without_privacy_clips_nothing(recipe):
    plain = adaptive(recipe).without_privacy()
    assert Recipe.parse({**recipe, "privacy": plain.privacy.model_dump(exclude_none=True)}).privacy == plain.privacy
    assert plain.privacy.mechanism == {"mechanism": "dp-sgd", "clip": FlatClip(1e9)}
    layered = Recipe.parse(changed("privacy.clipping", "per-layer"))
    assert layered.plan().clip == PerLayerClip(1.0, "equal")
