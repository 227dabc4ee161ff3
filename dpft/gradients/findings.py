"""What a preflight found, as plain values that JSON can keep."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path


@dataclass(frozen=True)
class CaptureChoices:
    """How the gradient of each parameter is captured.

    Attributes:
        one_by_one: why each example needs a backward pass of its own; None if it does not.
        levels: by a parameter's name, how often its modules were replaced by the modules around them.
        batched: by a module's name and the form of a call, which of its tensors have the batch in front.
    """

    one_by_one: str | None
    levels: dict[str, int]
    batched: dict[str, dict[str, list[bool]]]


@dataclass(frozen=True)
class Preflight:
    """What the checks found. ``max_relative_error`` is the worst parameter's, over all examples tried."""

    exact: bool
    isolated: bool
    max_relative_error: float
    trainable_parameters: int
    techniques: dict[str, int]
    examples: int
    one_by_one: str | None = None

    def __str__(self) -> str:
        techniques = ", ".join(f"{count:,} by {name}" for name, count in self.techniques.items())
        return (
            f"preflight: exact (max relative error {self.max_relative_error:.1e}) and isolated on {self.examples} "
            f"examples; {self.trainable_parameters:,} trainable parameters ({techniques})"
        )


@dataclass(frozen=True)
class Findings:
    """All that later steps need of a preflight. :class:`~dpft.gradients.capture.Capture` owns it.

    Attributes:
        caches: names of buffers that a forward pass may create, because they are the same for all examples.
        report: what people are shown.
    """

    choices: CaptureChoices
    caches: list[str]
    report: Preflight

    def save(self, path: Path, key: str | None) -> None:
        """Write them to a file for :meth:`load`; ``key`` is the fingerprint of all that they depend on."""
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({"key": key, "findings": asdict(self)}), encoding="utf-8")

    @classmethod
    def load(cls, path: Path, key: str | None) -> "Findings | None":
        """The findings that were saved under this key; None if there are none, or if an older dpft wrote the file."""
        try:
            kept = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None
        if key is None or kept.get("key") != key or "findings" not in kept:
            return None
        found = kept["findings"]
        return cls(CaptureChoices(**found["choices"]), found["caches"], Preflight(**found["report"]))
