"""The parts a subset is made of. Each is a frozen value whose fields are the words of the recipe's expression."""

from dataclasses import dataclass, fields
from fnmatch import fnmatch

from torch import nn

from dpft.errors import SubsetError
from dpft.subset.layers import heads, is_norm, last_blocks


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
        """Names of the model's own parameters that train in place; none for parts that add theirs to the model."""
        return set()


@dataclass(frozen=True)
class Lora(Part):
    """Low-rank adapters (Hu et al. 2022) through PEFT.

    Attributes:
        rank, alpha, dropout: as in PEFT; ``alpha`` is twice the rank unless given.
        targets: ``"attention"`` for PEFT's default layers of the model type, ``"all-linear"``, or comma-separated
            names.
        last_blocks: adapt only the last k blocks (0: all of them).
        dora: with a trained magnitude for each output (Liu et al. 2024).
        rslora: scaled by 1/√rank (Kalajdzievski 2023).
        freeze_a: train B alone and leave A at its random start (FFA-LoRA, Sun et al. 2024, arXiv:2403.12313). Half the
            numbers take noise, and no noise is multiplied by noise.
        init: ``"random"``, PEFT's own start, or ``"whitened"``: A reads uncorrelated directions of public text
            (:mod:`dpft.subset.whitening`), which ``data.public`` holds or a language model writes itself.
    """

    rank: int = 8
    alpha: float | None = None
    dropout: float = 0.0
    targets: str = "attention"
    last_blocks: int = 0
    dora: bool = False
    rslora: bool = False
    freeze_a: bool = False
    init: str = "random"

    def __post_init__(self) -> None:
        if self.init not in ("random", "whitened"):
            raise SubsetError(f"lora has init={self.init!r}: choose random or whitened.")


@dataclass(frozen=True)
class Tuner(Part):
    """Any other tuner of PEFT by the name of its type, such as ``ia3`` or ``vera(r=64)``; settings are its
    configuration's.

    Attributes:
        kind: a ``peft.PeftType`` in lower case.
        settings: pairs of a configuration field and its value.
    """

    kind: str
    settings: tuple[tuple[str, object], ...] = ()

    def __str__(self) -> str:
        given = ", ".join(f"{name}={value!r}" for name, value in self.settings)
        return f"{self.kind}({given})" if given else self.kind


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
        chosen = last_blocks(model, self.k, str(self))
        return {f"{name}.{parameter}" for name, block in chosen.items() for parameter, _ in block.named_parameters()}


@dataclass(frozen=True)
class Layers(Part):
    """Parameters whose name matches a shell pattern, such as ``"*.layer.5.attention.*"``."""

    pattern: str = "*"

    def names(self, model: nn.Module) -> set[str]:
        return {name for name, _ in model.named_parameters(remove_duplicate=False) if fnmatch(name, self.pattern)}


@dataclass(frozen=True)
class Sparse(Part):
    """Single weights of the blocks' layers; only they exist for clipping, noise and the optimizer.

    A very sparse subnetwork of a public model (Luo, Wu, Adeli, Fei-Fei 2021). Give one of the first three.

    Attributes:
        fraction: this share of the weights, in (0, 1].
        number: so many weights, of each layer or of the model.
        rank: as many as LoRA of this rank has; on linear layers alone the weights are saved as PEFT's SHiRA adapter.
        choose: by ``"magnitude"`` (the largest of the public model), at ``"random"`` (the control, from ``seed``), or
            by ``"gradient"``, the largest mean gradient over data declared public.
        over: ``"layer"`` chooses in each layer, ``"model"`` among all weights together.
        group: ``"weight"``, or whole ``"rows"`` (output units), ``"columns"`` (input units) or ``"heads"``
            (of attention), which are ranked by their norm; ``fraction`` and ``number`` then count groups.
        layers: a shell pattern of weight names, by default every matrix in the blocks. Tied weights are left out.
        seed: of the random choice, which no data enter.
    """

    fraction: float | None = None
    number: int | None = None
    rank: int | None = None
    choose: str = "magnitude"
    over: str = "layer"
    group: str = "weight"
    layers: str | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        given = [size for size in (self.fraction, self.number, self.rank) if size is not None]
        if len(given) != 1 or given[0] <= 0 or (self.fraction or 0) > 1:
            raise SubsetError(
                f"{self} must give one of fraction (0 to 1), number and rank, such as sparse(fraction=0.01)."
            )
        for name, allowed in SPARSE_WORDS.items():
            if getattr(self, name) not in allowed:
                raise SubsetError(f"sparse({name}={getattr(self, name)!r}) is unknown: choose {', '.join(allowed)}.")
        if self.rank is not None and (self.over, self.group) != ("layer", "weight"):
            raise SubsetError(
                f"{self} counts as LoRA does, by layer and weight: give fraction or number instead of rank."
            )


SPARSE_WORDS = {
    "choose": ("magnitude", "random", "gradient"),
    "over": ("layer", "model"),
    "group": ("weight", "rows", "columns", "heads"),
}


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
    "sparse": Sparse,
    "all": All,
}
