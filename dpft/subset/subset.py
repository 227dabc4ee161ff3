"""A subset: parts joined by ``+``, applied to a model, and saved in the ecosystem's own format."""

import ast
from pathlib import Path

from torch import nn

from dpft.errors import SubsetError
from dpft.subset.adapters import add_lora, is_adapted
from dpft.subset.parts import WORDS, Head, Lora, Part


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
        if sum(isinstance(part, Lora) for part in self.parts) > 1:
            raise SubsetError(f"{self} names lora twice: join their settings in one.")

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

    def apply(self, model: nn.Module) -> nn.Module:
        """Freeze the model, then let exactly this subset require gradients.

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
            if not found and not isinstance(part, Lora):
                raise SubsetError(
                    f"{part} selects no parameter of {type(model).__name__}: see `dpft params` for what it has."
                )
            names |= found
        by_name = dict(model.named_parameters(remove_duplicate=False))
        selected = [by_name[name] for name in sorted(names)]
        model.requires_grad_(False)
        lora = next((part for part in self.parts if isinstance(part, Lora)), None)
        if lora is not None:
            model, moved = add_lora(model, lora, with_head=any(isinstance(part, Head) for part in self.parts))
            selected = [p for p in selected if id(p) not in moved]
        for parameter in selected:
            if not parameter.is_floating_point():
                raise SubsetError(
                    f"{self} selects a parameter of type {parameter.dtype}, which has no gradient: leave quantized layers out."
                )
            parameter.requires_grad_(True)
        return model


def save_weights(model: nn.Module, folder: Path | str) -> str:
    """Save what was trained; returns how to load it, one line of Python that names the folder as ``"weights"``.

    If only adapters (and modules that PEFT saves beside them) trained, the folder is a PEFT adapter; otherwise
    adapters are merged and the whole model is saved.
    """
    if not is_adapted(model):
        model.save_pretrained(folder)
        return f'{type(model).__name__}.from_pretrained("weights")'
    own = [
        name
        for name, p in model.named_parameters()
        if p.requires_grad and "lora_" not in name and "modules_to_save" not in name
    ]
    if not own:
        model.save_pretrained(folder)
        return 'peft.PeftModel.from_pretrained(base_model, "weights")'
    merged = model.merge_and_unload()
    merged.save_pretrained(folder)
    return f'{type(merged).__name__}.from_pretrained("weights")'


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
    if not isinstance(name, ast.Name) or name.id not in WORDS:
        raise SubsetError(f"{ast.unparse(node)!r} is no part of a subset: choose from {', '.join(WORDS)}, joined by +.")
    positional = [ast.literal_eval(value) for value in call.args] if call else []
    named = {keyword.arg: ast.literal_eval(keyword.value) for keyword in call.keywords} if call else {}
    return (WORDS[name.id](*positional, **named),)
