"""What goes wrong outside of dpft is one sentence too; a bug keeps its traceback."""

import errno
import os
import shutil
import subprocess
import sys
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from dpft.cli import main
from dpft.cli.failures import explained, pipe_is_closed
from dpft.errors import BudgetError, RecipeError
from dpft.privacy.plan import Plan
from dpft.training.releases import Releases

OLD = Path(__file__).parent.parent / "report" / "run-0.1.0" / "run.json"
DPFT = [sys.executable, "-c", "from dpft.cli import main; main()"]


def run(*arguments):
    return CliRunner().invoke(main, list(arguments))


def is_one_sentence(result, *said):
    """Below the progress bar, where there was one."""
    *bars, sentence = result.stderr.splitlines()
    assert result.exit_code == 1 and all("━" in bar for bar in bars) and "Traceback" not in result.output
    assert sentence.startswith("Error: ") and all(words in sentence for words in said), sentence
    return True


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ("preflight .", "it is a folder"),
        ("train . --output x", "it is a folder"),
        ("audit step .", "it is a folder"),
        ("init --task causal_lm --model m --output recipe.toml/x.toml", "recipe.toml"),
        ("train recipe.toml --output recipe.toml/x", "recipe.toml"),
        ("report notes", "notes/run.json is not JSON"),
        ("audit meaning notes", "notes/run.json is not JSON"),
        ("preflight latin.toml", "save it as UTF-8"),
        ("audit meaning old --plot recipe.toml/x.svg", "cannot be read or written (Not a directory): name a folder"),
    ],
)
def test_a_path_that_cannot_be_used_is_one_sentence(arguments, said, in_folder):
    (in_folder / "notes").mkdir()
    (in_folder / "notes" / "run.json").write_bytes(b"\xff\xfe{")
    (in_folder / "latin.toml").write_bytes('subset = "é"'.encode("latin-1"))
    (in_folder / "old").mkdir()
    shutil.copy(OLD, in_folder / "old")
    assert is_one_sentence(run(*arguments.split()), said)


@pytest.mark.parametrize(
    ("error", "said", "code"),
    [
        (PermissionError(errno.EACCES, "Permission denied", "runs/x"), "runs/x cannot be read or written (Perm", 1),
        (OSError(errno.ENOSPC, "No space left on device"), "A file cannot be read or written (No space left on", 1),
        (OSError(errno.EROFS, "Read-only file system", "x"), "choose another path", 1),
        (RuntimeError("Error while serializing: I/O error: No space left on device (os error 28)"), "free space", 1),
        (UnicodeDecodeError("utf-8", b"\xe9", 0, 1, "invalid"), "save it as UTF-8", 1),
        (RecipeError("No."), "Error: No.", 1),
        (BudgetError("No."), "Error: No.", 3),
        (KeyboardInterrupt(), "Stopped. What was released before stays charged.", 130),
    ],
)  # fmt: skip
def test_what_the_system_refuses_is_one_sentence_with_a_way_out(error, said, code):
    sentence, found = explained(error)
    assert said in sentence and found == code and "\n" not in sentence


@pytest.mark.parametrize(
    "bug", [ValueError("no"), KeyError("x"), RuntimeError("no"), OSError("no number"), click.Abort()]
)
def test_a_bug_keeps_its_traceback(bug):
    assert explained(bug) is None


def test_a_closed_pipe_is_told_from_a_refusal():
    assert pipe_is_closed(BrokenPipeError(errno.EPIPE, "Broken pipe"))
    assert pipe_is_closed(OSError(errno.EINVAL, "Invalid argument"))  # as Windows has it
    assert not pipe_is_closed(OSError(errno.EINVAL, "Invalid argument", "a?.toml"))


def test_a_reader_that_leaves_ends_a_command_silently(tmp_path):
    """As ``dpft plan --help | head -1`` does; here the reader has left before the first line."""
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run([*DPFT, "plan", "--help"], stdout=write, stderr=subprocess.PIPE)
    os.close(write)
    assert done.stderr == b""


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="this system has no /dev/full")
@pytest.mark.parametrize("words", [["plan", "--help"], ["audit", "bounds", "--help"]])
def test_a_full_disk_below_the_output_is_one_sentence(words):
    with open("/dev/full", "w") as full:
        done = subprocess.run([*DPFT, *words], stdout=full, stderr=subprocess.PIPE, text=True)
    assert done.returncode == 1 and done.stderr.startswith("Error: A file cannot be read or written (No space left")
    assert done.stderr.count("\n") == 1


def test_an_error_says_whether_the_folder_can_be_used_again(in_folder, monkeypatch):
    """Before its first release a run costs nothing, and its folder is free; afterwards it goes on where it can."""
    charge, allowed = Releases.charge, 0

    def on_a_disk_that_fills(self, number, *steps):
        if number > allowed:
            raise OSError(errno.ENOSPC, "No space left on device", str(self.path))
        charge(self, number, *steps)

    monkeypatch.setattr(Releases, "charge", on_a_disk_that_fills)
    train = "train recipe.toml --output x --set run.save_steps=2".split()
    assert is_one_sentence(run(*train), "free space", "Nothing was released, so x can be used again.")
    allowed = 3
    assert is_one_sentence(run(*train), "x has released 3 steps, which stay charged: go on with --resume.")
    allowed = 4
    assert run(*train, "--resume").exit_code == 0
    allowed, train[3] = 1, "y"
    assert is_one_sentence(
        run(*train), "y has released 1 step, which stays charged, and", "no checkpoint", "choose another --output."
    )


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (KeyboardInterrupt(), 130, "Stopped. What was released before stays charged.\n"),
        (OSError(errno.EINVAL, "Invalid argument"), 1, ""),  # Windows, where the reader of the output left
    ],
)
def test_what_ends_a_command_from_outside_leaves_no_traceback(monkeypatch, error, code, said):
    def ended(**_):
        raise error

    monkeypatch.setattr(Plan, "calibrate", ended)
    result = run("plan", "--delta", "1e-5")
    assert (result.exit_code, result.stderr) == (code, said)
