"""Masked words of a text."""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from pydantic import Field
from torch import Tensor, nn

from dpft.errors import RecipeError
from dpft.recipe import TaskTable
from dpft.tasks.losses import IGNORED, pad_features
from dpft.tasks.perplexity import Perplexity, label_sums
from dpft.tasks.registry import task
from dpft.tasks.rules import own_token
from dpft.tasks.source import Source
from dpft.tasks.task import TEXTS, Columns
from dpft.tasks.text import MAX_LENGTH, TextTask
from dpft.tasks.words import WORDS
from dpft.values import Column

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SHARE = 0.15  # of a text's tokens that are predicted
HIDDEN, EXCHANGED = 0.8, 0.1  # of these: shown as the mask token, as a random token; the others are shown as they are
PUBLISHED_SEED = 15  # of the masks by which texts are evaluated


@task("masked_lm")
class MaskedLM(TextTask):
    """Masked language modelling, such as the pretraining of BERT on texts of a field (Devlin et al. 2019, section 3.1).

    Each draw of an example masks it anew, from the secret chance of the step: a share of its tokens, one at least, of
    which the model sees 80% as the mask token, 10% as another token and 10% as they are. An example's loss is the mean
    over its own masked tokens, zero if it has no token that can be masked. Evaluations and audits mask a text always
    alike, by a published seed and the text's own tokens, so that figures of two models can be compared.

    Args:
        tokenizer: a Hugging Face tokenizer with a mask token.
        text: the column to read.
        mask: the share of a text's tokens that is masked.
        max_length: texts are cut after so many tokens.
    """

    class Settings(TaskTable):
        text: str = Field("text", description="The column with the text.")
        mask: float = Field(
            SHARE, gt=0, le=0.9, description="The share of a text's tokens that is masked whenever it is drawn."
        )
        max_length: int | None = Field(None, ge=4, description=MAX_LENGTH)

        @property
        def columns(self) -> dict[str, Column]:
            return {self.text: Column("text")}

    headline = "perplexity"
    template: ClassVar = {"subset": "lora(rank=8)", "task": {}}

    def __init__(
        self, tokenizer: "PreTrainedTokenizerBase", *, text: str = "text", mask: float = SHARE, max_length: int = 128
    ) -> None:
        """Raises RecipeError: the tokenizer has no mask token."""
        if tokenizer.mask_token_id is None:
            raise RecipeError(
                f"The tokenizer {type(tokenizer).__name__} has no mask token, so its model predicts no masked words: "
                'choose a model such as BERT, or task.name = "causal_lm".'
            )
        super().__init__(tokenizer, max_length)
        self.text, self.mask = text, mask
        self._special = np.array(sorted(tokenizer.all_special_ids))

    @classmethod
    def load(cls, settings: Settings, source: Source) -> tuple["MaskedLM", nn.Module]:
        """Raises RecipeError: the tokenizer has no mask token, or the model is an encoder-decoder."""
        task = cls(source.processor(), text=settings.text, mask=settings.mask)
        model = source.model("AutoModelForMaskedLM")
        if model.config.is_encoder_decoder:
            raise RecipeError(
                f"{type(model).__name__} is an encoder-decoder, whose outputs are no masked words at their places: use "
                'task.name = "seq2seq".'
            )
        return task, model

    def examples(self) -> dict[str, list[str]]:
        return {self.text: list(TEXTS)}

    def encode(self, rows: Columns) -> list[dict[str, Any]]:
        texts = self.tokenizer(list(rows[self.text]), truncation=True, max_length=self.max_length)["input_ids"]
        return [{"input_ids": ids} for ids in texts]

    def draw(self, features: Mapping[str, Any], random: np.random.Generator) -> dict[str, Any]:
        """The text with masks, and labels at their places."""
        ids = np.array(features["input_ids"])
        places = np.flatnonzero(~np.isin(ids, self._special))
        chosen = random.permutation(places)[: max(1, round(self.mask * len(places)))]
        labels, how = np.full(len(ids), IGNORED), random.random(len(chosen))
        labels[chosen] = ids[chosen]
        others = random.integers(len(self.tokenizer), size=len(chosen))
        shown = np.where(how < HIDDEN + EXCHANGED, others, ids[chosen])
        ids[chosen] = np.where(how < HIDDEN, self.tokenizer.mask_token_id, shown)
        return {"input_ids": ids.tolist(), "labels": labels.tolist()}

    def collate(self, features: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        """What was not drawn gets its published masks."""
        drawn = [one if "labels" in one else self.draw(one, published(one["input_ids"])) for one in features]
        return pad_features(drawn, self.pad, token_labels=True)

    def losses(self, model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
        return own_token(model, batch)

    def metrics(self) -> Perplexity:
        return Perplexity(partial(label_sums, shift=False))

    def canary(self, random: np.random.Generator) -> dict[str, str]:
        return {self.text: self.words.text(WORDS, random)}


def published(ids: Sequence[int]) -> np.random.Generator:
    """The chance of a text that is evaluated: it follows from the text, and everybody may know it."""
    return np.random.default_rng([PUBLISHED_SEED, *ids])
