"""The tables of a recipe, each with its keys, their defaults and what they mean."""

import math
import re
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator

from dpft.privacy.adjacency import Adjacency
from dpft.privacy.clipping import AutoClip, Clip, FlatClip, PerLayerClip, Shares
from dpft.values import Column

CLIP_SETTINGS = {  # of the privacy table, and the clipping that uses each
    "clip_shares": "per-layer",
    "clip_quantile": "adaptive",
    "clip_rate": "adaptive",
    "clip_budget": "adaptive",
}


ALL_BUT_FREE = 1e4  # an ε beyond which noise does not matter
HEAD_CLIP = 0.8  # of a head's gradients, which are at most √2 long (decision 5)
HEAD_STEPS = 64  # of a head's mechanism: noise of so many releases costs what one of all of them would
Method = Literal["auto", "dp-sgd", "head-descent", "head-centred", "head-prototypes", "head-least-squares"]


class Table(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class ModelTable(Table):
    path: str = Field(description="A checkpoint folder, or a model's name on a hub. $VARIABLES are expanded.")
    revision: str | None = Field(None, description="The hub revision.")
    dtype: Literal["float32", "bfloat16"] = Field(
        "float32", description="Of the frozen weights; norms are float32, sums and noise float64 always."
    )
    quantize: Literal["4bit", "8bit"] | None = Field(
        None,
        description="Load the frozen weights quantized by bitsandbytes (pip install dpft[quantized]); adapters only.",
    )
    dropout: bool = Field(
        False, description="Keep the model's dropout; the noise regularises already, and without it training is faster."
    )


class TaskTable(Table):
    """What every task's table has. A task adds its keys in a subclass: :attr:`dpft.tasks.Task.Settings`."""

    former: ClassVar[tuple[str, ...]] = ()  # keys of other tasks, which recipes of earlier versions hold: left out
    name: str = Field(description="What is learned: a task's name. Its other keys are the task's own.")

    @model_validator(mode="before")
    @classmethod
    def _without_former(cls, table: object) -> object:
        return {k: v for k, v in table.items() if k not in cls.former} if isinstance(table, dict) else table

    @property
    def columns(self) -> dict[str, Column]:
        """What the data must have."""
        return {}


class TaskError(ValueError):
    def __init__(self, table: type[TaskTable], error: ValidationError) -> None:
        super().__init__(str(error))
        self.table, self.error = table, error


def by_its_task(table: object) -> object:
    """The table as the task of its name reads it."""
    if not isinstance(table, dict) or not isinstance(table.get("name"), str):
        return table
    from dpft.tasks.registry import find

    kind = find(table["name"]).Settings
    try:
        return kind.model_validate(table)
    except ValidationError as error:
        raise TaskError(kind, error) from error


def _declared(labels: list[str]) -> list[str]:
    if len(set(labels)) < 2:
        raise ValueError(
            "task.labels must declare at least two labels, because a label list collected from the data would reveal "
            "who has a rare one"
        )
    if len(set(labels)) != len(labels):
        raise ValueError("task.labels names a label twice: keep each once")
    return labels


# Of a task's table: at least two labels, each once. A field of this type needs ``validate_default=True``.
Labels = Annotated[list[str], AfterValidator(_declared)]


class DataTable(Table):
    train: str | list[str] = Field(
        description="The private data: CSV, TSV, JSON lines, Parquet, or a folder saved by `datasets`. "
        "A CSV cell is a text: 01 is not 1, and NA is not missing."
    )
    validation: str | list[str] | None = Field(None, description="Held-out data for evaluation.")
    validation_rows: int | None = Field(
        None, ge=1, description="Evaluate on so many of them, drawn once for all runs, where all would take too long."
    )
    validation_is_public: bool = Field(
        False, description="Whether metrics on the validation data may stand on the card."
    )
    public: str | list[str] | None = Field(
        None, description="Data declared public, with the same columns: what sparse(choose='gradient') looks at."
    )
    units: int = Field(ge=1, description="The declared, public number of units in the training data.")
    unit: str = Field(
        "example", description="The column whose text or whole number names a row's unit, such as patient_id."
    )
    examples_per_unit: int = Field(
        1,
        ge=1,
        description="How many examples of a unit one step uses at most. A head uses all; with unit_gradient = "
        "'sum' each counts as one over this number, and those of a unit as 1 at most.",
    )
    unit_gradient: Literal["mean", "sum"] = Field("mean", description="How a unit's examples make its gradient.")
    draws: int = Field(
        1,
        ge=1,
        description="How many draws of the task's chance, such as crops, are averaged inside an example before the "
        "clip: time for accuracy, at no cost of budget.",
    )

    @property
    def rows_per_unit(self) -> int:
        """The number over which a head has each row of a unit count; 1 has each unit count alike."""
        return self.examples_per_unit if self.unit_gradient == "sum" else 1

    def of_head(self) -> "DataTable":
        """The same for a head by itself, each of whose sums is over all rows of all units, once."""
        return self.model_copy(update={"draws": 1, "examples_per_unit": self.rows_per_unit})


class PrivacyTable(Table):
    epsilon: float | None = Field(None, gt=0, description="The target; or give noise_multiplier.")
    noise_multiplier: float | None = Field(None, ge=0, description="The noise; or give epsilon.")
    delta: float = Field(gt=0, lt=1, description="Must be below 1/units.")
    method: Method = Field(
        "auto",
        description="How noise is spent: dp-sgd, or for subset = 'head' one of head-descent, head-centred (where "
        "noise is large), head-prototypes and head-least-squares, which learn from sums over all units; auto is dp-sgd "
        "where batch_size is given, else one of the first two by units, labels, ε and δ.",
    )
    plan: Literal["declared", "auto"] = Field(
        "declared",
        description="auto: batch size, steps, clipping and optimizer follow from units, ε, δ and epochs (the passes "
        "over the data that there is time for, 1 by default); all of these are public.",
    )
    batch_size: int | None = Field(
        None, ge=1, description="dp-sgd: expected units per step; a draw's true size is random and private."
    )
    steps: int | None = Field(None, ge=1, description="Releases; dp-sgd: or give epochs. A head's are 64 by default.")
    epochs: float | None = Field(None, gt=0, description="Expected passes over the data; or give steps.")
    clipping: Literal["flat", "automatic", "per-layer", "adaptive"] = Field(
        "flat",
        description="flat; automatic (AUTO-S); per-layer, each layer to its share; adaptive, flat at a quantile of "
        "norms.",
    )
    clip_norm: float | None = Field(
        None,
        gt=0,
        description="The bound on one unit's gradient, by default 1, or 0.8 for a head by itself; adaptive: of the "
        "first step.",
    )
    clip_shares: Shares = Field(
        "equal",
        description="per-layer: each layer's share of the bound is equal, or follows its size (√ of its parameters).",
    )
    clip_quantile: float = Field(
        0.5, ge=0, le=1, description="adaptive: the share of units that are to stay unclipped."
    )
    clip_rate: float = Field(0.2, gt=0, le=1, description="adaptive: how fast the bound follows.")
    clip_budget: float = Field(
        0.01, gt=0, lt=1, description="adaptive: the share of the budget (of 1/σ²) that is paid for the quantile."
    )
    bands: int | None = Field(
        None,
        ge=1,
        description="dp-sgd: noise is correlated over so many steps, which take units by as many groups in turn; pays "
        "where ε is large and steps are many.",
    )
    adjacency: Adjacency = Field("add-or-remove-one", description="Which data sets are indistinguishable.")

    @model_validator(mode="after")
    def _two_of_three(self) -> Self:
        if (self.epsilon is None) == (self.noise_multiplier is None):
            raise ValueError("privacy needs epsilon or noise_multiplier, one of them, and the other follows")
        return self

    @model_validator(mode="after")
    def _uses_what_is_set(self) -> Self:
        for name, clipping in CLIP_SETTINGS.items():
            if self.clipping != clipping and getattr(self, name) != type(self).model_fields[name].default:
                raise ValueError(
                    f"privacy.{name} is {getattr(self, name)!r}, which clipping = {self.clipping!r} does not use: "
                    f"remove it, or choose clipping = {clipping!r}"
                )
        return self

    @model_validator(mode="after")
    def _one_kind_of_noise(self) -> Self:
        if self.bands is not None and self.clipping == "adaptive":
            raise ValueError(
                f"privacy.bands is {self.bands}, and clipping = 'adaptive' moves the clip from step to step, while "
                "correlated noise takes back what was added under an earlier clip: remove bands, or choose another "
                "clipping"
            )
        return self

    def mu(self, steps: int) -> float:
        """μ of the budget, or of so many releases over all units (Dong et al. 2022); infinite without noise."""
        from dpft.privacy.gaussian import mu_for

        if self.epsilon is not None:
            return mu_for(min(self.epsilon, ALL_BUT_FREE), self.delta)
        return math.sqrt(steps) / self.noise_multiplier if self.noise_multiplier else math.inf

    def clip(self, usual: float = 1.0) -> Clip:
        """The clip of the first step; its bound is the ``usual`` one where none is set."""
        bound = self.clip_norm or usual
        if self.clipping == "per-layer":
            return PerLayerClip(bound, self.clip_shares)
        return AutoClip(bound) if self.clipping == "automatic" else FlatClip(bound)

    @property
    def mechanism(self) -> dict[str, Any]:
        """The mechanism's name and its facts but for noise, rate and steps, as :class:`Plan` takes them."""
        if self.bands is not None:
            return {"mechanism": "dp-sgd-banded", "clip": self.clip(), "bands": self.bands}
        if self.clipping != "adaptive":
            return {"mechanism": "dp-sgd", "clip": self.clip()}
        settings = dict(quantile=self.clip_quantile, clip_rate=self.clip_rate, quantile_share=self.clip_budget)
        return {"mechanism": "dp-sgd-adaptive-clip", "clip": self.clip(), **settings}


class OptimizerTable(Table):
    name: str = Field("adamw_torch", description="Any optimizer of transformers.TrainingArguments.")
    learning_rate: float = Field(5e-4, gt=0, description="Higher than without privacy, where steps are few.")
    schedule: str = Field("constant", description="Any scheduler of transformers, such as linear or cosine.")
    warmup_steps: int = Field(0, ge=0, description="Steps over which the learning rate rises.")
    weight_decay: float = Field(0.0, ge=0, description="As in the optimizer.")


class BaselineTable(Table):
    """The run without privacy in ``dpft compare``: noise and clipping slow learning, so it may need other settings."""

    learning_rate: float | None = Field(None, gt=0, description="By default the private run's.")
    steps: int | None = Field(None, ge=1, description="By default the private run's.")


class RunTable(Table):
    seed: int = Field(
        0, description="Initialises new layers, and nothing else: noise, sampling and dropout are secret."
    )
    frozen_prefix: Literal["auto", "on", "off"] = Field(
        "auto", description="Compute layers before all that trains once for each example, and keep that encrypted."
    )
    token_budget: Annotated[int, Field(ge=16)] | Literal["auto"] = Field(
        "auto", description="Padded tokens in a micro-batch: speed and memory, not privacy; auto times a few."
    )
    memory: float | None = Field(
        None, gt=0, description="GiB that a micro-batch may take beside the model, for token_budget = auto."
    )
    save_steps: int | None = Field(None, ge=1, description="Write a checkpoint every so many steps, to resume from.")


class LedgerTable(Table):
    """The account that pays."""

    dataset: str | None = Field(
        None, description="The data set's name in the ledger; without one nothing across runs is counted."
    )
    url: str | None = Field(None, description="The ledger's file or URL; by default DPFT_LEDGER, or the user's own.")
    purpose: str = Field("", description="What the run is for; goes on record.")

    @model_validator(mode="after")
    def _no_secret(self) -> Self:
        if self.url and re.search(r"://[^/@]*:.+@|[?&](ssl)?pass(word|file)=", self.url):
            raise ValueError(
                "ledger.url holds a password, and recipes are published with their runs: put it into ~/.pgpass or "
                "PGPASSWORD"
            )
        return self

    @model_validator(mode="after")
    def _names_an_account(self) -> Self:
        if self.dataset is None and (self.url or self.purpose):
            raise ValueError("ledger.dataset is not named, so nothing would be charged: name the data set's account")
        return self
