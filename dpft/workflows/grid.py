"""The cells of a sweep: every subset with every ε and every seed, each with its recipe, its plan and its folder."""

import ast
import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dpft.errors import RecipeError
from dpft.privacy.plan import Plan
from dpft.privacy.rounding import rounded_up
from dpft.recipe import Recipe, toml
from dpft.recipe.tables import BaselineTable, OptimizerTable, RunTable
from dpft.runs.folder import RunFolder
from dpft.runs.sweep import NON_PRIVATE, PRIVATE, UNTOUCHED, Kind
from dpft.subset import Subset

# What may differ between subsets: how they train. All else is what a sweep compares on, or counts by.
OWN_TABLES = ("optimizer", "baseline", "privacy", "run")
SHARED = ("privacy.epsilon", "privacy.noise_multiplier", "privacy.delta", "privacy.adjacency", "run.seed")
PIECES = 10  # a run that descends keeps a checkpoint after each of so many parts: little is lost if it is killed
KEPT_OF_PRIVACY = ("epsilon", "noise_multiplier", "delta", "adjacency", "method")  # by a head beside other subsets


@dataclass(frozen=True)
class Planned:
    """A cell before it runs.

    Attributes:
        epsilon: what is asked for, or what the recipe's noise gives; None without privacy.
        plan: None of the untouched model.
        folder: the run's.
        keeps_checkpoints: whether the recipe asks for them; otherwise they go when the cell is done.
    """

    kind: Kind
    subset: str
    epsilon: float | None
    seed: int
    recipe: Recipe
    plan: Plan | None
    folder: Path
    keeps_checkpoints: bool

    @property
    def title(self) -> str:
        """What a progress bar calls it."""
        setting = self.kind if self.epsilon is None else f"ε = {rounded_up(self.epsilon)}"
        return ", ".join(filter(None, (self.subset, setting, f"seed {self.seed}")))

    @property
    def files(self) -> RunFolder:
        """Where its files are."""
        return RunFolder(self.folder)


@dataclass(frozen=True)
class Grid:
    """What a sweep is asked to run.

    Attributes:
        subsets: by default the recipe's own, and the recipe as it is written.
        epsilons: the budgets, infinity for the run without privacy, None for the recipe's own, which is the default.
        changes: for a subset, what its recipe has in place of the common one's, such as
            ``("optimizer.learning_rate=0.01",)``.
    """

    subsets: Sequence[str] = ()
    epsilons: Sequence[float | None] = ()
    seeds: Sequence[int] = (0,)
    changes: Mapping[str, Sequence[str]] | None = None

    def cells(self, recipe: Recipe, output: Path) -> tuple[Planned, ...]:
        """All cells, every recipe checked and every plan calibrated; nothing is read or written.

        Raises:
            RecipeError: a recipe of a cell is none, or two cells would share a folder.
            PlanError: an ε cannot be reached.
            SubsetError: a subset cannot be read.
        """
        plans: dict[str, Plan] = {}
        cells = [*self._untouched(recipe, output)]
        for subset, common in self._recipes(recipe):
            for asked in self.epsilons or (None,):
                budget = common if asked is None else _with_budget(common, asked)
                plan = _plan(budget, plans)
                given = budget.privacy.epsilon or plan.epsilon
                epsilon = None if given == math.inf else given
                name = NON_PRIVATE if epsilon is None else f"epsilon-{epsilon:.3g}"
                place = RunFolder(output).private if epsilon is None else output
                for seed in self.seeds:
                    seeded = _with_run(budget, seed, plan)
                    folder = place / self._name(subset, name, seed)
                    kind = NON_PRIVATE if epsilon is None else PRIVATE
                    kept = common.run.save_steps is not None
                    cells.append(Planned(kind, common.subset, epsilon, seed, seeded, plan, folder, kept))
        folders = [cell.folder for cell in cells]
        for folder in folders:
            if folders.count(folder) > 1:
                raise RecipeError(
                    f"Two cells of the sweep would lie in {folder}: name each subset, ε and seed once, and ε that "
                    "differ in their first three digits."
                )
        return tuple(cells)

    def _untouched(self, recipe: Recipe, output: Path) -> Iterator[Planned]:
        """The model before training; a classifier's new head is random, so each seed has its own."""
        from dpft.tasks.registry import find

        for seed in self.seeds if find(recipe.task.name).adds_layers else self.seeds[:1]:
            seeded = _with_run(recipe, seed, None)
            folder = RunFolder(output).private / f"{UNTOUCHED}-seed-{seed}"
            yield Planned(UNTOUCHED, "", None, seed, seeded, None, folder, True)

    def _recipes(self, recipe: Recipe) -> Iterator[tuple[str, Recipe]]:
        """Each subset as it stands in folders' names, and its recipe."""
        changes = {str(Subset(subset)): tuple(some) for subset, some in (self.changes or {}).items()}
        subsets = self.subsets or (recipe.subset,)
        known = {str(Subset(subset)): subset for subset in subsets}
        if len(known) < len(subsets):
            raise RecipeError(f"Of {', '.join(subsets)} two are the same subset: name each once.")
        for subset in changes:
            if subset not in known:
                raise RecipeError(f"Settings are given for {subset!r}, and the sweep has {', '.join(subsets)}: fix it.")
        for same, subset in known.items():
            tables = of_subset(recipe, subset) if self.subsets else recipe.model_dump()
            name = re.sub(r"[^\w.=]+", "-", subset).strip("-") if self.subsets else ""
            yield name, _changed(tables, changes.get(same, ()))

    def _name(self, subset: str, setting: str, seed: int) -> str:
        several = len(self.seeds) > 1 or bool(self.subsets)
        return "-".join(filter(None, (subset, setting, f"seed-{seed}" if several else "")))


