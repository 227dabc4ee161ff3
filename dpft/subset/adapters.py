"""The one door to PEFT."""

import json
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, TypeGuard

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from dpft.errors import SubsetError, first_line
from dpft.subset.layers import last_blocks, untied_heads
from dpft.subset.parts import Lora, Tuner

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

    from dpft.subset.sparse import SparseDelta

ADAPTERS = "adapters.json"  # beside several adapters, each in a folder of its name: their names in order
TENSORS = "adapter_model.safetensors"

# Query and value of attention, and the input projections of state-space models, whose other layers PEFT refuses.
USUAL = {"query", "value", "q_proj", "v_proj", "qkv", "q", "v", "q_lin", "v_lin", "in_proj", "x_proj"}


def is_adapted(model: nn.Module) -> TypeGuard["PeftModel"]:
    from peft import PeftModel

    return isinstance(model, PeftModel)


def tuner_kinds() -> set[str]:
    """The names of PEFT's tuners, as a subset writes them."""
    from peft import PeftType

    return {kind.value.lower() for kind in PeftType}


def add_adapter(model: nn.Module, part: Lora | Tuner, *, with_head: bool) -> nn.Module:
    """Wrap ``model`` with the adapter; a head that is not tied to the embeddings moves into it, so that it is saved
    there.

    Returns:
        The PEFT model, which keeps what it replaced by trainable copies as ``original_module``.

    Raises:
        SubsetError: PEFT cannot place the adapter, or does not know a setting.
    """
    from peft import get_peft_model
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

    kind, given = ("lora", _lora_settings(model, part)) if isinstance(part, Lora) else (part.kind, dict(part.settings))
    config_class = PEFT_TYPE_TO_CONFIG_MAPPING[kind.upper()]
    known = {field.name for field in fields(config_class)}
    unknown = sorted(set(given) - known)
    if unknown:
        raise SubsetError(f"{kind} has no setting {unknown[0]!r}: PEFT knows {', '.join(sorted(known))}.")
    saved = _nameable(model, untied_heads(model)) if with_head and "modules_to_save" in known else []
    derived = {
        "task_type": _task_type(model, saved, prompt="num_virtual_tokens" in known),
        "modules_to_save": saved or None,
        "fan_in_fan_out": any(isinstance(module, Conv1D) for module in model.modules()),  # as GPT-2 stores weights
    }
    settings = {**{name: value for name, value in derived.items() if name in known}, **given}
    way_out = _way_out(
        model, part, known
    )  # said of the model as it is: PEFT leaves one that it cannot adapt half adapted
    try:
        model = _place(get_peft_model, model, config_class, settings, known)
    except (ValueError, TypeError, KeyError, AttributeError, AssertionError, RuntimeError) as error:
        reason = first_line(error).removesuffix(".")
        reason = reason.replace("target_modules", "targets") if isinstance(part, Lora) else reason
        raise SubsetError(f"PEFT cannot place {part} on {type(model).__name__} ({reason}): {way_out}.") from error
    if isinstance(part, Lora) and part.freeze_a:
        for name, parameter in model.named_parameters():
            if ".lora_A." in name or ".lora_embedding_A." in name:
                parameter.requires_grad_(False)
    return model


def _way_out(model: nn.Module, part: Lora | Tuner, known: set[str]) -> str:
    """Which of the part's own words chooses other layers, and what layers there are."""
    word = "targets" if isinstance(part, Lora) else "target_modules"
    if word == "target_modules" and word not in known:
        return "give the settings that PEFT's configuration names"
    return (
        f"choose its layers with {word}, among {', '.join(_linear_names(model)) or 'none, for it has no linear layer'}"
    )


def _place(get_peft_model, model: nn.Module, config_class, settings: dict, known: set[str]) -> nn.Module:
    """With PEFT's own choice of layers, or, for a model type that it has none for, with the usual attention layers."""
    try:
        return get_peft_model(model, config_class(**settings))
    except ValueError as error:
        wanted = next((key for key in ("target_modules", "feedforward_modules") if key in str(error)), None)
        if wanted is None or settings.get("target_modules") or "target_modules" not in known:
            raise
        chosen = {"target_modules": _attention(model)}
        if "feedforward_modules" in known:
            chosen["feedforward_modules"] = []
        return get_peft_model(model, config_class(**{**settings, **chosen}))


