"""Whether saved weights load to the model that was trained: on a copy before the first charge, and at the end.

::

    check_room(model, output, checkpoints=3)
    check_savable(model, evaluate, load_base)      # nothing is charged yet
    ...                                            # training
    expected = outputs(model, evaluate)
    line = save_weights(model, folder)
    check_saved(expected, line, folder, evaluate, load_base)
"""

import copy
import math
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from dpft.errors import DPFTError, GuaranteeError, RecipeError, SubsetError, first_line
from dpft.subset.adapters import active_adapters, is_adapted
from dpft.subset.base import base_of, load_base, new_tensors, quiet
from dpft.subset.sparse import deltas
from dpft.subset.weights import changes_model, load_weights, save_weights, trained_in_place

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Evaluate = Callable[[nn.Module], Tensor]
LARGEST = 2 << 30  # bytes that a trial writes at most; larger weights are compared at the end of the run alone
FRESH_SEED = 0x5EED  # of new layers in a base that is loaded for a comparison
STEP = 0.02  # how far a trial moves what trains at first, about as far as training does
DOUBLINGS = 10  # of that, until the outputs show it
VISIBLE = 5.0  # a trial's move changes outputs by so many times what rounding explains
KEEPS_BASE = ("gaussian", "orthogonal", "eva")  # LoRA's initialisations that leave the base as it is
SMALLEST = 0.02
FLOAT32_TOLERANCE = 2e-4  # of the largest output; merging an adapter moves it by about 1e-6
OTHER_TOLERANCE = 4.0  # in units of the type's precision, 0.03 in bfloat16: SHiRA rounds once more than a sparse delta


def outputs(model: nn.Module, evaluate: Evaluate) -> Tensor:
    """What ``evaluate(model)`` gives in evaluation mode, without gradients, with fixed chance; float64, on the CPU.

    Args:
        evaluate: logits or losses of a small batch; a function of the model alone.
    """
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad(), torch.random.fork_rng(_cuda(model)):
            torch.manual_seed(0)
            return evaluate(model).detach().double().cpu()
    finally:
        model.train(was_training)


def check_saved(
    expected: Tensor, line: str, folder: Path | str, evaluate: Evaluate, load_base: Callable[[], nn.Module]
) -> None:
    """Load the saved weights as ``line`` says, and compare.

    Args:
        expected: :func:`outputs` of the trained model, taken before it was saved, which may merge it.
        line: what :func:`dpft.subset.save_weights` returned.
        load_base: makes the base model as a user would; its new layers get other random numbers here.

    Raises:
        GuaranteeError: they cannot be loaded, or the outputs differ by more than rounding explains. Its numbers are as
            private as the batch that ``evaluate`` uses.
    """
    try:
        with quiet(), torch.random.fork_rng(list(range(torch.cuda.device_count()))):
            torch.manual_seed(FRESH_SEED)
            model = _load(line, Path(folder), load_base)
            found = outputs(model, evaluate)
    except Exception as error:  # transformers and PEFT raise all kinds of errors
        raise GuaranteeError(
            f"The weights in {folder} cannot be loaded with {line} ({first_line(error)}), so nobody could use what was "
            "trained: choose another subset, such as lora + head."
        ) from error
    difference, scale = _difference(found, expected), _scale(expected)
    allowed = _tolerance(model) * scale
    if not difference <= allowed:
        raise GuaranteeError(
            f"The weights in {folder} load with {line} to another model: outputs differ by {difference:.2g} where the "
            f"trained model's reach {scale:.2g} and rounding explains {allowed:.1g}; choose another subset, such as "
            "lora + head."
        )


def check_savable(
    model: nn.Module,
    evaluate: Evaluate,
    load_base: Callable[[], nn.Module] | None = None,
    folder: Path | str | None = None,
    free: float = math.inf,
) -> bool:
    """Save and load a copy of ``model`` whose trainable parameters are moved a little; ``model`` is left as it is.

    The copy shares all tensors that saving leaves alone; it must be made before an engine hooks into ``model``.
    Without ``load_base`` the base comes from its checkpoint. Where that cannot be read, or does not fit in memory, it
    comes from ``model`` itself, with other random numbers in what is new.

    Args:
        folder: where a temporary folder may lie, for this user only; by default the system's.
        free: bytes of memory that copies may take.

    Returns:
        Whether it was tried. It is not if the weights are above 2 GiB, if saving needs a full copy that does not fit
        in memory, or if the base cannot be had.

    Raises:
        SubsetError: an adapter cannot be saved; named.
        GuaranteeError: see :func:`check_saved`.
    """
    _refuse_unsavable(model)
    copied = tensor_bytes(model) if changes_model(model) else 0
    if saved_bytes(model) > LARGEST or copied > free:
        return False
    if copied + tensor_bytes(base_of(model)) > free:
        load_base = None
    elif load_base is None:
        load_base = _checkpoint_loader(model)
    if load_base is None and not _base_is_kept(model):
        return False
    moved = _copy(model, {} if copied else _shared(model, _trainable(model)))
    expected = _move(moved, evaluate)
    with tempfile.TemporaryDirectory(prefix="dpft-", dir=folder) as place:
        try:
            with quiet():
                line = save_weights(moved, place)
        except Exception as error:
            if isinstance(error, DPFTError):
                raise
            raise GuaranteeError(
                f"What trains in {type(base_of(model)).__name__} cannot be saved ({first_line(error)}), so the budget "
                "would be spent on nothing: choose another subset, such as lora + head."
            ) from error
        check_saved(expected, line, place, evaluate, load_base or (lambda: _own_base(model)))
    return True


