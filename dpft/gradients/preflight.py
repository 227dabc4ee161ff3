"""The proof before the first step: fast gradients against one example at a time, on real examples.

Three checks, all before any budget is spent (no number of the data leaves them but relative errors near 1e-6):

exact      per-example gradients of the whole batch, as the engine makes them, equal a loop of plain backward passes
isolated   an example's loss and gradient are the same alone and beside others, padding included
covered    the forward pass changes no buffer, and every trainable parameter belongs to the engine
"""

from collections.abc import Callable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from dpft.errors import ExactnessError, GuaranteeError, IsolationError
from dpft.gradients.capture import Capture
from dpft.gradients.engine import Engine

TOLERANCE = 1e-4  # relative error that float32 arithmetic explains
FLOOR = 1e-2  # a parameter's error is measured against at least this share of the whole gradient's norm


@dataclass(frozen=True)
class Preflight:
    """What the checks found. ``max_relative_error`` is the worst parameter's, over all examples tried."""

    exact: bool
    isolated: bool
    max_relative_error: float
    trainable_parameters: int
    techniques: dict[str, int]
    examples: int

    def __str__(self) -> str:
        techniques = ", ".join(f"{count:,} by {name}" for name, count in self.techniques.items())
        return (
            f"preflight: exact (max relative error {self.max_relative_error:.1e}) and isolated on {self.examples} examples; "
            f"{self.trainable_parameters:,} trainable parameters ({techniques})"
        )


def preflight(engine: Engine, losses: Callable[[list], Tensor], examples: Sequence) -> Preflight:
    """Prove the engine's gradients on a few examples, or refuse.

    Parameters that one backward pass cannot serve are moved to the ``per example`` technique; the engine keeps that.

    Args:
        engine: attached.
        losses: ``losses(examples) -> (B,)``, collation and task loss; called with one and with several examples.
        examples: at least two, preferably of different lengths.

    Raises:
        ExactnessError: a parameter's fast gradient is not the brute-force one; named.
        IsolationError: examples influence each other; the layer is named where it can be found.
        GuaranteeError: the forward pass changes a buffer, or a loss is not finite.
    """
    if len(examples) < 2:
        raise GuaranteeError(
            f"The preflight was given {len(examples)} example, and isolation shows only beside others: give two or more."
        )
    capture = engine.capture
    with _deterministic(capture):
        _check_buffers(capture.model, lambda: losses(list(examples)))
        fast = _fast_rows(capture, lambda: losses(list(examples)))
        worst, error = None, 0.0
        for i, example in enumerate(examples):
            with capture.paused():
                reference = _gradient(capture, losses([example])[0])
            for slot, relative in _relative_errors(capture, fast[i], reference):
                if not relative <= error:  # a NaN error is an error
                    worst, error = slot, relative
        if not error <= TOLERANCE:
            _explain(capture, losses, list(examples), worst, error)
    techniques: dict[str, int] = {}
    for slot in capture.slots:
        techniques[slot.technique] = techniques.get(slot.technique, 0) + slot.parameter.numel()
    return Preflight(True, True, error, capture.size, techniques, len(examples))


def _fast_rows(capture: Capture, losses: Callable[[], Tensor]) -> Tensor:
    """The engine's own rows, after moving every parameter that it refuses to the per-example technique."""
    while True:
        try:
            return capture.rows(losses()).clone()
        except ExactnessError as error:
            refused = [slot for slot in getattr(error, "slots", []) if slot.technique != "per example"]
            if not refused:
                raise
            for slot in refused:
                capture.demote(slot)
            for slot in capture.slots:
                slot.parameter.grad = None


def _gradient(capture: Capture, loss: Tensor) -> Tensor:
    """``(P,)``: one plain backward pass of one loss, everything of the engine switched off."""
    if not torch.isfinite(loss):
        raise GuaranteeError(
            "The loss of a preflight example is not finite: lower the precision demands or look at its text and labels."
        )
    parameters = [slot.parameter for slot in capture.slots]
    gradients = torch.autograd.grad(loss, parameters, allow_unused=True, retain_graph=True)
    flat = torch.zeros(capture.size, device=loss.device)
    for slot, gradient in zip(capture.slots, gradients, strict=True):
        if gradient is not None:
            slot.view(flat).copy_(gradient)
    return flat


def _relative_errors(capture: Capture, fast: Tensor, reference: Tensor):
    floor = FLOOR * reference.norm()
    for slot in capture.slots:
        expected = reference[slot.slice]
        yield slot, float((fast[slot.slice] - expected).norm() / torch.maximum(expected.norm(), floor).clamp_min(1e-30))


