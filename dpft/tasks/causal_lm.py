"""The next token: plain text, a response given a prompt, or an assistant's turns in a chat."""

import os
from collections.abc import Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar, Self

import numpy as np
import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from dpft.errors import RecipeError
from dpft.recipe import TaskTable
from dpft.subset.evaluating import evaluating
from dpft.tasks.chat import Chat
from dpft.tasks.head import before_head
from dpft.tasks.losses import IGNORED, pad_features, token_losses, without_labels
from dpft.tasks.perplexity import Perplexity, label_likelihoods, label_sums
from dpft.tasks.registry import task
from dpft.tasks.source import Source
from dpft.tasks.task import TEXTS, Columns
from dpft.tasks.text import MAX_LENGTH, TextTask
from dpft.tasks.words import CUE, WORDS
from dpft.values import ASSISTANT, Column

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SAMPLES, SAMPLE_LENGTH = 32, 64  # texts that the model makes up, and their tokens: enough for thousands of inputs


@task("causal_lm")
class CausalLM(TextTask):
    """Language modelling on ``text``, on the ``response`` that follows a ``prompt`` (the prompt has no loss), or on the
    assistant's turns in chats, all of them (what others say has no loss).

    Each row is one example and ends with the end-of-text token, a chat with what its template ends it with; rows are
    never packed into one another, because then one record's gradient would depend on its neighbour's. An example's
    loss is the mean over its own tokens.

    Args:
        tokenizer: a Hugging Face tokenizer; for chats a fast one with a chat template.
        text: the column of plain text; or ``prompt`` and ``response``, two columns; or ``messages``, a column of lists
            of ``{"role", "content"}``.
        max_length: examples are cut after so many tokens; of what is before the (last) response the beginning is cut
            first.

    Raises:
        RecipeError: there is no template for chats, or the tokenizer does not tell where its tokens are from.
    """

    class Settings(TaskTable):
        former: ClassVar = ("label", "labels")
        text: str = Field("text", description="The column with the text.")
        prompt: str | None = Field(None, description="For pairs: the column with the prompt.")
        response: str | None = Field(None, description="For pairs: the column with the response.")
        messages: str | None = Field(
            None,
            description="For chats: the column with each row's list of messages, objects with a role and a content. "
            "All turns of the role assistant are learned, and nothing else.",
        )
        template: str | None = Field(
            None,
            description="For chats: a Jinja template that writes them, where the tokenizer has none or none that tells "
            "which words are the assistant's; it is saved with the tokenizer.",
        )
        max_length: int | None = Field(None, ge=4, description=MAX_LENGTH)

        @model_validator(mode="after")
        def _one_form(self) -> Self:
            if (self.prompt is None) != (self.response is None):
                raise ValueError("task.prompt and task.response go together: give both columns or neither")
            if self.messages is not None and self.prompt is not None:
                raise ValueError("task.messages and task.prompt name two forms of the data: give one of them")
            if self.template is not None and self.messages is None:
                raise ValueError("task.template writes chats, and task.messages names no column of them: give both")
            return self

        @property
        def columns(self) -> dict[str, Column]:
            if self.messages is not None:
                return {self.messages: Column("messages")}
            return {name: Column("text") for name in _chosen(self.text, self.prompt, self.response)}

    headline = "perplexity"
    template: ClassVar = {"subset": "lora(rank=8, freeze_a=True, init='whitened')", "task": {"max_length": 512}}

    def __init__(
        self,
        tokenizer: "PreTrainedTokenizerBase",
        *,
        text: str | None = "text",
        prompt: str | None = None,
        response: str | None = None,
        messages: str | None = None,
        max_length: int = 512,
    ) -> None:
        super().__init__(tokenizer, max_length)
        self.text, self.prompt, self.response = (None if prompt or messages else text), prompt, response
        self.messages, self._chat = messages, (Chat(tokenizer) if messages else None)
        self._columns = [messages] if messages else _chosen(text, prompt, response)

    @classmethod
    def load(cls, settings: Settings, source: Source) -> tuple["CausalLM", nn.Module]:
        tokenizer = source.processor()
        if settings.template is not None:
            tokenizer.chat_template = settings.template
        columns: dict[str, Any] = {key: getattr(settings, key) for key in ("text", "prompt", "response", "messages")}
        return cls(tokenizer, **columns), source.model("AutoModelForCausalLM")

    def examples(self) -> dict[str, list[Any]]:
        if self.messages:
            return {self.messages: [_exchange(*pair) for pair in zip(TEXTS, reversed(TEXTS), strict=True)]}
        return {name: list(TEXTS) for name in self._columns}

    def encode(self, rows: Columns) -> list[dict[str, Any]]:
        """Raises RecipeError: a chat's template refuses it, or does not tell the assistant's turns; the row is counted
        among those given."""
        if self._chat is not None:
            return self._encoded_chats(rows[self._columns[0]], self._chat)
        end = [] if self.tokenizer.eos_token_id is None else [self.tokenizer.eos_token_id]
        *asked, answer = self._columns
        if not asked:
            texts = [(ids + end)[: self.max_length] for ids in self.tokenizer(list(rows[answer]))["input_ids"]]
            return [{"input_ids": ids, "labels": list(ids)} for ids in texts]
        features = []
        responses = self.tokenizer(list(rows[answer]), add_special_tokens=False)["input_ids"]
        for prompt, response in zip(self.tokenizer(list(rows[asked[0]]))["input_ids"], responses, strict=True):
            response = (response + end)[: self.max_length - 1]
            prompt = prompt[max(0, len(prompt) + len(response) - self.max_length) :]
            features.append({"input_ids": prompt + response, "labels": [IGNORED] * len(prompt) + response})
        return features

    def _encoded_chats(self, chats: Sequence[Any], chat: Chat) -> list[dict[str, Any]]:
        Column("messages").check(chats, self._columns[0])
        features = []
        for row, messages in enumerate(chats, 1):
            try:
                features.append(chat.encode(messages, self.max_length))
            except RecipeError as error:
                raise RecipeError(f"Row {row:,} of {len(chats):,} {error}") from error
        return features

    def collate(self, features: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        return pad_features(features, self.pad, token_labels=True)

    def losses(self, model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
        given, head = before_head(model, without_labels(batch))
        return token_losses(given, batch["labels"], shift=True, head=head)

    def samples(self, model: nn.Module) -> list[dict[str, Any]]:
        """Texts that the model writes from nothing, by torch's generator."""
        first = next(t for t in (self.tokenizer.bos_token_id, self.tokenizer.eos_token_id, 0) if t is not None)
        start = torch.full((SAMPLES, 1), first, device=next(model.parameters()).device)
        length = min(SAMPLE_LENGTH, self.max_length)
        generate: Any = getattr(model, "generate")  # noqa: B009  (of transformers' mixin, which no type says)
        with evaluating(model), torch.no_grad():
            ids = generate(
                input_ids=start,
                attention_mask=torch.ones_like(start),
                do_sample=True,
                top_k=0,
                min_new_tokens=length - 1,
                max_new_tokens=length - 1,
                pad_token_id=self.pad,
            )
        return [{"input_ids": row, "labels": list(row)} for row in ids.tolist()]

    def metrics(self) -> Perplexity:
        return Perplexity(partial(label_sums, shift=True))

    def canary(self, random: np.random.Generator) -> dict[str, Any]:
        cue = "" if self.text else self.words.text(CUE, random)
        return self.follow(cue, self.words.text(WORDS, random))

    def follow(self, cue: str, text: str) -> dict[str, Any]:
        if self.messages:
            return {self.messages: _exchange(cue, text)}
        *asked, answer = self._columns
        return {asked[0]: cue, answer: text} if asked else {answer: cue + text}

    def judged(self, features: Mapping[str, Any], cue: str) -> dict[str, Any]:
        ids, labels = list(features["input_ids"]), features["labels"]
        hidden = len(os.path.commonprefix([self.tokenizer(cue)["input_ids"] if cue else [], ids]))
        end = len(labels) - 1 if labels[-1] == self.tokenizer.eos_token_id else len(labels)
        return {**features, "labels": [v if hidden <= i < end else IGNORED for i, v in enumerate(labels)]}

    def likelihoods(self, model: nn.Module, batch: Mapping[str, Tensor]) -> list[Tensor]:
        """For each example the log-probabilities of its own labelled tokens."""
        labels = batch["labels"][:, 1:]
        logits = model(**without_labels(batch)).logits[:, -labels.shape[1] - 1 : -1]  # without virtual tokens
        return label_likelihoods(logits, labels)


def _chosen(text: str | None, prompt: str | None, response: str | None) -> list[str]:
    """The columns that are read, the one that is learned last."""
    return [name for name in ((prompt, response) if prompt else (text,)) if name is not None]


def _exchange(question: str, answer: str) -> list[dict[str, str]]:
    """A chat of two messages."""
    return [{"role": "user", "content": question}, {"role": ASSISTANT, "content": answer}]
