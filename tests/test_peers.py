"""What benchmarks/peers.py makes of cells that are known; the systems themselves run when the study does."""

import sys
from argparse import Namespace
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

BENCHMARKS = str(Path(__file__).parent.parent / "benchmarks")
DPFT, PEER = "dpft: default", "Opacus: full batches"


@pytest.fixture
def peers(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    yield import_module("peers")
    for name in ("peers", "peer_systems", "output", "studies", "studies.run"):
        sys.modules.pop(name, None)


def cell(system, epsilon=3.0, seed=0, rate=None, **facts):
    figures = {"accuracy": 0.5, "macro_f1": 0.25, "stated_epsilon": epsilon, "cpu_seconds": 1.0}
    return {"system": system, "epsilon": epsilon, "seed": seed, "rate": rate, **(facts or figures)}


def scores(accuracy, stated=3.0):
    return {"accuracy": accuracy, "macro_f1": accuracy / 2, "stated_epsilon": stated, "cpu_seconds": 1.0}


def test_a_rate_is_chosen_at_its_epsilon_by_the_cells_of_seed_0(peers):
    cells = [
        cell(PEER, rate=0.1, **scores(0.4)),
        cell(PEER, rate=0.3, **scores(0.6)),
        cell(PEER, rate=1.0, error="ValueError: no"),
        cell(PEER, epsilon=8.0, rate=0.1, **scores(0.9)),
        cell(PEER, seed=1, rate=0.1, **scores(0.9)),
        cell(DPFT, **scores(0.95)),
    ]
    assert peers.best_rate(cells, PEER, 3.0) == 0.3 and peers.best_rate(cells, PEER, 8.0) == 0.1
    assert peers.best_rate(cells, DPFT, 3.0) is None


def test_a_row_has_the_chosen_rate_alone_and_the_largest_epsilon(peers):
    cells = [
        cell(PEER, rate=0.1, **scores(0.2)),
        cell(PEER, rate=0.3, **scores(0.6, stated=2.5)),
        cell(PEER, seed=1, rate=0.3, **scores(0.8, stated=2.75)),
    ]
    (row,) = peers.summary(cells)
    assert (row["accuracy"], row["macro_f1"], row["seeds"], row["settings"]) == (0.7, 0.35, 2, 2)
    assert row["stated_epsilon"] == 2.75 and row["accuracy_spread"] == pytest.approx(0.1414)
    assert peers.shown([row]).splitlines()[-1] == f"| 3 | {PEER} | 0.700 ± 0.141 | 0.350 ± 0.071 | 2.750 | 2 | 2 | 1 |"


def test_every_rate_runs_at_seed_0_and_the_chosen_one_at_the_others(peers, monkeypatch, tmp_path):
    ran = []

    def run(work, some):
        ran.append(some)
        return scores(0.9 if some.rate == 0.3 else 0.5), some.epsilon

    once = peers.System(run, rates=(0.1, 0.3), seeds=1)
    monkeypatch.setattr(peers, "SYSTEMS", {PEER: peers.System(run, rates=(0.1, 0.3)), "once": once})
    monkeypatch.setattr(peers, "made_work", lambda table, folder: None)
    arguments = Namespace(system="", epsilon=[3.0], seeds=3, work=tmp_path)
    cells = []
    for found in peers.measured("icd10", arguments, cells):
        cells.append(found)
    assert [(some.seed, some.rate) for some in ran] == [(0, 0.1), (0, 0.3), (1, 0.3), (2, 0.3), (0, 0.1), (0, 0.3)]
    assert list(peers.measured("icd10", arguments, cells)) == []  # a known cell is not computed again


def test_a_system_that_cannot_run_has_its_own_words_in_the_table(peers):
    def fails(work, cell):
        raise ValueError("this family is not known\nand more")

    row = peers.scored(None, peers.System(fails), peers.Cell(3.0, 0))
    assert row["error"] == "ValueError: this family is not known" and "accuracy" not in row
    rows = peers.summary([{"system": DPFT, **row}])
    assert "ValueError: this family is not known" in peers.shown(rows).splitlines()[-1]


def test_a_known_cell_is_found_by_all_that_it_is(peers):
    cells = [cell(PEER, rate=0.1)]
    assert peers.known(cells, PEER, peers.Cell(3.0, 0, 0.1)) is cells[0]
    for other in (peers.Cell(1.0, 0, 0.1), peers.Cell(3.0, 1, 0.1), peers.Cell(3.0, 0, 0.2)):
        assert peers.known(cells, PEER, other) is None
    assert peers.known(cells, DPFT, peers.Cell(3.0, 0, 0.1)) is None


def test_scores_are_those_of_the_labels_that_occur(peers):
    labels = torch.tensor([0, 0, 0, 2])
    work = SimpleNamespace(validation=SimpleNamespace(labels=labels))
    logits = torch.eye(3)[torch.tensor([0, 0, 0, 0])]
    row = peers.scored(work, peers.System(lambda work, cell: (logits, 2.9)), peers.Cell(3.0, 0))
    assert (row["accuracy"], row["stated_epsilon"]) == (0.75, 2.9)
    assert row["macro_f1"] == pytest.approx((6 / 7 + 0) / 2, abs=1e-4)


def test_a_study_is_read_as_its_own_program_reads_it(peers, recipe, monkeypatch, tmp_path):
    """The features that an earlier start left are given to every system, at length 1."""
    import peer_systems

    from dpft.recipe import Recipe

    (tmp_path / "small.toml").write_text(Recipe.parse(recipe).to_toml(), encoding="utf-8")
    monkeypatch.setattr(sys.modules["studies.run"], "STUDIES", tmp_path)
    table = sys.modules["studies.run"].Table(".", lambda folder: ("privacy.delta=1e-4",), recipe="small.toml")
    monkeypatch.setitem(peer_systems.TABLES, "small", table)
    assert set(peers.TABLES) < set(peer_systems.TABLES)
    (tmp_path / "small").mkdir()
    rows = {"features": torch.tensor([[3.0, 4.0]]), "labels": torch.tensor([1]), "members": [[0]], "classes": 3}
    torch.save((rows, torch.tensor([[0.0, 2.0]]), torch.tensor([2]), 5.0), tmp_path / "small" / "features.pt")
    work = peers.made_work("small", tmp_path)
    assert work.delta == 1e-4 and work.classes == 3 and work.seconds == 5.0
    assert work.train.features.tolist() == [[pytest.approx(0.6), pytest.approx(0.8)]]
    assert work.validation.features.tolist() == [[0.0, 1.0]] and work.validation.labels.tolist() == [2]
