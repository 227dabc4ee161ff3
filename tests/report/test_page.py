"""The page of a sweep says what its cells say, keeps private what is, and is one whole file."""

import csv
import json
import re
import shutil
import tomllib
from html.parser import HTMLParser
from pathlib import Path

import pytest
from click.testing import CliRunner

from dpft.cli import main
from dpft.errors import RecipeError
from dpft.recipe import Recipe
from dpft.report.page import write_page
from dpft.report.summary import Mean, Summary, budget
from dpft.runs.sweep import Cell, Sweep
from tests.support.chromium import CHROMIUM, dom_of
from tests.support.recipes import GOOD

OLD = Path(__file__).parent / "run-0.1.0"
SIZES = {"head": 1_000, "ia3": 10_000, "lora(rank=8)": 100_000, "all": 1_000_000}
FREE = 0.98765  # of the runs without privacy, and of nothing else


def metrics(accuracy, **more):
    """With a class of 90 examples, one of 10 that is worse, two groups and two bins."""
    return {
        "accuracy": accuracy,
        "ece": 1 - accuracy,
        "per_class": {
            "rare": {"precision": 1.0, "recall": 1.0, "f1": accuracy / 2, "count": 10},
            "common": {"precision": 1.0, "recall": 1.0, "f1": accuracy, "count": 90},
        },
        "groups": {
            "north": {"accuracy": accuracy, "macro_f1": accuracy, "count": 64},
            "south": {"accuracy": accuracy - 0.25, "macro_f1": accuracy, "count": 36},
        },
        "reliability": [
            {"confidence": 0.5, "accuracy": accuracy / 2, "count": 40},
            {"confidence": 0.9, "accuracy": accuracy, "count": 60},
        ],
        **more,
    }


def cell(kind, subset, epsilon, seed, found, **more):
    facts = dict(trainable_parameters=SIZES.get(subset), seconds=None, peak_memory=None, folder=None)
    return Cell(kind=kind, subset=subset, epsilon=epsilon, seed=seed, metrics=found, **{**facts, **more})


def sweep(cells, *, public=True, headline="accuracy", **tables):
    data = {**GOOD["data"], "validation": "v.csv", "validation_is_public": public, "unit": "patient_id"}
    recipe = Recipe.parse({**GOOD, "data": data, **tables}).model_dump()
    return Sweep(
        recipe=recipe,
        versions={"dpft": "1"},
        delta=1e-5,
        units=1000,
        headline=headline,
        composed_epsilon=7.0312,
        selection="composition",
        cells=tuple(cells),
    )


def trained(epsilon, values, *, kind="private", spread=0.01, **more):
    """Three seeds of each subset: its value, and a spread around it."""
    return [
        cell(kind, subset, epsilon, seed, metrics(value + spread * (seed - 1)), **more)
        for subset, value in values.items()
        for seed in range(3)
    ]


@pytest.fixture(scope="module")
def whole():
    """Fewer parameters are better at ε = 1, more at ε = 8, and nothing can be told at ε = 3."""
    small, large = [0.8, 0.7, 0.6, 0.5], [0.81, 0.84, 0.87, 0.91]
    return sweep(
        [
            cell("untouched", "", None, 0, metrics(0.3)),
            *trained(1.0, dict(zip(SIZES, small, strict=True)), seconds=61.5, peak_memory=3 * 2**30),
            *trained(3.0, dict.fromkeys(SIZES, 0.8)),
            *trained(8.0, dict(zip(SIZES, large, strict=True))),
            *trained(None, dict.fromkeys(SIZES, FREE), kind="non-private", spread=0.0, seconds=77.5),
        ]
    )


