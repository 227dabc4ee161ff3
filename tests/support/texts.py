"""Tasks on texts without a checkpoint: a tokenizer of words, small models, and the engine's proof for them."""

import datasets
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers

from dpft.gradients.engine import Engine
from dpft.gradients.preflight import preflight
from dpft.tasks.own_loss import check_own_loss
from dpft.training.batches import Examples
from tests.support.recipes import WORDS

SIZES = dict(vocab_size=len(WORDS) + 1, num_labels=1)
SMALL = dict(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)
POSITIONS = dict(max_position_embeddings=32)
TEXTS = ["w1 w2 w3", "w4", "w5 w6 w7 w8 w9 w10", "w2 w11 w1 w12 w13 w14 w15"]


def tokenizer(**special):
    """Each word is one token; what ends a text is known and not written."""
    raw = Tokenizer(models.WordLevel({word: i for i, word in enumerate([*WORDS, "<mask>"])}, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = dict(pad_token="<pad>", unk_token="<unk>", eos_token="<eos>", mask_token="<mask>") | special
    return transformers.PreTrainedTokenizerFast(tokenizer_object=raw, **special)


def classifier(family, outputs, problem):
    """A text classifier of a family, by the name of its classes."""
    transformers.set_seed(0)
    known = SIZES | dict(num_labels=outputs, problem_type=problem, pad_token_id=0)
    if family == "GPT2":
        config = transformers.GPT2Config(**known, n_embd=16, n_layer=1, n_head=2, n_positions=32)
    else:
        config = transformers.BertConfig(**known, **SMALL, **POSITIONS)
    return getattr(transformers, f"{family}ForSequenceClassification")(config)


def proven(task, model, rows, plan):
    """The preflight's report with every parameter trained, after the loss was found to be the model's own."""
    examples = Examples.encode(datasets.Dataset.from_dict(rows), task)
    model.eval().requires_grad_(True)
    check_own_loss(task, model, task.collate, examples.spread())
    with Engine(model, plan) as engine:
        losses = lambda features: task.losses(model, task.collate(features))
        return preflight(engine, losses, examples.spread(), longest=examples.longest)
