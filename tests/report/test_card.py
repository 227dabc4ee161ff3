"""The card says what the events say, and nothing that it is given can break the page."""

import json
import re
from html.parser import HTMLParser

import pytest

from dpft.report import write_card
from dpft.report.plots import line


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
            "ε = 2.77" in card
            and "patient_id" in card
            and "at most 4 examples of each" in card
            and "500 releases" in card
        )
    assert "| 1 % | 4.31 % |" in text
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
    svg = line([0, 1, 2], [0.0, 1.0, 1.5], title="ε spent", x_label="step", y_label="ε", mark=(2, 1.5, "ε = 1.5"))
    odd = line([0, 1], [0.0, 1.0], title='"><script>$a^$\\d</script>', x_label="step", y_label="ε", mark=(1, 1.0, "x"))
    assert "<script>" not in odd and "&quot;&gt;&lt;script&gt;$a^$\\d" in odd
    assert svg.startswith("<svg") and 'role="img"' in svg and 'aria-label="ε spent"' in svg
