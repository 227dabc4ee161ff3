"""What was trained, saved in the ecosystem's own formats, and loaded again."""

from collections.abc import Iterable
from operator import attrgetter
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from dpft.errors import RecipeError
from dpft.subset.adapters import (
    ADAPTERS,
    can_merge,
    is_adapted,
    load_adapters,
    save_adapters,
    save_shira,
    saved_by_peft,
    shira_rank,
)
from dpft.subset.base import new_tensors
from dpft.subset.sparse import deltas, fold

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

DELTA = "delta.safetensors"
PEFT_LINE = 'peft.PeftModel.from_pretrained(base_model, "weights")'
DPFT_LINE = 'dpft.load_weights(base_model, "weights")'


def save_weights(model: nn.Module, folder: Path | str) -> str:
    """Save what was trained; returns how to load it, one line of Python that names the folder as ``"weights"``.

    The active adapter alone (and modules that PEFT saves beside it) becomes a PEFT adapter; several go to a folder
    each. Sparse weights alone become PEFT's SHiRA adapter where its format fits, and otherwise ``delta.safetensors``:
    for each weight ``NAME.indices`` ``(k,)`` and ``NAME.values`` ``(k,)``. Anything else is merged into one model.
    Where PEFT cannot merge a tuner, or the base is not float32, the adapter is saved with the other trained parameters,
    whole, in ``delta.safetensors``. Merging, and folding sparse deltas, leaves another ``model``.

    Guarantee:
        What the base's checkpoint lacks is saved too, whole, though it did not train: another process makes such layers
        of other random numbers (:func:`dpft.subset.base.new_tensors`).
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    sparse, own = deltas(model), trained_in_place(model)
    if is_adapted(model) and own:
        return _save_merged(model, own, folder)
    if is_adapted(model):
        save_adapters(model, folder, _tensors(model, new_tensors(model)))
        return DPFT_LINE if (folder / ADAPTERS).exists() else PEFT_LINE
    if not sparse or len(own) > len(sparse):
        return _save_whole(model, folder)
    new = new_tensors(model)
    if not sparse.keys() & set(new) and shira_rank(sparse):
        save_shira(model, sparse, folder, _tensors(model, new))
        return PEFT_LINE
    tensors = _tensors(model, new)
    for name, (_, delta) in sparse.items():
        if name not in tensors:
            tensors[f"{name}.indices"] = delta.indices.int() if delta.indices[-1] < 2**31 else delta.indices
            tensors[f"{name}.values"] = delta.values.detach()
    save_file(tensors, folder / DELTA)
    return DPFT_LINE


def trained_in_place(model: nn.Module) -> list[str]:
    """Names of the parameters that train and that no adapter holds, sparse vectors among them."""
    kept = saved_by_peft(model) if is_adapted(model) else set()
    return [name for name, p in model.named_parameters() if p.requires_grad and id(p) not in kept]


def changes_model(model: nn.Module) -> bool:
    """Whether :func:`save_weights` merges adapters or folds sparse deltas, which leaves another ``model``."""
    own, sparse = trained_in_place(model), deltas(model)
    return bool(own) and (bool(sparse) or can_merge(model)) if is_adapted(model) else 0 < len(sparse) < len(own)


def _save_whole(model: "PreTrainedModel", folder: Path) -> str:
    fold(model)
    model.save_pretrained(folder)
    return f'{type(model).__name__}.from_pretrained("weights")'


def _save_merged(model: "PeftModel", own: list[str], folder: Path) -> str:
    """Merged into one whole model where nothing is lost by it, and else as an adapter and whole tensors."""
    fold(model)
    save_adapters(model, folder, {})
    changed = {name.replace(".parametrizations.", ".").removesuffix(".0.values") for name in own}
    save_file(_tensors(model, sorted(changed | set(new_tensors(model)))), folder / DELTA)
    if can_merge(model):
        try:
            merged = model.merge_and_unload()
        except Exception:  # PEFT raises all kinds of errors for tuners that it cannot merge; what was saved stands
            return DPFT_LINE
        for file in (folder / DELTA, folder / ADAPTERS, *folder.glob("**/adapter_*")):
            file.unlink(missing_ok=True)
        return _save_whole(merged, folder)
    return DPFT_LINE


def _tensors(model: nn.Module, names: Iterable[str]) -> dict[str, Tensor]:
    """Parameters and buffers by name, as safetensors takes them; a sparse delta's weight with its delta."""
    return {name: attrgetter(name)(model).detach().clone().contiguous() for name in names}


def load_weights(model: nn.Module, folder: Path | str) -> nn.Module:
    """Put saved weights on the base model that they were trained on: adapters, a ``delta.safetensors``, or both.

    Raises:
        RecipeError: the folder holds neither, or they do not fit this model.
    """
    folder = Path(folder)
    adapted = (folder / "adapter_config.json").exists() or (folder / ADAPTERS).exists()
    if not (folder / DELTA).exists() and not adapted:
        raise RecipeError(f"{folder} has no {DELTA} and no adapter: load a whole model with its own from_pretrained.")
    if adapted:
        model = load_adapters(model, folder)
    if not (folder / DELTA).exists():
        return model
    tensors = model.state_dict()  # of the model's own storage
    saved = load_file(folder / DELTA)
    for key, tensor in saved.items():
        name = key.removesuffix(".values")
        if key.endswith(".indices") and key.removesuffix("indices") + "values" in saved:
            continue
        sparse = saved.get(f"{name}.indices") if key.endswith(".values") else None
        if name not in tensors or (sparse is None and tensors[name].shape != tensor.shape):
            raise RecipeError(
                f"{folder / DELTA} has {name}, which the model lacks: load the model that it was trained on."
            )
        if sparse is None:
            tensors[name].copy_(tensor)
        else:
            tensors[name].view(-1).index_add_(0, sparse.long(), tensor.to(tensors[name]))
    return model


def save_kept(model: nn.Module, file: Path) -> None:
    """What a checkpoint holds of a model: all that trains, and what stands beside it in an adapter.

    An adapter's frozen numbers follow from chance and from public data as another machine may not compute them again.
    """
    save_file({name: p.detach().contiguous() for name, p in _kept(model)}, file)


def load_kept(model: nn.Module, file: Path) -> None:
    """Load what :func:`save_kept` saved."""
    saved = load_file(file)
    with torch.no_grad():
        for name, parameter in _kept(model):
            if parameter.requires_grad or name in saved:  # a checkpoint of 0.1.0 holds what trains alone
                parameter.copy_(saved[name])


def _kept(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    adapter = saved_by_peft(model) if is_adapted(model) else set()
    return [(name, p) for name, p in model.named_parameters() if p.requires_grad or id(p) in adapter]
