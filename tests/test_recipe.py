"""A recipe says everything, and says what is wrong with it in one sentence."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dpft.errors import RecipeError
from dpft.privacy.clipping import AutoClip
from dpft.recipe import Recipe, expand
from tests.support.recipes import GOOD, changed


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("privacy.epsilom", 3.0, "unknown key privacy.epsilom: did you mean epsilon?"),
        ("extra", {}, "unknown key extra"),
        ("model", None, "lacks model"),
        ("privacy.delta", 1e-3, "delta is 0.001 for 1,000 units"),
        ("privacy.noise_multiplier", 1.0, "epsilon or noise_multiplier"),
        ("privacy.epochs", 2.0, "steps or epochs"),
        ("privacy.batch_size", 2000, "batch_size is 2,000 of 1,000 units"),
        ("privacy.epsilon", -1.0, "privacy.epsilon is -1.0"),
        ("privacy.clipping", "none", "privacy.clipping is 'none'"),
        ("privacy.adjacency", "friends", "privacy.adjacency is 'friends'"),
        ("task.labels", ["a"], "at least two labels"),
        ("task.labels", ["a", "b", "a"], "a label twice"),
        ("task.prompt", "q", "unknown key task.prompt"),
        ("task.name", "poetry", "task.name is 'poetry'"),
        ("task.name", None, "lacks task.name"),
        ("task.lables", ["a"], "unknown key task.lables: did you mean labels?"),
        ("task.max_length", 1, "task.max_length is 1, but"),
        ("task", {"name": "causal_lm", "prompt": "q"}, "go together"),
        ("task", {"name": "causal_lm", "rank": 3}, "unknown key task.rank: choose from name, text,"),
        ("subset", "lora + tail", "'tail' is no part"),
        ("data.examples_per_unit", 3, "name the unit column"),
        ("data.units", "many", "data.units is 'many'"),
        ("run.token_budget", 1, "run.token_budget is 1"),
        ("ledger.url", "postgresql://ann:secret@host/ledger", "ledger.url holds a password"),
        ("ledger.url", "postgresql://ann:a/b@host/ledger", "ledger.url holds a password"),
        ("ledger.url", "postgresql://host/ledger?user=ann&password=secret", "ledger.url holds a password"),
        ("ledger.purpose", "a trial", "ledger.dataset is not named, so nothing would be charged"),
    ],
)
def test_one_sentence_says_what_is_wrong(key, value, said):
    with pytest.raises(RecipeError) as error:
        Recipe.parse(changed(key, value))
    assert said in str(error.value)
    assert (
        "\n" not in str(error.value)
        and str(error.value).rstrip("?").endswith((".", "epsilon", "?"))
        or "?" in str(error.value)
    )


def test_what_is_written_reads_back(tmp_path):
    recipe = Recipe.parse(GOOD)
    for comments in (False, True):
        path = tmp_path / f"{comments}.toml"
        path.write_text(recipe.to_toml(comments=comments))
        assert Recipe.read(path) == recipe


@given(st.text(max_size=30), st.lists(st.text(max_size=10), min_size=2, max_size=4, unique=True))
def test_any_text_survives_the_file(path, labels):
    import tomllib

    tables = changed("model.path", path)
    tables["task"]["labels"] = labels
    recipe = Recipe.parse(tables)
    assert Recipe.parse(tomllib.loads(recipe.to_toml())) == recipe


def test_overrides(tmp_path):
    path = tmp_path / "recipe.toml"
    path.write_text(Recipe.parse(GOOD).to_toml())
    recipe = Recipe.read(
        path, ("privacy.epsilon=1", "subset=norms + head", "data.unit=patient_id", "privacy.steps=", "privacy.epochs=2")
    )
    assert (recipe.privacy.epsilon, recipe.subset, recipe.data.unit) == (1.0, "norms + head", "patient_id")
    assert (recipe.privacy.steps, recipe.privacy.epochs) == (None, 2.0)
    for bad in ("privacy.epsilon", "=3", "subset.rank=3"):
        with pytest.raises(RecipeError, match="not of the form|no table"):
            Recipe.read(path, (bad,))


def test_files_that_cannot_be_read(tmp_path):
    with pytest.raises(RecipeError, match="no recipe"):
        Recipe.read(tmp_path / "none.toml")
    (tmp_path / "bad.toml").write_text("subset = [")
    with pytest.raises(RecipeError, match="not TOML"):
        Recipe.read(tmp_path / "bad.toml")


def test_a_recipe_that_an_earlier_version_wrote_still_parses():
    """It held every task's keys."""
    old = {"name": "causal_lm", "text": "note", "label": "label", "labels": [], "max_length": 64}
    recipe = Recipe.parse(changed("task", old))
    assert "label" not in recipe.to_toml() and recipe.task.columns.keys() == {"note"}


def test_the_plan_follows_the_recipe():
    plan = Recipe.parse(changed("data.unit", "patient_id")).plan()
    assert plan.epsilon == pytest.approx(3.0, rel=0.01) and plan.epsilon <= 3.0
    assert (plan.sample_rate, plan.steps, plan.units, plan.unit) == (0.1, 10, 1000, "patient_id")
    assert plan.clip.clip_norm == 1.0


