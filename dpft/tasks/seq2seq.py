"""A text from a text: translation, summaries, answers, by an encoder-decoder."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from pydantic import Field
from torch import Tensor, nn

from dpft.errors import RecipeError
from dpft.recipe import TaskTable
from dpft.tasks.head import before_head
from dpft.tasks.losses import IGNORED, pad_features, token_losses, token_sums, without_labels
from dpft.tasks.perplexity import Perplexity, label_likelihoods
from dpft.tasks.registry import task
from dpft.tasks.rules import unwrapped
from dpft.tasks.source import Source
from dpft.tasks.task import TEXTS, Columns, Size
from dpft.tasks.text import MAX_LENGTH, TextTask
from dpft.tasks.words import CUE, WORDS
from dpft.values import Column

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@task("seq2seq")
class Seq2Seq(TextTask):
    """Write the text of ``target`` for each text of ``source``, with an encoder-decoder such as T5, BART or Marian.

    An example's loss is the mean over the tokens of its own target, whose end is learned.

    Args:
        tokenizer: a Hugging Face tokenizer.
        columns: the source and the target.
        prefix: what is put before each source, as T5 needs to know what is asked.
        generate: whether evaluations have the model write each target, and compare what it wrote.
        max_length: sources are cut after so many tokens.
        target_length: targets are.

    Raises:
        RecipeError: ``generate`` is asked for and the packages that compare texts are not installed.
    """

    class Settings(TaskTable):
        source: str = Field("source", description="The column with the text that is read.")
        target: str = Field("target", description="The column with the text that is written.")
        prefix: str = Field(
            "", description='What is put before each source, such as "summarize: " for T5; by default nothing.'
        )
        max_length: int | None = Field(None, ge=4, description=MAX_LENGTH.replace("Examples", "Sources"))
        target_length: int | None = Field(None, ge=4, description=MAX_LENGTH.replace("Examples", "Targets"))
        generate: bool = Field(
            False,
            description="Have the model write each validation row's target, for exact match, BLEU and ROUGE-L (pip "
            "install dpft[text]); slow, so set data.validation_rows too.",
        )

        @property
        def columns(self) -> dict[str, Column]:
            return {self.source: Column("text"), self.target: Column("text")}

    headline = "perplexity"
    template: ClassVar = {"subset": "lora(rank=8)", "task": {"max_length": 512}}

    def __init__(
        self,
        tokenizer: "PreTrainedTokenizerBase",
        *,
        columns: tuple[str, str] = ("source", "target"),
        prefix: str = "",
        generate: bool = False,
        max_length: int = 512,
        target_length: int = 128,
    ) -> None:
        super().__init__(tokenizer, max_length)
        self.target_length, self.prefix, self.generate = target_length, prefix, generate
        self.source, self.target = columns
        if generate:
            _scorers()

    @classmethod
    def load(cls, settings: Settings, source: Source) -> tuple["Seq2Seq", nn.Module]:
        columns = settings.source, settings.target
        task = cls(source.processor(), columns=columns, prefix=settings.prefix, generate=settings.generate)
        return task, source.model("AutoModelForSeq2SeqLM")

    def examples(self) -> dict[str, list[str]]:
        return {self.source: list(TEXTS), self.target: list(reversed(TEXTS))}

    def encode(self, rows: Columns) -> list[dict[str, Any]]:
        sources = [self.prefix + text for text in rows[self.source]]
        read = self.tokenizer(sources, truncation=True, max_length=self.max_length)["input_ids"]
        written = self.tokenizer(text_target=list(rows[self.target]), truncation=True, max_length=self.target_length)
        labels = [self._ended(ids) for ids in written["input_ids"]]
        return [{"input_ids": ids, "labels": own} for ids, own in zip(read, labels, strict=True)]

    def _ended(self, ids: list[int]) -> list[int]:
        """A target with the end-of-text token, which most tokenizers put there."""
        end = self.tokenizer.eos_token_id
        return ids if end is None or ids[-1:] == [end] else [*ids[: self.target_length - 1], end]

    def size(self, features: Mapping[str, Any]) -> Size:
        """Both texts are padded, and no layer sees more than one of them."""
        read, written = len(features["input_ids"]), len(features["labels"])
        return Size(read + written, max(read, written))

    def collate(self, features: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        return pad_features(features, self.pad, token_labels=True)

    def losses(self, model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
        given, head = _decoded(model, batch)
        return token_losses(given, batch["labels"], shift=False, head=head)

    def metrics(self) -> Perplexity:
        return Written(self) if self.generate else Perplexity(_sums)

    def canary(self, random: np.random.Generator) -> dict[str, str]:
        return self.follow(self.words.text(CUE, random), self.words.text(WORDS, random))

    def follow(self, cue: str, text: str) -> dict[str, str]:
        return {self.source: cue, self.target: text}

    def judged(self, features: Mapping[str, Any], cue: str) -> dict[str, Any]:
        """The target without its end, which is no secret."""
        ends = features["labels"][-1:] == [self.tokenizer.eos_token_id]
        return {**features, "labels": [*features["labels"][:-1], IGNORED] if ends else list(features["labels"])}

    def likelihoods(self, model: nn.Module, batch: Mapping[str, Tensor]) -> list[Tensor]:
        """For each example the log-probabilities of its target's tokens."""
        labels = batch["labels"]
        logits = model(**_given(model, batch)).logits
        return label_likelihoods(logits[:, logits.shape[1] - labels.shape[1] :], labels)  # behind virtual tokens