class Page(HTMLParser):
    """What a browser makes of the page: its text, the ids, the figures' names; whether tags are balanced."""

    VOID = ("meta", "html", "br")

    def __init__(self, path):
        super().__init__()
        self.source = Path(path).read_text(encoding="utf-8")
        self.open, self.ids, self.figures, self.links, self.best, self.said = [], [], [], [], [], []
        self.feed(self.source)
        assert self.open == []
        self.text = re.sub(r"\s+", " ", " ".join(self.said))

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        self.ids += [attributes["id"]] if "id" in attributes else []
        self.links += [attributes[name] for name in ("href", "src", "xlink:href") if name in attributes]
        self.figures += [attributes] if tag == "svg" else []
        self.best += [attributes["data-best"]] if "data-best" in attributes else []
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.handle_starttag(tag, attributes)
        self.open.remove(tag)

    def handle_endtag(self, tag):
        if tag not in self.VOID:
            assert self.open.pop() == tag

    def handle_data(self, text):
        if self.open[-1:] != ["style"]:
            self.said.append(text.replace("\u00a0", " "))


def written(some, folder):
    """The pages: for publication and private; None where there is none."""
    write_page(some, folder)
    return [Page(path) if path.exists() else None for path in (folder / "index.html", folder / "private/index.html")]


@pytest.fixture(scope="module")
def folder(whole, tmp_path_factory):
    """Where the pages of the whole sweep are."""
    made = tmp_path_factory.mktemp("sweep")
    write_page(whole, made)
    return made


@pytest.fixture(scope="module")
def page(folder):
    return Page(folder / "index.html")


@pytest.fixture(scope="module")
def private(folder):
    return Page(folder / "private" / "index.html")


def test_figures_are_those_of_the_cells(page, folder):
    assert "1 head 1,000 0.800 ± 0.010 0.800 ± 0.010 0.810 ± 0.010" in page.text
    assert "4 all 1,000,000 0.500 ± 0.010 0.800 ± 0.010 0.910 ± 0.010" in page.text
    assert page.best == ["1.0", "3.0", "8.0"]
    tiles = "ε = 1 0.800 ± 0.010 (3 seeds) head ε = 3 0.800 ± 0.010 (3 seeds) head ε = 8 0.910 ± 0.010 (3 seeds) all"
    assert tiles in page.text
    assert "ε = 7.04 at δ = 1e-05, for all 36 private runs together" in page.text  # rounded up
    assert "The best setting at ε = 8 is better than the best at ε = 1, by 0.110." in page.text
    assert "The untouched model has 0.300." in page.text and "most frequent class has 0.900" in page.text
    assert "all rows that share one value of patient_id: two data sets that differ by adding" in page.text
    with (folder / "cells.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 37 and sum(float(row["accuracy"]) for row in rows if row["epsilon"] == "1.0") == pytest.approx(
        3 * (0.8 + 0.7 + 0.6 + 0.5)
    )
    assert float(rows[1]["per_class.rare.f1"]) == pytest.approx(0.395) and rows[1]["groups.south.count"] == "36"


def test_what_is_trained_without_privacy_is_on_the_private_page_alone(whole, folder, page, private, tmp_path):
    """T24."""
    names = {"index.html", "cells.csv", "utility.svg", "size.svg", "calibration.svg"}
    assert {path.name for path in folder.iterdir() if path.is_file()} == names
    figures = [re.sub(r' d="[^"]*"', "", (folder / name).read_text()) for name in names if name.endswith("svg")]
    for text in (page.text, *figures, (folder / "cells.csv").read_text()):
        for secret in (
            "0.988",
            ",inf",
            str(FREE),
            "non-private",
            "no privacy",
            "61.5",
            "77.5",
            str(3 * 2**30),
            "seconds",
        ):
            assert secret not in re.sub(r'(x|y|transform)="[^"]*"', "", text), secret
    assert "do not publish" not in page.text and "Time and memory" not in page.text
    assert "PRIVATE: do not publish this page." in private.text and "no privacy (do not publish)" in private.text
    assert "0.988 ± 0.000" in private.text and "head 61.5 77.5 3.000" in private.text
    assert str(FREE) in (folder / "private" / "cells.csv").read_text()
    fewer = sweep([one for one in whole.cells if one.kind != "non-private"])
    assert written(fewer, tmp_path)[0].source == page.source  # not one character follows from what is left out


