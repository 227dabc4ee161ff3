"""What the command line is tried in."""

import pytest

from dpft.recipe import Recipe


@pytest.fixture
def in_folder(recipe, tmp_path, monkeypatch):
    """A working folder with what the examples of ``--help`` name."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "recipe.toml").write_text(Recipe.parse(recipe).to_toml())
    return tmp_path
