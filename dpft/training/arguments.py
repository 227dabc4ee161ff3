"""What of ``transformers.TrainingArguments`` would break the guarantee, and why."""

import warnings
from dataclasses import fields
from typing import Any

from transformers import TrainingArguments

from dpft.errors import GuaranteeError
from dpft.privacy.plan import Plan

# Arguments of TrainingArguments that would break the guarantee, the value they must have, and why.
FORBIDDEN = {
    "gradient_accumulation_steps": (1, "a logical batch is one release; its micro-batches are cut by token_budget"),
    "label_smoothing_factor": (0.0, "it averages over the batch; build it into the task's per-example losses"),
    "train_sampling_strategy": ("random", "only Poisson sampling is accounted"),
    "group_by_length": (False, "only Poisson sampling is accounted; micro-batches are sorted by length anyway"),
    "fp16": (False, "loss scaling multiplies gradients before they are clipped; use bf16"),
    "auto_find_batch_size": (False, "it repeats steps that have been released; lower token_budget"),
    "load_best_model_at_end": (False, "choosing a checkpoint by private data is a release of its own"),
    "include_num_input_tokens_seen": ("no", "the true number of tokens is private"),
    "use_liger_kernel": (False, "it replaces layers after the preflight"),
    "neftune_noise_alpha": (None, "it hooks the embeddings after the preflight"),
    "full_determinism": (False, "it makes runs repeatable, and private noise must not be"),
    "torch_compile": (False, "it bypasses the layers that the engine hooks"),
    "packing": (False, "packing puts several records into one example"),
    "padding_free": (False, "it joins the records of a batch into one sequence"),
    "push_to_hub": (False, "it uploads the whole output folder, private/ included; push the finished weights"),
}
# What Trainer would read, and a private run takes from its plan.
IGNORED = ("num_train_epochs", "per_device_train_batch_size", "dataloader_drop_last")
INSIDE_BACKWARD = ("lomo", "layerwise")  # parts of the names of optimizers that step while gradients are being made


def check_arguments(args: TrainingArguments, plan: Plan, evaluation_is_public: bool) -> None:
    """Refuse what would break the guarantee, by name.

    Raises:
        GuaranteeError: with the argument, its value, why and what to do.
    """
    for name, (allowed, why) in FORBIDDEN.items():
        value = getattr(args, name, allowed)
        if value != allowed and value not in (None, False):
            raise GuaranteeError(f"TrainingArguments.{name} is {value!r}, but {why}: leave it at {allowed!r}.")
    if args.max_grad_norm not in (None, 0, 0.0, _default(args, "max_grad_norm")):
        raise GuaranteeError(
            f"TrainingArguments.max_grad_norm is {args.max_grad_norm}, which clips the batch and not its units: set "
            "the plan's clip, and leave this at its default."
        )
    optimizer = str(getattr(args.optim, "value", args.optim))
    if any(part in optimizer for part in INSIDE_BACKWARD):
        raise GuaranteeError(
            f"TrainingArguments.optim is {optimizer!r}, which changes weights inside the backward pass, before "
            "clipping and noise: choose another, such as 'adamw_torch'."
        )
    if args.max_steps not in (-1, plan.steps):
        raise GuaranteeError(
            f"TrainingArguments.max_steps is {args.max_steps:,}, but the plan accounts for {plan.steps:,} releases: "
            "leave it out, the plan decides."
        )
    if args.n_gpu > 1 or args.world_size > 1:
        raise GuaranteeError(
            f"{max(args.n_gpu, args.world_size)} devices would each add noise or sample on their own: run on one."
        )
    if str(getattr(args.eval_strategy, "value", args.eval_strategy)) != "no" and not evaluation_is_public:
        raise GuaranteeError(
            "eval_strategy logs un-noised metrics while training: pass evaluation_is_public=True if the evaluation "
            "data are public, or call evaluate() afterwards."
        )
    if str(getattr(args.save_strategy, "value", args.save_strategy)) == "best":
        raise GuaranteeError(
            "save_strategy='best' chooses a checkpoint by a metric, a release of its own: save by steps."
        )


def warn_of_ignored(args: TrainingArguments) -> None:
    """One warning that names arguments which were set and which the plan decides instead."""
    ignored = [name for name in IGNORED if getattr(args, name, None) != _default(args, name)]
    if ignored:
        warnings.warn(
            f"{', '.join(ignored)} {'is' if len(ignored) == 1 else 'are'} not used: the plan says how many units a "
            "step draws and how many steps there are, and token_budget how large a micro-batch is.",
            stacklevel=4,
        )


def _default(args: TrainingArguments, name: str) -> Any:
    return next(f.default for f in fields(args) if f.name == name)