def test_where_validation_data_are_private_nothing_may_be_published(whole, tmp_path):
    public, private = written(sweep(whole.cells, public=False), tmp_path)
    assert public is None and [path.name for path in tmp_path.iterdir()] == ["private"]
    assert "metrics on validation data that are not declared public" in private.text


def test_a_sweep_that_may_be_published_has_one_page(whole, tmp_path):
    public, private = written(whole.public, tmp_path)
    assert private is None and public is not None


@pytest.mark.parametrize("name", ["index.html", "private/index.html"])
def test_the_page_is_whole_named_and_fetches_nothing(folder, name):
    page = Page(folder / name)
    assert len(page.ids) == len(set(page.ids))
    for link in page.links:
        assert link[1:] in page.ids if link.startswith("#") else (folder / name).parent.joinpath(link).exists(), link
    assert set(re.findall(r"url\(#([^)]+)\)", page.source)) <= set(page.ids)
    assert not re.search(r"<script|@import|url\(http|<link", page.source)
    assert all(figure["role"] == "img" for figure in page.figures) and len(page.figures) == 3
    utility, size, calibration = (figure["aria-label"] for figure in page.figures)
    assert "0.800 ± 0.010 at ε = 1 with head" in utility and "Fewer parameters are better at ε = 1" in size
    assert "expected calibration error is 0.200 ± 0.010" in calibration
    assert page.source.count("#2f80ed") >= 2  # colours are no references


def test_a_page_is_the_same_each_time(whole, folder, tmp_path):
    write_page(whole, tmp_path)
    for path in tmp_path.rglob("*.*"):
        assert path.read_text() == (folder / path.relative_to(tmp_path)).read_text()


def test_lower_is_better_where_it_is(tmp_path):
    cells = [cell("untouched", "", None, 0, {"perplexity": 40.0})]
    cells += [cell("private", name, 2.0, 0, {"perplexity": value}) for name, value in (("head", 30.0), ("ia3", 21.04))]
    page, _ = written(sweep(cells, headline="perplexity", task={"name": "causal_lm"}), tmp_path)
    assert "ε = 2 21.0 one seed ia3" in page.text and "where lower is better" in page.text
    assert "Classes" not in page.text and "Calibration" not in page.text and "Time and memory" not in page.text
    assert Summary(sweep(cells, headline="accuracy_error")).lower_is_better


def test_whether_fewer_parameters_are_better_is_said_of_each_budget(whole, page, private):
    summary = Summary(whole)
    assert [trend.verdict for trend in summary.trends()] == ["fewer", "open", "more", "open"]
    first, _, third, _ = summary.trends()
    assert (first.pairs, first.told_apart, first.fewer_won, first.correlation) == (6, 6, 6, pytest.approx(1.0))
    assert (third.told_apart, third.fewer_won, third.correlation) == (6, 0, pytest.approx(-1.0))
    said = "Fewer parameters are better at ε = 1; more parameters are better at ε = 8; the seeds do not tell which"
    assert f"{said} are better at ε = 3." in page.text
    assert "the seeds do not tell which are better at ε = 3 and without privacy." in private.text
    lower = Summary(sweep(whole.cells, headline="ece"))
    assert [trend.verdict for trend in lower.trends()][:3] == ["fewer", "open", "more"]


def test_one_seed_tells_nothing_apart(whole):
    one = Summary(sweep([one for one in whole.cells if one.seed == 0]))
    assert {trend.verdict for trend in one.trends()} == {"open"} and one.trends()[0].told_apart is None
    assert one.trends()[0].correlation == pytest.approx(1.0)
    assert Mean((0.5,)).differs(Mean((0.9,))) is None and Mean((0.5,)).spread == 0


@pytest.mark.parametrize(("other", "differs"), [(0.52, False), (0.70, True)])
def test_means_differ_where_the_spread_does_not_explain_it(other, differs):
    at = lambda value: Mean((value - 0.03, value, value + 0.03))
    assert at(0.5).differs(at(other)) is differs
    assert Mean((0.5, 0.5)).differs(Mean((0.6, 0.6))) is True and Mean((0.5, 0.5)).differs(Mean((0.5, 0.5))) is False


