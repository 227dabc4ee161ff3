"""What a forward pass leaves behind in the model: nothing that data could be read from."""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from dpft.errors import GuaranteeError, IsolationError
from dpft.gradients.capture import Capture

SMALL = 1 << 16  # numbers of a parameter up to which it is put back as it was; larger ones are not kept twice
START = 1e-3  # of weights that a forward pass changes, to see whether they come out alike whatever it was given


def without_side_effects(model: nn.Module, forward: Callable[[], Tensor]) -> Tensor:
    """The losses, if making them changed no buffer that was there before."""
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


def leaves_no_data(capture: Capture, losses: Callable, examples: list) -> None:
    """A forward pass may make buffers, and change weights, only in a way that is the same for other examples.

    A cache of positions is, and so is a projection, which follows from the weight alone.

    Args:
        examples: the last is as long as any of them.

    Raises:
        IsolationError: it writes data into a weight or a buffer; named.
    """
    model = capture.model
    for name, module in model.named_modules():
        if getattr(module, "max_norm", None) is not None and isinstance(module, (nn.Embedding, nn.EmbeddingBag)):
            raise IsolationError(
                f"Layer {name} ({type(module).__name__}) has max_norm={module.max_norm:g}, which shrinks the rows of "
                "the words that occur in each forward pass, so its weights would say un-noised which do: set "
                f"max_norm to None."
            )
    modules, state = _ModuleState(model), FrozenState(model, model.parameters())
    small = [(p, p.detach().clone()) for p in model.parameters() if p.numel() <= SMALL]
    try:
        with capture.paused(), torch.no_grad():
            without_side_effects(model, lambda: losses(examples))
            weights, buffers = state.changed()
            if weights or buffers:
                _come_out_alike(model, losses, examples, weights, buffers, modules)
            capture.caches = buffers
    except BaseException:
        with torch.no_grad():
            for parameter, value in small:
                parameter.copy_(value)
        raise
    finally:
        modules.restore()


def _come_out_alike(
    model: nn.Module, losses: Callable, examples: list, weights: set[str], buffers: set[str], modules: "_ModuleState"
) -> None:
    """Raises IsolationError: a changed weight or new buffer is another for other examples of the same lengths."""
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
    """Everything in the model's state dict but some parameters, so that a change shows.

    Args:
        watched: the parameters to watch, beside all buffers.
    """

    def __init__(self, model: nn.Module, watched: Iterable[nn.Parameter]) -> None:
        self._model = model
        self._trainable = {id(p) for p in model.parameters()} - {id(p) for p in watched}
        self._before = self._sums()

    def changed(self) -> tuple[set[str], set[str]]:
        """Names of the parameters and extra states, and of the buffers, that are new, resized or changed."""
        now, buffers = self._sums(), {name for name, _ in self._model.named_buffers()}
        names = {name for name in now if self._before.get(name) != now[name]}
        return names - buffers, names & buffers

    def check(self, allowed: Iterable[str] = ()) -> None:
        """Raises GuaranteeError: what does not train has changed since, other than the buffers ``allowed``."""
        weights, buffers = self.changed()
        changed = sorted((weights | buffers) - set(allowed))
        if changed:
            raise GuaranteeError(
                f"{changed[0]} changed in training although it is not in the subset, so it was never noised: nothing "
                "of it is saved; let nothing but the released gradients change the model."
            )

    def _sums(self) -> dict[str, str]:
        frozen = [(name, p) for name, p in self._model.named_parameters() if id(p) not in self._trainable]
        sums = {name: _sum(tensor) for name, tensor in (*frozen, *self._model.named_buffers())}
        return sums | _extra_states(self._model)


class _ModuleState:
    """The flags, buffers and containers of all modules, to be put back; the tensors in them are as they are."""

    def __init__(self, model: nn.Module) -> None:
        self._modules = [(module, dict(vars(module)), _contents(module)) for module in model.modules()]
        self._buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]

    def restore(self) -> None:
        for module, attributes, contents in self._modules:
            vars(module).clear()
            vars(module).update(attributes)
            for name, content in contents.items():
                container = attributes[name]
                container.clear()
                container.extend(content) if isinstance(container, list) else container.update(content)
        for buffer, value in self._buffers:
            buffer.copy_(value)


def _contents(module: nn.Module) -> dict[str, list | dict | set]:
    return {name: value.copy() for name, value in vars(module).items() if isinstance(value, (dict, list, set))}


def _extra_states(model: nn.Module) -> dict[str, str]:
    """What modules add to the state dict beside parameters and buffers, by its name there: tensors and plain values."""
    found = {}
    for name, module in model.named_modules():
        if type(module).get_extra_state is not nn.Module.get_extra_state:
            leaves = tree_leaves(module.get_extra_state())
            shown = [_sum(leaf) if isinstance(leaf, Tensor) else leaf for leaf in leaves]
            shown = [leaf for leaf in shown if isinstance(leaf, (str, bytes, int, float, bool))]
            found[f"{name}._extra_state".lstrip(".")] = repr(shown)
    return found


def _alike(one: Tensor | None, other: Tensor | None) -> bool:
    return one is not None and other is not None and one.shape == other.shape and torch.equal(one, other)


def _sum(tensor: Tensor) -> str:
    """By which a change shows; of a quantised weight, which may know no sum, its shape alone."""
    plain = type(tensor) in (nn.Parameter, Tensor)
    wide = torch.float32 if tensor.device.type == "mps" else torch.float64  # which has no wider type
    number = tensor.detach().sum(dtype=wide).item() if plain and not tensor.is_complex() else ""
    return f"{tuple(tensor.shape)} {number!r}"