def check_room(model: nn.Module, folder: Path | str, checkpoints: int = 0) -> None:
    """Raises RecipeError: the disk of ``folder`` has no room for the weights and so many checkpoints of them."""
    trained = sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)
    needed = saved_bytes(model) + checkpoints * (
        saved_bytes(model) + 3 * trained
    )  # with the subset and Adam's two moments
    place = Path(folder).absolute()
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free
    if needed > free:
        raise RecipeError(
            f"The weights and {checkpoints} checkpoints take {needed / 1e9:,.2f} GB and {place} has {free / 1e9:,.2f} "
            "GB free, so a run would end unsaved: free some, or save fewer checkpoints."
        )


def saved_bytes(model: nn.Module) -> int:
    """Bytes that :func:`dpft.subset.save_weights` writes at most, for a moment twice where it merges."""
    sparse, own = deltas(model), trained_in_place(model)
    trained = sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)
    if changes_model(model) or not (sparse or is_adapted(model)):
        return tensor_bytes(model) + trained * is_adapted(model)
    tensors = model.state_dict()
    new = sum(tensors[name].nbytes for name in new_tensors(model) if name in tensors)
    return trained + new + sum(delta.indices.nbytes for _, delta in sparse.values() if own)


def tensor_bytes(model: nn.Module) -> int:
    """Bytes of the parameters and buffers, tied ones once."""
    return sum(tensor.nbytes for tensor in {id(t): t for t in (*model.parameters(), *model.buffers())}.values())


def _load(line: str, folder: Path, load_base: Callable[[], "PreTrainedModel"]) -> nn.Module:
    """What ``line`` says, and no more."""
    if line.startswith("peft."):
        from peft import PeftModel

        return PeftModel.from_pretrained(load_base(), folder)
    if line.startswith("dpft."):
        return load_weights(load_base(), folder)
    import transformers

    base = load_base()
    kind, device = getattr(transformers, line.partition(".")[0], type(base)), base.device
    del base  # so that there are never two of them
    model = kind.from_pretrained(folder)
    return model if getattr(model, "is_quantized", False) else model.to(device)


def _scale(expected: Tensor) -> float:
    """The largest output; one below ``SMALLEST`` is a small difference of larger numbers, whose rounding it has."""
    return max(SMALLEST, float(expected.nan_to_num(0.0, 0.0, 0.0).abs().max()))


def _difference(found: Tensor, expected: Tensor) -> float:
    """The largest absolute difference; infinite for another shape, and where one is not a number and the other is."""
    if found.shape != expected.shape:
        return float("inf")
    both = found.isnan() & expected.isnan() | (found == expected)
    return float((found - expected).masked_fill(both, 0.0).abs().nan_to_num(float("inf")).max())


def _tolerance(model: nn.Module) -> float:
    """How far outputs may differ, as a share of the largest, by the coarsest type that the model computes in.

    A quantized layer counts as twice bfloat16: its scales are rounded too, where a CPU packs them.
    """
    types = {tensor.dtype for tensor in model.parameters()}
    quantized = 2 * torch.finfo(torch.bfloat16).eps
    coarse = [torch.finfo(kind).eps if kind.is_floating_point else quantized for kind in types]
    return max(FLOAT32_TOLERANCE, *(OTHER_TOLERANCE * eps for eps in coarse))


def _refuse_unsavable(model: nn.Module) -> None:
    from peft import PeftMixedModel

    if isinstance(model, PeftMixedModel):
        raise SubsetError(
            f"The adapters {', '.join(model.peft_config)} are of several kinds in a PeftMixedModel, which PEFT cannot "
            "save: train one of them in a PeftModel."
        )
    if not is_adapted(model):
        return
    active = active_adapters(model)
    for adapter in model.peft_config:
        count = sum(p.requires_grad for p in _adapter_parameters(model, adapter))
        if count and adapter not in active and model.active_peft_config.peft_type != "XLORA":  # which mixes the others
            raise SubsetError(
                f"The adapter {adapter!r} trains and is not active, so its {count} parameters would be noise: activate "
                "it with set_adapter, or freeze it."
            )