def test_the_baseline_differs_in_noise_and_clipping_alone():
    recipe = Recipe.parse(GOOD)
    plain = recipe.without_privacy()
    assert plain.plan().noise_multiplier == 0 and plain.privacy.clip_norm > 1e6
    assert plain.plan().sample_rate == recipe.plan().sample_rate and plain.plan().steps == recipe.plan().steps
    assert plain.model_copy(update={"privacy": recipe.privacy}) == recipe


def test_the_baseline_may_have_its_own_rate_and_steps():
    plain = Recipe.parse(changed("baseline", {"learning_rate": 0.2, "steps": 3})).without_privacy()
    assert (plain.optimizer.learning_rate, plain.plan().steps) == (0.2, 3)


def test_variables_in_paths(monkeypatch):
    monkeypatch.setenv("DPFT_TEST_FOLDER", "/data")
    assert expand("$DPFT_TEST_FOLDER/x.csv") == "/data/x.csv"
    with pytest.raises(RecipeError, match="DPFT_TEST_MISSING, which is not set"):
        expand("$DPFT_TEST_MISSING/x.csv")


def in_encoding(encoding):
    text = Recipe.parse(GOOD).to_toml().replace("train.csv", "données.csv").replace("\n", "\r\n")
    return text.encode(encoding)


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_a_recipe_is_read_as_editors_and_shells_save_it(tmp_path, encoding):
    """With a byte-order mark, as Notepad and PowerShell write it, and in UTF-16, as PowerShell 5 does."""
    (tmp_path / "recipe.toml").write_bytes(in_encoding(encoding))
    assert Recipe.read(tmp_path / "recipe.toml") == Recipe.parse(changed("data.train", "données.csv"))


@pytest.mark.parametrize("encoding", ["cp1252", "utf-16-le", "utf-32"])
def test_a_recipe_in_another_encoding_is_sent_to_utf_8(tmp_path, encoding):
    (tmp_path / "recipe.toml").write_bytes(in_encoding(encoding))
    with pytest.raises(RecipeError, match="recipe.toml .*: save it as UTF-8.$"):
        Recipe.read(tmp_path / "recipe.toml")


@pytest.mark.parametrize("path", [r"C:\Users\ann\train.csv", r"D:\data\train.csv", r"C:\new\train.csv", "C:\\data\\"])
def test_a_windows_path_in_double_quotes_is_told_how_to_be_written(tmp_path, path):
    """As TOML it is an error, or, worse, another path: \\n and \\t are a line's end and a tab."""
    file = tmp_path / "recipe.toml"
    text = Recipe.parse(GOOD).to_toml()
    file.write_text(text.replace('"train.csv"', f'"{path}"'))
    with pytest.raises(RecipeError, match=r"write Windows paths in '\.\.\.' or with /\.$"):
        Recipe.read(file)
    file.write_text(text.replace('"train.csv"', f"'{path}'"))
    assert Recipe.read(file).data.train == path
    assert Recipe.read(file, (f"data.validation={path}",)).data.validation == path


def test_a_windows_path_that_dpft_writes_reads_back(tmp_path):
    (tmp_path / "recipe.toml").write_text(Recipe.parse(changed("model.path", r"C:\new\Uni\model")).to_toml())
    assert Recipe.read(tmp_path / "recipe.toml").model.path == r"C:\new\Uni\model"


def test_another_mistake_in_a_recipe_is_not_blamed_on_paths(tmp_path):
    (tmp_path / "recipe.toml").write_text('subset = "lora"\nmodel = {path = nothing}\n')
    with pytest.raises(RecipeError, match="at line 2, .*: fix that line.$"):
        Recipe.read(tmp_path / "recipe.toml")


def test_a_folder_is_no_recipe(tmp_path):
    with pytest.raises(RecipeError, match="it is a folder"):
        Recipe.read(tmp_path)


@pytest.mark.parametrize("public", ["./train.csv", "$DPFT_TEST_FOLDER/train.csv", "link.csv"])
def test_a_private_file_is_not_public_by_another_name(tmp_path, monkeypatch, public):
    """T14: weights that are chosen by its gradients would be released un-noised."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DPFT_TEST_FOLDER", str(tmp_path))
    (tmp_path / "link.csv").symlink_to("train.csv")
    with pytest.raises(RecipeError, match="names the private file train.csv"):
        Recipe.parse(changed("data.public", public))


def test_the_plan_protects_what_the_recipe_says():
    """Every fact of a plan that the recipe states, none of them at its default."""
    tables = changed("data.examples_per_unit", 3)
    tables["data"] |= {"unit": "patient", "unit_gradient": "sum"}
    tables["privacy"] |= {"adjacency": "zero-out", "clipping": "automatic", "clip_norm": 0.5}
    plan = Recipe.parse(tables).plan()
    assert (plan.unit, plan.examples_per_unit, plan.unit_gradient) == ("patient", 3, "sum")
    assert (plan.adjacency, plan.clip, plan.delta) == ("zero-out", AutoClip(0.5), 1e-5)
