"""The card says what the events say, and nothing that it is given can break the page."""

import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from markdown_it import MarkdownIt

from dpft.privacy import accounting
from dpft.privacy.events import Event, to_dp_event
from dpft.privacy.rounding import rounded_up
from dpft.report import write_card
from dpft.report.meaning import meaning
from dpft.report.plots import Labels, line
from dpft.runs import RunFolder

OLD = Path(__file__).parent / "run-0.1.0"


@pytest.fixture
def folder(tmp_path):
    run = {
        "guarantee": "", "private": True, "epsilon_rdp": 3.14, "delta": 1e-5, "unit": "patient_id", "units": 9000, "examples_per_unit": 4,
        "adjacency": "add-or-remove-one", "events": [{"event": "poisson_sampled_gaussian", "noise_multiplier": 1.0, "sample_rate": 0.02, "count": 500}],
        "planned_steps": 500, "released_steps": 500, "interrupted": False, "expected_batch_size": 180.0, "clip": {"rule": "FlatClip", "clip_norm": 1.0},
        "subset": "layers('<script>alert(1)</script>')", "trainable_parameters": 10, "all_parameters": 1000, "techniques": {"rule": 10}, "weights": "x",
        "metrics": {"accuracy": 0.5, "per_class": {"<b>bold</b>": {"precision": 1, "recall": 1, "f1": 1, "count": 3}}}, "metrics_are_private": False,
        "versions": {"python": "3.11"},
    }  # fmt: skip
    (tmp_path / "run.json").write_text(json.dumps(run))
    return tmp_path


def test_epsilon_is_derived_from_the_events(folder):
    text, page = (path.read_text() for path in write_card(folder))
    for card in (text, page):
        assert (
            "ε = 2.78" in card
            and "patient_id" in card
            and "at most 4 examples of each" in card
            and "500 releases" in card
        )
    assert "| 1 % | 4.32 % |" in text
    assert page.count("<svg") == 3


def test_names_cannot_become_markup(folder):
    _, page = write_card(folder)
    text = page.read_text()
    assert "<script" not in text and "&lt;script&gt;" in text and "<b>bold" not in text


def test_the_page_is_whole_and_fetches_nothing(folder):
    text = write_card(folder)[1].read_text()
    assert not re.findall(r"(?:src|href)=[\"'](?!#)", re.sub(r"xlink:href=\"#", "", text))
    assert "@import" not in text and "url(http" not in text
    open_tags: list[str] = []

    class Balance(HTMLParser):
        def handle_starttag(self, tag, attributes):
            if tag not in ("meta", "html", "br"):
                open_tags.append(tag)

        def handle_endtag(self, tag):
            if tag != "html":
                assert open_tags.pop() == tag

    Balance().feed(text)
    assert open_tags == []


def test_a_card_is_the_same_each_time(folder):
    assert write_card(folder)[1].read_text() == write_card(folder)[1].read_text()


def test_a_plot_has_a_name_for_those_who_cannot_see_it():
    svg = line([0, 1, 2], [0.0, 1.0, 1.5], Labels("ε spent", "step", "ε"), mark=(2, 1.5, "ε = 1.5"))
    odd = line([0, 1], [0.0, 1.0], Labels('"><script>$a^$\\d</script>', "step", "ε"), mark=(1, 1.0, "x"))
    assert "<script>" not in odd and "&quot;&gt;&lt;script&gt;$a^$\\d" in odd
    assert svg.startswith("<svg") and 'role="img"' in svg and 'aria-label="ε spent"' in svg


EPSILON = accounting.epsilon(Event(500, 1.0, 0.02).dp_event, 1e-5)


def figures(words, text):
    """The numbers that stand after or before these words."""
    return [float(found) for found in re.findall(words.replace("#", r"(\d[\d.]*(?:e[-+]\d+)?(?<!\.))"), text)]


