"""The check that no example changes the loss or the gradient of another."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from dpft.errors import GuaranteeError, IsolationError
from dpft.gradients.capture import Capture
from dpft.gradients.preflight.comparison import (
    TOLERANCE,
    Losses,
    Reference,
    floating_tensors,
    half_tensors,
    is_worse,
    plain_gradient,
    relative_error,
    size_of,
    weights_for,
    worst_parameter,
)
from dpft.gradients.preflight.determinism import in_precision
from dpft.gradients.preflight.side_effects import without_side_effects


def check_isolation(capture: Capture, losses: Losses, examples: list[Any], longest: Any) -> Reference:
    """Compare each example alone with the same one beside others, in at least float32.

    Raises:
        IsolationError: they differ by more than rounding explains, or an example changes beside the longest.
    """
    model = capture.map.model
    floating, half = floating_tensors(model), half_tensors(model)
    beside_longest = lambda: _error_beside(capture, losses, examples[-1], longest)
    with in_precision(half, torch.float32):
        reference = _beside_others(capture, losses, examples)
        beside = 0.0 if longest is None else beside_longest()
    # A large error is a coupling, or float32 rounding that a deep model amplified a thousandfold. float64 tells which.
    error = _in_double(reference.error, lambda: _beside_others(capture, losses, examples).error, floating)
    beside = _in_double(beside, beside_longest, floating)
    error = beside if is_worse(beside, error) else error
    if not error <= TOLERANCE:
        with in_precision(half, torch.float32), torch.no_grad():
            _refuse_other_randomness(losses, examples)
            raise IsolationError(
                f"An example's gradient changes by {error:.1e} (relative) when others share its batch, so clipping "
                "it would not bound its influence: "
                f"{_coupling_layer(model, losses, [*examples, *([] if longest is None else [longest])])}."
            )
    return Reference(error, reference.norms, reference.combined)


def _beside_others(capture: Capture, losses: Losses, examples: list[Any]) -> Reference:
    """Losses and gradients of each example alone and beside the others, by plain autograd.

    Gradients are compared in one combination, in which each example has about the same weight. A coupling that changes
    any of them changes the combination. It is kept for the whole batch and for the first example alone.
    """
    with capture.paused():
        together = without_side_effects(capture.map.model, lambda: losses(examples))
        losses_alone, gradients = [], []
        for example in examples:
            loss = losses([example])[0]
            losses_alone.append(loss.detach())
            gradients.append(plain_gradient(capture, loss))
        alone, norms = torch.stack(losses_alone), torch.stack([gradient.norm() for gradient in gradients])
        if not torch.isfinite(alone).all():
            raise GuaranteeError(
                "The loss of a preflight example is not finite: compute in float32, or check its text and labels."
            )
        if not norms.any():
            raise GuaranteeError(
                "No trainable parameter gets a gradient from any preflight example: choose a subset that the loss "
                "depends on."
            )
        weights = weights_for(norms)
        beside = plain_gradient(capture, together @ weights.to(together))
        expected = torch.zeros_like(gradients[0])
        for weight, gradient in zip(weights, gradients, strict=True):
            expected += weight * gradient
    of_losses, of_gradients = relative_error(together.detach(), alone), worst_parameter(capture, beside, expected)[1]
    error = of_gradients if is_worse(of_gradients, of_losses) else of_losses
    first = weights_for(norms[:1]) * gradients[0]
    return Reference(error, norms, {tuple(range(len(examples))): beside, (0,): first})


def _error_beside(capture: Capture, losses: Losses, example: Any, longest: Any) -> float:
    """The relative change of an example's loss beside the longest of all. Gradients might exceed the memory."""
    with capture.paused(), torch.no_grad():
        try:
            together = without_side_effects(capture.map.model, lambda: losses([example, longest]))
        except torch.OutOfMemoryError as error:
            raise GuaranteeError(
                "The preflight checks the longest example beside another, and two of its length do not fit into "
                "memory: cut the texts shorter (task.max_length)."
            ) from error
        return relative_error(together[:1], losses([example]))


def _in_double(found: float, check: Callable[[], float], floating: list[Tensor]) -> float:
    """An error found in float32. If it is too large it is measured again in float64, where the model allows that."""
    if found <= TOLERANCE:
        return found
    try:
        with in_precision(floating, torch.float64):
            return check()
    except GuaranteeError:
        raise
    except Exception:  # a device or a kernel may raise anything for a type that it lacks
        return found


def _refuse_other_randomness(losses: Losses, examples: list[Any]) -> None:
    """Raises IsolationError: a second pass gives the same examples other losses, though global generators return
    constants."""
    changed = relative_error(losses(examples), losses(examples))
    if not changed <= TOLERANCE:
        raise IsolationError(
            f"The same examples' loss changes by {changed:.1e} (relative) from pass to pass, so the collator or a "
            "layer has a generator of its own, or counts its calls: let it draw from the global generators."
        )


def _coupling_layer(model: nn.Module, losses: Losses, examples: list[Any]) -> str:
    """Name the first layer whose output for the longest example depends on the other one in the batch."""
    outputs: list[list[tuple[str, Any]]] = []
    longest = max(range(len(examples)), key=lambda i: size_of(examples[i]))
    others = [example for i, example in enumerate(examples) if i != longest]
    for companion in (others[0], others[-1] if len(others) > 1 else examples[longest]):
        seen: list[tuple[str, Any]] = []
        hooks = [module.register_forward_hook(_recorder(name, seen)) for name, module in model.named_modules()]
        try:
            losses([examples[longest], companion])
        finally:
            for hook in hooks:
                hook.remove()
        outputs.append(seen)
    for (name, one), (_, two) in zip(*outputs, strict=False):
        if isinstance(one, Tensor) and one.shape == two.shape and one.dim() and len(one) == 2:
            if one.is_floating_point() and not torch.allclose(one[0], two[0], rtol=1e-3, atol=1e-5):
                return (
                    f"layer {name} mixes the examples of a batch; freeze it and put it in eval mode, or replace it "
                    "(BatchNorm by GroupNorm)"
                )
    return (
        "padding or the loss couples them; pass an attention mask, and return each example's own loss, normalised by "
        "itself"
    )


def _recorder(name: str, seen: list[tuple[str, Any]]) -> Callable[[nn.Module, Any, Any], None]:
    """A forward hook that records a module's output under its name and class."""
    return lambda module, args, output: seen.append((f"{name} ({_class(module)})", output))


def _class(module: nn.Module) -> str:
    """The class by its name, and outside PyTorch by its module too, because many tuners call their layer Linear."""
    kind = type(module)
    return kind.__name__ if kind.__module__.startswith("torch.") else f"{kind.__module__}.{kind.__name__}"
