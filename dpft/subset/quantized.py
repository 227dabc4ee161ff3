"""Whether a recipe needs bitsandbytes, and how a command that needs it not does without.

PEFT imports bitsandbytes wherever it is installed, which takes more than a second because PyTorch's compiler comes
along.
"""

import sys
from collections.abc import Iterator
from contextlib import contextmanager

from dpft.recipe import Recipe, expand

OWN_OPTIMIZERS = ("adamw_torch", "adamw_torch_fused", "adafactor", "sgd", "adagrad", "rmsprop")  # no quantized state

ANSWERS = {
    "peft.import_utils": ("is_bnb_available", "is_bnb_4bit_available"),
    "transformers.utils.import_utils": ("is_bitsandbytes_available",),
}


def may_need_bitsandbytes(recipe: Recipe) -> bool:
    """False only if the recipe, and the model's configuration as far as it can be read, name nothing quantized."""
    if recipe.model.quantize or recipe.optimizer.name not in OWN_OPTIMIZERS or "loftq" in recipe.subset.lower():
        return True
    from transformers import PreTrainedConfig

    try:
        found, _ = PreTrainedConfig.get_config_dict(expand(recipe.model.path), revision=recipe.model.revision)
    except Exception:  # whatever it is, loading the model says it better
        return True
    return not found or "quantization_config" in str(found)


@contextmanager
def without_bitsandbytes() -> Iterator[None]:
    """While entered, bitsandbytes is as if it were not installed. Nothing happens where PEFT is imported already.

    It is for a process that has one model, as a command: a library must not decide what is installed.
    """
    if "peft" in sys.modules or "bitsandbytes" in sys.modules:
        yield
        return
    sys.modules["bitsandbytes"] = None  # type: ignore[assignment]  # Python's way to say that a module does not exist
    try:
        yield
    finally:
        del sys.modules["bitsandbytes"]
        _forget_answers()


def _forget_answers() -> None:
    """PEFT and transformers remember what they found installed."""
    for module, names in ANSWERS.items():
        for name in names:
            if module in sys.modules:
                getattr(sys.modules[module], name).cache_clear()
