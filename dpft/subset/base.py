"""The base model below what was trained: what its checkpoint lacks, and the model that it makes."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from dpft.subset.adapters import is_adapted
from dpft.subset.layers import untied_heads

if TYPE_CHECKING:
    from transformers import PreTrainedModel

WRAPPERS = {"base_layer", "parametrizations", "original"}  # what adapters and sparse deltas put into names


def base_of(model: nn.Module) -> nn.Module:
    """The Hugging Face model inside; ``model`` itself if it has no adapter."""
    return model.get_base_model() if is_adapted(model) else model


def new_tensors(model: nn.Module) -> list[str]:
    """Names in ``model`` of the base's parameters and buffers that its checkpoint lacks, or has in another shape.

    transformers itself says which: it loads the checkpoint that ``config._name_or_path`` names onto the meta device,
    where no weight is read. What a user put in place of a head counts too. Tied tensors are named once.

    Where no checkpoint can be read, the model was made from its configuration. Every head that is not tied to the
    embeddings is then taken to be new.
    """
    base = base_of(model)
    prefix = "".join(f"{name}." for name, module in model.named_modules() if module is base and name)
    heads = tuple(f"{name}." for name in untied_heads(base))
    names, lacking = _checkpoint(base)
    adapters = [f".{name}." for name in getattr(model, "peft_config", {})] if is_adapted(model) else []
    chosen: dict[int, str] = {}
    for name, tensor in model.state_dict().items():
        if not name.startswith(prefix) or not isinstance(tensor, torch.Tensor):
            continue
        if ".original_module." in name:  # a copy of it trains and is used instead
            continue
        plain = ".".join(part for part in name.removeprefix(prefix).split(".") if part not in WRAPPERS)
        if plain in names:
            new = lacking.get(plain, tensor.shape) != tensor.shape
        else:
            new = plain.startswith(heads) and not any(adapter in f"{name}." for adapter in adapters)
        if new and (".parametrizations." not in name or name.endswith(".original")):
            chosen.setdefault(tensor.data_ptr(), name.replace(".parametrizations.", ".").removesuffix(".original"))
    return list(chosen.values())


def _checkpoint(base: nn.Module) -> tuple[set[str], dict[str, torch.Size | None]]:
    """The names of a fresh model, and of what its checkpoint lacks (None) or has in another shape; both empty without
    one."""
    loaded = load_base(base, device_map="meta", output_loading_info=True)
    if loaded is None:
        return set(), {}
    empty, report = loaded
    lacking = dict.fromkeys(report["missing_keys"]) | {name: shape for name, shape, _ in report["mismatched_keys"]}
    return set(empty.state_dict()), lacking


def load_base(base: "PreTrainedModel", **options: Any) -> Any:
    """The model that the checkpoint of ``base`` makes, with new layers initialised afresh; None if it cannot be read.

    Args:
        options: of ``from_pretrained``; by default those that give the type and quantization of ``base``.
    """
    config: Any = copy.deepcopy(getattr(base, "config", None))
    path = getattr(config, "_name_or_path", "")
    if not path:
        return None
    try:
        with quiet():
            quantization = config.__dict__.pop("quantization_config", None)
            if not options:
                options = {"dtype": base.dtype, "device_map": {"": base.device}}
                if quantization is not None and hasattr(type(config).from_pretrained(path), "quantization_config"):
                    config.quantization_config = quantization  # the checkpoint itself is quantized
                elif quantization is not None:
                    options["quantization_config"] = quantization
            revision = getattr(config, "_commit_hash", None) or "main"
            options = {**options, "revision": revision, "local_files_only": True, "ignore_mismatched_sizes": True}
            return type(base).from_pretrained(path, config=config, **options)
    except Exception:  # transformers raises all kinds of errors for a folder that is gone or another model's
        return None


@contextmanager
def quiet() -> Iterator[None]:
    """Hugging Face's loading bars and advice, off while a checkpoint loads."""
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()
