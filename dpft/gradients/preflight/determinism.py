"""A model without randomness and without rounding, for as long as it is checked."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from dpft.errors import GuaranteeError
from dpft.gradients.capture import Capture
from dpft.gradients.preflight.stand_ins import Draw, python_and_numpy, refused, stand_in


@contextmanager
def deterministic(capture: Capture) -> Iterator[None]:
    """Training mode, with trainable weights slightly moved, so that no gradient is zero by initialisation.

    A fresh LoRA has B = 0, which makes every gradient of A zero. Equal zeros would prove nothing.
    """
    model, trainables = capture.map.model, capture.map.trainables
    was_training = model.training
    model.train()
    saved = [trainable.parameter.detach().clone() for trainable in trainables]
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    generator = torch.Generator().manual_seed(0)
    try:
        with torch.no_grad():
            for trainable in trainables:
                moved = torch.randn(trainable.parameter.shape, generator=generator, dtype=torch.float32)
                trainable.parameter.add_(0.01 * moved.to(trainable.parameter))
        yield
    finally:
        with torch.no_grad():
            for trainable, value in zip(trainables, saved, strict=True):
                trainable.parameter.copy_(value)
                trainable.parameter.grad = None
            for name, buffer in model.named_buffers():
                if name in buffers and buffers[name].shape == buffer.shape:
                    buffer.copy_(buffers[name])
        model.train(was_training)


@contextmanager
def in_precision(tensors: Sequence[Tensor], dtype: torch.dtype) -> Iterator[None]:
    """Convert parameters and buffers to a higher precision, which changes no value, and back."""
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
    """Every random operation of PyTorch, numpy and Python returns a constant (:mod:`.stand_ins`).

    It marks each functional module that draws random numbers, because a second forward pass would draw others.

    Attributes:
        seen: whether a random operation was called.

    Raises:
        GuaranteeError: from a forward pass with a generator of its own, or with an operation that has no constant.
    """

    def __init__(self, capture: Capture, draw: Draw) -> None:
        super().__init__()
        self._capture, self._draw = capture, draw
        self.seen = False

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if torch.Tag.nondeterministic_seeded not in func.tags:
            return func(*args, **kwargs)
        given = _by_name(func, args, kwargs)
        if "dropout_p" in given:  # of attention; its backward pass gets the same value
            if given["dropout_p"] > 0:
                self._note()
            return func(**_renamed(func, {**given, "dropout_p": 0.0}))
        if given.get("train") is False or given.get("training") is False:
            return func(*args, **kwargs)
        self._note()
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
            result = given["self"] * given["noise"]
            return given["self"].copy_(result) if name.endswith("_") else result
        found = stand_in(name, given, self._draw, func(*args, **kwargs))
        if found is None:
            refused(name)()
        return found

    def _note(self) -> None:
        self.seen = True
        for hooked in self._capture.running:
            hooked.random = True

    @classmethod
    @contextmanager
    def of(cls, capture: Capture, draw: Draw) -> Iterator["NoRandomness"]:
        """The constants for all three libraries at once."""
        with ExitStack() as stack:
            mode = cls(capture, draw)
            stack.enter_context(python_and_numpy(draw, mode._note))
            stack.enter_context(mode)
            yield mode


def _by_name(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """An operation's arguments by their names, defaults included."""
    given = {}
    for i, argument in enumerate(func._schema.arguments):
        given[argument.name] = args[i] if i < len(args) else kwargs.get(argument.name, argument.default_value)
    return given


def _renamed(func: Any, given: Mapping[str, Any]) -> dict[str, Any]:
    """All of an operation's arguments as keywords."""
    return {argument.name: given[argument.name] for argument in func._schema.arguments}