def _given(model: nn.Module, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What the model is given: its decoder reads the target one place later, as the model itself shifts it."""
    shifted = getattr(unwrapped(model), "prepare_decoder_input_ids_from_labels", None)
    return without_labels(batch) | {"decoder_input_ids": shifted(labels=batch["labels"])} if shifted else dict(batch)


def _decoded(model: nn.Module, batch: Mapping[str, Tensor]) -> tuple[Tensor, nn.Linear | None]:
    return before_head(model, _given(model, batch))


def _sums(model: nn.Module, batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    given, head = _decoded(model, batch)
    return token_sums(given, batch["labels"], shift=False, head=head)


def _scorers() -> tuple[Any, Any]:
    """The modules that compare texts."""
    try:
        import sacrebleu
        from rouge_score import rouge_scorer
    except ImportError as error:
        raise RecipeError(
            f"task.generate compares texts by sacrebleu and rouge-score, and {error.name} is not installed: run `pip "
            "install dpft[text]`, or set generate to false."
        ) from error
    return sacrebleu, rouge_scorer


class Written(Perplexity):
    """Perplexity, and what the model writes by itself, always its likeliest next token, beside the targets: the share
    of exact matches, BLEU from 0 to 100 (Papineni et al. 2002, by sacrebleu) and the mean ROUGE-L from 0 to 1 (Lin
    2004, F-measure, words of Latin letters and digits).

    A target is what the tokenizer gives back of it: cut after ``target_length`` tokens, without unknown characters.
    """

    def __init__(self, task: Seq2Seq) -> None:
        super().__init__(_sums)
        self._task = task
        self._written: list[str] = []
        self._wanted: list[str] = []

    def update(self, model: nn.Module, batch: Mapping[str, Tensor]) -> None:
        super().update(model, batch)
        generate: Any = getattr(model, "generate")  # noqa: B009  (of transformers' mixin, which no type says)
        how: dict[str, Any] = dict(do_sample=False, num_beams=1, max_new_tokens=self._task.target_length)
        found = generate(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], **how)
        self._written += self._texts(found)
        self._wanted += self._texts(batch["labels"].masked_fill(batch["labels"] == IGNORED, self._task.pad))

    def _texts(self, ids: Tensor) -> list[str]:
        texts: list[str] = self._task.tokenizer.batch_decode(ids.cpu(), skip_special_tokens=True)
        return [text.strip() for text in texts]

    def compute(self) -> dict[str, Any]:
        sacrebleu, rouge = _scorers()
        longest = rouge.RougeScorer(["rougeL"])
        pairs = list(zip(self._wanted, self._written, strict=True))
        return super().compute() | {
            "exact_match": float(np.mean([one == other for one, other in pairs])),
            "bleu": float(sacrebleu.corpus_bleu(self._written, [self._wanted]).score),
            "rouge_l": float(np.mean([longest.score(*pair)["rougeL"].fmeasure for pair in pairs])),
        }
