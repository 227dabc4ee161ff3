"""The order of the checks, and what they found as one object."""

from collections.abc import Sequence
from typing import Any

import torch

from dpft.errors import GuaranteeError
from dpft.gradients.capture import Capture
from dpft.gradients.engine import Engine
from dpft.gradients.findings import Findings, Preflight
from dpft.gradients.precision import full_precision
from dpft.gradients.preflight.comparison import Losses, half_tensors, size_of
from dpft.gradients.preflight.determinism import NoRandomness, deterministic, in_precision
from dpft.gradients.preflight.exactness import check_exactness
from dpft.gradients.preflight.isolation import check_isolation
from dpft.gradients.preflight.side_effects import check_no_data_kept
from dpft.gradients.preflight.stand_ins import DRAWS


def preflight(
    engine: Engine,
    losses: Losses,
    examples: Sequence[Any],
    precise_losses: Losses | None = None,
    longest: Any = None,
) -> Preflight:
    """Prove the engine's gradients on a few examples, or refuse.

    A parameter that its technique cannot serve, or serves wrongly, goes to the next one (:meth:`Capture.lift`). The
    last is one backward pass for each example. The engine's capture keeps the :class:`Findings`.

    Args:
        engine: attached.
        losses: ``losses(examples) -> (B,)``, collation and task loss. It is called with one and with several examples.
        examples: at least two, preferably of different lengths.
        precise_losses: the same without autocast, if ``losses`` runs under it.
        longest: the longest example of all. A model may treat long batches in another way, so the last of
            ``examples`` must have the same loss beside it.

    Raises:
        ExactnessError: a parameter's fast gradient is not the brute-force one; named.
        IsolationError: examples influence each other; the layer is named where it can be found.
        GuaranteeError: the forward pass changes a buffer or a parameter, a loss is not finite, or no gradient reaches
            the subset.
    """
    examples = list(examples)
    if len(examples) < 2:
        raise GuaranteeError(
            f"The preflight was given {len(examples)} example, and isolation shows only beside others: give two or "
            "more."
        )
    capture, precise = engine.capture, precise_losses or losses
    with deterministic(capture), full_precision():
        with NoRandomness.of(capture, DRAWS[0]) as randomness:
            with in_precision(half_tensors(capture.map.model), torch.float32):
                caches = check_no_data_kept(capture, precise, sorted(examples, key=size_of))
            reference = check_isolation(capture, precise, examples, longest)
            error = check_exactness(capture, losses, precise, examples, reference)
        if randomness.seen:  # what one set of constants hides by coincidence, two do not
            with NoRandomness.of(capture, DRAWS[1]):
                check_isolation(capture, precise, examples, longest)
        report = _report(capture, error, len(examples))
        capture.findings = Findings(capture.map.choices(), sorted(caches), report)
    return report


def _report(capture: Capture, error: float, examples: int) -> Preflight:
    techniques: dict[str, int] = {}
    for trainable in capture.map.trainables:
        techniques[trainable.technique] = techniques.get(trainable.technique, 0) + trainable.parameter.numel()
    return Preflight(True, True, error, capture.map.size, techniques, examples, capture.map.one_by_one)