def test_no_figure_of_the_card_is_below_what_it_bounds(folder):
    """ε is 2.773, which the nearest number with three digits, 2.77, would understate."""
    found = meaning(RunFolder(folder).record().events, 1e-5)
    assert found.epsilon == EPSILON and float(f"{EPSILON:.3g}") < EPSILON
    text, page = (path.read_text() for path in write_card(folder))
    rdp = accounting.epsilon_rdp(Event(500, 1.0, 0.02).dp_event, 1e-5)
    for card in (text, page):
        stated = figures("ε = #", card)
        assert len(stated) >= 2 and all(EPSILON <= one < 1.005 * EPSILON or rdp <= one < 1.005 * rdp for one in stated)
        for words, bound in {"at most #-fold": math.exp(EPSILON), "more than # % adv": 100 * found.advantage}.items():
            (one,) = figures(words, card)
            assert bound <= one < 1.01 * bound, words
    assert rdp <= figures(r"Rényi DP: #\)", text)[0] < 1.005 * rdp
    rows = dict(re.findall(r"^\| ([\d.,]+ ?%?) \| ([\d.]+) %", text, re.MULTILINE))
    assert len(rows) == len(found.detection) + len(found.reconstruction)
    for name, bound in {**{f"{100 * k:g} %": v for k, v in found.detection.items()}, **found.reconstruction}.items():
        one = float(rows[name if isinstance(name, str) else f"{name:,}"])
        assert 100 * bound <= one < 101 * bound, name
    assert f"ε = {rounded_up(EPSILON)}" in page[page.index("<svg") :]  # the plot's label


def test_what_an_audit_shows_is_rounded_down_and_what_is_claimed_up(folder):
    audit = {
        **json.loads((OLD / "audit.json").read_text()),
        "epsilon_lower_bound": 0.6737,
        "ceiling": 1.5067,
        "claimed": 2.7714,
    }
    (folder / "audit.json").write_text(json.dumps(audit))
    for path in write_card(folder):
        text = path.read_text()
        assert "ε ≥ 0.673 at δ" in text and "would have shown 1.5. An audit" in text and "ε = 2.78 is claimed" in text


@pytest.mark.parametrize("name", ["a|b", "a\nb"])
def test_a_name_cannot_break_a_row_of_the_markdown(folder, name):
    run = json.loads((folder / "run.json").read_text())
    run |= {
        "unit": name,
        "metrics": {"per_class": {name: {"precision": 1, "recall": 1, "f1": 1, "count": 3}}, "loss": 1.0},
    }
    (folder / "run.json").write_text(json.dumps(run))
    text = write_card(folder)[0].read_text()
    rendered = MarkdownIt().enable("table").render(text)
    assert rendered.count("<td>3</td>\n<td>1.00</td>") == 1 and rendered.count("declared, at most 4") == 1


def test_a_run_with_next_to_no_noise_has_a_card(folder):
    """ε is in the thousands, and e to that is no number of a computer."""
    run = json.loads((folder / "run.json").read_text())
    run["events"][0] |= {"noise_multiplier": 0.05, "sample_rate": 1.0, "count": 4}
    (folder / "run.json").write_text(json.dumps(run))
    text, page = (path.read_text() for path in write_card(folder))
    assert figures("ε = # at", text)[0] > 800 and "at most inf-fold" in text and "100 %" in page


def test_what_a_run_releases_beside_its_steps_stands_on_the_card(folder):
    run = json.loads((folder / "run.json").read_text())
    means = Event(1, 2.0, 1.0, sensitivity=0.1, name="class | means")
    run["events"].append(means.to_dict())
    (folder / "run.json").write_text(json.dumps(run))
    text, page = (path.read_text() for path in write_card(folder))
    together = accounting.epsilon(to_dp_event(RunFolder(folder).record().events), 1e-5)
    for card, name in ((text, "class \\| means"), (page, "class | means")):
        assert f"; {name}: 1 release of the Gaussian mechanism, noise multiplier 2, sensitivity 0.1" in card
        assert "500 releases of the Gaussian mechanism" in card and f"ε = {rounded_up(together)}" in card
    assert together > 1.1 * EPSILON and page.count("<svg") == 2  # no curve over steps, where not all of it is steps