def _lora_settings(model: nn.Module, lora: Lora) -> dict:
    return {
        "r": lora.rank,
        "lora_alpha": lora.alpha or 2 * lora.rank,
        "lora_dropout": lora.dropout,
        "target_modules": _targets(model, lora),
        "use_dora": lora.dora,
        "use_rslora": lora.rslora,
    }


def _task_type(model: nn.Module, saved: list[str], *, prompt: bool) -> str | None:
    kind = type(model).__name__
    if getattr(model, "main_input_name", "input_ids") != "input_ids":
        return None  # PEFT's classes for tasks pass text on
    if kind.endswith(("ForCausalLM", "LMHeadModel")):
        return "CAUSAL_LM"
    if kind.endswith("ForConditionalGeneration") and getattr(model.config, "is_encoder_decoder", False):
        return "SEQ_2_SEQ_LM"
    if kind.endswith("ForSequenceClassification") and (saved or prompt):
        return "SEQ_CLS"  # PEFT then trains the head as well
    return None


def _targets(model: nn.Module, lora: Lora) -> str | list[str]:
    """What PEFT is to adapt: its own words, layer names, or full names where only the last blocks are adapted."""
    if lora.targets == "all-linear":
        wanted: str | list[str] = "all-linear"
    elif lora.targets != "attention":
        wanted = [target.strip() for target in lora.targets.split(",")]
        _check_targets(model, lora, wanted)
    else:
        wanted = _attention(model)
    if not lora.last_blocks:
        return wanted
    chosen = [
        f"{name}.{inner}"
        for name, block in last_blocks(model, lora.last_blocks, f"lora(last_blocks={lora.last_blocks})").items()
        for inner, module in block.named_modules()
        if isinstance(module, (nn.Linear, Conv1D)) and (wanted == "all-linear" or inner.rpartition(".")[2] in wanted)
    ]
    if not chosen:
        raise SubsetError(
            f"{lora} finds none of {', '.join(wanted)} in the last {lora.last_blocks} blocks: choose other targets."
        )
    return chosen


def _check_targets(model: nn.Module, lora: Lora, wanted: list[str]) -> None:
    """Raises SubsetError: a name is no layer's, nor the end of one's; PEFT passes over it if another matches."""
    names = [name for name, _ in model.named_modules()]
    missed = [target for target in wanted if not any(f".{name}".endswith(f".{target}") for name in names)]
    if missed:
        raise SubsetError(
            f"{lora} matches no layer of {type(model).__name__} with {missed[0]!r}: its linear layers are named "
            f"{', '.join(_linear_names(model)) or 'nothing, for it has none'}."
        )


def _linear_names(model: nn.Module) -> list[str]:
    """The last parts of the names of the linear layers, each once."""
    linear = {name.rpartition(".")[2] for name, m in model.named_modules() if isinstance(m, (nn.Linear, Conv1D))}
    return sorted(name for name in linear if not name.isdigit())


def _attention(model: nn.Module) -> str | list[str]:
    """PEFT's default layers for this model type, else the usual names of query and value, else every linear layer."""
    from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as KNOWN

    known = KNOWN.get(getattr(model.config, "model_type", ""))
    if known is not None:
        return list(known)
    return sorted(USUAL.intersection(_linear_names(model))) or "all-linear"


def active_adapters(model: "PeftModel") -> list[str]:
    """The names of the adapters that the forward pass uses, in the order in which it uses them."""
    if model.active_peft_config.peft_type == "XLORA":  # which stands for the adapters that it mixes
        return [model.active_adapter]
    return list(model.active_adapters)


def can_merge(model: "PeftModel") -> bool:
    """Whether the adapters' change can be added to the base's weights without loss.

    X-LoRA's depends on the input, and in half precision or a quantized base a small change would be rounded away.
    """
    mixed = model.active_peft_config.peft_type == "XLORA"
    exact = all(p.dtype == torch.float32 for p in model.parameters())
    return hasattr(model.base_model, "merge_and_unload") and exact and not mixed


def saved_by_peft(model: "PeftModel") -> set[int]:
    """Ids of the parameters that are in PEFT's checkpoints of the active adapters, or that made a prompt which is."""
    from peft import get_peft_model_state_dict

    places = {
        tensor.data_ptr()
        for name in active_adapters(model)
        for tensor in get_peft_model_state_dict(model, adapter_name=name).values()
        if isinstance(tensor, Tensor) and tensor.numel()
    }
    return {
        id(p) for name, p in model.named_parameters() if p.data_ptr() in places or name.startswith("prompt_encoder.")
    }


