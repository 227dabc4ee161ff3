"""Which cells a sweep has, and what each of them trains by."""

import math
from pathlib import Path

import pytest

from dpft.errors import RecipeError, SubsetError
from dpft.recipe import Recipe
from dpft.runs.sweep import Cell, Sweep
from dpft.workflows import pool
from dpft.workflows.grid import Grid, split_subsets
from tests.support.recipes import changed

OUTPUT = Path("sweep")


def cells(grid, **keys):
    tables = changed("data.units", 2000)
    for key, value in keys.items():
        table, _, name = key.partition("__")
        tables.setdefault(table, {})[name] = value
    return Grid(**grid).cells(Recipe.parse(tables), OUTPUT)


@pytest.mark.parametrize(
    ("text", "subsets"),
    [
        ("head", ["head"]),
        (
            "head, bias, lora(rank=8), head + norms + sparse(fraction=0.01)",
            ["head", "bias", "lora(rank=8)", "head + norms + sparse(fraction=0.01)"],
        ),
        ("lora(rank=2, last_blocks=1),bias", ["lora(rank=2, last_blocks=1)", "bias"]),
        ("layers('a,b(c') + bias, last_blocks(2)", ["layers('a,b(c') + bias", "last_blocks(2)"]),
        ("vera(r=4, target_modules=['q', 'v']), ia3", ["vera(r=4, target_modules=['q', 'v'])", "ia3"]),
    ],
)
def test_commas_inside_of_a_subset_do_not_part_it(text, subsets):
    assert list(split_subsets(text)) == subsets


def test_every_subset_meets_every_budget_and_seed():
    found = cells(dict(subsets=["bias", "lora(rank=8)"], epsilons=[1.0, math.inf], seeds=[0, 1]))
    assert [str(cell.folder) for cell in found] == [
        "sweep/private/untouched-seed-0",
        "sweep/private/untouched-seed-1",
        "sweep/bias-epsilon-1-seed-0",
        "sweep/bias-epsilon-1-seed-1",
        "sweep/private/bias-non-private-seed-0",
        "sweep/private/bias-non-private-seed-1",
        "sweep/lora-rank=8-epsilon-1-seed-0",
        "sweep/lora-rank=8-epsilon-1-seed-1",
        "sweep/private/lora-rank=8-non-private-seed-0",
        "sweep/private/lora-rank=8-non-private-seed-1",
    ]
    for cell in found[2:]:
        assert cell.recipe.run.seed == cell.seed and cell.recipe.subset == cell.subset
        assert (cell.plan.epsilon <= 1.0) == (cell.kind == "private") == (cell.epsilon == 1.0)
    assert len({id(cell.plan) for cell in found}) == 3  # the noise of one ε is looked for once


def test_a_comparison_takes_the_recipe_as_it_is_written():
    """Its folders have the names that earlier versions gave them, so that what is done is known."""
    given, private = cells({}), cells(dict(epsilons=[math.inf, 2.0], seeds=[4, 5]))
    assert [str(cell.folder) for cell in given[1:]] == ["sweep/epsilon-3"]
    assert [cell.folder.name for cell in private[2:]] == [
        *("non-private-seed-4", "non-private-seed-5", "epsilon-2-seed-4", "epsilon-2-seed-5")
    ]
    own = cells({}, privacy__epsilon=None, privacy__noise_multiplier=2.0)[1]
    assert own.epsilon == own.plan.epsilon and own.folder.name == f"epsilon-{own.epsilon:.3g}"
    assert cells({}, privacy__epsilon=None, privacy__noise_multiplier=0.0)[1].kind == "non-private"


