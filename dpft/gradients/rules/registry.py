"""Rules by class of layer: the ones of this package, and Opacus's, which is imported for a layer that needs its rule.

To import Opacus takes seconds: its accountants and optimizers come along, and with them most of scipy. Few layers need
it.
"""

import sys
from collections.abc import Callable
from functools import cache
from typing import Any

from torch import Tensor, nn

Rule = Callable[[Any, list[Tensor], Tensor], dict[nn.Parameter, Any]]  # of (layer, [input], output gradient)

_RULES: dict[type[nn.Module], Rule] = {}


def register(*kinds: type[nn.Module]) -> Callable[[Rule], Rule]:
    """Decorate a rule with the classes of layers that it is for."""

    def decorate(rule: Rule) -> Rule:
        _RULES.update(dict.fromkeys(kinds, rule))
        return rule

    return decorate


def registered(kind: type[nn.Module]) -> Rule | None:
    """The rule of exactly this class, of this package or else of Opacus."""
    if kind in _RULES:
        return _RULES[kind]
    # Opacus has rules for PyTorch's layers and its own. Whoever gave it another rule has imported it.
    if "opacus" in sys.modules or kind.__module__.startswith("torch."):
        return opacus_rules().get(kind)
    return None


@cache
def opacus_rules() -> dict[type[nn.Module], Rule]:
    """Opacus's registry, to which the rules of this package are added, so that plain Opacus gains them."""
    from opacus.grad_sample import register_grad_sampler
    from opacus.grad_sample.grad_sample_module import GradSampleHooks

    for kind, rule in _RULES.items():
        register_grad_sampler(kind)(rule)
    return GradSampleHooks.GRAD_SAMPLERS
