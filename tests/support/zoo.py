"""Small random models of real families, and every PEFT tuner's configuration for them.

    case = Case("llama", tuner="dora")   a model, three examples, ``losses(examples) -> (B,)``
    model, losses, examples = LAYERS["Conv2d"]()

Weights are random: whether a per-example gradient is exact does not depend on training.
"""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import tempfile
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from functools import partial
from typing import Any

import peft
import torch
import transformers
from torch import Tensor, nn

from dpft.tasks.losses import IGNORED, class_losses, pad_features, token_losses

# -- families ----------------------------------------------------------------------------------------------------------

VOCABULARY = dict(vocab_size=60, bos_token_id=0, eos_token_id=0, pad_token_id=0)
BLOCKS = dict(hidden_size=16, num_hidden_layers=2, num_attention_heads=2)
DECODER = dict(
    **VOCABULARY, **BLOCKS, num_key_value_heads=1, head_dim=8, intermediate_size=24, max_position_embeddings=32
)
IMAGES = dict(image_size=16, patch_size=8, num_channels=1, num_labels=3)


def bert():
    config = transformers.BertConfig(
        vocab_size=60, **BLOCKS, intermediate_size=24, max_position_embeddings=32, num_labels=3
    )
    return transformers.BertForSequenceClassification(config)


def gpt2():
    return transformers.GPT2LMHeadModel(
        transformers.GPT2Config(**VOCABULARY, n_embd=16, n_layer=2, n_head=2, n_positions=32)
    )


def llama():
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**DECODER, tie_word_embeddings=True))


def gemma():
    return transformers.GemmaForCausalLM(transformers.GemmaConfig(**DECODER))


def qwen3():
    return transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**DECODER))


def mixtral():
    return transformers.MixtralForCausalLM(transformers.MixtralConfig(**DECODER, num_local_experts=4))


def qwen2_moe():
    settings = {key: value for key, value in DECODER.items() if key != "head_dim"}
    config = transformers.Qwen2MoeConfig(
        **settings,
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=12,
        shared_expert_intermediate_size=24,
        decoder_sparse_step=1,
    )
    return transformers.Qwen2MoeForCausalLM(config)


def vit():
    return transformers.ViTForImageClassification(transformers.ViTConfig(**IMAGES, **BLOCKS, intermediate_size=24))


def dinov2():
    return transformers.Dinov2ForImageClassification(transformers.Dinov2Config(**IMAGES, **BLOCKS, mlp_ratio=2))


def swin():
    config = transformers.SwinConfig(
        **{**IMAGES, "patch_size": 2}, embed_dim=8, depths=[2, 1], num_heads=[2, 2], window_size=4
    )
    return transformers.SwinForImageClassification(config)


def t5():
    config = transformers.T5Config(
        vocab_size=60, d_model=16, d_kv=8, d_ff=24, num_layers=2, num_heads=2, decoder_start_token_id=0
    )
    return transformers.T5ForConditionalGeneration(config)


def _bart_settings():
    # fmt: skip
    sides = {
        f"{side}_{key}": n
        for side in ("encoder", "decoder")
        for key, n in (("layers", 1), ("attention_heads", 2), ("ffn_dim", 24))
    }
    return dict(**VOCABULARY, **sides, d_model=16, decoder_start_token_id=0)


def bart():
    config = transformers.BartConfig(**_bart_settings(), max_position_embeddings=32, forced_eos_token_id=None)
    return transformers.BartForConditionalGeneration(config)


def whisper():
    config = transformers.WhisperConfig(
        **_bart_settings(), num_mel_bins=4, max_source_positions=6, max_target_positions=32
    )
    return transformers.WhisperForConditionalGeneration(config)


CLASS, TOKENS, IMAGE, SEQUENCE, SPEECH = "text class", "tokens", "image class", "sequence to sequence", "speech"
FAMILIES: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "bert": (bert, CLASS),
    "gpt2": (gpt2, TOKENS),
    "llama": (llama, TOKENS),
    "vit": (vit, IMAGE),
    "t5": (t5, SEQUENCE),
    "dinov2": (dinov2, IMAGE),
    "gemma": (gemma, TOKENS),
    "qwen3": (qwen3, TOKENS),
    "mixtral": (mixtral, TOKENS),
    "qwen2_moe": (qwen2_moe, TOKENS),
    "swin": (swin, IMAGE),
    "bart": (bart, SEQUENCE),
    "whisper": (whisper, SPEECH),
}
TUNED = ("bert", "gpt2", "llama", "vit", "t5")  # the families on which every tuner is tried


