"""Chats as a tokenizer's template writes them, and which tokens are the assistant's."""

import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from dpft.errors import RecipeError
from dpft.tasks.losses import IGNORED
from dpft.values import ASSISTANT

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Messages = Sequence[Mapping[str, Any]]
MARKED = re.compile(r"\{%-?\s*generation\s*-?%\}")  # a template that says itself where the assistant speaks
WAY_OUT = "declare a task.template that marks the assistant's words by {% generation %}"


class Chat:
    """Turns lists of messages into tokens, all of the assistant's turns labelled and nothing else.

    Where a template marks no turns, they are found by writing the chat up to each: what the template adds for a turn
    of the assistant, after the words with which it asks for one, is that turn, its end included.

    Raises:
        RecipeError: the tokenizer has no template, or does not tell from where in a text its tokens are.
    """

    def __init__(self, tokenizer: "PreTrainedTokenizerBase") -> None:
        if not tokenizer.chat_template:
            raise RecipeError(
                f"The tokenizer {type(tokenizer).__name__} has no chat template, so it cannot write task.messages: "
                "declare one in task.template, or choose a model that was made for chats."
            )
        if not tokenizer.is_fast:
            raise RecipeError(
                f"The tokenizer {type(tokenizer).__name__} does not tell from where in a text a token is, so the "
                "assistant's are not known: choose a model with a fast tokenizer."
            )
        self._tokenizer, self._template = tokenizer, str(tokenizer.get_chat_template())

    def encode(self, messages: Messages, max_length: int) -> dict[str, list[int]]:
        """``input_ids`` and ``labels`` of at most so many tokens; of what is before the last turn of the assistant the
        beginning is cut first.

        Raises:
            RecipeError: the template refuses the chat or does not tell the assistant's turns; it follows "Row 3".
        """
        text, turns = self._written(messages)
        found = self._tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        ids, starts = found["input_ids"], [start for start, _ in found["offset_mapping"]]
        said = [any(begin <= start < end for begin, end in turns) for start in starts]
        labels = [token if own else IGNORED for token, own in zip(ids, said, strict=True)]
        last = next((i for i, start in enumerate(starts) if start >= turns[-1][0]), len(ids))
        end = min(len(ids), last + max_length - 1)
        kept = slice(max(0, end - max_length), end)
        return {"input_ids": ids[kept], "labels": labels[kept]}

    def _written(self, messages: Messages) -> tuple[str, list[tuple[int, int]]]:
        """The chat as one text, and where in it each turn of the assistant begins and ends."""
        text, turns = self._rendered(messages)
        if MARKED.search(self._template):
            if not turns:
                raise RecipeError(f"has a chat in which the template marks no word of the assistant: {WAY_OUT}.")
            return text, turns
        for i, message in enumerate(messages):
            if message["role"] != ASSISTANT:
                continue
            before, after = self._rendered(messages[:i], asks=True)[0], self._rendered(messages[: i + 1])[0]
            if not (after.startswith(before) and text.startswith(after)):
                raise RecipeError(
                    f"has a chat of {len(messages):,} messages of which the template does not just add number "
                    f"{i + 1:,} to what it writes before, so nothing tells which tokens are the assistant's: {WAY_OUT}."
                )
            turns.append((len(before), len(after)))
        return text, turns

    def _rendered(self, messages: Messages, *, asks: bool = False) -> tuple[str, list[tuple[int, int]]]:
        """The text, and what the template marks in it; ``asks`` for the assistant's next turn."""
        from jinja2 import TemplateError
        from transformers.utils.chat_template_utils import render_jinja_template

        given = [{key: value for key, value in one.items() if value is not None} for one in messages]
        marked = MARKED.search(self._template) is not None and not asks
        how: dict[str, Any] = dict(add_generation_prompt=asks, return_assistant_tokens_mask=marked)
        try:
            (text,), turns = render_jinja_template(
                [given], chat_template=self._template, **how, **self._tokenizer.special_tokens_map
            )
        except (TemplateError, TypeError, ValueError) as error:
            # What the template says itself is public; another error may quote the chat.
            why = str(error) if str(error) in self._template else type(error).__name__
            raise RecipeError(
                f"has a chat of {len(messages):,} messages that the template refuses ({why}): correct the row, or "
                "declare another task.template."
            ) from error
        return text, [(start, end) for start, end in turns[0]] if marked else []
