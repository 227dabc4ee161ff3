"""What a preflight found, as plain values that JSON can keep."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any


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

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, kept: Mapping[str, Any]) -> "Findings":
        return cls(CaptureChoices(**kept["choices"]), kept["caches"], Preflight(**kept["report"]))
