"""The losses of Hugging Face's heads, example by example.

Each rule turns a model and a collated batch into ``(B,)`` losses. For one example it is the loss that
``model(**batch)`` returns, where the model follows the rule; :func:`dpft.tasks.own_loss.own_rule` finds out which that
is.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy, ctc_loss, log_softmax

from dpft.tasks.head import before_head
from dpft.tasks.losses import class_losses, token_losses, without_labels

Rule = Callable[[nn.Module, Mapping[str, Tensor]], Tensor]


def classes(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    """One class for each example: ``labels`` ``(B,)``. An encoder-decoder makes its decoder's input of other
    columns."""
    return class_losses(model(**without_labels(batch)).logits, batch["labels"].long().flatten())


def several_labels(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    """Labels that hold together: ``labels`` ``(B, C)`` of 0 and 1; an example's loss is the mean over its C."""
    logits = model(**without_labels(batch)).logits.float()
    return binary_cross_entropy_with_logits(logits, batch["labels"].float(), reduction="none").mean(1)


def numbers(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    """Regression: ``labels`` ``(B,)`` or ``(B, K)``; an example's loss is its mean squared error."""
    logits: Tensor = model(**without_labels(batch)).logits.float()
    labels = batch["labels"].float().view(len(logits), -1)
    if logits.shape != labels.shape:
        raise ValueError("other shapes")
    return (logits - labels).square().mean(1)


def next_token(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    """A causal language model: the output at t predicts the label at t + 1."""
    given, head = before_head(model, without_labels(batch))
    return token_losses(given, batch["labels"], shift=True, head=head)


def own_token(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    """Tags, masked words: the output at t predicts the label at t; an example's loss is the mean over its labelled
    tokens."""
    given, head = before_head(model, without_labels(batch))
    return token_losses(given, batch["labels"], shift=False, head=head)


def decoded(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    """An encoder-decoder, which makes its decoder's input from the labels."""
    return token_losses(model(**batch).logits, batch["labels"], shift=False)


def alignments(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    """Connectionist temporal classification (Graves et al. 2006), with the reduction of the model's configuration."""
    base, labels = unwrapped(model), batch["labels"]
    config = base.config
    inputs = batch["input_values"] if "input_values" in batch else batch["input_features"]
    mask = batch.get("attention_mask")
    heard = torch.full((len(inputs),), inputs.shape[1], device=inputs.device) if mask is None else mask.sum(-1)
    frames = (
        base._get_feat_extract_output_lengths(heard)
        if hasattr(base, "_get_feat_extract_output_lengths")
        else base._get_subsampling_output_length(heard)
    ).long()
    spoken = labels >= 0
    lengths = spoken.sum(-1)
    log_probabilities = log_softmax(model(**without_labels(batch)).logits, dim=-1, dtype=torch.float32).transpose(0, 1)
    with torch.backends.cudnn.flags(enabled=False):
        each = ctc_loss(
            log_probabilities,
            labels.masked_select(spoken),
            frames,
            lengths,
            blank=config.pad_token_id,
            reduction="none",
            zero_infinity=config.ctc_zero_infinity,
        )
    return each / lengths.clamp_min(1) if config.ctc_loss_reduction == "mean" else each


def spans(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    """Question answering: ``start_positions`` and ``end_positions`` ``(B,)``; an answer outside of the text has no
    loss.

    Padding competes for no position: how much of it there is follows from the other examples.
    """
    mask = batch.get("attention_mask")
    return _span_losses(model, batch, None if mask is None else mask == 0)


def spans_of_fixed_length(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    """As :func:`spans`, of features that were all padded to one length before; there padding competes, as in the
    model's own loss."""
    return _span_losses(model, batch, None)


def _span_losses(model: nn.Module, batch: Mapping[str, Tensor], padding: Tensor | None) -> Tensor:
    given = {key: value for key, value in batch.items() if key not in ("start_positions", "end_positions")}
    found = model(**given)
    sides = ((found.start_logits, batch["start_positions"]), (found.end_logits, batch["end_positions"]))
    start, end = (_position_losses(logits.float(), places, padding) for logits, places in sides)
    return (start + end) / 2


def _position_losses(logits: Tensor, places: Tensor, padding: Tensor | None) -> Tensor:
    places = places.view(-1).clamp(0, logits.shape[1])
    if padding is not None:
        logits = logits.masked_fill(padding, torch.finfo(logits.dtype).min)
    return cross_entropy(logits, places, ignore_index=logits.shape[1], reduction="none")


RULES: tuple[Rule, ...] = (
    classes,
    several_labels,
    numbers,
    next_token,
    own_token,
    decoded,
    alignments,
    spans,
    spans_of_fixed_length,
)
# By the loss types of transformers (``PreTrainedModel.loss_type``), which follow from a model's class.
HINTS: dict[str, Rule] = {
    "ForCausalLM": next_token,
    "ForMaskedLM": own_token,
    "ForTokenClassification": own_token,
    "ForQuestionAnswering": spans,
    "ForCTC": alignments,
}


def unwrapped(model: nn.Module) -> Any:
    """The model of transformers, or the one of them that an adapter wraps."""
    wrapped: Any = model
    return wrapped.get_base_model() if hasattr(model, "get_base_model") else model


def likeliest(model: nn.Module, batch: Mapping[str, Tensor]) -> Rule:
    """The rule that a model's class, a batch's columns and their shapes suggest, where nothing was found out."""
    base = unwrapped(model)
    if "start_positions" in batch:
        return spans
    labels = batch["labels"]
    if getattr(base.config, "is_encoder_decoder", False) and labels.dim() > 1:
        return decoded
    if labels.is_floating_point():
        return several_labels if labels.dim() > 1 else numbers
    if labels.dim() == 1:
        return classes
    return HINTS.get(getattr(base, "loss_type", ""), next_token)
