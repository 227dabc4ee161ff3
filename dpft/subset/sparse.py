"""Single weights as the trainable parameters: a small vector beside a frozen matrix.

A layer's weight becomes ``W + scatter(values, indices)`` through PyTorch's own parametrization, so ``values`` ``(k,)``
is all that clipping, noise and the optimizer see, and :func:`fold` makes it a plain weight again.
"""

from collections.abc import Callable, Mapping, Sequence
from fnmatch import fnmatch
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from transformers.pytorch_utils import Conv1D

from dpft.errors import SubsetError
from dpft.subset.layers import blocks
from dpft.subset.parts import Sparse

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Layers whose outputs are the heads', one after another.
HEAD_LAYERS = {"query", "key", "value", *(f"{x}{end}" for x in "qkv" for end in ("", "_proj", "_lin"))}


Losses = Callable[[list[Any]], Tensor]  # of some examples, (B,)


class SparseDelta(nn.Module):
    """Adds ``values`` ``(k,)``, zero at first, to the weights at the flat ``indices`` ``(k,)``."""

    indices: Tensor

    def __init__(self, indices: Tensor) -> None:
        super().__init__()
        self.register_buffer("indices", indices)
        self.values = nn.Parameter(torch.zeros(len(indices), device=indices.device))

    def forward(self, weight: Tensor) -> Tensor:
        return weight.flatten().index_add(0, self.indices, self.values.to(weight.dtype)).view_as(weight)


def add_sparse(
    model: nn.Module, part: Sparse, taken: set[str], scores: Mapping[str, Tensor] | None = None
) -> list[nn.Parameter]:
    """Give the model the sparse part's trainable vectors, in place; returns them.

    Args:
        taken: names of parameters that train whole, which a sparse part leaves to them.
        scores: for ``choose="gradient"``, a score for every candidate weight by name; see :func:`gradient_scores`.

    Raises:
        SubsetError: there is no weight to choose from, or gradients were asked for without scores.
    """
    if part.choose == "gradient" and scores is None:
        raise SubsetError(
            f"{part} chooses by gradients, which would reveal whose data made them: declare public data to choose on "
            "(data.public in a recipe), or choose by magnitude."
        )
    found = candidates(model, part)
    weights = {name: weight for name, weight in found.items() if name not in taken}
    if found and not weights:
        raise SubsetError(
            f"{part} has nothing to choose from, because its {len(found)} weights all train whole: leave it out."
        )
    if not weights:
        raise SubsetError(
            f"{part} finds no untied weight matrix in {type(model).__name__}: give layers, a name pattern."
        )
    vectors = []
    for name, indices in choose(model, part, weights, scores or {}).items():
        layer, _, attribute = name.rpartition(".")
        delta = SparseDelta(indices)
        parametrize.register_parametrization(model.get_submodule(layer), attribute, delta)
        vectors.append(delta.values)
    return vectors


def candidates(model: nn.Module, part: Sparse) -> dict[str, nn.Parameter]:
    """The weights that the part may choose from, by name."""
    uses: dict[int, int] = {}
    for _, parameter in model.named_parameters(remove_duplicate=False):
        uses[id(parameter)] = uses.get(id(parameter), 0) + 1
    pattern = part.layers or f"{blocks(model)[0]}.*"
    return {
        name: parameter
        for name, parameter in model.named_parameters()
        if (parameter.dim() > 1 if part.group == "weight" else parameter.dim() == 2)
        and (part.group != "heads" or name.split(".")[-2] in HEAD_LAYERS)
        and parameter.is_floating_point()
        and uses[id(parameter)] == 1
        and (fnmatch(name, pattern) or fnmatch(name, f"*.{pattern}"))
    }


