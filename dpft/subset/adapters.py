"""The one door to PEFT."""

from dataclasses import fields
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn
from transformers.pytorch_utils import Conv1D

from dpft.errors import SubsetError
from dpft.subset.layers import heads, last_blocks
from dpft.subset.parts import Lora, Tuner


def is_adapted(model: nn.Module) -> bool:
    from peft import PeftModel

    return isinstance(model, PeftModel)


def tuner_kinds() -> set[str]:
    """The names of PEFT's tuners, as a subset writes them."""
    from peft import PeftType

    return {kind.value.lower() for kind in PeftType}


def add_adapter(model: nn.Module, part: Lora | Tuner, *, with_head: bool) -> nn.Module:
    """Wrap ``model`` with the adapter; a head that is not tied to the embeddings moves into it, so that it is saved there.

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
    saved = _untied_heads(model) if with_head and "modules_to_save" in known else []
    derived = {
        "task_type": _task_type(model, saved, prompt="num_virtual_tokens" in known),
        "modules_to_save": saved or None,
        "fan_in_fan_out": any(isinstance(module, Conv1D) for module in model.modules()),  # as GPT-2 stores weights
    }
    settings = {**{name: value for name, value in derived.items() if name in known}, **given}
    try:
        return _place(get_peft_model, model, config_class, settings, known)
    except (ValueError, TypeError, KeyError, AttributeError, AssertionError, RuntimeError) as error:
        raise SubsetError(
            f"PEFT cannot place {kind} on {type(model).__name__} ({str(error) or type(error).__name__}): give the settings that "
            "PEFT's configuration names, such as target_modules."
        ) from error


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
    else:
        wanted = _attention(model)
    if not lora.last_blocks:
        return wanted
    return [
        f"{name}.{inner}"
        for name, block in last_blocks(model, lora.last_blocks, f"lora(last_blocks={lora.last_blocks})").items()
        for inner, module in block.named_modules()
        if isinstance(module, (nn.Linear, Conv1D)) and (wanted == "all-linear" or inner.rpartition(".")[2] in wanted)
    ]


def _attention(model: nn.Module) -> str | list[str]:
    """PEFT's default layers for this model type, else the usual names of query and value, else every linear layer."""
    from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as KNOWN

    known = KNOWN.get(getattr(model.config, "model_type", ""))
    if known is not None:
        return list(known)
    names = {name.rpartition(".")[2] for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    usual = sorted(names & {"query", "value", "q_proj", "v_proj", "qkv", "q", "v", "q_lin", "v_lin"})
    return usual or "all-linear"


def _untied_heads(model: nn.Module) -> list[str]:
    embeddings = (
        model.get_input_embeddings().weight
        if hasattr(model, "get_input_embeddings") and hasattr(model.get_input_embeddings(), "weight")
        else None
    )
    return [name for name in heads(model) if not any(p is embeddings for p in model.get_submodule(name).parameters())]


def saved_by_peft(model: nn.Module) -> set[int]:
    """Ids of the parameters that are in PEFT's own checkpoint, or that made a prompt which is."""
    from peft import get_peft_model_state_dict

    places = {tensor.data_ptr() for tensor in get_peft_model_state_dict(model).values() if tensor.numel()}
    return {
        id(p) for name, p in model.named_parameters() if p.data_ptr() in places or name.startswith("prompt_encoder.")
    }


def shira_rank(sparse: dict) -> int:
    """The whole r for which every delta is of a linear layer and has r·(in + out) weights, as SHiRA demands; else 0."""
    ranks = {
        len(delta.values) / (layer.in_features + layer.out_features) if isinstance(layer, nn.Linear) else 0
        for layer, delta in sparse.values()
    }
    rank = ranks.pop()
    return 0 if ranks or rank % 1 else int(rank)


def save_shira(model: nn.Module, sparse: dict, rank: int, folder: Path) -> None:
    """Sparse deltas of linear layers as a SHiRA adapter (Bhardwaj et al. 2024) that ``PeftModel.from_pretrained`` loads."""
    from peft import ShiraConfig

    names = {weight.rpartition(".")[0]: pair for weight, pair in sparse.items()}
    config = ShiraConfig(r=rank, target_modules=sorted(names), base_model_name_or_path=model.config.name_or_path)
    config.inference_mode = True
    config.save_pretrained(folder)
    tensors = {}
    for name, (layer, delta) in names.items():
        places = torch.stack([delta.indices // layer.in_features, delta.indices % layer.in_features])
        tensors[f"base_model.model.{name}.shira_indices"] = places.int()
        tensors[f"base_model.model.{name}.shira_weight"] = delta.values.detach()
    save_file(tensors, folder / "adapter_model.safetensors")
