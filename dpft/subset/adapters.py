"""The one door to PEFT."""

from typing import TYPE_CHECKING

from torch import nn

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
    if lora.last_blocks:
        name, found = blocks(model)
        settings["layers_to_transform"] = list(range(len(found) - lora.last_blocks, len(found)))
        settings["layers_pattern"] = name.rpartition(".")[2]
    kind = type(model).__name__
    task_type = "CAUSAL_LM" if kind.endswith(("ForCausalLM", "LMHeadModel")) else "SEQ_CLS" if saved and kind.endswith("ForSequenceClassification") else None
    moved = {id(p) for name in saved for p in model.get_submodule(name).parameters()}
    targets = _targets(model, lora.targets)
    try:
        return get_peft_model(model, LoraConfig(task_type=task_type, target_modules=targets, modules_to_save=saved or None, **settings)), moved
    except ValueError as error:
        raise SubsetError(f"PEFT cannot place lora on {kind} ({error}): give targets=\"all-linear\" or layer names.") from error


def _targets(model: nn.Module, targets: str) -> str | list[str] | None:
    if targets == "all-linear":
        return targets
    if targets != "attention":
        return [target.strip() for target in targets.split(",")]
    from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as KNOWN

    known = KNOWN.get(getattr(model.config, "model_type", ""))
    if known is not None:
        return list(known)
    names = {name.rpartition(".")[2] for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    attention = sorted(names & {"query", "value", "q_proj", "v_proj", "qkv", "q", "v", "q_lin", "v_lin"})
    return attention or "all-linear"


def _untied_heads(model: nn.Module) -> list[str]:
    embeddings = model.get_input_embeddings().weight if hasattr(model, "get_input_embeddings") and hasattr(model.get_input_embeddings(), "weight") else None
    return [name for name in heads(model) if not any(p is embeddings for p in model.get_submodule(name).parameters())]