# -- cases -------------------------------------------------------------------------------------------------------------


def text_examples(vocabulary=60, lengths=(5, 9, 7), token_labels=False, classes=3) -> list[dict]:
    generator = torch.Generator().manual_seed(1)
    examples = []
    for i, length in enumerate(lengths):
        ids = torch.randint(3, vocabulary, (length,), generator=generator).tolist()
        examples.append({"input_ids": ids, "labels": list(ids) if token_labels else i % classes})
    return examples


def tensor_examples(key: str, *shape: int) -> list[dict]:
    generator = torch.Generator().manual_seed(1)
    return [{key: torch.randn(*shape, generator=generator), "labels": i} for i in range(3)]


class Case:
    """A model with examples and ``losses(examples) -> (B,)``, the way a task would give them.

    Args:
        family: a name in :data:`FAMILIES`.
        tuner: a name in :data:`TUNERS`, put on the model; whatever PEFT raises is raised.

    Attributes:
        examples: three; those of text have unequal lengths.
    """

    def __init__(self, family: str, tuner: str | None = None) -> None:
        torch.manual_seed(0)
        make, self.kind = FAMILIES[family]
        self.name = family
        self.model = make()
        self.inputs: list[Callable[[Case, list, dict], None]] = []  # each adds to a batch what a tuner needs besides
        if self.kind == IMAGE:
            self.examples = tensor_examples("pixel_values", 1, 16, 16)
        else:
            self.examples = text_examples(token_labels=self.kind != CLASS)
            if self.kind == SPEECH:
                for example, sound in zip(self.examples, tensor_examples("sound", 4, 12), strict=True):
                    example["input_features"] = sound["sound"]
        if tuner is not None:
            TUNERS[tuner].put_on(self)

    def batch(self, examples: Sequence[dict]) -> dict[str, Tensor]:
        """Right-padded inputs, with an attention mask for text, and ``labels``."""
        if self.kind == IMAGE:
            batch = {
                "pixel_values": torch.stack([e["pixel_values"] for e in examples]),
                "labels": torch.tensor([e["labels"] for e in examples]),
            }
        else:
            batch = pad_features(examples, 0, token_labels=self.kind != CLASS)
        if self.kind == SPEECH:
            del batch["input_ids"], batch["attention_mask"]
            batch["input_features"] = torch.stack([e["input_features"] for e in examples])
        if self.kind in (SEQUENCE, SPEECH):
            before = nn.functional.pad(batch["labels"], (1, -1), value=0)
            batch["decoder_input_ids"] = before.masked_fill(before == IGNORED, 0)
        for add in self.inputs:
            add(self, examples, batch)
        return batch

    def losses(self, examples: Sequence[dict]) -> Tensor:
        """``(B,)``, each from its own example alone."""
        batch = self.batch(examples)
        labels = batch.pop("labels")
        logits = self.model(**batch).logits
        if labels.dim() == 1:
            return class_losses(logits, labels)
        return token_losses(logits, labels, shift=self.kind == TOKENS)


# -- tuners ------------------------------------------------------------------------------------------------------------

