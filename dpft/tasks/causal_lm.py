"""The next token: plain text, or a response given a prompt."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from dpft.tasks.head import before_head
from dpft.tasks.task import IGNORED, _without_labels, pad_features, token_losses, token_sums


class CausalLM:
    """Language modelling on ``text``, or on the ``response`` that follows a ``prompt`` (the prompt has no loss).

    Each row is one example and ends with the end-of-text token; rows are never packed into one another, because then
    one record's gradient would depend on its neighbour's. An example's loss is the mean over its own tokens.

    Args:
        tokenizer: a Hugging Face tokenizer.
        text: the column of plain text; or ``prompt`` and ``response``, two columns.
        max_length: examples are cut after so many tokens; of a prompt the beginning is cut first.
    """

    def __init__(
        self,
        tokenizer,
        *,
        text: str | None = "text",
        prompt: str | None = None,
        response: str | None = None,
        max_length: int = 512,
    ) -> None:
        self.tokenizer, self.max_length = tokenizer, max_length
        self.text, self.prompt, self.response = (None if prompt else text), prompt, response
        self._pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else (tokenizer.eos_token_id or 0)

    def encode(self, rows: Mapping[str, Sequence]) -> list[dict[str, Any]]:
        end = [] if self.tokenizer.eos_token_id is None else [self.tokenizer.eos_token_id]
        if self.text is not None:
            texts = [(ids + end)[: self.max_length] for ids in self.tokenizer(list(rows[self.text]))["input_ids"]]
            return [{"input_ids": ids, "labels": list(ids)} for ids in texts]
        features = []
        responses = self.tokenizer(list(rows[self.response]), add_special_tokens=False)["input_ids"]
        for prompt, response in zip(self.tokenizer(list(rows[self.prompt]))["input_ids"], responses, strict=True):
            response = (response + end)[: self.max_length - 1]
            prompt = prompt[max(0, len(prompt) + len(response) - self.max_length) :]
            features.append({"input_ids": prompt + response, "labels": [IGNORED] * len(prompt) + response})
        return features

    def collate(self, features: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        return pad_features(features, self._pad, token_labels=True)

    def length(self, features: Mapping[str, Any]) -> int:
        return len(features["input_ids"])

    def losses(self, model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
        given, head = before_head(model, _without_labels(batch))
        return token_losses(given, batch["labels"], shift=True, head=head)

    def evaluate(self, model: nn.Module, batches) -> dict[str, Any]:
        """Loss per token over all tokens (nats), and its exponential, the perplexity."""
        total, tokens, examples = 0.0, 0, 0
        with torch.no_grad():
            for batch in batches:
                given, head = before_head(model, _without_labels(batch))
                sums, counts = token_sums(given, batch["labels"], shift=True, head=head)
                total, tokens, examples = total + float(sums.sum()), tokens + int(counts.sum()), examples + len(counts)
        loss = total / max(tokens, 1)
        return {"loss_per_token": loss, "perplexity": math.exp(min(loss, 700)), "tokens": tokens, "examples": examples}
