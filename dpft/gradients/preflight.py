"""The proof before the first step: fast gradients against one example at a time, on real examples.

Three checks, all before any budget is spent (no number of the data leaves them but relative errors near 1e-6):

exact      per-example gradients of the whole batch, as the engine makes them, equal a loop of plain backward passes
isolated   an example's loss and gradient are the same alone and beside others, padding included
covered    the forward pass changes no buffer, and every module that the engine taps was seen at work

The structure is proven in float32, whatever the run computes in: rounding would hide a coupling that is as small.
"""

from collections.abc import Callable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from hashlib import sha256
from importlib.metadata import version

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from dpft.errors import ExactnessError, GuaranteeError, IsolationError, first_line
from dpft.gradients.capture import HALF, Capture
from dpft.gradients.engine import Engine
from dpft.gradients.sites import Slot

TOLERANCE = 1e-4  # relative error that float32 arithmetic explains
HALF_TOLERANCE = 0.1  # and that of half precision, where a run uses it: only gross errors show
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
    one_by_one: str | None = None

    def __str__(self) -> str:
        techniques = ", ".join(f"{count:,} by {name}" for name, count in self.techniques.items())
        return (
            f"preflight: exact (max relative error {self.max_relative_error:.1e}) and isolated on {self.examples} examples; "
            f"{self.trainable_parameters:,} trainable parameters ({techniques})"
        )


def preflight(
    engine: Engine,
    losses: Callable[[list], Tensor],
    examples: Sequence,
    precise_losses: Callable[[list], Tensor] | None = None,
) -> Preflight:
    """Prove the engine's gradients on a few examples, or refuse.

    A parameter that its technique cannot serve, or serves wrongly, goes to the next (:meth:`Capture.lift`), at last to
    one backward pass per example; the engine keeps what was found.

    Args:
        engine: attached.
        losses: ``losses(examples) -> (B,)``, collation and task loss; called with one and with several examples.
        examples: at least two, preferably of different lengths.
        precise_losses: the same without autocast, if ``losses`` runs under it.

    Raises:
        ExactnessError: a parameter's fast gradient is not the brute-force one; named.
        IsolationError: examples influence each other; the layer is named where it can be found.
        GuaranteeError: the forward pass changes a buffer, a loss is not finite, or no gradient reaches the subset.
    """
    examples = list(examples)
    if len(examples) < 2:
        raise GuaranteeError(
            f"The preflight was given {len(examples)} example, and isolation shows only beside others: give two or more."
        )
    capture = engine.capture
    with _deterministic(capture):
        floating = [t for t in (*capture.model.parameters(), *capture.model.buffers()) if t.is_floating_point()]
        half = [tensor for tensor in floating if tensor.dtype in HALF]
        precise = precise_losses or losses
        with _in_precision(half, torch.float32):
            isolated = _isolation(capture, precise, examples)
        if not isolated <= TOLERANCE:  # a coupling, or float32 rounding, which deep models amplify a thousandfold?
            with _in_precision(floating, torch.float64):
                isolated = _isolation_in_double(capture, precise, examples, isolated)
        if not isolated <= TOLERANCE:
            with _in_precision(half, torch.float32):
                raise IsolationError(
                    f"An example's gradient changes by {isolated:.1e} (relative) when others share its batch, so clipping it would not bound "
                    f"its influence: {_coupling_layer(capture.model, precise, examples)}."
                )
        while True:
            with _in_precision(half, torch.float32):
                error = max(isolated, _exactness(capture, precise, examples, TOLERANCE))
            proven = capture.state()
            if half or precise_losses:
                _exactness(capture, losses, examples, HALF_TOLERANCE)
            if capture.state() == proven:  # else half precision needed another arrangement, which is to be proven too
                break
        capture.settled = True
    techniques: dict[str, int] = {}
    for slot in capture.slots:
        techniques[slot.technique] = techniques.get(slot.technique, 0) + slot.parameter.numel()
    return Preflight(True, True, error, capture.size, techniques, len(examples), capture.one_by_one)


def fingerprint(model: nn.Module, *settings) -> str:
    """A hash of all that the checks depend on but the examples: layers, subset, dropout, task and library versions."""
    described = [
        str(model),
        repr([[(k, v) for k, v in vars(m).items() if isinstance(v, (bool, int, float, str))] for m in model.modules()]),
        repr([len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]),
        str(getattr(getattr(model, "config", None), "_attn_implementation", "")),
        repr([(n, tuple(p.shape), str(p.dtype), p.requires_grad) for n, p in model.named_parameters()]),
    ]
    plain = (str, bool, int, float)
    for setting in settings:
        values = (
            [setting] if isinstance(setting, plain) else [v for v in vars(setting).values() if isinstance(v, plain)]
        )
        described.append(f"{type(setting).__module__} {type(setting).__qualname__} {values}")
    described += [
        f"{name} {version(name)}" for name in ("dpft", "torch", "transformers", "peft", "opacus", "accelerate")
    ]
    described.append(str(getattr(model, "config", "")))
    return sha256("\n".join(described).encode()).hexdigest()


