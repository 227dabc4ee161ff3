"""The frozen beginning of a model, computed once for each example and kept, encrypted, as long as the run.

Where everything that trains sits behind layers that do not (a head, the last blocks, adapters on them), those layers
give the same output for an example in every step. It is private data: it lies in a file without a name, which the
operating system forgets when the process ends, however it ends, encrypted under a key that exists in this process
alone.
"""

import shutil
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from itertools import takewhile
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

from dpft.errors import IsolationError, SubsetError
from dpft.privacy.encrypted_file import EncryptedStore
from dpft.subset.layers import blocks
from dpft.tasks.rules import unwrapped
from dpft.tasks.task import Batch, Features
from dpft.training.batches import Examples, Numbers, cut

TOLERANCE = 1e-4
WORTH = 2.0  # how often an example must be expected in a run for its prefix to be worth keeping
Places = Sequence[int] | Numbers  # numbers of examples
Losses = Callable[[Batch], Tensor]


class _Stop(Exception):
    """Ends a forward pass at the boundary, with its output."""

    def __init__(self, output: object) -> None:
        self.output = output


@dataclass
class FrozenPrefix:
    """Replays the output of a model's frozen beginning; made by :meth:`find`, filled by :meth:`fill`.

    Attributes:
        name: of the last frozen module, the boundary.
        modules: those that need not run any more, the boundary last.
        needed: which of the boundary's output tensors the loss depends on.
        per_token: which of these have a row for each token; padding is not kept.
        random: whether two passes in training mode differ, by dropout.
        numbers: how many float32 are kept for each token, and for each example besides.
        unread: the task's :attr:`dpft.tasks.Task.unread`.
    """

    name: str
    modules: list[nn.Module]
    needed: list[int]
    per_token: list[bool]
    random: bool
    numbers: tuple[int, int]
    unread: Callable[[Features], Features] | None = None
    _store: EncryptedStore | None = None
    _structure: TreeSpec | None = None
    _others: list[Any] = field(default_factory=list)  # the output's leaves that are not kept, as they were once
    _dtypes: list[torch.dtype] = field(default_factory=list)
    _shapes: dict[int, list[torch.Size]] = field(default_factory=dict)
    _output: object = None

    # -- finding ---------------------------------------------------------------------------------------------------

    @classmethod
    def find(cls, model: nn.Module, losses: Losses, batch: Batch) -> "FrozenPrefix | None":
        """The longest frozen beginning, or None if everything from the first block on trains or it pads in its own way.

        Args:
            losses: of a collated batch; nothing must be attached to the model.
            batch: two examples or more.
        """
        base = unwrapped(model)
        backbone = getattr(base, "base_model", base)
        found: Iterable[nn.Module]
        try:
            name, found = blocks(base)
        except SubsetError:  # a model without blocks may still have a backbone
            name, found = "", []
        seen: dict[int, list[object]] = {}
        hooks = [
            module.register_forward_hook(lambda m, a, output: seen.setdefault(id(m), []).append(output))
            for module in (backbone, *found)
        ]
        try:
            losses(batch)
        finally:
            for hook in hooks:
                hook.remove()
        frozen = lambda module: len(seen.get(id(module), ())) == 1 and not _depends(seen[id(module)][0])
        if backbone is not base and frozen(backbone):
            names = {id(m): n for n, m in model.named_modules()}
            return cls._at(names[id(backbone)], [backbone], model, losses, batch)
        first = list(takewhile(frozen, found))
        return cls._at(f"{name}.{len(first) - 1}", first, model, losses, batch) if first else None

    @classmethod
    def _at(
        cls, name: str, modules: list[nn.Module], model: nn.Module, losses: Losses, batch: Batch
    ) -> "FrozenPrefix | None":
        leaves: list[Tensor] = []

        def as_leaves(module: nn.Module, args: Any, output: object) -> Any:
            values, structure = tree_flatten(output)
            values = [v.detach().requires_grad_() if _floating(v) else v for v in values]
            leaves.extend(values)
            return tree_unflatten(values, structure)

        hook = modules[-1].register_forward_hook(as_leaves)
        try:
            total = losses(batch).sum()
        finally:
            hook.remove()
        places = [i for i, leaf in enumerate(leaves) if _floating(leaf)]
        gradients = torch.autograd.grad(total, [leaves[i] for i in places], allow_unused=True)
        needed = [i for i, gradient in zip(places, gradients, strict=True) if gradient is not None]
        mask = _mask(batch)
        shape = None if mask is None else mask.shape
        if shape is not None and any(leaves[i].dim() > 2 and leaves[i].shape[:2] != shape for i in needed):
            return None  # padded in its own way, as by models that attend in windows: what is padding cannot be told
        per_token = [shape is not None and leaves[i].dim() > 2 and leaves[i].shape[:2] == shape for i in needed]
        tokens = 1 if shape is None else shape[1]
        widths = [leaves[i][0].numel() // (tokens if t else 1) for i, t in zip(needed, per_token, strict=True)]
        by_token = sum(w for w, t in zip(widths, per_token, strict=True) if t)
        prefix = cls(name, modules, needed, per_token, False, (by_token, sum(widths) - by_token))
        was = model.training
        model.train()
        first, second = (prefix._kept(losses, batch) for _ in range(2))
        prefix.random = any(not torch.equal(a, b) for a, b in zip(first, second, strict=True))
        model.train(was)
        return prefix

    # -- filling ---------------------------------------------------------------------------------------------------

    def bytes(self, examples: Examples) -> int:
        return 4 * int(self.numbers[0] * examples.lengths.sum() + self.numbers[1] * len(examples))

    def fits(self, examples: Examples, folder: Path) -> bool:
        """Whether half of the free space of the disk suffices; how much is needed is rounded up, so that no one example
        decides it."""
        return 1 << self.bytes(examples).bit_length() < shutil.disk_usage(folder).free / 2

    def shortened(self, examples: Examples) -> Examples:
        """The examples, as long as they are to what still runs, and without what only the kept layers read."""
        unread = self.unread
        if unread is not None:
            examples = replace(examples, chance=lambda features, random: unread(features))
        ones = np.ones_like(examples.lengths)
        return examples if any(self.per_token) else replace(examples, lengths=ones, costs=ones)

    def fill(
        self,
        examples: Examples,
        collate: Callable[[Places], Batch],
        losses: Losses,
        folder: Path,
        token_budget: int,
        replayed: Callable[[Places], Batch] | None = None,
    ) -> None:
        """Compute and keep the output for every example, in evaluation mode.

        Args:
            collate: the batch of the examples with these numbers.
            folder: where the nameless file lies.
            replayed: the batch that a step makes of them, by default the same.

        Raises:
            IsolationError: an example's output depends on which others share its batch, or padding comes first.
        """
        self._store = EncryptedStore(folder)
        model_modules = [module for module in self.modules for module in module.modules()]
        modes_before = [module.training for module in model_modules]
        for module in model_modules:
            module.training = False
        try:
            for places in cut(examples.costs, range(len(examples)), token_budget=token_budget):
                batch = collate(places)
                kept, lengths = self._kept(losses, batch), _lengths(batch, len(places))
                for row, place in enumerate(places.tolist()):
                    rows = [
                        tensor[row][: lengths[row]] if per_token else tensor[row]
                        for tensor, per_token in zip(kept, self.per_token, strict=True)
                    ]
                    self._shapes[place] = [tensor.shape for tensor in rows]
                    flat = torch.cat([tensor.flatten() for tensor in rows]).float().cpu()
                    self._store.write(place, flat.numpy().tobytes())
            self._verify(
                collate, replayed or collate, losses, [*examples.spread_places(), int(examples.lengths.argmax())]
            )
        finally:
            for module, mode in zip(model_modules, modes_before, strict=True):
                module.training = mode

    def _verify(
        self,
        collate: Callable[[Places], Batch],
        replayed: Callable[[Places], Batch],
        losses: Losses,
        places: Sequence[int],
    ) -> None:
        """What is replayed, alone or beside others, gives the loss that the model gives."""
        with torch.no_grad():
            for group in [list(places), *([place] for place in places)]:
                wanted, batch = losses(collate(group)), replayed(group)
                self.select(group, batch)
                with self:
                    made = losses(batch)
                if not torch.allclose(made, wanted, rtol=TOLERANCE, atol=TOLERANCE):
                    error = float((made - wanted).abs().max())
                    raise IsolationError(
                        f"What {self.name} gives for an example changes the loss by {error:.1e} when it is computed "
                        "beside others or the "
                        'layers before it are skipped: set run.frozen_prefix = "off".'
                    )

    def _kept(self, losses: Losses, batch: Batch) -> list[Tensor]:
        """Of the boundary's output, the tensors that are needed; what comes behind it does not run."""

        def stop(module: nn.Module, args: Any, output: object) -> NoReturn:
            raise _Stop(output)

        hook = self.modules[-1].register_forward_hook(stop)
        try:
            with torch.no_grad():
                losses(batch)
        except _Stop as stopped:
            leaves, self._structure = tree_flatten(stopped.output)
            self._others = [None if i in self.needed else leaf for i, leaf in enumerate(leaves)]
            self._dtypes = [leaves[i].dtype for i in self.needed]
            return [leaves[i] for i in self.needed]
        finally:
            hook.remove()
        raise IsolationError(f"{self.name} was not reached by an example's forward pass.")

    # -- replaying -------------------------------------------------------------------------------------------------

    def select(self, places: Places, batch: Batch) -> None:
        """Let the next forward passes be those of these examples, collated to ``batch``."""
        store, structure, mask = self._store, self._structure, _mask(batch)
        if store is None or structure is None:
            raise IsolationError(
                f"Nothing is kept of what {self.name} gives, so nothing can be replayed: fill it first."
            )
        longest = 0 if mask is None else mask.shape[1]
        device = next(self.modules[-1].parameters()).device
        flats = [torch.frombuffer(bytearray(store.read(int(place))), dtype=torch.float32) for place in places]
        parts = [
            flat.split([shape.numel() for shape in self._shapes[int(place)]])
            for flat, place in zip(flats, places, strict=True)
        ]
        leaves = [self._stand_in(leaf, len(flats), longest) for leaf in self._others]
        for k, (leaf, per_token) in enumerate(zip(self.needed, self.per_token, strict=True)):
            rows = [part[k].view(self._shapes[int(place)][k]) for part, place in zip(parts, places, strict=True)]
            if per_token:
                whole = rows[0].new_zeros(len(rows), longest, *rows[0].shape[1:])
                for i, row in enumerate(rows):
                    whole[i, : len(row)] = row
            else:
                whole = torch.stack(rows)
            leaves[leaf] = whole.to(device, self._dtypes[k])
        self._output = tree_unflatten(leaves, structure)

    @staticmethod
    def _stand_in(leaf: Any, examples: int, longest: int) -> Any:
        """Zeros for a tensor that the loss does not depend on; anything else as it was."""
        if not isinstance(leaf, Tensor) or leaf.dim() == 0:
            return leaf
        shape = [examples, *leaf.shape[1:]]
        return leaf.new_zeros(1).expand(shape if leaf.dim() < 3 else [examples, longest, *leaf.shape[2:]])

    def __enter__(self) -> "FrozenPrefix":
        for module in self.modules:
            module.forward = lambda *args, **kwargs: self._output
        return self

    def __exit__(self, *_: object) -> None:
        for module in self.modules:
            del module.forward

    def close(self) -> None:
        """Forget key and content."""
        if self._store is not None:
            self._store.close()
        self._output, self._store = None, None


def _floating(value: object) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


def _depends(output: object) -> bool:
    return any(isinstance(leaf, Tensor) and leaf.requires_grad for leaf in tree_flatten(output)[0])


def _mask(batch: Batch) -> Tensor | None:
    return batch.get("attention_mask")


def _lengths(batch: Batch, examples: int) -> list[int]:
    """How many leading tokens of each example are no padding.

    Raises:
        IsolationError: some padding comes before a token.
    """
    mask = _mask(batch)
    if mask is None:
        return [0] * examples
    if (mask[:, 1:] > mask[:, :-1]).any():
        raise IsolationError(
            "The batches are padded before their tokens, so a frozen prefix would lose its place: set "
            'run.frozen_prefix = "off".'
        )
    lengths: list[int] = mask.sum(1).tolist()
    return lengths
