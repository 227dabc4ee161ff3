"""The check that a forward pass leaves nothing in the model that data could be read from."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from dpft.errors import GuaranteeError, IsolationError
from dpft.gradients.capture import Capture
from dpft.gradients.preflight.comparison import Losses

SMALL = 1 << 16  # a parameter of at most this many numbers is restored after an error; no larger one is kept twice
START = 1e-3  # the value of a weight that a forward pass changes, before each pass that is compared


def without_side_effects(model: nn.Module, forward: Callable[[], Tensor]) -> Tensor:
    """The losses of a forward pass.

    Raises:
        IsolationError: it changed a buffer that existed before; named.
    """
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
                f"Layer {name.rpartition('.')[0]} ({type(layer).__name__}) changes its buffer {name} in the forward "
                "pass, where data would stay un-noised: put it in eval mode, or replace it (subset.replace_batchnorm "
                f"puts GroupNorm for BatchNorm)."
            )
    return result


def check_no_data_kept(capture: Capture, losses: Losses, examples: list[Any]) -> set[str]:
    """A forward pass may create buffers and change weights, but only to values that are the same for other examples.

    A cache of positions is the same, and so is a projection, which depends on the weight alone.

    Args:
        examples: the last is as long as any of them.

    Returns:
        The names of the buffers that it created or changed.

    Raises:
        IsolationError: it writes data into a weight or a buffer; named.
    """
    model = capture.map.model
    for name, module in model.named_modules():
        if getattr(module, "max_norm", None) is not None and isinstance(module, (nn.Embedding, nn.EmbeddingBag)):
            raise IsolationError(
                f"Layer {name} ({type(module).__name__}) has max_norm={module.max_norm:g}, which shrinks the rows of "
                "the words that occur in each forward pass, so its weights would say un-noised which do: set "
                "max_norm to None."
            )
    modules, state = _ModuleState(model), FrozenState(model, model.parameters())
    small = [(p, p.detach().clone()) for p in model.parameters() if p.numel() <= SMALL]
    try:
        with capture.paused(), torch.no_grad():
            without_side_effects(model, lambda: losses(examples))
            weights, buffers = state.changed()
            if weights or buffers:
                _check_alike(modules, losses, examples, weights, buffers)
    except BaseException:
        with torch.no_grad():
            for parameter, value in small:
                parameter.copy_(value)
        raise
    finally:
        modules.restore()
    return buffers


def _check_alike(
    modules: "_ModuleState", losses: Losses, examples: list[Any], weights: set[str], buffers: set[str]
) -> None:
    """Raises IsolationError: a changed weight or new buffer differs between examples of the same lengths."""
    model = modules.model
    kept = {name: w.detach().clone() for name, w in model.named_parameters() if name in weights}
    *others, longest = examples
    for companions in ([[longest, one] for one in others], [[one, longest] for one in others]):
        outcomes = []
        for batch in [*companions, [longest, longest]]:
            modules.restore()
            for name, weight in model.named_parameters():
                if name in weights:
                    weight.fill_(START)
            losses(batch)
            tensors = (*model.named_parameters(), *model.named_buffers())
            outcomes.append({name: t.detach().clone() for name, t in tensors if name in weights | buffers})
        for name in sorted(weights | buffers):
            if not all(_alike(outcomes[0].get(name), outcome.get(name)) for outcome in outcomes):
                kind = "changes the parameter" if name in kept else "keeps data in"
                raise IsolationError(
                    f"The forward pass {kind} {name}, which comes out another for other examples, so that data would "
                    "stay there un-noised: let no forward pass write what it was given."
                )
    modules.restore()
    for name, weight in model.named_parameters():
        if name in kept:
            weight.copy_(kept[name])


class FrozenState:
    """Checksums of a model's buffers, extra states and some of its parameters, so that a change shows.

    Args:
        watched: these parameters.
    """

    def __init__(self, model: nn.Module, watched: Iterable[nn.Parameter]) -> None:
        self._model = model
        self._unwatched = {id(p) for p in model.parameters()} - {id(p) for p in watched}
        self._before = self._checksums()

    def changed(self) -> tuple[set[str], set[str]]:
        """Names of the parameters and extra states, and of the buffers, that are new, resized or changed."""
        now, buffers = self._checksums(), {name for name, _ in self._model.named_buffers()}
        names = {name for name in now if self._before.get(name) != now[name]}
        return names - buffers, names & buffers

    def check(self, allowed: Iterable[str] = ()) -> None:
        """Raises GuaranteeError: one of them has changed since, other than the buffers ``allowed``."""
        weights, buffers = self.changed()
        changed = sorted((weights | buffers) - set(allowed))
        if changed:
            raise GuaranteeError(
                f"{changed[0]} changed in training although it is not in the subset, so it was never noised: nothing "
                "of it is saved; let nothing but the released gradients change the model."
            )

    def _checksums(self) -> dict[str, str]:
        watched = [(name, p) for name, p in self._model.named_parameters() if id(p) not in self._unwatched]
        sums = {name: _checksum(tensor) for name, tensor in (*watched, *self._model.named_buffers())}
        return sums | _extra_states(self._model)


class _ModuleState:
    """The attributes, buffers and containers of all modules, to be restored. Other tensors are not copied."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self._modules = [(module, dict(vars(module)), _contents(module)) for module in model.modules()]
        self._buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]

    def restore(self) -> None:
        for module, attributes, contents in self._modules:
            vars(module).clear()
            vars(module).update(attributes)
            for name, content in contents.items():
                container = attributes[name]
                container.clear()
                if isinstance(container, list):
                    container.extend(content)
                else:
                    container.update(content)
        for buffer, value in self._buffers:
            buffer.copy_(value)


def _contents(module: nn.Module) -> dict[str, Any]:
    return {name: value.copy() for name, value in vars(module).items() if isinstance(value, (dict, list, set))}


def _extra_states(model: nn.Module) -> dict[str, str]:
    """Tensors and plain values that modules add to the state dict beside parameters and buffers, by their names."""
    found = {}
    for name, module in model.named_modules():
        if type(module).get_extra_state is not nn.Module.get_extra_state:
            leaves = tree_leaves(module.get_extra_state())
            shown = [_checksum(leaf) if isinstance(leaf, Tensor) else leaf for leaf in leaves]
            shown = [leaf for leaf in shown if isinstance(leaf, (str, bytes, int, float, bool))]
            found[f"{name}._extra_state".lstrip(".")] = repr(shown)
    return found


def _alike(one: Tensor | None, other: Tensor | None) -> bool:
    return one is not None and other is not None and one.shape == other.shape and torch.equal(one, other)


def _checksum(tensor: Tensor) -> str:
    """The checksum of a tensor. A quantised weight, which may have no sum, is described by its shape alone."""
    plain = type(tensor) in (nn.Parameter, Tensor)
    wide = torch.float32 if tensor.device.type == "mps" else torch.float64  # no float64 there
    number = tensor.detach().sum(dtype=wide).item() if plain and not tensor.is_complex() else ""
    return f"{tuple(tensor.shape)} {number!r}"