def _isolation(capture: Capture, losses: Callable, examples: list) -> float:
    """The largest relative difference between an example's gradient alone and beside the others, by plain autograd."""
    with capture.paused():
        together = _without_side_effects(capture.model, lambda: losses(examples))
        alone = torch.stack([losses([example])[0].detach() for example in examples])
        if not torch.isfinite(alone).all():
            raise GuaranteeError(
                "The loss of a preflight example is not finite: compute in float32, or look at its text and labels."
            )
        error, depends = float(((together.detach() - alone).abs() / alone.abs().clamp_min(1e-2)).max()), False
        for example, loss in zip(examples, together, strict=True):
            single = _gradient(capture, losses([example])[0])
            depends |= bool(single.any())
            error = max(error, _difference(capture, _gradient(capture, loss), single)[1])
    if not depends:
        raise GuaranteeError(
            "No trainable parameter gets a gradient from any preflight example: choose a subset that the loss depends on."
        )
    return error


def _isolation_in_double(capture: Capture, losses: Callable, examples: list, otherwise: float) -> float:
    """The same in float64, or what float32 gave where the model or its inputs cannot be float64."""
    try:
        return _isolation(capture, losses, examples)
    except GuaranteeError:
        raise
    except Exception:  # whatever a kernel says of a type that it does not know
        return otherwise


def _exactness(capture: Capture, losses: Callable, examples: list, tolerance: float) -> float:
    """Compare the engine's rows with plain backward passes through the same batches; lift what fails until all agree.

    The batches have several sizes, which tell what is as long as the batch from the batch, both orders of lengths, and, as
    many a model then passes its mask in another form or not at all, no padding.

    Returns:
        The largest relative error.
    """
    batches = [examples, [*reversed(examples), examples[0]], [examples[0]] * 2, [examples[0]] * 3]
    capture.settled = False
    while True:
        failed, before, worst, error = None, capture.state(), capture.slots[0], 0.0
        try:
            for batch in batches:
                here = _batch_error(capture, losses, batch)
                if not here[1] <= error:  # a NaN error is an error
                    worst, error = here
        except Exception as problem:  # a model may raise anything when its layers are tapped or differentiated again
            if capture.one_by_one or (isinstance(problem, GuaranteeError) and not isinstance(problem, ExactnessError)):
                raise
            failed = problem
        finally:
            for slot in capture.slots:
                slot.parameter.grad = None
        chancy = next((site for site in capture.sites if site.random), None)
        unseen = next((site for site in capture.sites if len(site.sizes) < 2), None)
        if chancy is not None:
            capture.go_one_by_one(f"{chancy.name} ({type(chancy.module).__name__}) draws random numbers")
        elif isinstance(failed, ExactnessError):
            capture.lift(failed.slots, failed.reason)
        elif failed is not None:
            capture.go_one_by_one(f"the model cannot run while tapped ({first_line(failed)})")
        elif unseen is not None:
            name = f"{unseen.name} ({type(unseen.module).__name__})"
            capture.go_one_by_one(f"{name} was not reached by every preflight batch")
        elif capture.state() == before:  # else gradients were made before all was known of the calls: make them again
            if error <= tolerance:
                return error
            if capture.one_by_one:
                raise ExactnessError(
                    f"{worst.name} got a per-example gradient that differs from the brute-force one by {error:.1e} (relative), more "
                    "than rounding explains: leave it out of the subset and report the layer."
                )
            capture.lift([worst], f"{worst.name} came out wrong by {error:.1e} at {worst.technique}")


def _batch_error(capture: Capture, losses: Callable, batch: list) -> tuple[Slot, float]:
    """The slot that the engine's gradients of one batch differ most in from plain backward passes, and by how much."""
    gradients = capture.gradients(losses(batch))
    norms, rows = gradients.norms(), gradients.rows(capture.size)
    worst, error = (
        capture.slots[0],
        float((norms / rows.norm(dim=1).clamp_min(1e-30) - 1).abs().max()) if rows.any() else 0.0,
    )
    with capture.paused():
        for row, loss in zip(rows, losses(batch), strict=True):
            here = _difference(capture, row, _gradient(capture, loss))
            if not here[1] <= error:
                worst, error = here
    return worst, error


def _gradient(capture: Capture, loss: Tensor) -> Tensor:
    """``(P,)``: one plain backward pass, through a graph that others may share; to be called while paused."""
    for slot in capture.slots:
        slot.parameter.grad = None
    if loss.requires_grad:
        loss.backward(retain_graph=True)
    flat = torch.zeros(capture.size, device=loss.device)
    capture.take(flat)
    return flat


def _difference(capture: Capture, made: Tensor, expected: Tensor) -> tuple[Slot, float]:
    """The slot with the largest relative error of a ``(P,)`` gradient, and that error."""
    worst, largest = capture.slots[0], 0.0
    floor = FLOOR * expected.norm()
    for slot in capture.slots:
        wanted = expected[slot.slice]
        error = float((made[slot.slice] - wanted).norm() / torch.maximum(wanted.norm(), floor).clamp_min(1e-30))
        if not error <= largest:  # a NaN error is an error
            worst, largest = slot, error
    return worst, largest


