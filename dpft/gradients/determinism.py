"""A model without chance and without rounding, for as long as it is looked at."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from dpft.errors import GuaranteeError
from dpft.gradients.capture import Capture
from dpft.gradients.stand_ins import Draw, python_and_numpy, refused, stand_in


@contextmanager
def deterministic(capture: Capture):
    """Training mode, with trainable weights slightly moved, so that no gradient is zero by initialisation.

    A fresh LoRA has B = 0, which makes every gradient of A zero: equal zeros would prove nothing.
    """
    was_training = capture.model.training
    capture.model.train()
    saved = [trainable.parameter.detach().clone() for trainable in capture.trainables]
    buffers = {name: buffer.clone() for name, buffer in capture.model.named_buffers()}
    generator = torch.Generator().manual_seed(0)
    try:
        with torch.no_grad():
            for trainable in capture.trainables:
                moved = torch.randn(trainable.parameter.shape, generator=generator, dtype=torch.float32)
                trainable.parameter += 0.01 * moved.to(trainable.parameter)
        yield
    finally:
        with torch.no_grad():
            for trainable, value in zip(capture.trainables, saved, strict=True):
                trainable.parameter.copy_(value)
                trainable.parameter.grad = None
            for name, buffer in capture.model.named_buffers():
                if name in buffers and buffers[name].shape == buffer.shape:
                    buffer.copy_(buffers[name])
        capture.model.train(was_training)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode, but for quantized layers: on a CPU bitsandbytes packs these at an evaluation, and no gradient
    passes them afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    for module, _ in modes:
        if any(not parameter.is_floating_point() for parameter in module.parameters(recurse=False)):
            module.training = True
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


@contextmanager
def in_precision(tensors: list[Tensor], dtype: torch.dtype):
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


class NoRandomness(TorchDispatchMode):
    """Every random operation of PyTorch, numpy and Python comes to a constant (:mod:`dpft.gradients.stand_ins`).

    Attributes:
        taken: whether one was seen. A functional hooked that takes chances is marked, because differentiating it again
            would draw others.

    Raises:
        GuaranteeError: from a forward pass with a generator of its own, or with an operation that has no stand-in.
    """

    def __init__(self, capture: Capture, draw: Draw) -> None:
        super().__init__()
        self._capture, self._draw = capture, draw
        self.taken = False

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if torch.Tag.nondeterministic_seeded not in func.tags:
            return func(*args, **kwargs)
        given = _by_name(func, args, kwargs)
        if "dropout_p" in given:  # of attention; its backward pass is told the same
            self._take(given["dropout_p"] > 0)
            return func(**_renamed(func, {**given, "dropout_p": 0.0}))
        if given.get("train") is False or given.get("training") is False:
            return func(*args, **kwargs)
        self._take()
        name = func._schema.name.partition("::")[2]
        if given.get("generator") is not None:
            raise GuaranteeError(
                f"A forward pass or the collator draws from a generator of its own ({name}), whose seed makes each "
                "example's chance follow from who else is in the batch: let it draw from PyTorch's global generator, "
                f"which dpft keeps secret."
            )
        if name == "native_dropout":
            keep, x = 1 - given["p"], given["input"]
            return x / keep if keep else x * 0, torch.ones_like(x, dtype=torch.bool)
        if name.startswith("rrelu_with_noise"):
            slope = given["lower"] + self._draw.uniform * (given["upper"] - given["lower"])
            given["noise"].copy_(torch.where(given["self"] <= 0, slope, 1.0))
            made = given["self"] * given["noise"]
            return given["self"].copy_(made) if name.endswith("_") else made
        found = stand_in(name, given, self._draw, func(*args, **kwargs))
        if found is None:
            refused(name)()
        return found

    def _take(self, chance: bool = True) -> None:
        self.taken = self.taken or chance
        for hooked in self._capture.running if chance else ():
            hooked.random = True

    @classmethod
    @contextmanager
    def of(cls, capture: Capture, draw: Draw) -> Iterator["NoRandomness"]:
        """All three at once."""
        with ExitStack() as stack:
            mode = cls(capture, draw)
            stack.enter_context(python_and_numpy(draw, mode._take))
            stack.enter_context(mode)
            yield mode


def _by_name(func, args: tuple, kwargs: dict) -> dict:
    """An operation's arguments by their names, defaults included."""
    given = {}
    for i, argument in enumerate(func._schema.arguments):
        given[argument.name] = args[i] if i < len(args) else kwargs.get(argument.name, argument.default_value)
    return given


def _renamed(func, given: dict) -> dict:
    """All of an operation's arguments as keywords."""
    return {argument.name: given[argument.name] for argument in func._schema.arguments}