def test_a_random_mask_is_named_as_the_control_of_its_twin(tmp_path):
    names = {"sparse(rank=8) + head": 0.7, "sparse(rank=8, choose='random', seed=3) + head": 0.5, "sparse(rank=4)": 0.1}
    page, _ = written(sweep(trained(1.0, names, trainable_parameters=100)), tmp_path)
    control = "sparse(rank=8) + head against its control sparse(rank=8, choose='random', seed=3) + head: "
    assert control + "0.700 against 0.500 at ε = 1 (more than the spread)." in page.text
    assert page.text.count("its control") == 1


def test_classes_and_groups_are_those_of_the_best_subset(whole, page, private):
    assert Summary(whole).chosen == "head"  # 0.8, 0.8 and 0.81
    assert "common 90 0.80 0.80 0.81 -0.01" in page.text and "rare 10 0.40 0.40" in page.text
    assert (
        "F1 falls most for common (0.010, 90 examples) and rare (0.005, 10 examples), at ε = 1 beside ε = 8."
        in page.text
    )
    assert "north 64 0.80 0.80 0.81 -0.01" in page.text
    assert "At ε = 1 accuracy lies between 0.550 (south) and 0.800 (north), a gap of 0.250." in page.text
    assert "An accuracy over 36 examples (south) is known to about ±0.167." in page.text
    assert (
        "F1 falls most for common (0.188, 90 examples) and rare (0.094, 10 examples), at ε = 1 beside no privacy."
        in private.text
    )


def test_calibration_pools_the_seeds(whole, page):
    assert Summary(whole).reliability(1.0) == [(0.5, pytest.approx(0.4), 120), (0.9, pytest.approx(0.8), 180)]
    assert "ε = 1 0.200 ± 0.010 +0.100" in page.text
    assert (
        "At ε = 1 the expected calibration error is 0.200 ± 0.010, and the model is on average more confident"
        in page.text
    )


def test_audits_stand_where_a_run_has_one(page, tmp_path):
    assert "Memorisation" not in page.text
    audit = json.loads((OLD / "audit.json").read_text())
    (tmp_path / "cells" / "1").mkdir(parents=True)
    found = {**audit, "epsilon_lower_bound": 0.6737, "claimed": 2.7714, "verdict": "consistent"}
    (tmp_path / "cells" / "1" / "audit.json").write_text(json.dumps(found))
    one = cell("private", "head", 3.0, 7, metrics(0.8), folder="cells/1")
    page, _ = written(sweep([one]), tmp_path)
    assert "1 of 1 audited runs: consistent, nothing contradicts the claim" in page.text
    assert "head ε = 3 7 consistent 20 ≥ 0.673 2.78" in page.text


@pytest.mark.parametrize("left", [["head"], ["head", "all"]])
def test_what_is_missing_is_left_out(whole, tmp_path, left):
    cells = [one for one in whole.cells if one.subset in left]
    bare = [cell(one.kind, one.subset, one.epsilon, one.seed, {"accuracy": 0.5}) for one in cells[::2]]
    lost = [cell("private", "head", 16.0, 0, {"accuracy": float("nan")}), cell("private", "ia3", 3.0, 0, {})]
    unknown = cell("private", "head", 1.0, 9, {"accuracy": 0.5}, trainable_parameters=None)
    page, _ = written(sweep([*bare, *lost, unknown]), tmp_path)
    assert "nan" not in page.text and "Classes" not in page.text and "1 ia3" in page.text
    with pytest.raises(RecipeError, match="has no run, so there is nothing to show"):
        write_page(sweep([cell("untouched", "", None, 0, metrics(0.3))]), tmp_path)


def test_an_epsilon_is_never_rounded_down():
    assert budget(2.9961) == "ε = 3" and budget(1.2149) == "ε = 1.22"


