"""The ledger's commands, and the dashboard in a real browser."""

import json
import re
import shlex

import pytest
from click.testing import CliRunner

from dpft.cli import main
from dpft.cli.ledger import ledger as group
from dpft.privacy.rounding import rounded_up
from tests.support.chromium import CHROMIUM, dom_of


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "home"))
    monkeypatch.delenv("DPFT_LEDGER", raising=False)
    monkeypatch.chdir(tmp_path)
    rows = "".join(f"note {i},p{i % 50}\n" for i in range(400))
    (tmp_path / "notes.csv").write_text("text,patient_id\n" + rows)


def run(command):
    return CliRunner().invoke(main, shlex.split(command)[1:])


def example_of(command):
    text = run(f"dpft ledger {command} --help").output
    return " ".join(re.search(r"Example:\n\s+(dpft ledger .*(?:\n .*)?)\n\n", text)[1].split())


def test_every_example_runs():
    """In the order in which a person would meet them."""
    order = ["create", "spend", "fits", "amend", "show", "list", "verify", "export", "import", "dashboard"]
    assert sorted(order) == sorted(group.commands)
    for command in order:
        result = run(example_of(command))
        assert result.exit_code == 0, f"{command}: {result.output}"


def test_what_is_read_is_also_json():
    run("dpft ledger create notes --epsilon 4 --delta 1e-4 --data notes.csv")
    run("dpft ledger spend notes --noise-multiplier 1 --sample-rate 0.01 --steps 100 --purpose counts")
    listed = json.loads(run("dpft ledger list --json").stdout)["datasets"]
    shown = json.loads(run("dpft ledger show notes --json").stdout)
    fits = json.loads(run("dpft ledger fits notes --noise-multiplier 0.8 --sample-rate 0.1 --steps 1000 --json").stdout)
    proved = json.loads(run("dpft ledger verify --json").stdout)
    assert listed[0]["spent"] == shown["spent"] == shown["runs"][0]["epsilon"] == fits["spent"]
    assert (
        shown["knows_its_rows"]
        and "rows" not in shown
        and shown["spent_rdp"] > shown["spent"]
        and shown["runs"][0]["purpose"] == "counts"
    )
    assert not fits["fits"] and 0 < fits["most_steps"] < 1000 and fits["least_noise_multiplier"] > 0.8
    assert proved["verified"] and proved["entries"] == 5 and proved["figures"] == 1


@pytest.mark.parametrize(
    ("command", "code", "said"),
    [
        ("dpft ledger show nodes", 1, "no data set 'nodes'"),
        ("dpft ledger create notes --epsilon 4 --delta 1e-4", 1, "already"),
        ("dpft ledger create copy --epsilon 4 --delta 1e-4 --data notes.csv", 1, "two accounts would spend one budget"),
        ("dpft ledger spend notes --epsilon 9 --purpose x", 3, "to ε = 9 of 4"),
        ("dpft ledger spend notes --purpose x", 2, "Give --noise-multiplier"),
        ("dpft ledger spend notes --epsilon 1 --delta -1e-3 --purpose x", 1, "delta = -0.001"),
        ("dpft ledger spend notes --epsilon 1 --steps 100 --purpose x", 2, "is of all releases together"),
        ("dpft ledger spend notes --noise-multiplier 1 --sample-rate 2 --purpose x", 1, "sample_rate = 2"),
        ("dpft ledger create b --epsilon 4 --delta 1e-4 --unit patientid --data notes.csv", 1, "no column 'patientid'"),
        ("dpft ledger list --ledger gone.db", 1, "There is no ledger at gone.db"),
        ("dpft ledger verify --export notes.csv", 1, "not an export"),
        ("dpft ledger verify --public-key 00", 1, "was expected"),
    ],
)
def test_mistakes_are_one_sentence(command, code, said):
    run("dpft ledger create notes --epsilon 4 --delta 1e-4 --data notes.csv")
    result = run(command)
    assert result.exit_code == code and said in result.output and "Traceback" not in result.output


def test_a_changed_copy_is_warned_about(tmp_path):
    run("dpft ledger create notes --epsilon 4 --delta 1e-4 --data notes.csv")
    lines = (tmp_path / "notes.csv").read_text().splitlines()
    (tmp_path / "copy.csv").write_text("\n".join(lines[:300]) + "\n")
    result = run("dpft ledger create copy --epsilon 4 --delta 1e-4 --data copy.csv")
    assert result.exit_code == 0 and re.search(
        r"about (60|70|80)% of the rows or texts are in 'notes' too", result.output
    )


@pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed")
@pytest.mark.parametrize("width", [1200, 390])
def test_the_dashboard_in_a_browser(tmp_path, width):
    run("dpft ledger create 'notes <of> 2026' --epsilon 4 --delta 1e-4 --data notes.csv")
    run(
        "dpft ledger spend 'notes <of> 2026' --noise-multiplier 1 --sample-rate 0.01 --steps 100 --purpose "
        "'<b>counts</b>'"
    )
    spent = json.loads(run("dpft ledger list --json").stdout)["datasets"][0]["spent"]
    assert run("dpft ledger dashboard --output ledger.html").exit_code == 0
    page = (tmp_path / "ledger.html").read_text()
    assert not re.search(r"(src|href)=.?https?:|<script|@import", page.replace('href="http://www.w3.org', ""))
    dom = dom_of(tmp_path / "ledger.html", width)
    assert f'<span data-spent="">{rounded_up(spent)}</span>' in dom and 'data-dataset="notes &lt;of&gt; 2026"' in dom
    assert dom.count("<tr data-run=") == 1 and "&lt;b&gt;counts" in dom and "<svg" in dom
    whole, seen = re.search(r"<title>(\d+) (\d+)</title>", dom).groups()
    assert int(whole) <= int(seen)  # nothing is wider than the screen