def save_adapters(model: "PeftModel", folder: Path, extra: Mapping[str, Tensor]) -> None:
    """The active adapter as PEFT saves it, whatever its name; several of them in folders of their names.

    Args:
        extra: tensors of the base by their names in ``model``, which PEFT loads into the base with the adapter.
    """
    names = active_adapters(model)
    places = {name: folder / name if len(names) > 1 else folder for name in names}
    for name, place in places.items():
        model.save_pretrained(place, selected_adapters=[name])
        if name != "default":  # PEFT makes a folder for any other name
            for file in (place / name).iterdir():
                file.replace(place / file.name)
            (place / name).rmdir()
    if len(names) > 1:
        (folder / ADAPTERS).write_text(json.dumps(names), encoding="utf-8")
    if extra:
        place = places[names[0]]
        save_file({**load_file(place / TENSORS), **extra}, place / TENSORS, metadata={"format": "pt"})
        _name_modules(model, place / "adapter_config.json", extra)


def _name_modules(model: "PeftModel", path: Path, extra: Mapping[str, Tensor]) -> None:
    """Name whole heads in the adapter's modules_to_save, so that each of several adapters on one base keeps its own."""
    config, base = json.loads(path.read_text(encoding="utf-8")), model.get_base_model()
    tensors = {id(tensor): name for name, tensor in model.state_dict(keep_vars=True).items()}
    whole = [
        head
        for head in untied_heads(base)
        if all(tensors.get(id(t)) in extra for t in base.get_submodule(head).state_dict(keep_vars=True).values())
    ]
    named = _nameable(base, whole)
    if named and "modules_to_save" in config:
        config["modules_to_save"] = sorted({*(config["modules_to_save"] or []), *named})
        path.write_text(json.dumps(config, indent=2, sort_keys=True), encoding="utf-8")


def _nameable(model: nn.Module, chosen: list[str]) -> list[str]:
    """Those of the modules that modules_to_save can name: PEFT takes every module whose name ends in such a name."""
    names = [name for name, _ in model.named_modules()]
    return [one for one in chosen if all(name in chosen for name in names if name.endswith(one))]


def load_adapters(model: nn.Module, folder: Path) -> "PeftModel":
    """PEFT's model around ``model``, with the adapter or the several that :func:`save_adapters` left."""
    from peft import PeftModel

    if not (folder / ADAPTERS).exists():
        return PeftModel.from_pretrained(model, folder)
    first, *others = names = json.loads((folder / ADAPTERS).read_text(encoding="utf-8"))
    adapted = PeftModel.from_pretrained(model, folder / first, adapter_name=first)
    for name in others:
        adapted.load_adapter(folder / name, name)
    adapted.base_model.set_adapter(names, inference_mode=True)
    return adapted


def shira_rank(sparse: "Mapping[str, tuple[nn.Module, SparseDelta]]") -> int:
    """The whole r for which every delta is of a linear layer and has r·(in + out) weights, as SHiRA demands; else 0."""
    ranks = {
        len(delta.values) / (layer.in_features + layer.out_features) if isinstance(layer, nn.Linear) else 0
        for layer, delta in sparse.values()
    }
    rank = ranks.pop()
    return 0 if ranks or rank % 1 else int(rank)


def save_shira(
    model: "PreTrainedModel",
    sparse: "Mapping[str, tuple[nn.Module, SparseDelta]]",
    folder: Path,
    extra: Mapping[str, Tensor],
) -> None:
    """Sparse deltas of linear layers as PEFT's SHiRA adapter (Bhardwaj et al. 2024).

    Args:
        extra: tensors of the model by their names, which PEFT loads into the base with the adapter.
    """
    from peft import ShiraConfig

    names = {
        weight.rpartition(".")[0]: (layer, delta)
        for weight, (layer, delta) in sparse.items()
        if isinstance(layer, nn.Linear)
    }
    config = ShiraConfig(
        r=shira_rank(sparse), target_modules=sorted(names), base_model_name_or_path=model.config.name_or_path
    )
    config.inference_mode = True
    config.save_pretrained(folder)
    tensors = {f"base_model.model.{name}": tensor for name, tensor in extra.items()}
    for name, (layer, delta) in names.items():
        places = torch.stack([delta.indices // layer.in_features, delta.indices % layer.in_features])
        tensors[f"base_model.model.{name}.shira_indices"] = places.int()
        tensors[f"base_model.model.{name}.shira_weight"] = delta.values.detach()
    save_file(tensors, folder / TENSORS, metadata={"format": "pt"})