ATTENTION = {
    "bert": ["query", "value"],
    "gpt2": ["c_attn"],
    "llama": ["q_proj", "v_proj"],
    "vit": ["q_proj", "v_proj"],
    "t5": ["q", "v"],
}
ALL_LINEAR = {
    "bert": ["query", "key", "value", "dense"],
    "gpt2": ["c_attn", "c_proj", "c_fc"],
    "llama": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
    "vit": ["q_proj", "k_proj", "v_proj", "o_proj", "fc1", "fc2"],
    "t5": ["q", "k", "v", "o", "wi", "wo"],
}
FEEDFORWARD = {"bert": ["output.dense"], "gpt2": ["mlp.c_proj"], "llama": ["down_proj"], "vit": ["fc2"], "t5": ["wo"]}
EMBEDDING = {"bert": ["word_embeddings"], "gpt2": ["wte"], "llama": ["embed_tokens"], "t5": ["embed_tokens"]}
NORM = {
    "bert": ["LayerNorm"],
    "gpt2": ["ln_1", "ln_2", "ln_f"],
    "llama": ["input_layernorm", "post_attention_layernorm", "norm"],
    "vit": ["layernorm_before", "layernorm_after", "layernorm"],
    "t5": ["layer_norm", "final_layer_norm"],
}
CONVOLUTION = {"vit": ["projection"]}
BLOCK = {"bert": r".*\.layer\.\d+", "gpt2": r".*\.h\.\d+", "llama": r".*\.layers\.\d+"}
WEIGHT = {family: [f"{name}.weight" for name in names] for family, names in ATTENTION.items()}
HEAD = {"bert": ["classifier"], "gpt2": ["lm_head"], "llama": ["lm_head"], "vit": ["classifier"], "t5": ["lm_head"]}
TASK_TYPE = {"bert": "SEQ_CLS", "gpt2": "CAUSAL_LM", "llama": "CAUSAL_LM", "t5": "SEQ_2_SEQ_LM"}
LINEAR = ("bert", "llama", "vit", "t5")  # GPT-2's layers are transposed, of class Conv1D
TEXT = ("bert", "gpt2", "llama", "t5")
CAUSAL = ("gpt2", "llama")


@dataclass(frozen=True)
class Tuner:
    """One way to configure one :class:`peft.PeftType`.

    Attributes:
        families: where PEFT can train it; elsewhere :meth:`put_on` or the model's forward pass raises.
        layers: each family's names of the layers that it adapts, or None if it needs none.
        settings: of the configuration; a callable is asked for its value, given the case.
        inputs: adds what the forward pass needs besides to a batch of these examples.
    """

    peft_type: str
    families: tuple[str, ...]
    layers: dict[str, list[str]] | None
    settings: dict[str, Any]
    inputs: Callable[[Case, list, dict], None] | None

    def put_on(self, case: Case) -> None:
        settings = {key: value(case) if callable(value) else value for key, value in self.settings.items()}
        if self.layers is not None:
            settings["target_modules"] = self.layers[case.name]
        kind = peft.PEFT_TYPE_TO_CONFIG_MAPPING[self.peft_type]
        case.model = peft.get_peft_model(case.model, kind(task_type=TASK_TYPE.get(case.name), **settings))
        if self.inputs:
            case.inputs.append(self.inputs)


def _tuner(peft_type, layers=ATTENTION, *, families=TUNED, inputs=None, **settings) -> Tuner:
    return Tuner(peft_type, tuple(f for f in families if layers is None or f in layers), layers, settings, inputs)


