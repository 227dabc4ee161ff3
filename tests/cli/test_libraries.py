"""A command's standard error holds what dpft says, and not what the libraries below it say of themselves."""

import logging
import os
import subprocess
import sys
import warnings

from dpft.cli.libraries import BARS, only_our_messages
from dpft.recipe import Recipe

COMMANDS = """
--help
plan --noise-multiplier 1.0 --sample-rate 0.02 --steps 500 --delta 1e-5
init --task causal_lm --model m --output new.toml
preflight recipe.toml
train recipe.toml --output runs/notes
compare recipe.toml --output runs/compared --epsilon 2
sweep recipe.toml --output runs/swept --epsilon 2 --subset bias,norms --jobs 2
report runs/notes
ledger create notes --epsilon 8 --delta 1e-6 --data train.csv
ledger list
audit bounds --canaries 1000 --guesses 100 --correct 75 --delta 1e-4
audit step recipe.toml --steps 100
"""
# In one process, because each would import for seconds what the others have imported.
ALL = """
import sys
from dpft.cli import main
for line in sys.argv[1].strip().splitlines():
    try:
        main(line.split())
    except SystemExit as end:
        print("##", end.code, line, file=sys.stderr, flush=True)
"""


def test_plain_commands_leave_nothing_on_standard_error_but_the_bar(recipe, tmp_path):
    (tmp_path / "recipe.toml").write_text(Recipe.parse(recipe).to_toml())
    environment = {name: value for name, value in os.environ.items() if name not in BARS}
    environment |= {"XDG_DATA_HOME": str(tmp_path / "home"), "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [sys.executable, "-c", ALL, COMMANDS], capture_output=True, text=True, cwd=tmp_path, env=environment
    )
    said = done.stderr.splitlines()
    assert [line for line in said if line.startswith("##")] == [f"## 0 {c}" for c in COMMANDS.strip().splitlines()]
    assert [line for line in said if not line.startswith("##") and "━" not in line] == []


def test_warnings_of_dpft_and_errors_of_all_are_shown(capsys, recwarn):
    shown, other = logging.StreamHandler(sys.stderr), logging.getLogger("another.library")
    other.addHandler(shown)
    warn = "import warnings; warnings.warn('{0}', stacklevel=1)"
    with only_our_messages():
        other.warning("advice of a library")
        other.error("error of a library")
        exec(warn.format("warning of a library"), {"__name__": "another.library"})
        exec(warn.format("warning of dpft"), {"__name__": "dpft.training.data"})
    other.removeHandler(shown)
    assert capsys.readouterr().err == "error of a library\n"
    assert [str(warning.message) for warning in recwarn] == ["warning of dpft"]


def test_a_command_leaves_the_process_as_it_was(monkeypatch):
    monkeypatch.setenv("TQDM_DISABLE", "")
    before = dict(os.environ), list(warnings.filters), logging.root.manager.disable
    with only_our_messages():
        assert os.environ["TQDM_DISABLE"] == "" and os.environ["HF_DATASETS_DISABLE_PROGRESS_BARS"] == "1"
    assert (dict(os.environ), list(warnings.filters), logging.root.manager.disable) == before
