"""What a command imports: seconds of every start are imports, so a library comes only where it is used."""

import json
import os
import subprocess
import sys

import pytest

from dpft.recipe import Recipe
from dpft.subset.quantized import may_need_bitsandbytes

# Each takes from a tenth of a second to two seconds, and no plain command of these needs it.
HEAVY = ["bitsandbytes", "torch._inductor.compile_fx", "opacus", "matplotlib", "sklearn", "alembic", "torchvision"]
HEAVY += ["dp_accounting", "scipy.stats", "scipy.signal", "sqlalchemy", "transformers.trainer"]
IMPORTED = """
import json, sys
from dpft.cli import main
try:
    main(sys.argv[1:])
except SystemExit as end:
    print("##" + json.dumps([end.code, sorted(sys.modules)]))
"""


def imported_by(*command, folder):
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    run = [sys.executable, "-c", IMPORTED, *command]
    done = subprocess.run(run, capture_output=True, text=True, cwd=folder, env=environment, check=True)
    code, modules = json.loads(done.stdout.split("##")[1])
    assert code == 0, done.stderr
    return set(modules)


@pytest.mark.parametrize("subset", ["lora + head", "bias + norms"])
def test_a_preflight_imports_no_library_that_its_recipe_does_not_need(recipe, tmp_path, subset):
    (tmp_path / "recipe.toml").write_text(Recipe.parse(recipe | {"subset": subset}).to_toml())
    modules = imported_by("preflight", "recipe.toml", folder=tmp_path)
    assert "torch" in modules
    assert modules.isdisjoint(HEAVY), modules & set(HEAVY)


def test_help_needs_no_torch(tmp_path):
    assert imported_by("train", "--help", folder=tmp_path).isdisjoint([*HEAVY, "torch", "transformers", "scipy"])


@pytest.mark.parametrize(
    "change",
    [
        {"subset": "adalora(init_lora_weights='loftq')"},
        {"optimizer": {"name": "adamw_bnb_8bit"}},
        {"model": {"path": "quantized"}},
        {"model": {"path": "unreadable"}},
    ],
)
def test_bitsandbytes_is_left_where_a_recipe_may_need_it(recipe, tmp_path, monkeypatch, change):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "quantized").mkdir()
    (tmp_path / "quantized" / "config.json").write_text('{"model_type": "bert", "quantization_config": {}}')
    assert not may_need_bitsandbytes(Recipe.parse(recipe))
    assert may_need_bitsandbytes(Recipe.parse(recipe | change))


def test_bitsandbytes_is_back_afterwards():
    code = """
import sys
from dpft.subset.quantized import without_bitsandbytes
with without_bitsandbytes():
    from peft.import_utils import is_bnb_available
    inside = is_bnb_available()
assert not inside and "bitsandbytes" not in sys.modules and is_bnb_available()
"""
    subprocess.run(
        [sys.executable, "-c", code], check=True, env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    )