def _adapter_parameters(model: nn.Module, adapter: str) -> Iterator[nn.Parameter]:
    from peft.tuners.tuners_utils import BaseTunerLayer

    for module in model.modules():
        if isinstance(module, BaseTunerLayer):
            for kind in module.adapter_layer_names:
                held = getattr(module, kind, None)
                if isinstance(held, (nn.ModuleDict, nn.ParameterDict)) and adapter in held:
                    part = held[adapter]
                    yield from part.parameters() if isinstance(part, nn.Module) else [part]


def _trainable(model: nn.Module) -> list[Tensor]:
    return [p for p in model.parameters() if p.requires_grad]


def _copy(model: nn.Module, shared: dict[int, Tensor]) -> nn.Module:
    """A deep copy but for ``shared``; each layer with a sparse delta gets a class of its own, which folding alters."""
    copied = copy.deepcopy(model, shared)
    for module in copied.modules():
        if parametrize.is_parametrized(module):
            kind = type(module)
            module.__class__ = type(kind.__name__, kind.__bases__, dict(vars(kind)))
    return copied


def _shared(model: nn.Module, copied: list[Tensor]) -> dict[int, Tensor]:
    """What ``copy.deepcopy`` takes instead of copies: all tensors but ``copied``, each in the same memory.

    A parameter is another object in the copy, because PEFT gives some new data when it loads. A quantized one is the
    same object. On a CPU it is copied: there bitsandbytes packs it in place, with less precision, at an evaluation.
    """
    own, shared = {id(tensor) for tensor in copied}, {}
    for tensor in (*model.parameters(), *model.buffers()):
        plain = isinstance(tensor, nn.Parameter) and tensor.is_floating_point()
        quantized = isinstance(tensor, nn.Parameter) and not plain
        if id(tensor) not in own and not (quantized and tensor.device.type == "cpu"):
            shared[id(tensor)] = nn.Parameter(tensor.data, tensor.requires_grad) if plain else tensor
    return shared


def _move(model: nn.Module, evaluate: Evaluate) -> Tensor:
    """Move every trainable parameter by random steps until the outputs show it; returns these outputs."""
    generator, before = torch.Generator().manual_seed(1), outputs(model, evaluate)
    visible = VISIBLE * _tolerance(model) * _scale(before)
    for doublings in range(DOUBLINGS):
        with torch.no_grad():
            for parameter in _trainable(model):
                step = torch.randn(parameter.shape, generator=generator, dtype=torch.float32)
                parameter += STEP * 2**doublings * step.to(parameter)
        moved = outputs(model, evaluate)
        if _difference(moved, before) > visible:
            break
    return moved


def _checkpoint_loader(model: nn.Module) -> Callable[[], nn.Module] | None:
    """Loads the base from its checkpoint; None if that cannot be read."""
    base = base_of(model)
    return (lambda: load_base(base)) if load_base(base, device_map="meta") is not None else None


def _own_base(model: nn.Module) -> nn.Module:
    """The base below ``model``, in its memory, but with other random numbers in what its checkpoint lacks."""
    tensors, sparse = model.state_dict(keep_vars=True), deltas(model)
    new = [name for name in new_tensors(model) if name in tensors]
    loaded = [tensors[name] for name in new] + _trainable(model)  # loading writes into these, and into sparse layers
    own = _copy(model, _shared(model, loaded + [p for layer, _ in sparse.values() for p in layer.parameters()]))
    for name, tensor in own.state_dict().items():
        if name in new:
            tensor.normal_(std=STEP)
    for name, (layer, _) in deltas(own).items():
        parametrize.remove_parametrizations(layer, name.rpartition(".")[2], leave_parametrized=False)
    if not is_adapted(own):
        return own
    if hasattr(own.base_model, "unload"):
        return own.unload()
    if hasattr(own.base_model, "disable_adapter_layers"):  # adaption prompts, which stand around attention layers
        own.base_model.disable_adapter_layers()
    return own.get_base_model()


def _base_is_kept(model: nn.Module) -> bool:
    """Whether the base below ``model`` is what it was: PiSSA and its like move a part of it into the adapter."""
    kinds = [getattr(config, "init_lora_weights", True) for config in getattr(model, "peft_config", {}).values()]
    return not is_adapted(model) or all(not isinstance(kind, str) or kind in KEEPS_BASE for kind in kinds)


def _cuda(model: nn.Module) -> list[int]:
    device = next(model.parameters()).device
    return [device.index or 0] if device.type == "cuda" else []
