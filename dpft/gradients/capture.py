"""Per-example gradients of the trainable parameters, from one backward pass.

While attached, each layer that owns trainable parameters runs its own forward with those parameters held constant
(so autograd builds no ``.grad`` for them) and taps the gradient of its output. When the backward pass reaches the tap,
the layer's per-example gradients are added to a flat workspace ``(B, P)``, one row per example. Three techniques:

``rule``         a closed form from :mod:`dpft.gradients.rules` (Opacus's own, and ours)
``functional``   the layer differentiated again, example by example, with ``torch.func`` (layers without a rule)
``per example``  one backward pass for each example: always right, and as fast as any batch on long inputs

A parameter whose layer is not called with the batch as leading dimension, or that is used outside its layer, can only
be handled per example; everything here raises :class:`~dpft.errors.ExactnessError` rather than guess.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

from dpft.errors import BypassError, ExactnessError
from dpft.gradients.rules import rule_for

RULE, FUNCTIONAL, PER_EXAMPLE = "rule", "functional", "per example"


@dataclass
class Slot:
    """Where one trainable parameter lives in the flat workspace, and how its gradient is made."""

    name: str
    parameter: nn.Parameter
    start: int
    technique: str

    @property
    def slice(self) -> slice:
        return slice(self.start, self.start + self.parameter.numel())

    def view(self, flat: Tensor) -> Tensor:
        """``(P,)`` or ``(B, P)`` to this parameter's ``(*shape)`` or ``(B, *shape)``."""
        return (
            flat[..., self.slice].unflatten(-1, self.parameter.shape) if self.parameter.dim() else flat[..., self.start]
        )


