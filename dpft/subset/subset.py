"""A subset: parts joined by ``+``, applied to a model."""

import ast
from collections.abc import Callable, Sequence
from dataclasses import fields

from torch import Tensor, nn

from dpft.errors import SubsetError
from dpft.subset.adapters import add_adapter, is_adapted, tuner_kinds
from dpft.subset.parts import WORDS, Head, Lora, Part, Sparse, Tuner
from dpft.subset.sparse import add_sparse, gradient_scores
from dpft.subset.whitening import whiten


class Subset:
    """The parameters that train, as parts joined by ``+``.

    >>> Subset("lora(rank=16) + head")
    Subset('lora(rank=16) + head')
    >>> str(Lora(rank=16) + Head())
    'lora(rank=16) + head'

    Raises:
        SubsetError: the expression cannot be read.
    """

    def __init__(self, *parts: "Part | Subset | str") -> None:
        self.parts: tuple[Part, ...] = tuple(part for given in parts for part in _parts(given))
        if not self.parts:
            raise SubsetError("The subset is empty: name at least one of " + ", ".join(WORDS) + ".")
        for kinds in ((Lora, Tuner), (Sparse,)):
            same = [str(part) for part in self.parts if isinstance(part, kinds)]
            if len(same) > 1:
                raise SubsetError(f"{' and '.join(same)} cannot train together: choose one of them.")

    def __add__(self, other: "Part | Subset | str") -> "Subset":
        return Subset(self, other)

    def __str__(self) -> str:
        return " + ".join(map(str, self.parts))

    def __repr__(self) -> str:
        return f"Subset({str(self)!r})"

    def __eq__(self, other) -> bool:
        return isinstance(other, Subset) and self.parts == other.parts

    def __hash__(self) -> int:
        return hash(self.parts)

    @property
    def needs_public_data(self) -> bool:
        """Whether a part looks at gradients to choose its weights."""
        return any(isinstance(part, Sparse) and part.choose == "gradient" for part in self.parts)

    @property
    def whitens(self) -> bool:
        """Whether a part looks at the inputs of layers, on public data or on what the model makes up itself."""
        return any(isinstance(part, Lora) and part.init == "whitened" for part in self.parts)

    def apply(
        self,
        model: nn.Module,
        public_losses: Callable[[list], Tensor] | None = None,
        public_examples: Sequence = (),
    ) -> nn.Module:
        """Freeze the model, then let exactly this subset require gradients.

        Args:
            public_losses, public_examples: public data and their losses ``(B,)``, for parts that choose by gradients
                or look at inputs.

        Returns:
            The same model, or PEFT's model around it if the subset has an adapter.

        Raises:
            SubsetError: a part finds nothing in this model.
        """
        if is_adapted(model):
            raise SubsetError(
                f"The model already has adapters, so {self} would train beside them: start from the base model."
            )
        names: set[str] = set()
        for part in self.parts:
            found = part.names(model)
            if not found and not isinstance(part, (Lora, Tuner, Sparse)):
                raise SubsetError(
                    f"{part} selects no parameter of {type(model).__name__}: see `dpft params` for what it has."
                )
            names |= found
        by_name = dict(model.named_parameters(remove_duplicate=False))
        selected = [by_name[name] for name in sorted(names)]
        sparse = next((part for part in self.parts if isinstance(part, Sparse)), None)
        if sparse is not None:
            scores = None
            if sparse.choose == "gradient" and public_losses is not None:
                scores = gradient_scores(model, sparse, public_losses, public_examples)
            selected += add_sparse(model, sparse, names, scores)
        model.requires_grad_(False)
        adapter = next((part for part in self.parts if isinstance(part, (Lora, Tuner))), None)
        if adapter is not None:
            with_head = any(isinstance(part, Head) for part in self.parts)
            model = add_adapter(model, adapter, with_head=with_head)
            moved = {id(p) for name, p in model.named_parameters() if ".original_module." in name}
            selected = [p for p in selected if id(p) not in moved]
        if self.whitens:
            if public_losses is None or not public_examples:
                raise SubsetError(f"{self} looks at what public examples are inside the model: give public data.")
            whiten(model, public_losses, public_examples)
        for parameter in selected:
            if not parameter.is_floating_point():
                raise SubsetError(
                    f"{self} selects a parameter of type {parameter.dtype}, which has no gradient: leave quantized "
                    "layers out."
                )
            parameter.requires_grad_(True)
        return model


def _parts(given: Part | Subset | str) -> tuple[Part, ...]:
    if isinstance(given, Subset):
        return given.parts
    if isinstance(given, Part):
        return (given,)
    try:
        return _read(ast.parse(given.strip(), mode="eval").body)
    except (SyntaxError, TypeError, ValueError) as error:
        if isinstance(error, SubsetError):
            raise
        raise SubsetError(
            f'The subset {given!r} cannot be read ({error}): write parts such as "lora(rank=8) + head".'
        ) from error


def _read(node: ast.expr) -> tuple[Part, ...]:
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return _read(node.left) + _read(node.right)
    call = node if isinstance(node, ast.Call) else None
    name = call.func if call else node
    word = name.id if isinstance(name, ast.Name) else ""
    if word not in WORDS and word not in tuner_kinds():
        raise SubsetError(
            f"{ast.unparse(node)!r} is no part of a subset: choose from {', '.join(WORDS)}, or a tuner of PEFT "
            f"({', '.join(sorted(tuner_kinds() - set(WORDS)))}), joined by +."
        )
    positional = [ast.literal_eval(value) for value in call.args] if call else []
    named = {str(keyword.arg): ast.literal_eval(keyword.value) for keyword in call.keywords} if call else {}
    if word in WORDS:
        settings = [field.name for field in fields(WORDS[word])]
        unknown = [key for key in named if key not in settings]
        if unknown:
            raise SubsetError(f"{word} has no setting {unknown[0]!r}: it has {', '.join(settings) or 'none'}.")
        return (WORDS[word](*positional, **named),)
    if positional:
        raise SubsetError(
            f"{ast.unparse(node)!r} gives settings without their names: write them as {word}(name=value)."
        )
    return (Tuner(word, tuple(named.items())),)
