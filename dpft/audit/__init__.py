"""Measuring from outside how much a training leaks: what an audit proves is a lower bound on ε, never an upper one.

The commands of ``dpft audit``, as functions: :func:`audit_canaries` (``run``), :func:`audit_command`,
:func:`audit_step`, :func:`audit_membership`, :func:`audit_exposure`, and :func:`audit_run` and :func:`audit_ledger`
(``spending``); :func:`audit_training` is for any training in Python.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dpft.audit.exposure import audit_exposure as audit_exposure
    from dpft.audit.features import audit_training as audit_training
    from dpft.audit.game import audit_command as audit_command
    from dpft.audit.game import audit_run as audit_canaries  # noqa: F401
    from dpft.audit.membership import audit_membership as audit_membership
    from dpft.audit.spending import audit_ledger as audit_ledger
    from dpft.audit.spending import audit_run as audit_run
    from dpft.audit.step import audit_step as audit_step

_HOMES = {  # each function's module, and its name there
    "audit_canaries": ("dpft.audit.game", "audit_run"),
    "audit_command": ("dpft.audit.game", "audit_command"),
    "audit_exposure": ("dpft.audit.exposure", "audit_exposure"),
    "audit_ledger": ("dpft.audit.spending", "audit_ledger"),
    "audit_membership": ("dpft.audit.membership", "audit_membership"),
    "audit_run": ("dpft.audit.spending", "audit_run"),
    "audit_step": ("dpft.audit.step", "audit_step"),
    "audit_training": ("dpft.audit.features", "audit_training"),
}

__all__ = sorted(_HOMES)


def __getattr__(name: str) -> Any:
    if name in _HOMES:  # on first use, because most need PyTorch
        module, own = _HOMES[name]
        return getattr(import_module(module), own)
    raise AttributeError(f"module 'dpft.audit' has no attribute {name!r}")
