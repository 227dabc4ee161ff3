"""What every task on texts has: a tokenizer, which is saved beside the weights, and examples as long as their ids."""

from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dpft.tasks.task import Size, Task
from dpft.tasks.words import Words

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MAX_LENGTH = "Examples are cut after this many tokens; by default 128, or the model's positions if fewer."


class TextTask(Task):
    """A task whose features have ``input_ids``.

    Args:
        tokenizer: a Hugging Face tokenizer.
        max_length: texts are cut after so many tokens.
    """

    def __init__(self, tokenizer: "PreTrainedTokenizerBase", max_length: int = 128) -> None:
        self.tokenizer, self.max_length = tokenizer, max_length

    def save(self, folder: Path | str) -> None:
        self.tokenizer.save_pretrained(folder)

    def size(self, features: Mapping[str, Any]) -> Size:
        return Size(len(features["input_ids"]), len(features["input_ids"]))

    @property
    def pad(self) -> int:
        """The token that pads ``input_ids``: the one by which decoders find a text's last token
        (:meth:`Source.labelled_model`)."""
        known = (self.tokenizer.pad_token_id, self.tokenizer.eos_token_id, 0)
        return next(token for token in known if token is not None)

    @cached_property
    def words(self) -> Words:
        """What canaries are made of."""
        return Words(self.tokenizer)
