"""Small models of real families, built from their configurations: exactness does not depend on trained weights."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch
import transformers


def text_examples(vocabulary=60, lengths=(5, 9, 7), token_labels=False, classes=3):
    generator = torch.Generator().manual_seed(1)
    examples = []
    for i, length in enumerate(lengths):
        ids = torch.randint(3, vocabulary, (length,), generator=generator).tolist()
        examples.append({"input_ids": ids, "labels": list(ids) if token_labels else i % classes})
    return examples


def bert():
    config = transformers.BertConfig(
        vocab_size=60,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=24,
        max_position_embeddings=32,
        num_labels=3,
    )
    return transformers.BertForSequenceClassification(config)


def gpt2():
    return transformers.GPT2LMHeadModel(
        transformers.GPT2Config(
            vocab_size=60, n_embd=16, n_layer=2, n_head=2, n_positions=32, bos_token_id=0, eos_token_id=0
        )
    )


def llama():
    config = transformers.LlamaConfig(
        vocab_size=60, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1, intermediate_size=24,
        max_position_embeddings=32, tie_word_embeddings=True, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config)


def vit():
    config = transformers.ViTConfig(
        image_size=16,
        patch_size=8,
        num_channels=1,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=24,
        num_labels=3,
    )
    return transformers.ViTForImageClassification(config)


def dinov2():
    config = transformers.Dinov2Config(
        image_size=16,
        patch_size=8,
        num_channels=1,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        mlp_ratio=2,
        num_labels=3,
    )
    return transformers.Dinov2ForImageClassification(config)


class Case:
    """A model with examples and ``losses(examples) -> (B,)``, the way a task would give them."""

    def __init__(self, name):
        from dpft.tasks.task import class_losses, pad_features, token_losses

        torch.manual_seed(0)
        self.name = name
        self.model = {"bert": bert, "gpt2": gpt2, "llama": llama, "vit": vit, "dinov2": dinov2}[name]()
        if name in ("vit", "dinov2"):
            generator = torch.Generator().manual_seed(1)
            self.examples = [
                {"pixel_values": torch.randn(1, 16, 16, generator=generator), "labels": i} for i in range(3)
            ]
            self.batch = lambda examples: {
                "pixel_values": torch.stack([e["pixel_values"] for e in examples]),
                "labels": torch.tensor([e["labels"] for e in examples]),
            }
        else:
            self.examples = text_examples(token_labels=name != "bert")
            self.batch = lambda examples: pad_features(examples, 0, token_labels=name != "bert")
        self._loss = (
            class_losses
            if name in ("bert", "vit", "dinov2")
            else lambda logits, labels: token_losses(logits, labels, shift=True)
        )

    def losses(self, examples):
        batch = self.batch(examples)
        labels = batch.pop("labels")
        return self._loss(self.model(**batch).logits, labels)


@pytest.fixture
def case():
    return Case


@pytest.fixture
def plan():
    from dpft.privacy.plan import Plan

    def make(**fields):
        return Plan(**{"noise_multiplier": 1.0, "sample_rate": 0.5, "steps": 10, "delta": 1e-3, "units": 8, **fields})

    return make
