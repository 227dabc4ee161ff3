"""Where a task's model comes from, and how it is loaded."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True)
class Source:
    """A checkpoint.

    Args:
        path: a folder, or a name on a hub.
        revision: the hub's.
        options: what every model's ``from_pretrained`` is given: type, quantization.
        head_alone: whether nothing but the output layer will train, so that what it is given may be chosen.
    """

    path: str
    revision: str | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    head_alone: bool = False

    def processor(self, kind: str = "AutoTokenizer", **options: Any) -> Any:
        """The tokenizer, or what else of transformers (``"AutoImageProcessor"``) prepares the data."""
        import transformers

        return getattr(transformers, kind).from_pretrained(self.path, revision=self.revision, **options)

    def model(self, kind: str, **options: Any) -> "PreTrainedModel":
        """The model by a class of transformers, such as ``"AutoModelForCausalLM"``."""
        import transformers

        return getattr(transformers, kind).from_pretrained(self.path, revision=self.revision, **self.options, **options)

    def labelled_model(
        self, kind: str, labels: list[str], tokenizer: "PreTrainedTokenizerBase | None" = None, **options: Any
    ) -> "PreTrainedModel":
        """The model with one output for each label, and with the tokenizer's padding token in its configuration."""
        names = dict(enumerate(labels))
        options |= dict(num_labels=len(names), id2label=names, label2id={v: k for k, v in names.items()})
        model = self.model(kind, **options)
        if tokenizer is not None and model.config.pad_token_id is None:  # decoders find an example's last token by it
            padding = tokenizer.pad_token_id
            model.config.pad_token_id = tokenizer.eos_token_id if padding is None else padding
        return model