def split_subsets(text: str) -> tuple[str, ...]:
    """The subsets of a list that commas separate; commas in brackets or quotes belong to a subset.

    >>> split_subsets("head, lora(rank=8, last_blocks=1), layers('a{1,2}') + bias")
    ('head', 'lora(rank=8, last_blocks=1)', "layers('a{1,2}') + bias")
    """
    try:
        found = ast.parse(text.strip(), mode="eval").body
    except SyntaxError:
        return (text.strip(),)  # which no subset is, as its reader says better
    each = found.elts if isinstance(found, ast.Tuple) else [found]
    return tuple(ast.get_source_segment(text.strip(), one) or "" for one in each)


def of_subset(recipe: Recipe, subset: str) -> dict[str, Any]:
    """The recipe's tables for another subset.

    ``head`` by itself is learned from sums, whatever batch size others descend with, unless ``privacy.method`` is
    ``dp-sgd``. It takes none of the settings that it does not use.
    """
    tables = {**recipe.model_dump(), "subset": subset}
    method = recipe.privacy.method
    if str(Subset(subset)) != "head":
        tables["privacy"] |= {"method": "auto" if method != "dp-sgd" else method}
    elif method != "dp-sgd":
        kept = {name: tables["privacy"][name] for name in KEPT_OF_PRIVACY}
        steps = recipe.privacy.steps if recipe.learns_head else None
        tables["privacy"] = {**kept, "steps": steps}
        tables["data"] = recipe.data.of_head().model_dump()
        tables["optimizer"] = OptimizerTable().model_dump()
        if not recipe.learns_head:
            tables["baseline"] = BaselineTable().model_dump()
    return tables


def _changed(tables: dict[str, Any], changes: Sequence[str]) -> Recipe:
    for change in changes:
        key = change.partition("=")[0].strip()
        if key.split(".")[0] not in OWN_TABLES or key in SHARED:
            raise RecipeError(
                f"{change!r} is for one subset alone, and all must have the same {key}, or they could not be compared: "
                "use --set."
            )
        toml.override(tables, change)
    return Recipe.parse(tables)


def _with_budget(recipe: Recipe, epsilon: float) -> Recipe:
    if epsilon == math.inf:
        changed = recipe.without_privacy()
    else:
        privacy = recipe.privacy.model_copy(update=dict(epsilon=epsilon, noise_multiplier=None))
        changed = recipe.model_copy(update=dict(privacy=privacy))
    return Recipe.parse(changed.model_dump())


def _with_run(recipe: Recipe, seed: int, plan: Plan | None) -> Recipe:
    update: dict[str, Any] = dict(seed=seed)
    if plan is not None and not recipe.learns_head and recipe.run.save_steps is None:
        update["save_steps"] = math.ceil(plan.steps / PIECES)
    return recipe.model_copy(update=dict(run=recipe.run.model_copy(update=update)))


def _plan(recipe: Recipe, known: dict[str, Plan]) -> Plan:
    """The recipe's plan; cells that differ in what plans do not know share one."""
    facts = {"privacy": recipe.privacy.model_dump(), "data": recipe.data.model_dump(), "method": recipe.method}
    key = json.dumps(facts, sort_keys=True)
    if key not in known:
        known[key] = recipe.plan()
    return known[key]


def same_run(one: Recipe, other: Recipe) -> bool:
    """Whether both make the same run; what is set for speed and memory may differ."""
    plain = [recipe.model_copy(update=dict(run=RunTable(seed=recipe.run.seed))) for recipe in (one, other)]
    return plain[0] == plain[1]
