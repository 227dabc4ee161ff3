"""Where a LoRA begins: rows of A that read the directions of a layer's input, each as wide as the others.

A row a of A reads one number aᵀx of the layer's input x. Inputs of transformers are far from round: most of their
length lies in a few directions, which random rows all read again. With the covariance C of x on public text, of mean
eigenvalue c, and orthonormal random rows Q ``(r, d)``,

    A = s Q (C + c/100 · I)^(-1/2)

reads r numbers that are uncorrelated and equally wide. The gradient of B then has the same signal in every column, and
one noise serves all (the input side of DP-KFC's preconditioner, arXiv:2605.13418). s keeps the mean square of Ax as it
was at PEFT's random start. A follows from public data and a seed, and B is zero, so the model is the same.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence, Sized
from contextlib import ExitStack
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, nn

from dpft.errors import SubsetError
from dpft.subset.evaluating import evaluating

RIDGE = 0.01  # of the mean eigenvalue: directions that public text hardly shows are not blown up
MOST = 256  # examples that are looked at
TOGETHER = 8


class _Moments:
    """Mean and second moment of all the inputs of a layer, in float64."""

    def __init__(self, width: int) -> None:
        self.number, self.total, self.squares = 0, torch.zeros(width).double(), torch.zeros(width, width).double()

    def add(self, inputs: Tensor) -> None:
        rows = inputs.detach().flatten(0, -2).double().cpu()
        self.number += len(rows)
        self.total += rows.sum(0)
        self.squares += rows.T @ rows

    @property
    def second(self) -> Tensor:
        return self.squares / self.number

    @property
    def covariance(self) -> Tensor:
        mean = self.total / self.number
        return self.second - torch.outer(mean, mean)


def whiten(model: nn.Module, run: Callable[[list[Any]], Tensor], examples: Sequence[Any]) -> None:
    """Give the A of every LoRA in the model its whitened rows, from torch's generator.

    Args:
        run: runs the model on some examples.
        examples: public; those of one length are run together, so no padding is read.

    Raises:
        SubsetError: an adapted layer is no linear layer, or no example reached it.
    """
    layers = dict(_linear_a(model))
    moments = {name: _Moments(layer.in_features) for name, layer in layers.items()}
    with ExitStack() as hooks, evaluating(model), torch.no_grad():
        for name, layer in layers.items():
            take = lambda module, args, moments=moments[name]: moments.add(args[0])
            hooks.callback(layer.register_forward_pre_hook(take).remove)
        for _, same in groupby(sorted(list(examples)[:MOST], key=_shape), key=_shape):
            some = list(same)
            for start in range(0, len(some), TOGETHER):
                run(some[start : start + TOGETHER])
    for name, layer in layers.items():
        if moments[name].number < 2:
            raise SubsetError(f"No public example reached {name}, so its inputs are unknown: give public data.")
        with torch.no_grad():
            layer.weight.copy_(_whitened(layer.weight.double().cpu(), moments[name]))


def _shape(example: Any) -> str:
    """What two examples of one length have in common."""
    if isinstance(example, Mapping):
        return str({name: _shape(value) for name, value in example.items()})
    shape = getattr(example, "shape", None)
    return str(len(example) if shape is None and isinstance(example, Sized) else shape)


def _whitened(random: Tensor, moments: _Moments) -> Tensor:
    """``(r, d)`` random rows to whitened ones."""
    spread, directions = torch.linalg.eigh(moments.covariance)
    spread = spread.clamp_min(0.0)
    scale = (spread + RIDGE * spread.mean()).rsqrt()
    rows = torch.linalg.qr(random.T).Q.T
    rows = (rows @ directions) * scale @ directions.T
    size = lambda some: ((some @ moments.second) * some).sum()
    return rows * (size(random) / size(rows)).sqrt()


def _linear_a(model: nn.Module) -> Iterator[tuple[str, nn.Linear]]:
    for name, module in model.named_modules():
        for layer in getattr(module, "lora_A", {}).values():
            if not isinstance(layer, nn.Linear):
                raise SubsetError(f"{name} is no linear layer, whose inputs alone can be whitened: choose targets.")
            if layer.out_features > layer.in_features:
                raise SubsetError(
                    f"The rank {layer.out_features} is above the {layer.in_features} inputs of {name}, and no more "
                    "directions than inputs can be uncorrelated: lower the rank."
                )
            yield name, layer