def choose(
    model: nn.Module, part: Sparse, weights: Mapping[str, Tensor], scores: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Flat indices ``(k,)`` into each weight, ascending; weights of which nothing is chosen are absent."""
    generator = torch.Generator().manual_seed(part.seed)
    grouped = {}
    for name, weight in weights.items():
        groups = _groups(model, part.group, name, weight)
        if part.choose == "random":
            score = torch.rand(int(groups.max()) + 1, generator=generator).to(weight.device)
        else:
            each = (weight if part.choose == "magnitude" else scores[name]).detach().float().flatten()
            score = torch.zeros(int(groups.max()) + 1, device=weight.device).index_add_(0, groups, each.square())
        grouped[name] = groups, score
    if part.over == "model":
        every = torch.cat([score for _, score in grouped.values()])
        kept = _largest(every, _count(part, len(every))).split([len(score) for _, score in grouped.values()])
    else:
        kept = [_largest(s, _count(part, len(s), weights[name].shape)) for name, (_, s) in grouped.items()]
    found = {}
    for (name, (groups, _)), chosen in zip(grouped.items(), kept, strict=True):
        indices = torch.nonzero(chosen[groups])[:, 0]
        if len(indices):
            found[name] = indices
    return found


def _largest(score: Tensor, count: int) -> Tensor:
    """``(n,)`` truth values of which ``count`` are true; of equal scores no more than asked for."""
    chosen = torch.zeros(len(score), dtype=torch.bool, device=score.device)
    chosen[torch.topk(score, count).indices] = True
    return chosen


def _count(part: Sparse, available: int, shape: Sequence[int] = ()) -> int:
    if part.fraction is not None:
        return max(1, round(part.fraction * available))
    wanted = part.number if part.number is not None else (part.rank or 0) * sum(shape)
    if wanted > available:
        raise SubsetError(f"{part} asks for {wanted:,} of {available:,} weights or groups: choose fewer.")
    return wanted


def _groups(model: "PreTrainedModel", group: str, name: str, weight: Tensor) -> Tensor:
    """``(weight.numel(),)``: the group of each weight."""
    layer = model.get_submodule(name.rpartition(".")[0])
    places = torch.arange(weight.numel(), device=weight.device)
    if group == "weight":
        return places
    width = weight[0].numel()
    outputs, inputs = places // width, places % width
    if isinstance(layer, Conv1D):  # stored (in, out)
        outputs, inputs = inputs, outputs
    if group == "columns":
        return inputs
    if group == "rows":
        return outputs
    config = model.config
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    rows = int(outputs.max()) + 1
    if rows % size:
        raise SubsetError(
            f"{name} has {rows} outputs, no multiple of the head size {size}: choose layers of the attention."
        )
    return outputs // size


def gradient_scores(
    model: nn.Module, part: Sparse, losses: Losses, examples: Sequence[Any], size: int = 8
) -> dict[str, Tensor]:
    """The mean gradient of every candidate over *public* examples, of which ``size`` are differentiated at once."""
    weights = candidates(model, part)
    flags, was_training = [(p, p.requires_grad) for p in model.parameters()], model.training
    model.eval()
    model.requires_grad_(False)
    for weight in weights.values():
        weight.requires_grad_(True)
    totals = {name: torch.zeros_like(weight) for name, weight in weights.items()}
    try:
        _add_gradients(totals, weights, losses, examples, size)
    finally:
        for parameter, flag in flags:
            parameter.requires_grad_(flag)
        model.train(was_training)
    every = torch.cat([total.flatten() for total in totals.values()]) if totals else torch.zeros(1)
    if not every.isfinite().all() or not every.any():
        raise SubsetError(
            f"{part} found no usable gradient in {len(examples)} public examples: give public data that the model can "
            "learn from."
        )
    return totals


def _add_gradients(
    totals: dict[str, Tensor], weights: dict[str, nn.Parameter], losses: Losses, examples: Sequence[Any], size: int
) -> None:
    for start in range(0, len(examples), size):
        total = losses(list(examples[start : start + size])).sum()
        gradients = torch.autograd.grad(total, list(weights.values()), allow_unused=True)
        for name, gradient in zip(weights, gradients, strict=True):
            if gradient is not None:
                totals[name] += gradient / len(examples)


def deltas(model: nn.Module) -> dict[str, tuple[nn.Module, SparseDelta]]:
    """The layers with a sparse delta and the delta, by the weight's name."""
    found = {}
    for name, module in model.named_modules():
        for attribute, steps in getattr(module, "parametrizations", {}).items():
            if isinstance(steps[0], SparseDelta):
                found[f"{name}.{attribute}".lstrip(".")] = (module, steps[0])
    return found


def fold(model: nn.Module) -> None:
    """Make every sparse delta part of its weight, which is then an ordinary parameter again."""
    for name, (module, _) in deltas(model).items():
        parametrize.remove_parametrizations(module, name.rpartition(".")[2], leave_parametrized=True)