class Capture:
    """Taps a model's trainable layers; the model is not wrapped and :meth:`detach` leaves nothing behind.

    Attributes:
        slots: one :class:`Slot` per trainable parameter, tied parameters once.
        size: P, the number of trainable scalars.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.slots: list[Slot] = []
        self.size = 0
        self._taps: list[tuple[nn.Module, Callable | None]] = []  # with the forward that hid the class's own, if any
        self._workspace: Tensor | None = None
        self._written: set[int] = set()  # starts of the slots that hold gradients of the current backward pass
        self._examples: int | None = None  # B while a backward pass of rows() runs
        self._paused = False
        owners: dict[int, list[nn.Module]] = {}
        for module in model.modules():
            for parameter in module.parameters(recurse=False):
                owners.setdefault(id(parameter), []).append(module)
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                self.slots.append(Slot(name, parameter, self.size, _technique(owners[id(parameter)])))
                self.size += parameter.numel()
        self._by_id = {id(slot.parameter): slot for slot in self.slots}

    # -- attaching -----------------------------------------------------------------------------------------------

    def attach(self) -> None:
        for module in self.model.modules():
            tapped = [
                p
                for p in module.parameters(recurse=False)
                if p.requires_grad and self._by_id[id(p)].technique != PER_EXAMPLE
            ]
            if tapped:
                self._taps.append((module, vars(module).get("forward")))
                module.forward = self._tapped_forward(module, tapped)

    def detach(self) -> None:
        for module, hidden in self._taps:
            del module.forward  # the class's own forward shows again
            if hidden is not None:
                module.forward = hidden
        self._taps.clear()
        self._workspace = None

    def demote(self, slot: Slot) -> None:
        """Handle this parameter one example at a time from now on."""
        slot.technique = PER_EXAMPLE
        if self._taps:
            self.detach()
            self.attach()

    def paused(self) -> "_Paused":
        """A context in which the model computes and differentiates as if nothing were attached."""
        return _Paused(self)

    @property
    def per_example(self) -> bool:
        """Whether some parameter needs a backward pass of its own for each example."""
        return any(slot.technique == PER_EXAMPLE for slot in self.slots)

    def _tapped_forward(self, module: nn.Module, tapped: list[nn.Parameter]) -> Callable:
        forward = module.forward

        def tapped_forward(*args, **kwargs):
            if self._paused or not torch.is_grad_enabled():
                return forward(*args, **kwargs)
            for parameter in tapped:
                parameter.requires_grad_(False)
            try:
                output = forward(*args, **kwargs)
            finally:
                for parameter in tapped:
                    parameter.requires_grad_(True)
            if not isinstance(output, Tensor):
                raise self._inexact(
                    tapped, f"its layer {type(module).__name__} returns {type(output).__name__}, not one tensor"
                )
            values, rebuild = _flatten(args, kwargs)
            return _Tap.apply(
                output,
                lambda tensors, grad_output: self._record(module, tapped, rebuild(tensors), grad_output),
                len(values),
                *values,
                *tapped,
            )

        return tapped_forward

    # -- gradients -----------------------------------------------------------------------------------------------

    def rows(self, losses: Tensor) -> Tensor:
        """Back-propagate ``(B,)`` losses; returns the ``(B, P)`` float32 workspace, valid until the next call.

        Raises:
            ExactnessError: a gradient has no batch dimension, or a parameter was used outside its layer.
        """
        examples = len(losses)
        rows = self._fresh_rows(examples)
        self._examples = examples
        try:
            if self.per_example:
                for i in range(examples):
                    losses[i].backward(retain_graph=i + 1 < examples)
                    self._collect(rows, i)
            else:
                losses.sum().backward()
        finally:
            self._examples = None
        for slot in self.slots:
            if slot.start not in self._written:
                slot.view(rows).zero_()  # the losses do not depend on it
            if slot.parameter.grad is not None:
                slot.parameter.grad = None
                raise self._inexact(
                    [slot.parameter], "it is used outside its layer's forward, where that use would be lost"
                )
        return rows

    def _fresh_rows(self, examples: int) -> Tensor:
        if self._workspace is None or len(self._workspace) < examples:
            self._workspace = torch.empty(examples, self.size, device=self.slots[0].parameter.device)
        self._written.clear()
        return self._workspace[:examples]

    def _write(self, slot: Slot, destination: Tensor, gradient: Tensor) -> None:
        """The first use of a parameter overwrites what the workspace held before; further uses add to it."""
        if slot.start in self._written:
            destination.add_(gradient)
        else:
            self._written.add(slot.start)
            destination.copy_(gradient)

    def _collect(self, rows: Tensor, i: int) -> None:
        """Move what one example's backward pass left in ``.grad`` to its row."""
        for slot in self.slots:
            if slot.technique == PER_EXAMPLE and slot.parameter.grad is not None:
                if slot.start not in self._written:
                    self._write(slot, slot.view(rows), torch.zeros_like(slot.parameter.grad))
                slot.view(rows[i]).copy_(slot.parameter.grad)
                slot.parameter.grad = None

    def _record(self, module: nn.Module, tapped: list[nn.Parameter], call: tuple, grad_output: Tensor) -> None:
        """Add one use of a layer to the workspace: uses accumulate, so shared and tied parameters are whole."""
        if self._examples is None:
            raise BypassError(
                f"A backward pass reached {type(module).__name__} outside engine.accumulate, so its gradients would be "
                "neither clipped nor noised: pass the per-example losses to engine.accumulate instead."
            )
        args, kwargs = call
        rule = rule_for(module)
        try:
            if rule is None:
                gradients = _functional(module, tapped, args, kwargs, grad_output, self._examples)
            else:
                (activation,) = args if not kwargs else ()
                self._check_leading(tapped, activation.shape, grad_output.shape)
                gradients = rule(module, [activation], grad_output)
        except (RuntimeError, ValueError, AttributeError, TypeError) as error:
            if isinstance(error, ExactnessError):
                raise
            raise self._inexact(
                tapped, f"its layer {type(module).__name__} cannot be differentiated example by example ({error})"
            ) from error
        for parameter in tapped:
            gradient, slot = gradients[parameter], self._by_id[id(parameter)]
            self._check_leading([parameter], gradient.shape)
            self._write(slot, slot.view(self._workspace[: self._examples]), gradient)

    def _check_leading(self, tapped: list[nn.Parameter], *shapes: torch.Size) -> None:
        for shape in shapes:
            if not shape or shape[0] != self._examples:
                found = shape[0] if shape else 0
                raise self._inexact(
                    tapped,
                    f"it gave {found} gradients for a batch of {self._examples}: its input has no batch dimension",
                )

    def _inexact(self, tapped: list[nn.Parameter], reason: str) -> ExactnessError:
        slot = self._by_id[id(tapped[0])]
        error = ExactnessError(
            f"{slot.name} cannot be captured in one backward pass because {reason}: run the preflight, which handles such "
            "parameters one example at a time, or leave it out of the subset."
        )
        error.slots = [self._by_id[id(parameter)] for parameter in tapped]
        return error


