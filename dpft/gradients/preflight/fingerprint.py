"""A hash of what a proof depends on. A run that is started again skips the proof if the hash is the same."""

from hashlib import sha256
from importlib.metadata import version
from typing import Any

from torch import nn

VERSIONED = ("dpft", "torch", "transformers", "peft", "opacus", "accelerate", "tokenizers")


def fingerprint(model: nn.Module, *settings: Any) -> str | None:
    """A hash of layers, subset, dropout, task and library versions: all that the checks depend on but the examples.

    It is None if some code has no version, such as a task of the user's own: that may have changed.
    """
    parts = [part for s in settings for part in (s, *getattr(s, "__dict__", {}).values())]
    hooks = [hook for m in model.modules() for hook in (*m._forward_hooks.values(), *m._forward_pre_hooks.values())]
    if not all(map(_versioned, (*model.modules(), *parts, *hooks))):
        return None
    described = [
        str(model),
        repr([[(k, v) for k, v in vars(m).items() if isinstance(v, (bool, int, float, str))] for m in model.modules()]),
        repr([len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]),
        str(getattr(getattr(model, "config", None), "_attn_implementation", "")),
        repr([(n, tuple(p.shape), str(p.dtype), p.requires_grad) for n, p in model.named_parameters()]),
    ]
    described += [f"{type(part).__module__} {type(part).__qualname__} {_described(part)}" for part in parts]
    described += [f"{name} {version(name)}" for name in VERSIONED]
    described.append(str(getattr(model, "config", "")))
    return sha256("\n".join(described).encode()).hexdigest()


def _versioned(part: Any) -> bool:
    """Whether its code is built into Python or belongs to a package of VERSIONED."""
    module: str = getattr(part, "__module__", None) or type(part).__module__
    return module.partition(".")[0] in ("builtins", *VERSIONED)


def _described(part: Any) -> str:
    """Its ``repr``, or nothing if that is only an address."""
    text = repr(part)
    return "" if " at 0x" in text else text