def _task_ids(case: Case, examples: list, batch: dict) -> None:
    """Each example's task, 0 or 1, from the example alone."""
    batch["task_ids"] = torch.tensor([len(example.get("input_ids", ())) // 2 % 2 for example in examples])


def _task_prompts(case: Case, examples: list, batch: dict) -> None:
    """Task ids; the decoder gets prompts as well, which PEFT can only join to embeddings."""
    _task_ids(case, examples, batch)
    if "decoder_input_ids" in batch:
        batch["decoder_inputs_embeds"] = case.model.word_embeddings(batch.pop("decoder_input_ids"))


def _first_tokens(case: Case) -> list[int]:
    return [example["input_ids"][0] for example in case.examples]


def _invocation(case: Case) -> list[int]:
    """An activated LoRA acts from its invocation on: put it, token 2, into every example."""
    for example in case.examples:
        example["input_ids"][1] = example["labels"][1] = 2
    return [2]


def _saved_adapters(case: Case) -> dict[str, str]:
    """X-LoRA mixes adapters that are read from disk: two LoRAs of this family, saved."""
    case.model.config.use_cache = False  # X-LoRA demands it
    folder = tempfile.TemporaryDirectory()
    weakref.finalize(case, folder.cleanup)
    paths = {name: os.path.join(folder.name, name) for name in ("0", "1")}
    for path in paths.values():
        model = FAMILIES[case.name][0]()
        config = peft.LoraConfig(
            task_type=TASK_TYPE.get(case.name), target_modules=ATTENTION[case.name], r=2, init_lora_weights=False
        )
        peft.get_peft_model(model, config).save_pretrained(path)
    return paths


TUNERS: dict[str, Tuner] = {
    "lora": _tuner("LORA", r=2),
    "lora all-linear": _tuner("LORA", ALL_LINEAR, r=2),
    "lora dora": _tuner("LORA", r=2, use_dora=True),
    "lora rslora": _tuner("LORA", r=2, use_rslora=True),
    "lora pissa": _tuner("LORA", r=2, init_lora_weights="pissa"),
    "lora biased": _tuner("LORA", r=2, lora_bias=True),
    "lora bias=all": _tuner("LORA", r=2, bias="all"),
    "lora bias=lora_only": _tuner("LORA", r=2, bias="lora_only"),
    "lora modules_to_save": _tuner("LORA", r=2, modules_to_save=lambda case: HEAD[case.name]),
    "lora embedding": _tuner("LORA", EMBEDDING, r=2),
    "lora dora embedding": _tuner("LORA", EMBEDDING, r=2, use_dora=True),
    "lora convolution": _tuner("LORA", CONVOLUTION, r=2),
    "lora dora convolution": _tuner("LORA", CONVOLUTION, r=2, use_dora=True),
    "lora tokens": _tuner("LORA", {f: ATTENTION[f] for f in TEXT}, r=2, trainable_token_indices=_first_tokens),
    "lora parameters": _tuner("LORA", {f: [] for f in TUNED}, r=2, target_parameters=lambda case: WEIGHT[case.name]),
    "lora replicated": _tuner("LORA", families=("bert", "llama"), r=2, layer_replication=[(0, 2), (1, 2)]),
    "lora activated": _tuner("LORA", {f: ATTENTION[f] for f in CAUSAL}, r=2, alora_invocation_tokens=_invocation),
    "lora block-diagonal": _tuner(
        "LORA",
        ALL_LINEAR,
        families=LINEAR,
        r=2,
        use_bdlora=lambda case: peft.tuners.lora.BdLoraConfig(nblocks=2, target_modules_bd_b=ALL_LINEAR[case.name]),
    ),
    "lora kasa": _tuner("LORA", families=LINEAR, r=2, kasa_config=peft.tuners.lora.config.KasaConfig()),
    "lora velora": _tuner("LORA", r=2, velora_config=dict(num_groups=4, init_type="batch_average_once")),
    "lora velora random": _tuner("LORA", r=2, velora_config=dict(num_groups=4, init_type="random")),
    "lora monteclora": _tuner(
        "LORA", r=2, monteclora_config=peft.tuners.lora.config.MontecloraConfig(num_samples=2, buffer_size=1)
    ),
    "adalora": _tuner("ADALORA", init_r=3, target_r=2, total_step=100),
    "adamss": _tuner("ADAMSS", families=LINEAR, r=8, num_subspaces=2),
    "adaption prompt": _tuner("ADAPTION_PROMPT", None, families=CAUSAL, adapter_len=3, adapter_layers=2),
    "beft": _tuner("BEFT", families=LINEAR),
    "boft": _tuner("BOFT", families=LINEAR, boft_block_size=4),
    "boft butterfly": _tuner("BOFT", families=LINEAR, boft_block_size=4, boft_n_butterfly_factor=2),
    "boft convolution": _tuner("BOFT", CONVOLUTION, boft_block_size=4),
    "c3a": _tuner("C3A", families=LINEAR, block_size=8),
    "cartridge": _tuner("CARTRIDGE", None, families=TEXT, num_virtual_tokens=4),
    "cpt": _tuner(
        "CPT", None, families=CAUSAL, cpt_token_ids=[3, 4, 5, 6], cpt_mask=[1] * 4, cpt_tokens_type_mask=[1, 2, 3, 4]
    ),
    "deft": _tuner("DEFT", r=2),
    "deft qr": _tuner("DEFT", r=2, decomposition_method="qr"),
    "delora": _tuner("DELORA", families=LINEAR, r=2),
    "fourierft": _tuner("FOURIERFT", n_frequency=20),
    "frod": _tuner("FROD", sparse_rate=0.1, progressbar=False),
    "glora": _tuner("GLORA", families=LINEAR, r=2),
    "glora vector": _tuner("GLORA", families=LINEAR, r=2, config_A_B="vector", config_C="vector", config_D_E="vector"),
    "gralora": _tuner("GRALORA", r=4, gralora_k=2),
    "gralora hybrid": _tuner("GRALORA", r=4, gralora_k=2, hybrid_r=2),
    "hira": _tuner("HIRA", r=2),
    "hira embedding": _tuner("HIRA", EMBEDDING, r=2),
    "hira convolution": _tuner("HIRA", CONVOLUTION, r=2),
    "hra": _tuner("HRA", families=LINEAR, r=2),
    "hra orthogonal": _tuner("HRA", families=LINEAR, r=2, apply_GS=True),
    "hra convolution": _tuner("HRA", CONVOLUTION, r=2),
    "ia3": _tuner("IA3", feedforward_modules=[]),
    "ia3 feedforward": _tuner("IA3", FEEDFORWARD, feedforward_modules=lambda case: FEEDFORWARD[case.name]),
    "ia3 convolution": _tuner("IA3", CONVOLUTION, feedforward_modules=[]),
    "lily": _tuner("LILY", families=LINEAR, r=4, num_B=2),
    "ln tuning": _tuner("LN_TUNING", NORM),
    "loha": _tuner("LOHA", families=LINEAR, r=2),
    "loha convolution": _tuner("LOHA", CONVOLUTION, r=2),
    "loha convolution effective": _tuner("LOHA", CONVOLUTION, r=2, use_effective_conv2d=True),
    "lokr": _tuner("LOKR", families=LINEAR, r=2),
    "lokr decomposed": _tuner("LOKR", families=LINEAR, r=1, decompose_both=True, decompose_factor=4),
    "lokr convolution": _tuner("LOKR", CONVOLUTION, r=2),
    "miss": _tuner("MISS", families=LINEAR, r=4),
    "miss bat": _tuner("MISS", families=LINEAR, r=4, init_weights="bat"),
    "miss mini": _tuner("MISS", families=LINEAR, r=4, init_weights="mini", mini_r=2),
    "multitask prompt tuning": _tuner(
        "MULTITASK_PROMPT_TUNING",
        None,
        families=TEXT,
        num_virtual_tokens=4,
        num_tasks=2,
        num_ranks=1,
        inputs=_task_prompts,
    ),
    "oft": _tuner("OFT", families=LINEAR, oft_block_size=4),
    "oft exact": _tuner("OFT", families=LINEAR, oft_block_size=4, use_cayley_neumann=False),
    "oft shared": _tuner("OFT", families=LINEAR, oft_block_size=4, block_share=True),
    "oft constrained": _tuner("OFT", families=LINEAR, oft_block_size=4, coft=True),
    "oft convolution": _tuner("OFT", CONVOLUTION, oft_block_size=4),
    "osf": _tuner("OSF", families=LINEAR, effective_rank=4),
    "p-tuning MLP": _tuner("P_TUNING", None, families=TEXT, num_virtual_tokens=4, encoder_hidden_size=8),
    "p-tuning LSTM": _tuner(
        "P_TUNING",
        None,
        families=TEXT,
        num_virtual_tokens=4,
        encoder_hidden_size=8,
        encoder_reparameterization_type="LSTM",
    ),
    "peanut": _tuner("PEANUT", families=LINEAR, r=4),
    "peanut deep": _tuner("PEANUT", families=LINEAR, r=4, depth=1),
    "poly": _tuner("POLY", families=("bert", "llama", "t5"), r=2, n_tasks=2, n_skills=2, inputs=_task_ids),
    "prefix tuning": _tuner("PREFIX_TUNING", None, families=TEXT, num_virtual_tokens=4),
    "prefix tuning projected": _tuner(
        "PREFIX_TUNING", None, families=TEXT, num_virtual_tokens=4, prefix_projection=True, encoder_hidden_size=8
    ),
    "prompt tuning": _tuner("PROMPT_TUNING", None, families=TEXT, num_virtual_tokens=4),
    "psoft": _tuner("PSOFT", families=LINEAR, r=4),
    "psoft neumann": _tuner("PSOFT", families=LINEAR, r=4, use_cayley_neumann=True),
    "pvera": _tuner("PVERA", r=4),
    "randlora": _tuner("RANDLORA", r=4),
    "road": _tuner("ROAD", families=LINEAR, group_size=8),
    "road 2": _tuner("ROAD", families=LINEAR, group_size=8, variant="road_2"),
    "road 4": _tuner("ROAD", families=LINEAR, group_size=8, variant="road_4"),
    "shadow": _tuner("SHADOW", BLOCK, families=("bert", "gpt2", "llama"), r=2),
    "shira": _tuner("SHIRA", families=LINEAR, r=2),
    "supertuning": _tuner("SUPERTUNING", families=LINEAR, sparsity=0.5),
    "supertuning supra": _tuner("SUPERTUNING", families=LINEAR, sparsity=0.5, r=2),
    "tinylora": _tuner("TINYLORA", u=4),
    "tinylora tied": _tuner("TINYLORA", u=4, weight_tying=1.0),
    "trainable tokens": _tuner("TRAINABLE_TOKENS", EMBEDDING, token_indices=_first_tokens),
    "unilora": _tuner("UNILORA", r=2, theta_d_length=16),
    "vblora": _tuner("VBLORA", r=2, num_vectors=8, vector_length=8),
    "vera": _tuner("VERA", r=4),
    "waveft": _tuner("WAVEFT", n_frequency=20),
    "xlora": _tuner("XLORA", None, families=("llama",), hidden_size=16, adapters=_saved_adapters),
    "xlora trainable": _tuner(
        "XLORA",
        None,
        families=("llama",),
        hidden_size=16,
        xlora_depth=2,
        xlora_size=8,
        xlora_dropout_p=0.0,
        layerwise_scalings=True,
        use_trainable_adapters=True,
        adapters=_saved_adapters,
    ),  # fmt: skip
}


# What no exact method can serve as it is, and why.
REFUSED: dict[str, str] = {
    "lily": "its router averages over all tokens of the batch, so one example's gradient contains the others",
    "lora velora": "its projection is the mean activation of a batch, kept in a buffer: other examples enter un-noised",
    "lora monteclora": "its forward pass rewrites buffers and draws one sample of the weights for a whole batch",
    "BatchNorm": "its statistics mix the examples of a batch and stay in buffers; subset.replace_batchnorm puts "
    "GroupNorm",
    "Conv2d after a frozen BatchNorm in train mode": "the frozen layer's statistics still take in the data; eval mode "
    "or GroupNorm",
}


# -- layers trained in place -------------------------------------------------------------------------------------------


def _trained(family: str, *patterns: str) -> Callable[[], tuple]:
    """Parameters of a whole model whose names match a pattern."""

    def make():
        case = Case(family)
        for name, parameter in case.model.named_parameters():
            parameter.requires_grad_(any(fnmatch(name, pattern) for pattern in patterns))
        return case.model, case.losses, case.examples

    return make


def _lora_on_experts():
    """LoRA on the experts' stacked weights, which are parameters and not layers."""
    case = Case("mixtral")
    config = peft.LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=[], target_parameters=["experts.gate_up_proj"])
    case.model = peft.get_peft_model(case.model, config)
    return case.model, case.losses, case.examples


class First(nn.Module):
    """A layer that returns a tuple, and its first output; ``copies`` of the input are passed."""

    def __init__(self, layer: nn.Module, copies: int = 1) -> None:
        super().__init__()
        self.layer, self.copies = layer, copies

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(*[x] * self.copies)[0]


class Swap(nn.Module):
    """``(B, T, C)`` to ``(B, C, T)``."""

    def forward(self, x: Tensor) -> Tensor:
        return x.transpose(1, 2)


class Mean(nn.Module):
    """``(B, T, C)``, or ``(B, C, ...)`` with ``channels_first``, to ``(B, C)``."""

    def __init__(self, channels_first: bool) -> None:
        super().__init__()
        self.channels_first = channels_first

    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(2).mean(2) if self.channels_first else x.mean(1)


def _alone(layer: Callable[[], nn.Module], *shape: int, before: Callable[[], nn.Module] = nn.Identity) -> Callable:
    """One trainable layer on inputs of this shape, between a frozen layer ``before`` it and a frozen head."""

    def make():
        torch.manual_seed(0)
        model = nn.ModuleDict(
            {"before": before(), "layer": layer(), "mean": Mean(len(shape) == 3), "head": nn.LazyLinear(3)}
        )
        examples = tensor_examples("x", *shape)

        def losses(chosen: Sequence[dict]) -> Tensor:
            hidden = torch.stack([example["x"] for example in chosen])
            for step in model.values():
                hidden = step(hidden)
            return class_losses(hidden, torch.tensor([example["labels"] for example in chosen]))

        with torch.no_grad():
            model.eval()
            losses(examples)
            model.train()
        model.requires_grad_(False)
        model["layer"].requires_grad_(True)
        return model, losses, examples

    return make


def _dp_lstm() -> nn.Module:
    from opacus.layers import DPLSTM

    return First(DPLSTM(6, 5, batch_first=True))


PICTURE = (4, 8, 8)
LAYERS: dict[str, Callable[[], tuple[nn.Module, Callable[[Sequence], Tensor], list]]] = {
    "Linear": _trained("bert", "*.dense.*", "*.query.*"),
    "GPT-2 Conv1D": _trained("gpt2", "*c_attn*", "*c_fc*", "*c_proj*"),
    "GPT-2, embeddings tied to the head": _trained("gpt2", "*"),
    "position embeddings (BERT)": _trained("bert", "*position_embeddings*"),
    "LayerNorm": _trained("bert", "*LayerNorm*"),
    "RMSNorm (Llama)": _trained("llama", "*norm*"),
    "RMSNorm (Gemma)": _trained("gemma", "*norm*"),
    "RMSNorm (Qwen3)": _trained("qwen3", "*norm*"),
    "RMSNorm (T5)": _trained("t5", "*layer_norm*"),
    "all biases": _trained("bert", "*bias"),
    "relative attention bias (T5)": _trained("t5", "*relative_attention_bias*"),
    "class token and position embeddings (ViT)": _trained("vit", "*cls_token", "*position_embeddings"),
    "experts and router (Mixtral)": _trained("mixtral", "*.mlp.*"),
    "experts, shared expert and router (Qwen2-MoE)": _trained("qwen2_moe", "*.mlp.*"),
    "LoRA on expert parameters (Mixtral)": _lora_on_experts,
    "whole BERT": _trained("bert", "*"),
    "whole Llama": _trained("llama", "*"),
    "whole ViT": _trained("vit", "*"),
    "whole DINOv2": _trained("dinov2", "*"),
    "whole Swin": _trained("swin", "*"),
    "whole T5": _trained("t5", "*"),
    "whole BART": _trained("bart", "*"),
    "whole Whisper": _trained("whisper", "*"),
    "GroupNorm": _alone(partial(nn.GroupNorm, 2, 4), *PICTURE),
    "InstanceNorm": _alone(partial(nn.InstanceNorm2d, 4, affine=True), *PICTURE),
    "Conv1d": _alone(lambda: nn.Sequential(Swap(), nn.Conv1d(6, 8, 3, padding=1, groups=2), Swap()), 5, 6),
    "Conv2d": _alone(partial(nn.Conv2d, 4, 6, 3, stride=2, padding=1), *PICTURE),
    "Conv2d, depthwise and dilated": _alone(partial(nn.Conv2d, 4, 8, 3, groups=4, dilation=2), *PICTURE),
    "ConvTranspose2d": _alone(partial(nn.ConvTranspose2d, 4, 6, 3), *PICTURE),
    "LSTM": _alone(lambda: First(nn.LSTM(6, 5, batch_first=True)), 7, 6),
    "LSTM (Opacus DPLSTM)": _alone(_dp_lstm, 7, 6),
    "MultiheadAttention": _alone(lambda: First(nn.MultiheadAttention(6, 2, batch_first=True), copies=3), 7, 6),
    "BatchNorm": _alone(partial(nn.BatchNorm2d, 4), *PICTURE),
    "Conv2d after a frozen BatchNorm in train mode": _alone(
        partial(nn.Conv2d, 4, 6, 3), *PICTURE, before=partial(nn.BatchNorm2d, 4)
    ),
}
