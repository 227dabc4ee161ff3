"""Finding a model's head, blocks and norms by structure, so that no list of model names is needed."""

from torch import nn

from dpft.errors import SubsetError

# Parts of a head that models keep inside their base, or beside an encoder and a decoder that have no base around them.
HEADS = ("classifier", "score", "lm_head", "proj_out", "qa_outputs", "projector", "pooler")


def heads(model: nn.Module) -> list[str]:
    """Names of the modules after the last block: the pooler, the projection and the task's output layer.

    They are what a model has beside its ``base_model``, its output embeddings, and modules named as in ``HEADS``.

    Raises:
        SubsetError: none was found.
    """
    output = getattr(model, "get_output_embeddings", lambda: None)()
    base = getattr(model, "base_model", model)
    beside = {id(child) for child in model.children() if child is not base} if base is not model else set()
    found = [
        name
        for name, module in model.named_modules()
        if (module is output or id(module) in beside or name.rpartition(".")[2] in HEADS)
        and any(True for _ in module.parameters())
    ]
    found = [name for name in found if not any(name.startswith(other + ".") for other in found)]
    if not found:
        raise SubsetError(
            f"{type(model).__name__} has no head, which is what follows its base model: load it with a task's class, "
            'or name layers("…").'
        )
    return found


def untied_heads(model: nn.Module) -> list[str]:
    """The heads that share no parameter with the input embeddings; none where the model has no head."""
    try:
        inputs = getattr(model, "get_input_embeddings", lambda: None)()
    except (AttributeError, NotImplementedError):  # a model that takes no tokens
        inputs = None
    embeddings = {id(p) for p in inputs.parameters()} if isinstance(inputs, nn.Module) else set()
    try:
        found = heads(model)
    except SubsetError:
        return []
    return [name for name in found if not any(id(p) in embeddings for p in model.get_submodule(name).parameters())]


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


def last_blocks(model: nn.Module, k: int, asked: str) -> dict[str, nn.Module]:
    """The last ``k`` blocks by name; ``asked`` is what the message calls the request.

    Raises:
        SubsetError: there are fewer, or none.
    """
    name, found = blocks(model)
    if not 1 <= k <= len(found):
        raise SubsetError(f"{asked} was asked of {len(found)} blocks in {name}: choose 1 to {len(found)}.")
    return {f"{name}.{i}": found[i] for i in range(len(found) - k, len(found))}


def is_norm(module: nn.Module) -> bool:
    """Layer, RMS and group normalisation; not BatchNorm, whose statistics mix examples."""
    name = type(module).__name__
    return ("Norm" in name or name == "T5LayerNorm") and not isinstance(module, nn.modules.batchnorm._BatchNorm)


def replace_batchnorm(model: nn.Module, groups: int = 32) -> nn.Module:
    """Put GroupNorm (Wu and He 2018) in place of every BatchNorm, whose statistics mix the examples of a batch; in
    place.

    Scale and shift carry over; running statistics do not, so a pre-trained network needs training to recover. The
    number of groups is the largest divisor of the channels that is at most ``groups``.

    Returns:
        The model; a GroupNorm itself if ``model`` is a BatchNorm.
    """
    if isinstance(model, nn.modules.batchnorm._BatchNorm):
        channels = model.num_features
        count = max(n for n in range(1, min(groups, channels) + 1) if channels % n == 0)
        norm = nn.GroupNorm(count, channels, eps=model.eps, affine=model.affine)
        if model.affine:
            norm.weight, norm.bias = model.weight, model.bias
        return norm
    for name, child in model.named_children():
        replacement = replace_batchnorm(child, groups)
        if replacement is not child:
            setattr(model, name, replacement)
    return model
