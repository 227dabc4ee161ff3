"""The plan that dpft would choose: from public facts alone, and near the best that the accountant knows."""

import json
from math import sqrt

import pytest
from click.testing import CliRunner

from dpft.cli import main
from dpft.errors import RecipeError
from dpft.privacy.plan import Plan
from dpft.recipe import Recipe
from dpft.recipe.advice import FEWEST, FEWEST_NEW, advised, noise_of
from dpft.workflows.advise import advise
from tests.support.recipes import classifier_in, language_in

OPEN = {"epsilon": 3.0, "delta": 1e-3, "plan": "auto"}


def true_noise(steps, batch_size, units, epsilon, delta):
    """σ/(qN√T) of the plan as the accountant calibrates it."""
    plan = Plan.calibrate(epsilon=epsilon, delta=delta, units=units, batch_size=batch_size, steps=steps)
    return plan.noise_multiplier / batch_size / sqrt(steps)


@pytest.mark.parametrize("epsilon", [1.0, 3.0, 8.0])
@pytest.mark.parametrize("passes", [0.32, 1.0, 4.0])
def test_the_advised_steps_have_about_the_least_noise_that_the_accountant_knows(epsilon, passes):
    units, delta = 1200, 1e-5
    chosen = advised(units, passes, epsilon=epsilon, delta=delta, new_layers=False)
    others = [
        true_noise(steps, min(units, round(units * passes / steps)), units, epsilon, delta)
        for steps in (2, 3, 4, 6, 12, 24)
        if round(units * passes / steps) <= units
    ]
    found = true_noise(chosen.steps, chosen.batch_size, units, epsilon, delta)
    assert found <= 1.35 * min(others)
    assert chosen.steps * chosen.batch_size <= 1.05 * units * max(passes, chosen.batch_size / units * chosen.steps)


def test_full_batches_have_the_noise_of_one_gaussian_however_many_they_are():
    assert noise_of(4, 4.0, 1000, 0.5) == noise_of(8, 8.0, 1000, 0.5) == pytest.approx(1 / 500)
    assert noise_of(8, 4.0, 1000, 0.5) > noise_of(4, 4.0, 1000, 0.5)  # sampled steps cost more
    assert noise_of(4, 2.0, 1000, 0.5) > noise_of(4, 4.0, 1000, 0.5)


def test_layers_that_begin_at_random_get_more_steps():
    few, many = (advised(5000, 1.0, epsilon=3.0, delta=1e-5, new_layers=new) for new in (False, True))
    assert FEWEST <= few.steps < FEWEST_NEW <= many.steps
    assert advised(5, 0.1, epsilon=3.0, delta=1e-2, new_layers=False).batch_size == 1


def test_an_open_plan_is_written_out_when_the_recipe_is_read(tmp_path):
    recipe = Recipe.parse(language_in(tmp_path) | {"privacy": OPEN | {"epochs": 4}, "optimizer": {}})
    privacy = recipe.privacy
    assert (privacy.plan, privacy.clipping, privacy.epochs) == ("declared", "automatic", None)
    assert privacy.batch_size * privacy.steps == pytest.approx(160, rel=0.2) and recipe.optimizer.name == "sgd"
    assert recipe.plan().epsilon <= 3.0
    assert Recipe.parse(recipe.model_dump()) == recipe
    head = Recipe.parse(classifier_in(tmp_path / "c") | {"privacy": OPEN, "subset": "head"})
    assert head.learns_head and head.privacy.batch_size is None


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"privacy": OPEN | {"batch_size": 8}}, "privacy.batch_size is set"),
        ({"privacy": OPEN | {"steps": 8}}, "privacy.steps is set"),
        ({"privacy": OPEN | {"clipping": "automatic"}}, "privacy.clipping is set"),
        ({"privacy": OPEN, "optimizer": {"learning_rate": 1.0}}, "optimizer is set"),
        ({"privacy": {"noise_multiplier": 1.0, "delta": 1e-3, "plan": "auto"}}, "give privacy.epsilon"),
    ],
)
def test_an_open_plan_with_a_part_of_its_own_is_refused(tmp_path, change, said):
    with pytest.raises(RecipeError, match=said):
        Recipe.parse(language_in(tmp_path) | {"optimizer": {}} | change)


def test_advice_reads_no_private_row(tmp_path):
    """T14: what is proposed follows from the declared number alone."""
    recipe = language_in(tmp_path) | {"subset": "lora(rank=2)"}
    (tmp_path / "train.csv").unlink()
    (tmp_path / "validation.csv").unlink()
    advice = advise(Recipe.checked(recipe), hours=0.01)
    assert advice.recipe.subset == "lora(rank=2, freeze_a=True, init='whitened')"
    assert advice.recipe.privacy.epsilon == 3.0 and advice.recipe.plan().epsilon <= 3.0
    expected = advice.noise_multiplier / advice.recipe.privacy.batch_size
    assert advice.noise_batch_ratio == pytest.approx(expected, rel=1e-6)
    assert advice.hours > 0 and advice.trainable_parameters > 0


def test_a_classifier_is_advised_to_learn_its_head_alone(tmp_path):
    advice = advise(Recipe.checked(classifier_in(tmp_path)))
    assert advice.recipe.subset == "head" and advice.recipe.learns_head and "beat adapters" in advice.why[0]
    noise = {"noise_multiplier": 1.0, "delta": 1e-3, "steps": 2, "batch_size": 4}
    with pytest.raises(RecipeError, match="names none"):
        advise(Recipe.checked(classifier_in(tmp_path) | {"privacy": noise}))


def test_the_command_prints_it_and_writes_a_recipe_that_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    asked = Recipe.parse(language_in(tmp_path) | {"subset": "lora(rank=2)"})
    (tmp_path / "recipe.toml").write_text(asked.to_toml())
    run = lambda *words: CliRunner().invoke(main, ["plan", *words])
    found = run("--advise", "recipe.toml", "--write", "better.toml", "--json")
    assert found.exit_code == 0, found.output
    facts = json.loads(found.stdout)
    better = Recipe.read("better.toml")
    assert (better.privacy.steps, better.privacy.batch_size) == (facts["steps"], facts["batch_size"])
    assert "expects" in run("--advise", "recipe.toml").stdout
    assert "exists already" in run("--advise", "recipe.toml", "--write", "better.toml").stderr
    assert "belong to --advise" in run("--hours", "2", "--delta", "1e-5").stderr
    assert "Missing option '--delta'" in run("--epsilon", "3").stderr