def test_names_cannot_become_markup(tmp_path):
    label = "</table><script>alert(1)</script>"
    found = metrics(0.5, per_class={label: {"f1": 0.5, "count": 3}})
    name = "layers('<script>alert(1)</script>$a_')"
    page, _ = written(sweep([cell("private", name, 1.0, 0, found), cell("private", "head", 1.0, 0, found)]), tmp_path)
    assert "<script" not in page.source and label in page.text and name in page.text


def test_the_page_s_recipe_and_command_repeat_the_sweep(whole, page, private):
    text = re.search(r'aria-label="The recipe">(.*?)</pre>', page.source, re.DOTALL)[1]
    tables = tomllib.loads(text.replace("&#34;", '"').replace("&#39;", "'"))
    assert Recipe.parse(tables).model_dump() == whole.recipe
    command = "dpft sweep recipe.toml --output again --epsilon 1,3,8"
    rest = " --subset 'head, ia3, lora(rank=8), all' --seeds 3"
    assert command + rest in page.text and f"{command},inf{rest}" in private.text


def dumped(some):
    facts = {name: getattr(some, name) for name in vars(some) if name != "cells"}
    return json.dumps({"schema": 1, **facts, "cells": [vars(one) for one in some.cells]})


def test_report_makes_the_page_of_a_sweep(whole, tmp_path):
    (tmp_path / "private").mkdir()
    (tmp_path / "sweep.json").write_text(dumped(whole.public))
    run = lambda *more: CliRunner().invoke(main, ["report", str(tmp_path), *more])
    assert len(json.loads(run("--json").stdout)["files"]) == 5 and not (tmp_path / "private" / "index.html").exists()
    (tmp_path / "private" / "sweep.json").write_text(dumped(whole))
    files = run().stdout.splitlines()
    assert files[0] == str(tmp_path / "index.html") and str(tmp_path / "private" / "index.html") in files
    assert all(Path(path).exists() for path in files) and len(files) == 10
    (tmp_path / "private" / "sweep.json").write_text(json.dumps({"rows": []}))
    done = run()
    assert done.exit_code == 1 and re.match(r"Error: \S+sweep.json .*\.\n$", done.output)
    (tmp_path / "private" / "sweep.json").write_text(dumped(whole).replace('"private"', '"odd"'))
    assert run().exit_code == 1


def test_report_makes_the_card_of_a_run(tmp_path):
    shutil.copytree(OLD, tmp_path / "run")
    done = CliRunner().invoke(main, ["report", str(tmp_path / "run"), "--json"])
    assert json.loads(done.stdout)["files"] == [str(tmp_path / "run" / name) for name in ("card.md", "card.html")]
    assert "holds no finished run" in CliRunner().invoke(main, ["report", str(tmp_path)]).output


@pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed")
@pytest.mark.parametrize("width", [1200, 390])
def test_the_page_in_a_browser_is_no_wider_than_the_screen(whole, tmp_path, width):
    long = "sparse(fraction=0.001, choose='random', over='model', group='rows') + head + lora(rank=8)"
    more = [cell("private", long, 1.0, seed, metrics(0.5), trainable_parameters=12345) for seed in range(3)]
    written(sweep([*whole.cells, *more]), tmp_path)
    dom = dom_of(tmp_path / "private" / "index.html", width)
    wide, seen = re.search(r"<title>(\d+) (\d+)</title>", dom).groups()
    assert int(wide) <= int(seen)


@pytest.mark.parametrize("levels", [(0.5, 0.5), (0.49, 0.5), (0.495, 0.505), (0.0, 1.0), (0.93, 0.94)])
def test_names_of_levels_find_places_wherever_they_lie(levels):
    from matplotlib import pyplot

    from dpft.report.sweep_plots import APART, _levels

    figure, axes = pyplot.subplots()
    axes.set_ylim(0, 1)
    _levels(axes, {"majority class": levels[0], "untouched model": levels[1]}, [0.0, 1.0])
    one, two = (text.get_position()[1] for text in axes.texts)
    assert abs(one - two) >= APART - 1e-9
    pyplot.close(figure)
