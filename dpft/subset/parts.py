"""The parts a subset is made of. Each is a frozen value whose fields are the words of the recipe's expression."""

from dataclasses import dataclass, fields
from fnmatch import fnmatch

from torch import nn

from dpft.errors import SubsetError
from dpft.subset.layers import blocks, heads, is_norm


@dataclass(frozen=True)
class Part:
    """One kind of parameters. Parts add up: ``Lora(rank=8) + Head()``."""

    def __add__(self, other):
        from dpft.subset.subset import Subset

        return Subset(self) + other

    def __str__(self) -> str:
        changed = [f"{f.name}={getattr(self, f.name)!r}" for f in fields(self) if getattr(self, f.name) != f.default]
        return f"{self.word}({', '.join(changed)})" if changed else self.word

    @property
    def word(self) -> str:
        """The part's name in a recipe."""
        return next(word for word, part in WORDS.items() if part is type(self))

    def names(self, model: nn.Module) -> set[str]:
        """Names of the model's own parameters that train; adapters add theirs when they are attached."""
        raise NotImplementedError  # pragma: no cover


@dataclass(frozen=True)
class Lora(Part):
    """Low-rank adapters (Hu et al. 2022) through PEFT.

    Attributes:
        rank, alpha, dropout: as in PEFT; ``alpha`` is twice the rank unless given.
        targets: ``"attention"`` for PEFT's default layers of the model type, ``"all-linear"``, or comma-separated names.
        last_blocks: adapt only the last k blocks (0: all of them).
    """

    rank: int = 8
    alpha: float | None = None
    dropout: float = 0.0
    targets: str = "attention"
    last_blocks: int = 0

    def names(self, model: nn.Module) -> set[str]:
        return set()


@dataclass(frozen=True)
class Head(Part):
    """What follows the last block: pooler, projection, the task's output layer."""

    def names(self, model: nn.Module) -> set[str]:
        return {f"{head}.{name}" for head in heads(model) for name, _ in model.get_submodule(head).named_parameters()}


@dataclass(frozen=True)
class Bias(Part):
    """Every bias vector (BitFit, Ben Zaken et al. 2022; with DP, Bu et al. 2022)."""

    def names(self, model: nn.Module) -> set[str]:
        return {name for name, _ in model.named_parameters() if name.rpartition(".")[2] == "bias"}


@dataclass(frozen=True)
class Norms(Part):
    """Weights and biases of layer, RMS and group normalisation."""

    def names(self, model: nn.Module) -> set[str]:
        return {
            f"{layer}.{name}"
            for layer, module in model.named_modules()
            if is_norm(module)
            for name, _ in module.named_parameters(recurse=False)
        }


@dataclass(frozen=True)
class LastBlocks(Part):
    """Everything in the last ``k`` blocks."""

    k: int = 1

    def names(self, model: nn.Module) -> set[str]:
        name, found = blocks(model)
        if not 1 <= self.k <= len(found):
            raise SubsetError(
                f"last_blocks({self.k}) was asked of {len(found)} blocks in {name}: choose 1 to {len(found)}."
            )
        first = len(found) - self.k
        return {f"{name}.{first + i}.{p}" for i, block in enumerate(found[first:]) for p, _ in block.named_parameters()}


@dataclass(frozen=True)
class Layers(Part):
    """Parameters whose name matches a shell pattern, such as ``"*.layer.5.attention.*"``."""

    pattern: str = "*"

    def names(self, model: nn.Module) -> set[str]:
        return {name for name, _ in model.named_parameters(remove_duplicate=False) if fnmatch(name, self.pattern)}


@dataclass(frozen=True)
class All(Part):
    """Every parameter of the model."""

    def names(self, model: nn.Module) -> set[str]:
        return {name for name, _ in model.named_parameters(remove_duplicate=False)}


WORDS: dict[str, type[Part]] = {
    "lora": Lora,
    "head": Head,
    "bias": Bias,
    "norms": Norms,
    "last_blocks": LastBlocks,
    "layers": Layers,
    "all": All,
}
