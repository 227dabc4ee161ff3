"""Made-up text of a tokenizer's own words, for canaries."""

import re
from typing import TYPE_CHECKING

import numpy as np

from dpft.errors import RecipeError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

WORDS = 12  # of a random text
CUE = 4  # random words that come before what is judged


class Words:
    """Whole words of a tokenizer's vocabulary, the common ones first.

    Raises:
        RecipeError: it has none.
    """

    def __init__(self, tokenizer: "PreTrainedTokenizerBase") -> None:
        self._tokenizer = tokenizer
        special = set(tokenizer.all_special_ids)
        found = (tokenizer.decode([token]).strip() for token in range(len(tokenizer)) if token not in special)
        self.words = list(dict.fromkeys(word for word in found if re.fullmatch(r"\w{2,}", word)))
        if not self.words:
            raise RecipeError("The tokenizer has no whole words to make canaries of: use another kind of canary.")

    def text(self, number: int, random: np.random.Generator) -> str:
        """``number`` random words, with spaces between them."""
        return " ".join(self.words[i] for i in random.integers(len(self.words), size=number))

    def rare(self, number: int, random: np.random.Generator) -> list[str]:
        """Different words of one token each, from the later half of the vocabulary: merges that a tokenizer learned
        last.

        Raises:
            RecipeError: there are fewer.
        """
        found = []
        for word in self.words[len(self.words) // 2 :]:
            if len(self._tokenizer(f"a {word}", add_special_tokens=False)["input_ids"]) == 2:
                found.append(word)
        if len(found) < number:
            raise RecipeError(
                f"The vocabulary has {len(found):,} rare words of one token, and {number:,} canaries need one each: "
                "plant fewer, or another kind."
            )
        return [found[i] for i in random.permutation(len(found))[:number]]