def _coupling_layer(model: nn.Module, losses: Callable, examples: list) -> str:
    """Name the first layer whose output for the longest example depends on which others are in the batch."""
    outputs: list[list[tuple[str, Tensor]]] = []
    longest = max(range(len(examples)), key=lambda i: _size(examples[i]))
    others = [example for i, example in enumerate(examples) if i != longest]
    for companion in (others[0], others[-1] if len(others) > 1 else examples[longest]):
        seen: list[tuple[str, Tensor]] = []
        hooks = [
            module.register_forward_hook(
                lambda m, a, out, name=name, seen=seen: seen.append((f"{name} ({_class(m)})", out))
            )
            for name, module in model.named_modules()
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


def _class(module: nn.Module) -> str:
    """PyTorch's classes by their name, others with their module, since many a tuner's layer is called Linear."""
    kind = type(module)
    return kind.__name__ if kind.__module__.startswith("torch.") else f"{kind.__module__}.{kind.__name__}"


def _size(example) -> int:
    if isinstance(example, dict):
        return max((len(value) for value in example.values() if hasattr(value, "__len__")), default=0)
    return 0


def _without_side_effects(model: nn.Module, forward: Callable[[], Tensor]) -> Tensor:
    """The losses, if making them changed no buffer."""
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
                f"Layer {name.rpartition('.')[0]} ({type(layer).__name__}) changes its buffer {name} in the forward pass, where data "
                "would stay un-noised: put it in eval mode, or replace it (subset.replace_batchnorm puts GroupNorm for BatchNorm)."
            )
    return result


@contextmanager
def _deterministic(capture: Capture):
    """Training mode without chance, and trainable weights slightly moved, so that no gradient is zero by initialisation.

    A fresh LoRA has B = 0, which makes every gradient of A zero: equal zeros would prove nothing.
    """
    was_training = capture.model.training
    capture.model.train()
    saved = [slot.parameter.detach().clone() for slot in capture.slots]
    buffers = {name: buffer.clone() for name, buffer in capture.model.named_buffers()}
    generator = torch.Generator().manual_seed(0)
    try:
        with torch.no_grad():
            for slot in capture.slots:
                slot.parameter += 0.01 * torch.randn(slot.parameter.shape, generator=generator).to(slot.parameter)
        with _NoChance(capture):
            yield
    finally:
        with torch.no_grad():
            for slot, value in zip(capture.slots, saved, strict=True):
                slot.parameter.copy_(value)
                slot.parameter.grad = None
            for name, buffer in capture.model.named_buffers():
                if name in buffers and buffers[name].shape == buffer.shape:
                    buffer.copy_(buffers[name])
        capture.model.train(was_training)


@contextmanager
def _in_precision(tensors: list[Tensor], dtype: torch.dtype):
    """Parameters and buffers in a higher precision, which changes no value, and back."""
    saved = [(tensor, tensor.data) for tensor in tensors]
    try:
        for tensor in tensors:
            tensor.data = tensor.data.to(dtype)
        yield
    finally:
        for tensor, value in saved:
            tensor.grad = None
            tensor.data = value


class _NoChance(TorchFunctionMode):
    """Dropout is the identity and random tensors are constant: chance is per example anyway, but differs in a batch.

    A functional site that takes chances is remembered, because differentiating it again would draw others.
    """

    DROPOUTS = {
        getattr(torch.nn.functional, name)
        for name in ("dropout", "dropout1d", "dropout2d", "dropout3d", "alpha_dropout", "feature_alpha_dropout")
    } | {torch.dropout}
    LIKE = {torch.randn_like: 0.0, torch.rand_like: 0.5, torch.bernoulli: 1.0}
    FILL = {Tensor.normal_: 0.0, Tensor.uniform_: 0.5, Tensor.bernoulli_: 1.0}
    MAKE = {torch.randn: 0.0, torch.rand: 0.5}

    def __init__(self, capture: Capture) -> None:
        super().__init__()
        self._capture = capture

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if func in self.DROPOUTS:
            probability = kwargs.get("p", args[1] if len(args) > 1 else 0.5)
            training = kwargs.get("training", kwargs.get("train", args[2] if len(args) > 2 else True))
            if probability and training:
                self._takes_chances()
            return args[0] if args else kwargs["input"]
        if func in self.LIKE or func in self.FILL or func in self.MAKE:
            self._takes_chances()
            if func in self.LIKE:
                return torch.full_like(args[0], self.LIKE[func])
            if func in self.FILL:
                return args[0].fill_(self.FILL[func])
            return func(*args, **kwargs).detach().fill_(self.MAKE[func])
        if func is torch.nn.functional.scaled_dot_product_attention:
            if kwargs.get("dropout_p", args[4] if len(args) > 4 else 0.0):
                self._takes_chances()
            args, kwargs = args[:4], {**kwargs, "dropout_p": 0.0}
        return func(*args, **kwargs)

    def _takes_chances(self) -> None:
        for site in self._capture.inside:
            site.random = True
