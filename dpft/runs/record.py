"""``run.json``: what a run publishes, typed and versioned. Nothing else is written there.

Every field says where its value comes from:

``plan``      a field of the plan or recipe, chosen and public
``released``  counted releases, what follows from them and the plan, or released weights
``public``    computed from data that are declared public
``software``  versions and the model's structure
``ledger``    what the data set's account says of all runs
``day``       a date without its time, which would follow the true batch sizes
``user``      what the user did
``read``      nothing of this version: an older one wrote it, so it is read and never written
"""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, PlainSerializer, PlainValidator, ValidationError
from pydantic.fields import FieldInfo

from dpft.errors import RecipeError
from dpft.privacy.adjacency import Adjacency
from dpft.privacy.events import Event

VERSION = 3  # 1 is of dpft 0.1, 2 of 0.2; neither is written in its file

Events = Annotated[
    tuple[Event, ...],
    PlainValidator(tuple),
    PlainSerializer(lambda events: [event.to_dict() for event in events]),
]


def _from(source: str, **options: Any) -> Any:
    return Field(json_schema_extra={"from": source}, **options)


def _source(field: FieldInfo) -> str:
    facts = field.json_schema_extra
    if not isinstance(facts, dict):
        raise TypeError(f"{field} does not say where its value comes from.")
    return str(facts["from"])


class _Published(BaseModel):
    model_config = ConfigDict(frozen=True, strict=True, extra="forbid")

    @classmethod
    def sources(cls) -> dict[str, str]:
        """Every key that is written, and where its value comes from."""
        found = {name: _source(field) for name, field in cls.model_fields.items()}
        return {name: source for name, source in found.items() if source != "read"}


class ClipFacts(_Published):
    """How a unit's gradient was bounded: the rule's class, and its bound."""

    rule: str = _from("plan")
    clip_norm: float = _from("plan")


class MechanismFacts(_Published):
    """What the mechanism says of itself, as the card prints it."""

    sampler: str = _from("released")
    mechanism: str = _from("released")


class AccountFacts(_Published):
    """Where a run was charged, and what its data set had spent when it ended."""

    ledger: str | None = _from("ledger", default=None)
    dataset: str | None = _from("ledger", default=None)
    run: str | None = _from("ledger", default=None)
    budget: float | None = _from("ledger", default=None)
    delta: float | None = _from("ledger", default=None)
    spent: float | None = _from("ledger", default=None)
    runs: int | None = _from("ledger", default=None)
    overlap: float | None = _from("read", default=None, exclude=True)


class RunRecord(_Published):
    """What a run claims and released.

    A field without a default is part of the claim, and no record lacks it; another one is None where an older version
    did not write it.

    Attributes:
        epsilon, epsilon_rdp: at ``delta``, when the run ended; readers derive them from ``events`` again. None without
            privacy.
        events: what was released.
        clip_norm: in the units of the gradient.
        expected_batch_size: units.
    """

    version: int = _from("software", default=VERSION)
    guarantee: str = _from("released")
    private: bool = _from("plan")
    epsilon: float | None = _from("released", default=None)
    epsilon_rdp: float | None = _from("plan", default=None)
    delta: float = _from("plan")
    unit: str = _from("plan")
    units: int | None = _from("plan")
    examples_per_unit: int | None = _from("plan", default=None)
    adjacency: Adjacency = _from("plan")
    events: Events = _from("released")
    planned_steps: int = _from("plan")
    released_steps: int = _from("released")
    interrupted: bool | None = _from("user", default=None)
    halted: str | None = _from("ledger", default=None)
    ledger: AccountFacts | None = _from("ledger", default=None)
    expected_batch_size: float | None = _from("plan", default=None)
    mechanism: MechanismFacts | None = _from("released", default=None)
    clip: ClipFacts = _from("plan")
    subset: str = _from("plan")
    trainable_parameters: int | None = _from("software", default=None)
    all_parameters: int | None = _from("software", default=None)
    weights: str | None = _from("software", default=None)
    metrics: dict[str, Any] | None = _from("public", default=None)
    metrics_are_private: bool | None = _from("plan", default=None)
    date: str | None = _from("day", default=None)
    versions: dict[str, str] | None = _from("software", default=None)

    @property
    def claims(self) -> bool:
        """Whether there is a guarantee to speak of: the run is private and released something."""
        return self.private and self.released_steps > 0

    def to_dict(self) -> dict[str, Any]:
        """As it is written."""
        return self.model_dump()

    def to_json(self) -> str:
        """The content of ``run.json``."""
        return json.dumps(self.to_dict(), indent=2)

    @classmethod
    def from_dict(cls, facts: Mapping[str, Any], source: Path | str = "run.json") -> "RunRecord":
        """The record that this or an older version wrote.

        Args:
            source: where it stands, for messages.

        Raises:
            RecipeError: it is no record, or a newer version's.
            PlanError: it names a release that this version does not know, or that none can be.
        """
        version = facts.get("version", 2 if "date" in facts else 1)
        if type(version) is not int or not 1 <= version <= VERSION:
            raise RecipeError(
                f"{source} has version {version!r}, and this dpft reads versions 1 to {VERSION}: update dpft."
            )
        missing = [name for name, field in cls.model_fields.items() if field.is_required() and name not in facts]
        if missing:
            raise RecipeError(f"{source} lacks {', '.join(missing)}: it is not the record of a run of dpft.")
        facts = dict(facts)
        for old in range(version, VERSION):
            MIGRATIONS[old](facts)
        try:
            return cls(**{**facts, "events": [Event.from_dict(event) for event in facts["events"]]})
        except (ValidationError, TypeError, AttributeError) as error:
            raise RecipeError(f"{source} is not the record of a run of dpft ({_first(error)}): restore it.") from error


def _from_1(facts: dict[str, Any]) -> None:
    """Version 1 told seconds, techniques and the layer that was kept, which follow the data."""
    finished = facts.pop("finished", None)
    for name in ("started", "techniques", "frozen_prefix"):
        facts.pop(name, None)
    facts["date"] = finished and finished[:10]


def _from_2(facts: dict[str, Any]) -> None:
    """Version 2 has the keys of version 3; events say by themselves how they are written."""
    facts["version"] = VERSION


MIGRATIONS = {1: _from_1, 2: _from_2}


def write_whole(path: Path, text: str) -> None:
    """Write a file of which, whatever happens, a reader finds all or nothing."""
    temporary = path.with_name(f"{path.name}.tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


def read_json(path: Path) -> dict[str, Any]:
    """The object in the file.

    Raises:
        RecipeError: it is damaged.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise RecipeError(f"{path} is not JSON ({error}): restore it from a backup, or make it again.") from error
    if not isinstance(found, dict):
        raise RecipeError(f"{path} holds no JSON object: restore it from a backup, or make it again.")
    return found


def _first(error: Exception) -> str:
    if not isinstance(error, ValidationError):
        return str(error)
    first = error.errors()[0]
    return f"{'.'.join(map(str, first['loc']))}: {first['msg']}"
