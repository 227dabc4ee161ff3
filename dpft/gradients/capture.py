"""Per-example gradients of the trainable parameters, from one backward pass.

While attached, certain modules run their own forward with the trainable parameters handled there held constant (so
autograd builds no ``.grad`` for them) and tap the gradient of their output. When the backward pass reaches the tap,
the per-example gradients are added to :class:`~dpft.gradients.batch_gradients.BatchGradients`. Three techniques:

``rule``         at the layer that owns the parameter, by a closed form from :mod:`dpft.gradients.rules`
``functional``   at that layer or the module around it, differentiated again example by example with ``torch.func``
``per example``  nothing is tapped: one backward pass for each example, always right, and on CPUs as fast on long inputs

What a technique cannot do raises :class:`~dpft.errors.ExactnessError` rather than guess, and :meth:`Capture.lift` goes
on to the next; the preflight decides for each model.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.utils._pytree import TreeSpec, tree_flatten, tree_leaves, tree_unflatten

from dpft.errors import BypassError, ExactnessError, IsolationError, first_line
from dpft.gradients.batch_gradients import BatchGradients
from dpft.gradients.capture_map import CaptureMap, HookedModule, TrainableParameter
from dpft.gradients.precision import precise

HALF = (torch.float16, torch.bfloat16)
MATERIALISED = 1 << 26  # scalars of weights that functional differentiation may make at a time


class Capture(CaptureMap):
    """Taps the hooked_modules of a model; the model is not wrapped and :meth:`detach` leaves nothing behind."""

    def __init__(self, model: nn.Module) -> None:
        self.running: list[HookedModule] = []  # the functional hooked_modules whose forward runs now
        self._attached = False
        self._workspace: Tensor | None = None
        self._gradients: BatchGradients | None = None  # while a backward pass of gradients() runs
        self._paused = False
        super().__init__(model)

    def arrange(self) -> None:
        attached = self._attached
        self.detach()
        super().arrange()
        if attached:
            self.attach()

    # -- attaching -----------------------------------------------------------------------------------------------

    def attach(self) -> None:
        self._attached = True
        for hooked in self.hooked_modules:
            hooked.hidden = vars(hooked.module).get("forward")
            hooked.module.forward = self._hooked_forward(hooked)

    def detach(self) -> None:
        if self._attached:
            for hooked in self.hooked_modules:
                del hooked.module.forward  # the class's own forward shows again
                if hooked.hidden is not None:
                    hooked.module.forward = hooked.hidden
        self._attached = False
        self._workspace = None

    def paused(self) -> "_Paused":
        """A context in which the model computes and differentiates as if nothing were attached."""
        return _Paused(self)

    def _hooked_forward(self, hooked: HookedModule) -> Callable:
        forward = hooked.module.forward
        parameters = [trainable.parameter for trainable in hooked.trainables]
        functional = hooked.rule is None

        def hooked_forward(*args, **kwargs):
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
                raise self._inexact(
                    hooked.trainables, f"{_called(hooked)} returns {type(output).__name__}, not one tensor"
                )
            if functional:
                call, tensors = _Call.of(args, kwargs)
                sink = lambda values, grad_output: self._record(hooked, grad_output, values, call)
                return _GradientHook.apply(output, sink, len(tensors), *tensors, *parameters)
            if len(args) != 1 or kwargs:
                args = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
            if len(args) != 1:
                raise self._inexact(
                    hooked.trainables, f"{_called(hooked)} was called with {len(args)} tensors, not one"
                )
            x = args[0].detach()
            if not hooked.needs_input:  # the shape is enough; a value that were used all the same would be found out
                x = x.new_full((1,), torch.nan).expand(x.shape)
            elif hooked.takes_half and output.dtype in HALF:
                x = x.to(output.dtype)  # as the layer itself rounds it under autocast, keeping no more
            sink = lambda values, grad_output: self._record(hooked, grad_output, values)
            return _GradientHook.apply(output, sink, 1, x, *parameters)

        return hooked_forward

    # -- gradients -----------------------------------------------------------------------------------------------

    def gradients(self, losses: Tensor) -> BatchGradients:
        """Back-propagate ``(B,)`` losses; what is returned is valid until the next call.

        Raises:
            ExactnessError: a gradient has no batch dimension, or a parameter was used outside its layer.
        """
        if self.one_by_one:
            return BatchGradients(self._one_by_one(losses))
        self._gradients = made = BatchGradients(self._fresh_workspace(len(losses)))
        try:
            losses.sum().backward()
        finally:
            self._gradients = None
        made.complete(self.trainables)
        for trainable in self.trainables:
            if trainable.parameter.grad is not None:
                trainable.parameter.grad = None
                raise self._inexact([trainable], "it is used outside its layer's forward, where that use would be lost")
        return made

    def rows(self, losses: Tensor) -> Tensor:
        """``(B, P)``: :meth:`gradients`, every one made."""
        return self.gradients(losses).rows(self.size)

    def _one_by_one(self, losses: Tensor) -> Tensor:
        rows = losses.new_empty(len(losses), self.size, dtype=torch.float32)
        for i, row in enumerate(rows):
            losses[i].backward(retain_graph=i + 1 < len(losses))
            self.collect_grads(row)
        return rows

    def collect_grads(self, row: Tensor) -> None:
        """Move what a plain backward pass left in ``.grad`` to the flat ``(P,)`` row."""
        for trainable in self.trainables:
            if trainable.parameter.grad is None:
                trainable.view(row).zero_()
            else:
                trainable.view(row).copy_(trainable.parameter.grad)
                trainable.parameter.grad = None

    def _fresh_workspace(self, examples: int) -> Tensor:
        if self._workspace is None or len(self._workspace) < examples:
            self._workspace = torch.empty(
                examples, self.small_size, dtype=torch.float32, device=self.trainables[0].parameter.device
            )
        return self._workspace[:examples]

    def _record(
        self, hooked: HookedModule, grad_output: Tensor, tensors: tuple[Tensor, ...], call: "_Call | None" = None
    ) -> None:
        """Add the gradients of one use of a module: by its rule, or differentiating the call again."""
        if self._gradients is None:
            raise BypassError(
                f"A backward pass reached {type(hooked.module).__name__} outside engine.accumulate, so its gradients "
                "would be neither clipped nor noised: pass the per-example losses to engine.accumulate instead."
            )
        try:
            if call is not None:
                gradients = self._functional(hooked, grad_output, tensors, call)
            else:
                activation = tensors[0]
                self._check_leading(hooked.trainables, activation.shape, grad_output.shape)
                if not hooked.takes_half:
                    activation, grad_output = precise(activation), precise(grad_output)
                gradients = hooked.rule(hooked.module, [activation], grad_output)
        except (ExactnessError, IsolationError):
            raise
        except (RuntimeError, ValueError, AttributeError, TypeError) as error:
            reason = f"{_called(hooked)} cannot be differentiated example by example ({first_line(error)})"
            raise self._inexact(hooked.trainables, reason) from error
        for trainable in hooked.trainables:
            gradient = gradients[trainable.parameter]
            self._check_leading([trainable], gradient.shape)
            self._gradients.add(trainable, gradient)
        hooked.sizes.add(self._gradients.examples)

    def _functional(
        self, hooked: HookedModule, grad_output: Tensor, tensors: tuple[Tensor, ...], call: "_Call"
    ) -> dict[nn.Parameter, Tensor]:
        """Differentiate ``<module(x_i), dy_i>`` for each example i; tensors without a batch dimension are constants."""
        self._check_leading(hooked.trainables, grad_output.shape)
        form = call.form
        batched = [tensor.dim() > 0 and len(tensor) == self._gradients.examples for tensor in tensors]
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
        values = {names[id(trainable.parameter)]: trainable.parameter.detach() for trainable in hooked.trainables}

        def inner_product(parameters, cotangent, *inputs):
            args, kwargs = call.arguments([x.unsqueeze(0) if b else x for x, b in zip(inputs, batched, strict=True)])
            output = functional_call(hooked.module, parameters, args, kwargs)
            if output.shape != (1, *cotangent.shape):  # one example came out as several: another's data entered
                raise ValueError(f"one example alone gave an output of shape {tuple(output.shape)}")
            return (output * cotangent.unsqueeze(0)).sum()

        in_dims = (None, 0, *[0 if is_batched else None for is_batched in batched])
        # Many a tuner makes its whole weight matrix anew, here once for each example that is differentiated at a time.
        weights = sum(parameter.numel() for parameter in hooked.module.parameters())
        differentiate = vmap(grad(inner_product), in_dims=in_dims, chunk_size=max(1, MATERIALISED // weights))
        with self.paused(), torch.enable_grad():
            gradients = differentiate(values, grad_output, *tensors)
        return {trainable.parameter: gradients[names[id(trainable.parameter)]] for trainable in hooked.trainables}

    def _check_leading(self, trainables: list[TrainableParameter], *shapes: torch.Size) -> None:
        for shape in shapes:
            if not shape or shape[0] != self._gradients.examples:
                found = shape[0] if shape else 0
                raise self._inexact(
                    trainables,
                    f"it gave {found} gradients for a batch of {self._gradients.examples}: its input has no batch "
                    "dimension",
                )

    def _inexact(self, trainables: list[TrainableParameter], reason: str) -> ExactnessError:
        error = ExactnessError(
            f"{trainables[0].name} cannot be captured in one backward pass because {reason}: run the preflight, which "
            "handles such parameters in another way, or leave it out of the subset."
        )
        error.trainables, error.reason = trainables, f"{trainables[0].name}: {reason}"
        return error


@dataclass(frozen=True)
class _Call:
    """What a tapped module was called with, its tensors left out."""

    structure: TreeSpec
    others: list  # the leaves, with None in the tensors' places
    places: list[int]

    @classmethod
    def of(cls, args: tuple, kwargs: dict) -> tuple["_Call", list[Tensor]]:
        leaves, structure = tree_flatten((args, kwargs))
        places = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]
        others = [None if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        return cls(structure, others, places), [leaves[i].detach() for i in places]

    @property
    def form(self) -> str:
        return f"{self.structure} {self.places}"

    def arguments(self, tensors: Sequence[Tensor]) -> tuple[tuple, dict]:
        """The call's ``args`` and ``kwargs`` with these tensors."""
        leaves = list(self.others)
        for place, tensor in zip(self.places, tensors, strict=True):
            leaves[place] = tensor
        return tree_unflatten(leaves, self.structure)


class _GradientHook(torch.autograd.Function):
    """Identity whose backward hands the output's gradient to ``sink``; ``parameters`` only make it require grad."""

    @staticmethod
    def forward(ctx, output, sink, count, *values_and_parameters):
        ctx.sink, ctx.inputs = sink, 3 + len(values_and_parameters)
        ctx.save_for_backward(*values_and_parameters[:count])
        # Not a view, so that what follows may change it in place (as a residual network's ReLU does); if the layer
        # itself needs its output again, PyTorch's version counter, which both share, says so.
        return output.detach()

    @staticmethod
    def backward(ctx, grad_output):
        with torch.no_grad():
            ctx.sink(ctx.saved_tensors, grad_output)
        return grad_output, *[None] * (ctx.inputs - 1)


class _Paused:
    def __init__(self, capture: Capture) -> None:
        self._capture = capture

    def __enter__(self) -> None:
        self._was, self._capture._paused = self._capture._paused, True

    def __exit__(self, *_) -> None:
        self._capture._paused = self._was


def _called(hooked: HookedModule) -> str:
    return f"its layer {type(hooked.module).__name__}"
