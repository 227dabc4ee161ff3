"""``releases.json``: how many releases a run has counted, and what each of them was. Public."""

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from dpft.errors import RecipeError
from dpft.privacy.events import Event
from dpft.runs.record import read_json

VERSION = 2  # 1 is of dpft 0.1 and 0.2, and is not written in its file


@dataclass(frozen=True)
class Mechanism:
    """What each release was: its event, made once, and whom it protects by which bound. None: a version did not write
    it."""

    event: Event
    clip: str | None
    unit: str | None
    adjacency: str | None
    private_randomness: bool | None

    def to_dict(self) -> dict[str, Any]:
        """As it is written."""
        return {**asdict(self), "event": self.event.to_dict()}

    def differences(self, other: "Mechanism") -> Iterator[tuple[str, object, object]]:
        """Each fact in which ``other`` differs: its name, this value, the other's."""
        mine, others = ({**vars(one), **one.event.to_dict(), "event": None} for one in (self, other))
        for name in dict.fromkeys((*mine, *others)):
            if mine.get(name) != others.get(name):
                yield name, mine.get(name), others.get(name)


@dataclass(frozen=True)
class Count:
    """How many releases a run has counted; ``run`` names the run, so that a copy is known."""

    charged: int = 0
    run: str | None = None
    mechanism: Mechanism | None = None

    def to_dict(self) -> dict[str, Any]:
        """As it is written."""
        facts: dict[str, Any] = {"version": VERSION, "run": self.run, "charged": self.charged}
        return facts | {"mechanism": self.mechanism and self.mechanism.to_dict()}

    @classmethod
    def read(cls, path: Path) -> "Count":
        """The count in ``path``, whichever version of dpft wrote it; none where there is no file.

        Raises:
            RecipeError: the file is damaged, or a newer version's.
            PlanError: it names a release that this version does not know.
        """
        if not path.exists():
            return cls()
        facts = read_json(path)
        version = facts.get("version", 1)
        if version not in (1, VERSION):
            raise RecipeError(f"{path} has version {version!r}, and this dpft reads up to {VERSION}: update dpft.")
        charged, mechanism = facts.get("charged"), facts.get("mechanism")
        if type(charged) is not int or charged < 0 or not isinstance(mechanism, dict):
            raise RecipeError(f"{path} counts no releases of a run: restore it from a checkpoint's copy.")
        return cls(charged, facts.get("run"), _mechanism(mechanism, version))


def _mechanism(facts: Mapping[str, Any], version: int) -> Mechanism:
    names = ("noise_multiplier", "sample_rate")
    event = {name: facts[name] for name in names if name in facts} if version == 1 else facts.get("event", {})
    known = (facts.get(name) for name in ("clip", "unit", "adjacency", "private_randomness"))
    return Mechanism(Event.from_dict(event), *known)
