"""The one door to PEFT."""

from typing import TYPE_CHECKING

from torch import nn
from transformers.pytorch_utils import Conv1D

from dpft.errors import SubsetError
from dpft.subset.layers import blocks, heads

if TYPE_CHECKING:
    from dpft.subset.parts import Lora


def is_adapted(model: nn.Module) -> bool:
    from peft import PeftModel

    return isinstance(model, PeftModel)


def add_lora(model: nn.Module, lora: "Lora", *, with_head: bool) -> tuple[nn.Module, set[int]]:
    """Wrap ``model`` with LoRA; a head that is not tied to the embeddings moves into the adapter, so that it is saved there.

    Returns:
        The PEFT model and the ids of the original parameters that PEFT replaced by trainable copies.

    Raises:
        SubsetError: PEFT finds no layer to adapt.
    """
    from peft import LoraConfig, get_peft_model

    saved = _untied_heads(model) if with_head else []
    settings = dict(r=lora.rank, lora_alpha=lora.alpha or 2 * lora.rank, lora_dropout=lora.dropout)
    kind = type(model).__name__
    task_type = (
        "CAUSAL_LM"
        if kind.endswith(("ForCausalLM", "LMHeadModel"))
        else "SEQ_CLS"
        if saved and kind.endswith("ForSequenceClassification")
        else None
    )
    moved = {id(p) for name in saved for p in model.get_submodule(name).parameters()}
    targets = _targets(model, lora)
    settings["fan_in_fan_out"] = any(
        isinstance(module, Conv1D) for module in model.modules()
    )  # as GPT-2 stores weights
    try:
        return get_peft_model(
            model, LoraConfig(task_type=task_type, target_modules=targets, modules_to_save=saved or None, **settings)
        ), moved
    except ValueError as error:
        raise SubsetError(
            f'PEFT cannot place lora on {kind} ({error}): give targets="all-linear" or layer names.'
        ) from error


def _targets(model: nn.Module, lora: "Lora") -> str | list[str]:
    """What PEFT is to adapt: its own words, layer names, or full names where only the last blocks are adapted."""
    if lora.targets == "all-linear":
        wanted: str | list[str] = "all-linear"
    elif lora.targets != "attention":
        wanted = [target.strip() for target in lora.targets.split(",")]
    else:
        wanted = _attention(model)
    if not lora.last_blocks:
        return wanted
    name, found = blocks(model)
    if lora.last_blocks > len(found):
        raise SubsetError(
            f"lora(last_blocks={lora.last_blocks}) was asked of {len(found)} blocks in {name}: choose at most {len(found)}."
        )
    first = len(found) - lora.last_blocks
    return [
        f"{name}.{first + i}.{inner}"
        for i, block in enumerate(found[first:])
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
