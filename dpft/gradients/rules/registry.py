"""Rules by class of layer: those of this package, and those of Opacus.

Opacus is imported only when a layer needs one of its rules. The import takes seconds, because it loads accountants,
optimizers and most of scipy. Few layers need it.
"""

import sys
from collections.abc import Callable
from functools import cache
from typing import Any

from torch import Tensor, nn

Rule = Callable[[Any, list[Tensor], Tensor], dict[Tensor, Any]]  # of (layer, [input], output gradient)

_RULES: dict[type[nn.Module], Rule] = {}


def register(*kinds: type[nn.Module]) -> Callable[[Rule], Rule]:
    """A decorator that registers a rule for these classes of layers."""

    def decorate(rule: Rule) -> Rule:
        _RULES.update(dict.fromkeys(kinds, rule))
        return rule

    return decorate


def registered(kind: type[nn.Module]) -> Rule | None:
    """The rule of exactly this class, from this package or else from Opacus."""
    if kind in _RULES:
        return _RULES[kind]
    # Opacus has rules for PyTorch's layers and for its own. Code that gave it more rules has imported it.
    if "opacus" in sys.modules or kind.__module__.startswith("torch."):
        return opacus_rules().get(kind)
    return None


@cache
def opacus_rules() -> dict[type[nn.Module], Rule]:
    """Opacus's registry. The rules of this package are added to it, so that plain Opacus can use them."""
    from opacus.grad_sample import register_grad_sampler
    from opacus.grad_sample.grad_sample_module import GradSampleHooks

    for kind, rule in _RULES.items():
        register_grad_sampler(kind)(rule)
    return GradSampleHooks.GRAD_SAMPLERS
