"""The check that the engine's gradients equal plain backward passes, and the choice of each technique by it."""

from typing import Any

import torch
from torch import Tensor

from dpft.errors import ExactnessError, GuaranteeError, first_line
from dpft.gradients.batch_gradients import row_norms
from dpft.gradients.capture import Capture, CaptureError
from dpft.gradients.capture_map import TrainableParameter
from dpft.gradients.preflight.comparison import (
    TOLERANCE,
    Losses,
    Reference,
    half_tensors,
    is_worse,
    plain_gradient,
    weights_for,
    worst_parameter,
)
from dpft.gradients.preflight.determinism import in_precision

HALF_TOLERANCE = 0.1  # relative error that half precision explains, where a run uses it; only gross errors show


def check_exactness(
    capture: Capture, losses: Losses, precise: Losses, examples: list[Any], reference: Reference
) -> float:
    """The largest relative error of the engine's gradients in float32.

    What the run computes in is checked too, as far as half precision can tell.

    Raises:
        ExactnessError: a gradient is wrong by every technique.
    """
    half = half_tensors(capture.map.model)
    while True:
        with in_precision(half, torch.float32):
            error = max(reference.error, _proven(capture, precise, examples, reference, TOLERANCE))
        proven = capture.map.choices()
        if half or precise is not losses:
            _proven(capture, losses, examples, Reference(reference.error, reference.norms, {}), HALF_TOLERANCE)
        if capture.map.choices() == proven:  # otherwise half precision needed other choices; prove these too
            return error


def _proven(capture: Capture, losses: Losses, examples: list[Any], reference: Reference, tolerance: float) -> float:
    """Change techniques until the engine's gradients equal the plain ones. Returns the largest relative error.

    The batches have several sizes: a tensor that is as long as the batch by coincidence then shows. They have both
    orders of lengths. Two have no padding, where many models pass their mask in another form or not at all.

    Args:
        reference: its ``combined`` gains the batches that it lacks.
    """
    every = list(range(len(examples)))
    batches = [every, every[1::-1], [0, 0], [0]]
    capture.findings = None
    while True:
        failed: Exception | None = None
        before, worst, error = capture.map.choices(), capture.map.trainables[0], 0.0
        try:
            for batch in batches:
                trainable, errors = _compared(capture, losses, examples, batch, reference)
                for found in errors:
                    if is_worse(found, error):
                        worst, error = trainable, found
        except Exception as problem:  # a model may raise anything when its layers are hooked or differentiated again
            if capture.map.one_by_one or (
                isinstance(problem, GuaranteeError) and not isinstance(problem, ExactnessError)
            ):
                raise
            failed = problem
        finally:
            for trainable in capture.map.trainables:
                trainable.parameter.grad = None
        random = next((hooked for hooked in capture.map.hooked_modules if hooked.random), None)
        unreached = next((hooked for hooked in capture.map.hooked_modules if len(hooked.sizes) < 2), None)
        if random is not None:
            capture.go_one_by_one(f"{random} draws random numbers")
        elif isinstance(failed, CaptureError):
            capture.lift(failed.trainables, failed.reason)
        elif failed is not None:
            capture.go_one_by_one(f"the model cannot run while hooked ({first_line(failed)})")
        elif unreached is not None:
            capture.go_one_by_one(f"{unreached} was not reached by every preflight batch")
        elif capture.map.choices() == before:  # otherwise a form of call was new: compare again with all known
            if error <= tolerance:
                return error
            if capture.map.one_by_one:
                raise ExactnessError(
                    f"{worst.name} got a per-example gradient that differs from the brute-force one by {error:.1e} "
                    "(relative), more than rounding explains: leave it out of the subset and report the layer."
                )
            capture.lift([worst], f"{worst.name} came out wrong by {error:.1e} at {worst.technique}")


def _compared(
    capture: Capture, losses: Losses, examples: list[Any], batch: list[int], reference: Reference
) -> tuple[TrainableParameter, tuple[float, float]]:
    """The worst parameter in one batch of examples; the relative errors of its gradient and of the norms."""
    chosen, weights = [examples[i] for i in batch], weights_for(reference.norms[batch])
    found, error_of_norms = _combined(capture, losses(chosen), weights)
    if tuple(batch) not in reference.combined:
        with capture.paused():
            plain = losses(chosen)
            reference.combined[tuple(batch)] = plain_gradient(capture, plain @ weights.to(plain))
    trainable, error = worst_parameter(capture, found, reference.combined[tuple(batch)])
    return trainable, (error, error_of_norms)


def _combined(capture: Capture, losses: Tensor, weights: Tensor) -> tuple[Tensor, float]:
    """The engine's gradients of a batch in one combination ``(P,)``, and the error of norms that skip materialising.

    Such a norm is rounded up, which only clips more. An error in that direction counts a hundredth.
    """
    gradients = capture.gradients(losses)
    norms, rows = gradients.norms(), gradients.rows(capture.map.size)
    lengths = row_norms(rows)
    excess = (norms - lengths) / lengths.clamp_min(1e-30)
    return weights @ rows, float(torch.where(excess > 0, excess / 100, -excess).max()) if lengths.any() else 0.0
