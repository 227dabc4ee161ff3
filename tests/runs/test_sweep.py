"""Reading ``sweep.json``."""

import json

import pytest

from dpft.errors import RecipeError
from dpft.runs.sweep import Sweep

CELL = dict(kind="private", subset="head", epsilon=1.0, seed=0, trainable_parameters=3, metrics={"accuracy": 0.5})
CELL |= dict(seconds=2.5, peak_memory=7, folder="cells/0")
FACTS = dict(schema=1, recipe={}, versions={}, delta=1e-5, units=9, headline="accuracy", composed_epsilon=None)
FACTS |= dict(selection="composition", cells=[CELL, {**CELL, "kind": "non-private", "epsilon": None}])


def read(folder, **changes):
    (folder / "sweep.json").write_text(json.dumps({**FACTS, **changes}))
    return Sweep.read(folder / "sweep.json")


def test_cells_are_read_and_what_no_guarantee_covers_is_left_out(tmp_path):
    """T24."""
    found = read(tmp_path)
    assert (found.units, len(found.cells), found.cells[0].metrics) == (9, 2, {"accuracy": 0.5})
    (left,) = found.public.cells
    assert (left.kind, left.seconds, left.peak_memory, left.folder) == ("private", None, None, "cells/0")


@pytest.mark.parametrize(
    "changes",
    [
        {"schema": 2},
        {"cells": [{**CELL, "kind": "odd"}]},
        {"cells": [{**CELL, "more": 1}]},
        {"cells": [{"kind": "private"}]},
    ],
)
def test_what_is_no_sweep_is_refused(tmp_path, changes):
    with pytest.raises(RecipeError, match="sweep.json"):
        read(tmp_path, **changes)
