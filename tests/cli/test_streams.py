"""Output reaches pipes that cannot encode ε, as on Windows: nothing ends in a traceback, and every word stays
readable."""

import io
import json
import os
import subprocess
import sys

import pytest
from click.testing import CliRunner

from dpft.cli import COMMANDS, main
from dpft.cli.streams import spell_out

WINDOWS = "cp1252"  # of a pipe on a Western Windows


def all_commands():
    for name in COMMANDS:
        command = main.get_command(None, name)
        yield [name]
        yield from ([name, inner] for inner in getattr(command, "commands", {}))


def run(*arguments, charset=WINDOWS):
    return CliRunner(charset=charset).invoke(main, list(arguments))


@pytest.mark.parametrize("words", [[], *all_commands()], ids=" ".join)
@pytest.mark.parametrize("charset", [WINDOWS, "cp437", "latin-1"])
def test_the_help_of_every_command_fits_a_pipe_of_windows(words, charset):
    result, plain = run(*words, "--help", charset=charset), run(*words, "--help", charset="utf-8")
    assert result.exit_code == 0 and result.exception is None
    text = result.stdout_bytes.decode(charset)
    assert "?" not in text.replace("?", "", plain.stdout.count("?")) and "\\u" not in text
    assert text.count("\n") == plain.stdout.count("\n")


def test_a_pipe_reads_names_for_letters_that_it_lacks():
    result = run("plan", "--help")
    assert "Target epsilon; the noise" in result.stdout and "delta, below 1/units." in result.stdout
    assert "Target ε; the noise" in run("plan", "--help", charset="utf-8").stdout


def test_a_run_whose_output_is_piped_ends_well(in_folder):
    """0.1.0 trained, charged, and ended with a traceback and exit code 1."""
    result = run("train", "recipe.toml", "--output", "x")
    assert result.exit_code == 0 and "(epsilon = 3, delta = 0.001)-differential privacy" in result.stdout
    assert "epsilon <= " in result.stderr and "4/4" in result.stderr and "\\u" not in result.stderr  # the bar
    assert (in_folder / "x" / "weights").is_dir()


def test_errors_and_names_from_other_alphabets_are_printed_too(in_folder):
    result = run("report", "żółw-病院")
    assert result.exit_code == 1 and result.exception.code == 1
    assert result.stderr == (
        "Error: zó\\u0142w-\\u75c5\\u9662 holds no finished run (no run.json): give the folder that `dpft train "
        "--output` made.\n"
    )


def test_json_is_ascii_and_says_the_same_in_every_pipe(in_folder):
    arguments = ["params", "recipe.toml", "--json", "--set", "run.seed=1"]
    facts = [json.loads(run(*arguments, charset=charset).stdout_bytes) for charset in (WINDOWS, "utf-8")]
    assert facts[0] == facts[1]
    result = run("audit", "bounds", *"--canaries 100 --guesses 10 --correct 9 --delta 1e-4 --json".split())
    assert result.stdout_bytes.isascii() and json.loads(result.stdout_bytes)["delta"] == 1e-4
    result = run("train", "recipe.toml", "--output", "x", "--json")
    assert result.stdout_bytes.isascii() and json.loads(result.stdout_bytes)["guarantee"].startswith("(ε = ")


@pytest.mark.parametrize("encoding", ["cp1252", "cp1252:strict", "cp1250:strict", "utf-8"])
def test_a_process_with_a_pipe_of_windows_ends_well(encoding, tmp_path):
    environment = {**os.environ, "PYTHONIOENCODING": encoding}
    command = [sys.executable, "-c", "from dpft.cli import main; main()"]
    done = subprocess.run([*command, "audit", "--help"], capture_output=True, env=environment)
    text = done.stdout.decode(encoding.partition(":")[0])
    assert done.returncode == 0 and not done.stderr
    assert f"An audit can refute {'ε' if encoding == 'utf-8' else 'epsilon'}; it never" in text


def test_a_stream_keeps_its_encoding_and_what_it_can_encode(monkeypatch):
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding=WINDOWS, newline=""))
    monkeypatch.setattr(sys, "stderr", None)  # as under pythonw
    spell_out()
    print("–é…", "ε ≤ δ·σ²", "\udce9", flush=True, end="")
    assert raw.getvalue() == "–é… epsilon <= delta·sigma² \\udce9".encode(WINDOWS)