def test_a_head_beside_others_is_learned_from_sums():
    facts = dict(privacy__clip_norm=10.0, optimizer__learning_rate=0.1, baseline__steps=9, data__draws=3)
    _, head, plain, bias = cells(dict(subsets=["head", "bias"], epsilons=[3.0, math.inf]), **facts)[:4]
    assert head.recipe.method == "head-centred" and bias.recipe.method == "dp-sgd"
    assert plain.recipe.method == "head-descent"  # without noise it is the better head
    assert head.plan.mechanism.name == "head-centred" and head.plan.steps == plain.plan.steps == 64
    assert head.plan.clip.clip_norm == 0.8 and bias.plan.clip.clip_norm == 10.0
    assert bias.recipe.optimizer.learning_rate == 0.1 and bias.plan.steps == 10
    _, head = cells(dict(subsets=["head"]), privacy__method="dp-sgd")
    assert head.recipe.method == "dp-sgd" and head.recipe.run.save_steps == 1


def test_a_subset_may_have_settings_of_its_own():
    with_own = {"bias": ["optimizer.learning_rate=0.1", "privacy.steps=20"], "lora": ["run.token_budget=64"]}
    _, bias, lora = cells(dict(subsets=["bias", "lora(rank=8)"], changes=with_own))
    assert (bias.recipe.optimizer.learning_rate, bias.plan.steps, bias.recipe.run.save_steps) == (0.1, 20, 2)
    assert (lora.recipe.optimizer.learning_rate, lora.plan.steps, lora.recipe.run.token_budget) == (5e-4, 10, 64)


@pytest.mark.parametrize(
    ("grid", "error", "said"),
    [
        (dict(subsets=["bias", "bias()"]), RecipeError, "two are the same subset"),
        (dict(epsilons=[1.001, 1.002]), RecipeError, "differ in their first three digits"),
        (dict(seeds=[0, 0]), RecipeError, "Two cells of the sweep"),
        (dict(subsets=["tail"]), SubsetError, "no part"),
        (dict(subsets=["bias"], changes={"norms": ["run.token_budget=64"]}), RecipeError, "the sweep has bias"),
        (dict(changes={"lora + head": ["privacy.delta=1e-6"]}), RecipeError, "same privacy.delta"),
        (dict(changes={"lora + head": ["data.train=x.csv"]}), RecipeError, "same data.train"),
        (dict(changes={"lora + head": ["run.seed=3"]}), RecipeError, "same run.seed"),
        (dict(changes={"lora + head": ["privacy.steps=0"]}), RecipeError, "privacy.steps is 0"),
        (dict(epsilons=[3.0, 1e6]), RecipeError, "protects nobody"),
    ],
)
def test_what_is_wrong_with_any_cell_is_said_before_the_first(grid, error, said):
    with pytest.raises(error, match=said):
        cells(grid)


def test_heads_share_a_process_and_others_have_their_own():
    found = cells(dict(subsets=["bias", "head"], epsilons=[1.0, 2.0]))
    subsets = [[cell.subset for cell in group] for group in pool.groups(found)]
    assert subsets == [["head", "head"], [""], ["bias"], ["bias"]]


def test_the_record_is_read_as_it_was_written_and_nothing_else_is(tmp_path):
    made = [Cell("private", "bias", 3.0, s, 7, 1.5, None, {"accuracy": 0.5 + s / 4}, f"bias-{s}") for s in (0, 1)]
    found = Sweep({"subset": "bias"}, {"dpft": "0"}, 1e-5, 40, "accuracy", 4.5, tuple(made))
    path = tmp_path / "sweep.json"
    found.write(path)
    assert Sweep.read(path) == found and path.read_text().startswith('{\n  "schema": 1')
    (row,) = found.rows()
    assert (row.setting, row.mean, row.folders) == ("ε = 3", 0.625, ("bias-0", "bias-1"))
    assert row.spread == pytest.approx(0.25 / math.sqrt(2))
    for old, new in (('"schema": 1', '"schema": 2'), ('"cells"', '"rows"'), ("composition", "best"), ("{", "")):
        path.write_text(path.read_text().replace(old, new, 1))
        with pytest.raises(RecipeError, match="is not the record of a sweep"):
            Sweep.read(path)
        found.write(path)
    with pytest.raises(RecipeError, match="run `dpft sweep`"):
        Sweep.read(tmp_path / "nothing.json")
