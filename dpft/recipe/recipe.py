"""A run's recipe: public information only, validated before anything is read or charged."""

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Self

from pydantic import BeforeValidator, Field, SerializeAsAny, ValidationError, model_validator
from pydantic.fields import FieldInfo

from dpft.errors import DPFTError, RecipeError
from dpft.privacy.delta import check_delta
from dpft.privacy.plan import Plan
from dpft.recipe import toml
from dpft.recipe.paths import PATHS, check_path, expanded_path, listed
from dpft.recipe.tables import (
    CLIP_SETTINGS,
    HEAD_CLIP,
    HEAD_STEPS,
    BaselineTable,
    DataTable,
    LedgerTable,
    ModelTable,
    OptimizerTable,
    PrivacyTable,
    RunTable,
    Table,
    TaskError,
    TaskTable,
    by_its_task,
)

if TYPE_CHECKING:
    from dpft.subset import Subset


class Recipe(Table):
    """One run, as one TOML file.

    Raises:
        RecipeError: from :meth:`read` and :meth:`parse`, one sentence for the first thing that is wrong.
    """

    subset: str = Field(description="Which parameters train, such as 'lora(rank=8) + head'.")
    model: ModelTable
    task: SerializeAsAny[Annotated[TaskTable, BeforeValidator(by_its_task)]]
    data: DataTable
    privacy: PrivacyTable
    optimizer: OptimizerTable = OptimizerTable()
    baseline: BaselineTable = BaselineTable()
    run: RunTable = RunTable()
    ledger: LedgerTable = LedgerTable()

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        from dpft.subset import Subset

        subset = Subset(self.subset)
        if subset.needs_public_data and self.data.public is None:
            raise ValueError(
                f"{self.subset} chooses weights by gradients, which would reveal whose data made them: declare public "
                "data in data.public, or choose by magnitude"
            )
        if self.data.public is not None:
            public = {os.path.realpath(expanded_path(path)) for path in listed(self.data.public)}
            validation = None if self.data.validation_is_public else self.data.validation
            private = [*listed(self.data.train), *listed(validation)]
            shared = [path for path in private if os.path.realpath(expanded_path(path)) in public]
            if shared:
                raise ValueError(
                    f"data.public names the private file {shared[0]}, whose gradients would be released un-noised: "
                    "name public data"
                )
        self._check_dp_sgd() if self.method == "dp-sgd" else self._check_head(subset)
        for key in ("hints", "balance"):
            if getattr(self.task, key, None) and not self.learns_head:
                raise ValueError(
                    f"task.{key} is set, which only a head by itself uses: remove it, or train "
                    'subset = "head" without privacy.batch_size'
                )
        check_delta(self.privacy.delta, self.data.units, subject="privacy.delta")
        if self.data.examples_per_unit > 1 and self.data.unit == "example":
            raise ValueError(
                "data.examples_per_unit is above 1, but each example is its own unit: name the unit column in data.unit"
            )
        return self

    @property
    def method(self) -> str:
        """The privacy table's method, ``auto`` resolved."""
        if self.privacy.method != "auto":
            return self.privacy.method
        if self.privacy.batch_size is not None or self.subset.strip() != "head":
            return "dp-sgd"
        if getattr(self.task, "hints", ()):
            return "head-descent"
        from dpft.recipe.advice import head_method

        labels = len(getattr(self.task, "labels", ())) or 1
        return head_method(self.data.units, labels, self.privacy.mu(self.privacy.steps or HEAD_STEPS))

    @property
    def learns_head(self) -> bool:
        """Whether a head is learned by itself, from sums over all units."""
        return self.method != "dp-sgd"

    def _check_dp_sgd(self) -> None:
        privacy = self.privacy
        if privacy.plan == "auto":
            return self._check_open_plan()
        if privacy.batch_size is None:
            raise ValueError(
                "privacy.batch_size is missing, without which only subset = 'head' can train: add it, and steps or "
                "epochs"
            )
        if (privacy.steps is None) == (privacy.epochs is None):
            raise ValueError("privacy needs steps or epochs, one of them, and the other follows")
        if privacy.batch_size > self.data.units:
            raise ValueError(
                f"privacy.batch_size is {privacy.batch_size:,} of {self.data.units:,} units: expect at most all of them"
            )
        if privacy.bands is not None and privacy.bands * privacy.batch_size > self.data.units:
            raise ValueError(
                f"privacy.bands is {privacy.bands}, and each of as many groups of the {self.data.units:,} units must "
                f"fill batches of {privacy.batch_size:,}: lower bands to {self.data.units // privacy.batch_size} at "
                "most, or the batch size"
            )

    def _check_open_plan(self) -> None:
        chosen = {
            "privacy.batch_size": self.privacy.batch_size is not None,
            "privacy.steps": self.privacy.steps is not None,
            "privacy.clipping": self.privacy.clipping != "flat" or self.privacy.clip_norm is not None,
            "privacy.bands": self.privacy.bands is not None,
            "optimizer": self.optimizer != OptimizerTable(),
        }
        for key in (key for key, is_set in chosen.items() if is_set):
            raise ValueError(
                f'{key} is set, and privacy.plan = "auto" chooses it: remove one of them; `dpft plan --advise` writes '
                "out what it would choose, to change"
            )
        if self.privacy.epsilon is None:
            raise ValueError('privacy.plan = "auto" chooses a plan for an ε, and there is none: give privacy.epsilon')

    def _check_head(self, subset: "Subset") -> None:
        """A head's sums are over all units and all of their rows, and nothing else trains."""
        if str(subset) != "head":
            raise ValueError(
                f"privacy.method is {self.method!r}, which learns the head alone, and subset is {self.subset!r}: train "
                "subset = 'head', or choose method = 'dp-sgd'"
            )
        unused = {
            "privacy.batch_size": self.privacy.batch_size is not None,
            "privacy.epochs": self.privacy.epochs is not None,
            "privacy.clipping": self.privacy.clipping != "flat",
            "privacy.bands": self.privacy.bands is not None,
            **{f"data.{key}": value != getattr(self.data, key) for key, value in self.data.of_head()},
            **{f"task.{key}": bool(getattr(self.task, key, None)) for key in ("crop", "flip")},
            "optimizer": self.optimizer != OptimizerTable(),
        }
        for key in (key for key, is_set in unused.items() if is_set):
            raise ValueError(
                f"{key} is set, which privacy.method = {self.method!r} does not use, because each step is over all "
                "rows of all units as they are: remove it, or choose method = 'dp-sgd'"
            )

    @classmethod
    def read(cls, path: Path | str, overrides: tuple[str, ...] = ()) -> "Recipe":
        """Read a TOML file, with ``overrides``: ``"table.key=value"`` with a TOML value or a bare string.

        UTF-8 is read with a byte-order mark or without, and UTF-16 with one, as Windows PowerShell 5 writes it.

        Raises:
            RecipeError: one sentence for the first thing that is wrong.
        """
        tables = toml.read(path, overrides)
        for key in PATHS:
            check_path(tables, key)
        return cls.parse(tables)

    @classmethod
    def parse(cls, tables: dict[str, Any]) -> "Recipe":
        """The recipe of these tables, with its plan written out."""
        return cls.checked(tables).planned()

    @classmethod
    def checked(cls, tables: dict[str, Any]) -> "Recipe":
        """The recipe as it stands, with a plan that may be open."""
        try:
            return cls.model_validate(tables)
        except ValidationError as error:
            raise RecipeError(_sentence(error)) from error

    def planned(self) -> "Recipe":
        """The same, where ``privacy.plan`` is ``auto`` with what it stands for (:mod:`dpft.recipe.advice`)."""
        privacy = self.privacy
        if privacy.plan == "declared":
            return self
        closed: dict[str, Any] = dict(plan="declared")
        if self.learns_head or privacy.epsilon is None:
            return self.model_copy(update=dict(privacy=privacy.model_copy(update=closed)))
        from dpft.recipe.advice import advised, rate_of
        from dpft.tasks.registry import find

        new_layers = find(self.task.name).adds_layers
        passes = privacy.epochs or 1.0
        plan = advised(self.data.units, passes, epsilon=privacy.epsilon, delta=privacy.delta, new_layers=new_layers)
        closed |= dict(batch_size=plan.batch_size, steps=plan.steps, epochs=None, clipping="automatic")
        chosen = OptimizerTable(name="adamw_torch", learning_rate=0.02, schedule="linear")
        if not new_layers:
            chosen = OptimizerTable(name="sgd", learning_rate=rate_of(plan.steps), schedule="linear")
        return self.model_copy(update=dict(privacy=privacy.model_copy(update=closed), optimizer=chosen))

    def plan(self) -> Plan:
        """The plan, calibrated; takes seconds when ε is the target."""
        privacy, data = self.privacy, self.data
        if self.learns_head:
            facts: dict[str, Any] = dict(mechanism=self.method, clip=privacy.clip(HEAD_CLIP))
            facts |= dict(steps=privacy.steps or HEAD_STEPS)
        else:
            facts = dict(
                batch_size=privacy.batch_size,
                steps=privacy.steps,
                epochs=privacy.epochs,
                **privacy.mechanism,
                examples_per_unit=data.examples_per_unit,
                unit_gradient=data.unit_gradient,
            )
        try:
            return Plan.calibrate(
                epsilon=privacy.epsilon,
                noise_multiplier=privacy.noise_multiplier,
                delta=privacy.delta,
                units=data.units,
                adjacency=privacy.adjacency,
                unit=data.unit,
                **facts,
            )
        except DPFTError as error:
            raise RecipeError(str(error)) from error

    def without_privacy(self) -> "Recipe":
        """The same run with no noise and a bound that clips nothing: the baseline beside which privacy is judged."""
        privacy = dict(epsilon=None, noise_multiplier=0.0, clipping="flat", clip_norm=1e9, bands=None)
        privacy |= {name: PrivacyTable.model_fields[name].default for name in CLIP_SETTINGS}
        if self.baseline.steps:
            privacy |= dict(steps=self.baseline.steps, epochs=None)
        rate = None if self.learns_head else self.baseline.learning_rate  # a head's descent sets its own
        optimizer = dict(learning_rate=rate or self.optimizer.learning_rate)
        return self.model_copy(
            update=dict(
                privacy=self.privacy.model_copy(update=privacy), optimizer=self.optimizer.model_copy(update=optimizer)
            )
        )

    def to_toml(self, *, comments: bool = False) -> str:
        """The recipe as resolved; with ``comments``, each key explained."""
        lines = (
            []
            if comments is False
            else ["# A run of dpft. Everything in this file is public: declare it, never compute it from the data."]
        )

        def write(name: str, field: FieldInfo, value: object) -> None:
            if comments and field.description:
                lines.append(f"# {field.description}")
            if value is not None:
                lines.append(f"{name} = {toml.dumps(value)}")
            elif comments:
                lines.append(f"# {name} =")

        for key, field in type(self).model_fields.items():
            value = getattr(self, key)
            if isinstance(value, Table):
                lines += ["", f"[{key}]"]
                for name, inner in type(value).model_fields.items():
                    write(name, inner, getattr(value, name))
            else:
                write(key, field, value)
        return "\n".join(lines) + "\n"


def _sentence(error: ValidationError, table: type[Table] = Recipe, above: tuple[int | str, ...] = ()) -> str:
    first = error.errors()[0]
    cause = first.get("ctx", {}).get("error")
    if isinstance(cause, TaskError):
        return _sentence(cause.error, cause.table, first["loc"])
    place = ".".join(
        [*map(str, above), *map(str, first["loc"])][:2]
    )  # a table's key; what follows says which alternative of a type failed
    if first["type"] == "extra_forbidden":
        from difflib import get_close_matches

        for part in first["loc"][:-1]:
            inner = table.model_fields[str(part)].annotation
            table = inner if isinstance(inner, type) and issubclass(inner, Table) else table
        close = get_close_matches(str(first["loc"][-1]), table.model_fields, n=1)
        hint = f"did you mean {close[0]}?" if close else f"choose from {', '.join(table.model_fields)}."
        return f"The recipe has an unknown key {place}: {hint}"
    if first["type"] == "missing":
        return f"The recipe lacks {place}: add it, or start from `dpft init`."
    if first["type"] == "value_error":
        return f"{str(cause).removesuffix('.')}."
    return f"The recipe's {place} is {first['input']!r}, but {first['msg'][0].lower()}{first['msg'][1:]}: fix it."
