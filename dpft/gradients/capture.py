"""Per-example gradients of the trainable parameters, from one backward pass.

While a capture is attached, the ``forward`` of certain modules is replaced. The replacement treats the trainable
parameters served there as constants, so that autograd builds no ``.grad`` for them, and hooks the gradient of the
output. When the backward pass reaches the hook, the per-example gradients are added to
:class:`~dpft.gradients.batch_gradients.BatchGradients`. There are three techniques:

``rule``         at the layer that owns the parameter, by a closed form from :mod:`dpft.gradients.rules`
``functional``   at that layer or a module around it, differentiated again for each example by ``torch.func``
``per example``  no hooks, one backward pass for each example: always right, and on CPUs as fast for long inputs

A technique that cannot serve a parameter raises :class:`CaptureError` and does not guess. :meth:`Capture.lift` then
goes on to the next one. The preflight decides for each model.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.utils._pytree import TreeSpec, tree_flatten, tree_leaves, tree_unflatten

from dpft.errors import BypassError, ExactnessError, IsolationError, first_line
from dpft.gradients.batch_gradients import BatchGradients
from dpft.gradients.capture_map import CaptureMap, HookedModule, TrainableParameter
from dpft.gradients.findings import Findings
from dpft.gradients.precision import precise

HALF = (torch.float16, torch.bfloat16)
MATERIALISED = 1 << 26  # scalars of weights that functional differentiation may materialise at a time


class CaptureError(ExactnessError):
    """These parameters cannot be captured by their present technique."""

    def __init__(self, trainables: Sequence[TrainableParameter], reason: str) -> None:
        self.trainables, self.reason = trainables, f"{trainables[0].name}: {reason}"
        super().__init__(
            f"{trainables[0].name} cannot be captured in one backward pass because {reason}: run the preflight, which "
            "handles such parameters in another way, or leave it out of the subset."
        )


class Capture:
    """Hooks modules of a model. The model is not wrapped, and :meth:`detach` leaves nothing behind.

    Attributes:
        map: the trainable parameters and the hooked modules.
        findings: what the preflight found, kept here for all later steps; None before it has ended.
        running: the modules of the functional technique whose forward pass runs now.
    """

    def __init__(self, model: nn.Module) -> None:
        self.map = CaptureMap(model)
        self.findings: Findings | None = None
        self.running: list[HookedModule] = []
        self._attached = False
        self._paused = False
        self._workspace: Tensor | None = None
        self._gradients: BatchGradients | None = None  # while a backward pass of gradients() runs

    @property
    def forms_known(self) -> bool:
        """Whether the preflight has seen every form of call."""
        return self.findings is not None

    # -- attaching -----------------------------------------------------------------------------------------------

    def attach(self) -> None:
        self._attached = True
        for hooked in self.map.hooked_modules:
            hooked.own_forward = vars(hooked.module).get("forward")
            hooked.module.forward = self._hooked_forward(hooked)

    def detach(self) -> None:
        if self._attached:
            for hooked in self.map.hooked_modules:
                del hooked.module.forward  # the class's own forward shows again
                if hooked.own_forward is not None:
                    hooked.module.forward = hooked.own_forward
        self._attached = False
        self._workspace = None

    @contextmanager
    def paused(self) -> Iterator[None]:
        """A context in which the model computes and differentiates as if nothing were attached."""
        before, self._paused = self._paused, True
        try:
            yield
        finally:
            self._paused = before

    def lift(self, trainables: Sequence[TrainableParameter], reason: str) -> None:
        """Go on to the next technique for these parameters: see :meth:`CaptureMap.lift`."""
        with self._remapping():
            self.map.lift(trainables, reason)

    def go_one_by_one(self, reason: str) -> None:
        """Hook nothing: from now on each example gets a plain backward pass of its own."""
        with self._remapping():
            self.map.go_one_by_one(reason)

    def adopt(self, findings: Findings) -> None:
        """Take over what a preflight of the same model found, in place of one."""
        with self._remapping():
            self.map.apply(findings.choices)
        self.findings = findings

    @contextmanager
    def _remapping(self) -> Iterator[None]:
        """Detach while the map changes, and attach again where it leads."""
        attached = self._attached
        self.detach()
        yield
        if attached:
            self.attach()

    def _hooked_forward(self, hooked: HookedModule) -> Callable[..., Tensor]:
        forward = hooked.module.forward
        parameters = [trainable.parameter for trainable in hooked.trainables]
        functional = hooked.rule is None

        def hooked_forward(*args: Any, **kwargs: Any) -> Tensor:
            if self._paused or not torch.is_grad_enabled():
                return forward(*args, **kwargs)
            for parameter in parameters:
                parameter.requires_grad_(False)
            if functional:
                self.running.append(hooked)
            try:
                output = forward(*args, **kwargs)
            finally:
                for parameter in parameters:
                    parameter.requires_grad_(True)
                if functional:
                    self.running.remove(hooked)
            if not isinstance(output, Tensor):
                reason = f"{_called(hooked)} returns {type(output).__name__}, not one tensor"
                raise CaptureError(hooked.trainables, reason)
            if functional:
                call, tensors = _Call.of(args, kwargs)
                sink: _Sink = lambda values, grad_output: self._record(hooked, grad_output, values, call)
                return _GradientHook.apply(output, sink, len(tensors), *tensors, *parameters)
            x = self._rule_input(hooked, args, kwargs, output)
            sink = lambda values, grad_output: self._record(hooked, grad_output, values)
            return _GradientHook.apply(output, sink, 1, x, *parameters)

        return hooked_forward

    def _rule_input(
        self, hooked: HookedModule, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor
    ) -> Tensor:
        """The one tensor that the layer was called with, as far as its rule needs it."""
        tensors = list(args)
        if len(args) != 1 or kwargs:
            tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        if len(tensors) != 1:
            reason = f"{_called(hooked)} was called with {len(tensors)} tensors, not one"
            raise CaptureError(hooked.trainables, reason)
        x: Tensor = tensors[0].detach()
        if not hooked.needs_input:  # the shape is enough; NaN shows if a value is used nevertheless
            return x.new_full((1,), torch.nan).expand(x.shape)
        if hooked.takes_half and output.dtype in HALF:
            return x.to(output.dtype)  # the layer rounds it so under autocast, and keeps no more
        return x

    # -- gradients -----------------------------------------------------------------------------------------------

    def gradients(self, losses: Tensor) -> BatchGradients:
        """Back-propagate ``(B,)`` losses. The result is valid until the next call.

        Raises:
            ExactnessError: a gradient has no batch dimension, or a parameter was used outside its layer.
        """
        if self.map.one_by_one:
            return BatchGradients(self._one_by_one(losses))
        self._gradients = gradients = BatchGradients(self._fresh_workspace(len(losses)))
        try:
            losses.sum().backward()
        finally:
            self._gradients = None
        gradients.complete(self.map.trainables)
        for trainable in self.map.trainables:
            if trainable.parameter.grad is not None:
                trainable.parameter.grad = None
                raise CaptureError([trainable], "it is used outside its layer's forward, where that use would be lost")
        return gradients

    def rows(self, losses: Tensor) -> Tensor:
        """:meth:`gradients` as one matrix ``(B, P)``, every one materialised."""
        return self.gradients(losses).rows(self.map.size)

    def _one_by_one(self, losses: Tensor) -> Tensor:
        rows = losses.new_empty(len(losses), self.map.size, dtype=torch.float32)
        for i, row in enumerate(rows):
            losses[i].backward(retain_graph=i + 1 < len(losses))
            self.collect_grads(row)
        return rows

    def collect_grads(self, row: Tensor) -> None:
        """Move what a plain backward pass left in ``.grad`` to the flat ``(P,)`` row."""
        for trainable in self.map.trainables:
            if trainable.parameter.grad is None:
                trainable.view(row).zero_()
            else:
                trainable.view(row).copy_(trainable.parameter.grad)
                trainable.parameter.grad = None

    def _fresh_workspace(self, examples: int) -> Tensor:
        if self._workspace is None or len(self._workspace) < examples:
            device = self.map.trainables[0].parameter.device
            self._workspace = torch.empty(examples, self.map.small_size, dtype=torch.float32, device=device)
        return self._workspace[:examples]

    def _record(
        self,
        hooked: HookedModule,
        grad_output: Tensor,
        tensors: tuple[Tensor, ...],
        call: "_Call | None" = None,
    ) -> None:
        """Add the gradients of one use of a module: by its rule, or by differentiating the call again."""
        if self._gradients is None:
            raise BypassError(
                f"A backward pass reached {type(hooked.module).__name__} outside engine.accumulate, so its gradients "
                "would be neither clipped nor noised: pass the per-example losses to engine.accumulate instead."
            )
        examples = self._gradients.examples
        try:
            if call is not None:
                gradients = self._functional(hooked, grad_output, tensors, call)
            else:
                activation = tensors[0]
                _check_leading(examples, hooked.trainables, activation.shape, grad_output.shape)
                if not hooked.takes_half:
                    activation, grad_output = precise(activation), precise(grad_output)
                assert hooked.rule is not None
                gradients = hooked.rule(hooked.module, [activation], grad_output)
        except (ExactnessError, IsolationError):
            raise
        except (RuntimeError, ValueError, AttributeError, TypeError) as error:
            reason = f"{_called(hooked)} cannot be differentiated example by example ({first_line(error)})"
            raise CaptureError(hooked.trainables, reason) from error
        for trainable in hooked.trainables:
            gradient = gradients[trainable.parameter]
            _check_leading(examples, [trainable], gradient.shape)
            self._gradients.add(trainable, gradient)
        hooked.sizes.add(examples)

    def _functional(
        self, hooked: HookedModule, grad_output: Tensor, tensors: tuple[Tensor, ...], call: "_Call"
    ) -> dict[Tensor, Tensor]:
        """Differentiate ``<module(x_i), dy_i>`` for each example i. Tensors without a batch dimension are constants."""
        assert self._gradients is not None
        examples = self._gradients.examples
        _check_leading(examples, hooked.trainables, grad_output.shape)
        form = call.form
        batched = [tensor.dim() > 0 and len(tensor) == examples for tensor in tensors]
        if form in hooked.batched:
            batched = [a and b for a, b in zip(hooked.batched[form], batched, strict=True)]
        elif self.forms_known:
            raise ValueError("it was called in a form that no preflight example had")
        if not self.forms_known:
            hooked.batched[form] = batched
        if not any(batched):
            raise ValueError("none of its inputs has a batch dimension")
        names: dict[int, str] = {}
        for name, parameter in hooked.module.named_parameters():
            names[id(parameter)] = name
        values = {names[id(one.parameter)]: one.parameter.detach() for one in hooked.trainables}

        def inner_product(parameters: dict[str, Tensor], cotangent: Tensor, *inputs: Tensor) -> Tensor:
            args, kwargs = call.arguments([x.unsqueeze(0) if b else x for x, b in zip(inputs, batched, strict=True)])
            output = functional_call(hooked.module, parameters, args, kwargs)
            if output.shape != (1, *cotangent.shape):  # one example came out as several: another's data entered
                raise ValueError(f"one example alone gave an output of shape {tuple(output.shape)}")
            return (output * cotangent.unsqueeze(0)).sum()

        in_dims = (None, 0, *[0 if is_batched else None for is_batched in batched])
        # Many tuners materialise their whole weight matrix: here once for each example that is differentiated together.
        weights = sum(parameter.numel() for parameter in hooked.module.parameters())
        differentiate = vmap(grad(inner_product), in_dims=in_dims, chunk_size=max(1, MATERIALISED // weights))
        with self.paused(), torch.enable_grad():
            gradients = differentiate(values, grad_output, *tensors)
        return {one.parameter: gradients[names[id(one.parameter)]] for one in hooked.trainables}


def _check_leading(examples: int, trainables: Sequence[TrainableParameter], *shapes: torch.Size) -> None:
    """Raises CaptureError: one of the shapes does not begin with the number of examples."""
    for shape in shapes:
        if not shape or shape[0] != examples:
            found = shape[0] if shape else 0
            reason = f"it gave {found} gradients for a batch of {examples}: its input has no batch dimension"
            raise CaptureError(trainables, reason)


@dataclass(frozen=True)
class _Call:
    """What a hooked module was called with, without its tensors."""

    structure: TreeSpec
    others: list[Any]  # the leaves, with None in place of each tensor
    places: list[int]  # where the tensors were among the leaves

    @classmethod
    def of(cls, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple["_Call", list[Tensor]]:
        leaves, structure = tree_flatten((args, kwargs))
        places = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]
        others = [None if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        return cls(structure, others, places), [leaves[i].detach() for i in places]

    @property
    def form(self) -> str:
        return f"{self.structure} {self.places}"

    def arguments(self, tensors: Sequence[Tensor]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The call's ``args`` and ``kwargs`` with these tensors."""
        leaves = list(self.others)
        for place, tensor in zip(self.places, tensors, strict=True):
            leaves[place] = tensor
        args, kwargs = tree_unflatten(leaves, self.structure)
        return args, kwargs


_Sink = Callable[[tuple[Tensor, ...], Tensor], None]  # of the saved tensors and the output's gradient


class _GradientHook(torch.autograd.Function):
    """Identity whose backward gives the output's gradient to ``sink``; ``parameters`` only make it require grad."""

    @staticmethod
    def forward(ctx: Any, output: Tensor, sink: _Sink, count: int, *values_and_parameters: Tensor) -> Tensor:
        ctx.sink, ctx.inputs = sink, 3 + len(values_and_parameters)
        ctx.save_for_backward(*values_and_parameters[:count])
        # This is no view, so that later layers may change it in place, as a residual network's ReLU does. If the layer
        # itself needs its output again, PyTorch's version counter, which both share, raises an error.
        return output.detach()

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        with torch.no_grad():
            ctx.sink(ctx.saved_tensors, grad_output)
        return grad_output, *[None] * (ctx.inputs - 1)


def _called(hooked: HookedModule) -> str:
    return f"its layer {type(hooked.module).__name__}"