def _explain(capture: Capture, losses: Callable, examples: list, worst, error: float) -> None:
    """Say whether the engine or the model is to blame: is plain autograd in the batch what it is alone?"""
    with capture.paused():
        together = losses(examples)
        for i, example in enumerate(examples):
            alone = losses([example])[0]
            coupled = max(
                e for _, e in _relative_errors(capture, _gradient(capture, together[i]), _gradient(capture, alone))
            )
            if not coupled <= TOLERANCE or not torch.allclose(together[i], alone, rtol=TOLERANCE, atol=1e-6):
                raise IsolationError(
                    f"An example's gradient changes by {coupled:.1e} (relative) when others share its batch, so clipping it would not bound "
                    f"its influence: {_coupling_layer(capture.model, losses, examples)}."
                )
    raise ExactnessError(
        f"{worst.name} got a per-example gradient that differs from the brute-force one by {error:.1e} (relative), more than "
        f"float32 explains: leave it out of the subset and report the layer."
    )


def _coupling_layer(model: nn.Module, losses: Callable, examples: list) -> str:
    """Name the first layer whose output for the longest example depends on which others are in the batch."""
    outputs: list[list[tuple[str, Tensor]]] = []
    longest = max(range(len(examples)), key=lambda i: _size(examples[i]))
    others = [example for i, example in enumerate(examples) if i != longest]
    for companion in (others[0], others[-1] if len(others) > 1 else examples[longest]):
        seen: list[tuple[str, Tensor]] = []
        hooks = [
            module.register_forward_hook(
                lambda m, a, out, name=name, seen=seen: seen.append((f"{name} ({type(m).__name__})", out))
            )
            for name, module in model.named_modules()
            if next(module.children(), None) is None
        ]
        try:
            losses([examples[longest], companion])
        finally:
            for hook in hooks:
                hook.remove()
        outputs.append(seen)
    for (name, one), (_, two) in zip(*outputs, strict=False):
        if isinstance(one, Tensor) and one.shape == two.shape and one.dim() and len(one) == 2:
            if one.is_floating_point() and not torch.allclose(one[0], two[0], rtol=1e-3, atol=1e-5):
                return f"layer {name} mixes the examples of a batch; freeze it and put it in eval mode, or replace it (BatchNorm by GroupNorm)"
    return "padding or the loss couples them; pass an attention mask, and return each example's own loss, normalised by itself"


def _size(example) -> int:
    if isinstance(example, dict):
        return max((len(value) for value in example.values() if hasattr(value, "__len__")), default=0)
    return 0


def _check_buffers(model: nn.Module, forward: Callable[[], Tensor]) -> None:
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    result = forward()
    if result.dim() != 1:
        raise GuaranteeError(
            f"The task returned losses of shape {tuple(result.shape)}: return one loss per example, (B,)."
        )
    for name, buffer in model.named_buffers():
        if name in before and before[name].shape == buffer.shape and not torch.equal(before[name], buffer):
            layer = model.get_submodule(name.rpartition(".")[0])
            raise IsolationError(
                f"Layer {name.rpartition('.')[0]} ({type(layer).__name__}) writes statistics of the batch into {name}, un-noised: put it in "
                "eval mode, or replace it by a layer without running statistics (BatchNorm by GroupNorm)."
            )


@contextmanager
def _deterministic(capture: Capture):
    """Training mode without dropout, and trainable weights slightly moved, so that no gradient is zero by initialisation.

    A fresh LoRA has B = 0, which makes every gradient of A zero: equal zeros would prove nothing.
    """
    was_training = capture.model.training
    capture.model.train()
    saved = [slot.parameter.detach().clone() for slot in capture.slots]
    generator = torch.Generator().manual_seed(0)
    try:
        with torch.no_grad():
            for slot in capture.slots:
                slot.parameter += 0.01 * torch.randn(slot.parameter.shape, generator=generator).to(slot.parameter)
        with _NoDropout():
            yield
    finally:
        with torch.no_grad():
            for slot, value in zip(capture.slots, saved, strict=True):
                slot.parameter.copy_(value)
                slot.parameter.grad = None
        capture.model.train(was_training)


class _NoDropout(TorchFunctionMode):
    """Every dropout is the identity: masks are per example anyway, but not the same alone and in a batch."""

    DROPOUTS = {
        torch.nn.functional.dropout,
        torch.dropout,
        torch.nn.functional.dropout1d,
        torch.nn.functional.dropout2d,
    }

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if func in self.DROPOUTS:
            return args[0] if args else kwargs["input"]
        if func is torch.nn.functional.scaled_dot_product_attention:
            args, kwargs = args[:4], {**kwargs, "dropout_p": 0.0}
        return func(*args, **kwargs)