class _Tap(torch.autograd.Function):
    """Identity whose backward hands the output's gradient to ``sink``; ``parameters`` only make it require grad."""

    @staticmethod
    def forward(ctx, output, sink, count, *values_and_parameters):
        ctx.sink, ctx.inputs = sink, 3 + len(values_and_parameters)
        ctx.save_for_backward(*values_and_parameters[:count])
        return output.view_as(output)

    @staticmethod
    def backward(ctx, grad_output):
        with torch.no_grad():
            ctx.sink(ctx.saved_tensors, grad_output)
        return grad_output, *[None] * (ctx.inputs - 1)


class _Paused:
    def __init__(self, capture: Capture) -> None:
        self._capture = capture

    def __enter__(self) -> None:
        self._capture._paused = True

    def __exit__(self, *_) -> None:
        self._capture._paused = False


def _technique(modules: list[nn.Module]) -> str:
    """The cheapest technique that every layer sharing a parameter allows."""
    if any(rule_for(module) is None and next(module.children(), None) is not None for module in modules):
        return PER_EXAMPLE
    return RULE if all(rule_for(module) for module in modules) else FUNCTIONAL


def _flatten(args: tuple, kwargs: dict) -> tuple[list[Tensor], Callable]:
    """The tensors among a call's arguments, detached, and how to put such tensors back into the call."""
    leaves = [*args, *kwargs.values()]
    places = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]

    def rebuild(tensors: tuple[Tensor, ...]) -> tuple[tuple, dict]:
        whole = list(leaves_without_tensors)
        for place, tensor in zip(places, tensors, strict=True):
            whole[place] = tensor
        return tuple(whole[: len(args)]), dict(zip(kwargs, whole[len(args) :], strict=True))

    leaves_without_tensors = [None if i in places else leaf for i, leaf in enumerate(leaves)]
    return [leaves[i].detach() for i in places], rebuild


def _functional(
    module: nn.Module, tapped: list[nn.Parameter], args: tuple, kwargs: dict, grad_output: Tensor, examples: int
) -> dict[nn.Parameter, Tensor]:
    """Differentiate ``<module(x_i), dy_i>`` for each example i; inputs without a batch dimension are constants."""
    names = {name: p for name, p in module.named_parameters(recurse=False) if any(p is q for q in tapped)}
    if not args or not isinstance(args[0], Tensor) or args[0].shape[0] != examples or grad_output.shape[0] != examples:
        raise ValueError("its input has no batch dimension")
    batched = [isinstance(a, Tensor) and a.dim() > 0 and a.shape[0] == examples for a in args]
    varying = [a for a, is_batched in zip(args, batched, strict=True) if is_batched]

    def inner_product(parameters, cotangent, *inputs):
        inputs = iter(inputs)
        call = [next(inputs).unsqueeze(0) if is_batched else a for a, is_batched in zip(args, batched, strict=True)]
        output = functional_call(module, parameters, tuple(call), kwargs)
        return (output * cotangent.unsqueeze(0)).sum()

    forward = module.__dict__.pop("forward", None)  # differentiate the class's own forward, not the tapped one
    try:
        values = {name: p.detach() for name, p in names.items()}
        with torch.enable_grad():
            gradients = vmap(grad(inner_product), in_dims=(None, 0, *[0] * len(varying)))(values, grad_output, *varying)
    finally:
        if forward is not None:
            module.forward = forward
    return {parameter: gradients[name] for name, parameter in names.items()}
