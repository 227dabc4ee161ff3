"""A model without chance and without rounding, for as long as it is looked at."""

from contextlib import contextmanager

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from dpft.gradients.capture import Capture


@contextmanager
def deterministic(capture: Capture):
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
