"""What was trained, saved in the ecosystem's own formats, and loaded again."""

from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from dpft.errors import RecipeError
from dpft.subset.adapters import is_adapted, save_shira, saved_by_peft, shira_rank
from dpft.subset.sparse import deltas, fold

DELTA = "delta.safetensors"


def save_weights(model: nn.Module, folder: Path | str) -> str:
    """Save what was trained; returns how to load it, one line of Python that names the folder as ``"weights"``.

    Adapters alone (and modules that PEFT saves beside them) become a PEFT adapter. Sparse weights alone become PEFT's
    SHiRA adapter where its format fits, and otherwise ``delta.safetensors``: for each weight ``NAME.indices`` ``(k,)`` and
    ``NAME.values`` ``(k,)``. Anything else is merged into the whole model; where PEFT cannot merge a tuner, or the base is not
    float32, the adapter is saved with the other trained parameters, whole, in ``delta.safetensors``. After merging, and where
    sparse deltas are folded, ``model`` is no longer what it was.
    """
    folder = Path(folder)
    sparse = deltas(model)
    adapted = is_adapted(model)
    kept = saved_by_peft(model) if adapted else set()
    own = {name: p for name, p in model.named_parameters() if p.requires_grad and id(p) not in kept}
    in_place = {name: p for name, p in own.items() if ".parametrizations." not in f".{name}"}
    if sparse and not adapted and not in_place:
        folder.mkdir(parents=True, exist_ok=True)
        rank = shira_rank(sparse)
        if rank:
            save_shira(model, sparse, rank, folder)
            return 'peft.PeftModel.from_pretrained(base_model, "weights")'
        tensors = {}
        for name, (_, delta) in sparse.items():
            tensors[f"{name}.indices"] = delta.indices.int() if delta.indices[-1] < 2**31 else delta.indices
            tensors[f"{name}.values"] = delta.values.detach()
        save_file(tensors, folder / DELTA)
        return 'dpft.load_weights(base_model, "weights")'
    if not adapted:
        fold(model)
        model.save_pretrained(folder)
        return f'{type(model).__name__}.from_pretrained("weights")'
    if not own:
        model.save_pretrained(folder)
        return 'peft.PeftModel.from_pretrained(base_model, "weights")'
    fold(model)
    model.save_pretrained(folder)
    changed = {name.replace(".parametrizations.", ".").removesuffix(".0.values") for name in own}
    whole = dict(model.named_parameters())
    save_file({name: whole[name].detach().contiguous() for name in sorted(changed)}, folder / DELTA)
    # Merged into half precision or a quantized base, a small change would be rounded away.
    if hasattr(model.base_model, "merge_and_unload") and all(p.dtype == torch.float32 for p in model.parameters()):
        try:
            merged = model.merge_and_unload()
        except Exception:  # PEFT raises all kinds of errors for tuners that it cannot merge; what was saved stands
            return 'dpft.load_weights(base_model, "weights")'
        for file in (folder / DELTA, *folder.glob("adapter_*")):
            file.unlink()
        merged.save_pretrained(folder)
        return f'{type(merged).__name__}.from_pretrained("weights")'
    return 'dpft.load_weights(base_model, "weights")'


def load_weights(model: nn.Module, folder: Path | str) -> nn.Module:
    """Put saved weights on the base model that they were trained on: an adapter, a ``delta.safetensors``, or both.

    Raises:
        RecipeError: the folder holds neither, or they do not fit this model.
    """
    folder = Path(folder)
    if not (folder / DELTA).exists() and not (folder / "adapter_config.json").exists():
        raise RecipeError(f"{folder} has no {DELTA} and no adapter: load a whole model with its own from_pretrained.")
    if (folder / "adapter_config.json").exists():
        from peft import PeftModel

        model = PeftModel.from_pretrained(model, folder)
    if not (folder / DELTA).exists():
        return model
    parameters = dict(model.named_parameters(remove_duplicate=False))
    saved = load_file(folder / DELTA)
    with torch.no_grad():
        for key, tensor in saved.items():
            name = key.removesuffix(".values")
            if key.endswith(".indices") and key.removesuffix("indices") + "values" in saved:
                continue
            sparse = saved.get(f"{name}.indices") if key.endswith(".values") else None
            if name not in parameters or (sparse is None and parameters[name].shape != tensor.shape):
                raise RecipeError(
                    f"{folder / DELTA} has {name}, which the model lacks: load the model that it was trained on."
                )
            if sparse is None:
                parameters[name].copy_(tensor)
            else:
                parameters[name].view(-1).index_add_(0, sparse.long(), tensor.to(parameters[name]))
    return model
