"""What a session may be told."""

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Literal

from dpft.ledger import Dataset
from dpft.privacy.noise import Randomness
from dpft.tasks.task import Batch


def tell_each(callbacks: Iterable[Any], name: str, *facts: Any) -> None:
    """Call the method of this name of every callback that has one."""
    for callback in callbacks:
        if hasattr(callback, name):
            getattr(callback, name)(*facts)


@dataclass(frozen=True, kw_only=True)
class SessionOptions:
    """What a session may be told beside its model, plan, task, rows and folder.

    Attributes:
        randomness: the source of sampling and noise, by default a secure one; a seeded one is for tests and states NOT
            PRIVATE.
        token_budget: padded tokens in a micro-batch; ``"auto"`` times a few budgets on this machine and takes the
            smallest that is about as fast as any, within ``memory``.
        memory: bytes that a micro-batch may take beside the model, for ``"auto"``; by default a share of what is free.
        frozen_prefix: whether the output of layers before all that trains is computed once for each example and kept,
            encrypted, as long as the run (:mod:`dpft.training.prefix`): ``"auto"`` if it pays and the layers are
            deterministic, ``"on"``, with these layers in evaluation mode, or ``"off"``.
        ledger: the data set's account (:meth:`dpft.Ledger.dataset`), charged in blocks before they are released. The
            run ends at the block that no longer fits. Without one nothing across runs is counted.
        purpose: what the run is for; goes on the ledger's record.
        account_rows: the data that the account is kept for, where it is not quite the training data.
        draws: K, how often a step draws the task's chance (a crop, a mask, a timestep) for an example. The mean of the
            K gradients is the example's, before its unit is clipped: K costs time and no budget (De et al. 2022).
        autocast: makes the context of a forward pass in mixed precision, such as
            ``lambda: torch.autocast("cuda", torch.bfloat16)``.
        prepare: moves a collated batch to the model's device; by default its tensors are moved.
        tell: called with what happens, ``("watch", engine)`` and ``("say", text)``, for a progress bar.
    """

    randomness: Randomness | None = None
    token_budget: int | Literal["auto"] = "auto"
    memory: int | None = None
    frozen_prefix: Literal["auto", "on", "off"] = "auto"
    ledger: Dataset | None = None
    purpose: str = ""
    account_rows: Any = None
    draws: int = 1
    autocast: Callable[[], AbstractContextManager[Any]] | None = None
    prepare: Callable[[Batch], Batch] | None = None
    tell: Callable[..., None] = lambda name, *facts: None
