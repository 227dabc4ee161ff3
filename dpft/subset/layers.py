"""Finding a model's head, blocks and norms by structure, so that no list of model names is needed."""

from torch import nn

from dpft.errors import SubsetError

HEADS = ("classifier", "score", "lm_head", "proj_out", "qa_outputs", "projector", "pooler")


def heads(model: nn.Module) -> list[str]:
    """Names of the modules after the last block: the pooler, the projection and the task's output layer.

    Raises:
        SubsetError: none was found.
    """
    output = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    found = [
        name
        for name, module in model.named_modules()
        if (module is output or name.rpartition(".")[2] in HEADS) and any(True for _ in module.parameters())
    ]
    found = [name for name in found if not any(name.startswith(other + ".") for other in found)]
    if not found:
        raise SubsetError(
            f'{type(model).__name__} has no head ({", ".join(HEADS)}): load it with a task\'s class, or name layers("…").'
        )
    return found


def blocks(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """The name and list of the model's repeated blocks: its largest ``ModuleList``.

    Raises:
        SubsetError: there is none.
    """
    lists = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) > 0
    ]
    if not lists:
        raise SubsetError(f'{type(model).__name__} has no list of blocks: name the layers to train with layers("…").')
    return max(lists, key=lambda item: sum(p.numel() for p in item[1].parameters()))


def is_norm(module: nn.Module) -> bool:
    """Layer, RMS and group normalisation; not BatchNorm, whose statistics mix examples."""
    name = type(module).__name__
    return ("Norm" in name or name == "T5LayerNorm") and not isinstance(module, nn.modules.batchnorm._BatchNorm)
