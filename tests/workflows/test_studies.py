"""What `benchmarks/studies/run.py` writes of a table."""

import json

import pytest

from benchmarks.studies import run as studies
from dpft.recipe import Recipe


def test_a_table_of_subsets_has_a_row_for_each_subset_and_setting(recipe, tmp_path, monkeypatch):
    recipe["data"]["validation_is_public"] = True
    (tmp_path / "study").mkdir()
    (tmp_path / "study" / "small.toml").write_text(Recipe.parse(recipe).to_toml(), encoding="utf-8")
    monkeypatch.setattr(studies, "STUDIES", tmp_path)
    table = studies.Table("study", recipe="small.toml", subsets=("head", "bias + head"), epsilons=(8.0,))
    monkeypatch.setitem(studies.TABLES, "small", table)
    rows = studies.run("small", tmp_path / "runs", seeds=2)
    settings = [(row["subset"], row["setting"], row["seeds"]) for row in rows]
    trained = [(name, one, 2) for name in table.subsets for one in ("non-private", "ε = 8")]
    assert settings == [("", "untouched", 2), *trained]
    written = json.loads((tmp_path / "study" / "results.json").read_text(encoding="utf-8"))["small"]
    cells = json.loads((tmp_path / "runs" / "small" / "private" / "sweep.json").read_text(encoding="utf-8"))["cells"]
    found = [cell["metrics"]["accuracy"] for cell in cells if (cell["subset"], cell["epsilon"]) == ("bias + head", 8.0)]
    assert written["rows"] == rows and written["composed_epsilon"] > 8.0
    assert rows[-1]["accuracy"] == pytest.approx(sum(found) / 2, abs=1e-4)
    assert rows[-1]["parameters"] > rows[1]["parameters"] > 0
