"""Structure of models: their heads, the layers that adapters find, BatchNorm's replacement."""

import pytest
import torch
import transformers
from torch import nn

from dpft.errors import SubsetError
from dpft.gradients.engine import Engine
from dpft.gradients.preflight import preflight
from dpft.subset import Subset, replace_batchnorm
from dpft.subset.layers import heads, untied_heads
from dpft.tasks.losses import class_losses
from tests.support.zoo import BLOCKS, FAMILIES, IMAGES, VOCABULARY, _bart_settings


def resnet():
    torch.manual_seed(0)
    config = transformers.ResNetConfig(
        num_channels=1, embedding_size=8, hidden_sizes=[8, 12], depths=[1, 1], layer_type="basic", num_labels=3
    )
    return transformers.ResNetForImageClassification(config)


def test_a_residual_network_is_exact_after_its_batch_norm_is_replaced(plan):
    model = resnet()
    norms = [name for name, m in model.named_modules() if isinstance(m, nn.BatchNorm2d)]
    scales = {name: model.get_submodule(name).weight for name in norms}
    assert norms and replace_batchnorm(model, groups=5) is model
    for name in norms:
        norm = model.get_submodule(name)
        assert type(norm) is nn.GroupNorm and norm.num_groups == 4 and norm.weight is scales[name]
    model = Subset("all").apply(model)
    examples = [(torch.randn(1, 16, 16), i) for i in range(3)]

    def losses(chosen):
        pixels = torch.stack([image for image, _ in chosen])
        return class_losses(model(pixels).logits, torch.tensor([label for _, label in chosen]))

    with Engine(model, plan()) as engine:
        found = preflight(engine, losses, examples)
    assert found.exact and set(found.techniques) == {"rule"}


def test_a_lone_norm_is_replaced_too():
    norm = replace_batchnorm(nn.BatchNorm1d(6, affine=False))
    assert type(norm) is nn.GroupNorm and norm.num_groups == 6 and norm.weight is None


TEXT = dict(**VOCABULARY, **BLOCKS, intermediate_size=24, max_position_embeddings=32)
T5 = dict(vocab_size=60, d_model=16, d_kv=8, d_ff=24, num_layers=1, num_heads=2, decoder_start_token_id=0)
XLNET = dict(vocab_size=60, d_model=16, n_layer=1, n_head=2, d_inner=24)
VIT = dict(IMAGES, **BLOCKS, intermediate_size=24)
SOUND = dict(
    TEXT, conv_dim=[16], conv_kernel=[3], conv_stride=[2], num_conv_pos_embeddings=4, num_conv_pos_embedding_groups=2
)
MAMBA = dict(vocab_size=60, hidden_size=16, num_hidden_layers=1, state_size=4)
HEADS_OF = {
    "BartForSequenceClassification": (_bart_settings(), ["classification_head"]),
    "MBartForSequenceClassification": (_bart_settings(), ["classification_head"]),
    "BartForCausalLM": (_bart_settings(), ["lm_head"]),
    "T5ForSequenceClassification": (T5, ["classification_head"]),
    "T5ForTokenClassification": (T5, ["classifier"]),
    "T5ForQuestionAnswering": (T5, ["qa_outputs"]),
    "XLNetForSequenceClassification": (XLNET, ["sequence_summary", "logits_proj"]),
    "XLNetLMHeadModel": (XLNET, ["lm_loss"]),
    "XLMForSequenceClassification": (dict(vocab_size=60, emb_dim=16, n_layers=1, n_heads=2), ["sequence_summary"]),
    "DistilBertForSequenceClassification": (
        dict(vocab_size=60, dim=16, n_layers=1, n_heads=2, hidden_dim=24),
        ["pre_classifier", "classifier"],
    ),
    "RobertaForSequenceClassification": (TEXT, ["classifier"]),
    "DebertaV2ForTokenClassification": (TEXT, ["classifier"]),
    "BertForQuestionAnswering": (TEXT, ["qa_outputs"]),
    "ModernBertForSequenceClassification": (dict(TEXT, cls_token_id=1, sep_token_id=2), ["head", "classifier"]),
    "BioGptForCausalLM": (TEXT, ["output_projection"]),
    "GPTNeoXForCausalLM": (TEXT, ["lm_head"]),
    "MambaForCausalLM": (MAMBA, ["lm_head"]),
    "DeiTForImageClassificationWithTeacher": (VIT, ["cls_classifier", "distillation_classifier"]),
    "BeitForImageClassification": (VIT, ["beit.pooler", "classifier"]),
    "Wav2Vec2ForSequenceClassification": (SOUND, ["projector", "classifier"]),
    "WavLMForCTC": (SOUND, ["lm_head"]),
}


def make(kind):
    model = getattr(transformers, kind)
    return model(model.config_class(**HEADS_OF[kind][0]))


@pytest.mark.parametrize("kind", HEADS_OF)
def test_a_head_is_what_follows_the_base(kind):
    model = make(kind)
    assert heads(model) == HEADS_OF[kind][1]
    model = Subset("lora(rank=2) + head").apply(model)  # as `dpft init` writes it
    trained = {name for name, p in model.named_parameters(remove_duplicate=False) if p.requires_grad}
    assert any("lora_" in name for name in trained)
    for head in HEADS_OF[kind][1]:
        assert {name for name in trained if f".{head}." in name}


CLASSIFIERS = {"bert": ["bert.pooler", "classifier"], "whisper": ["proj_out"]}
CLASSIFIERS |= {family: ["classifier"] for family in ("vit", "dinov2", "swin")}


@pytest.mark.parametrize("family", FAMILIES)
def test_the_heads_of_the_usual_families_stay(family, case):
    assert heads(case(family).model) == CLASSIFIERS.get(family, ["lm_head"])


def test_a_model_without_a_head_says_so():
    model = transformers.BertModel(transformers.BertConfig(**TEXT), add_pooling_layer=False)
    with pytest.raises(SubsetError, match="BertModel has no head, which is what follows its base model"):
        heads(model)
    assert untied_heads(model) == []


def test_a_head_is_not_mistaken_for_what_ends_in_its_name():
    config = transformers.PoolFormerConfig(num_channels=1, hidden_sizes=[8] * 4, depths=[1] * 4)
    model = transformers.PoolFormerForImageClassification(config)
    before = {name for name in model.state_dict() if name.startswith(("norm.", "classifier."))}
    model = Subset("ia3(target_modules=['conv1'], feedforward_modules=[]) + head").apply(model)
    trained = [name for name, p in model.named_parameters() if p.requires_grad and "ia3_" not in name]
    assert {
        name.removeprefix("base_model.model.").replace("modules_to_save.default.", "") for name in trained
    } == before


@pytest.mark.parametrize("kind", ["Mamba", "Mamba2", "FalconMamba"])
def test_lora_finds_the_layers_of_a_state_space_model(kind):
    more = dict(num_heads=4, head_dim=8, n_groups=1) if kind == "Mamba2" else {}
    model = getattr(transformers, f"{kind}ForCausalLM")(getattr(transformers, f"{kind}Config")(**MAMBA, **more))
    model = Subset("lora(rank=2)").apply(model)
    assert {name.split(".")[-4] for name, p in model.named_parameters() if p.requires_grad} <= {"in_proj", "x_proj"}


@pytest.mark.parametrize(
    ("subset", "words"),
    [
        ("lora(targets='nothing')", "with 'nothing': its linear layers are named dt_proj, in_proj, lm_head, out_proj"),
        ("lora(targets='in_proj, nothing')", "matches no layer of MambaForCausalLM with 'nothing'"),
        ("lora(targets='proj')", "with 'proj'"),
        ("lora(targets='out_proj')", "choose its layers with targets, among dt_proj, in_proj"),
        ("lora(targets='all-linear')", "Please remove it from `targets` .* among dt_proj, in_proj, lm_head, out_proj"),
        ("lora(targets='lm_head', last_blocks=1)", "finds none of lm_head in the last 1 blocks"),
        ("lora(target_modules='in_proj')", "lora has no setting 'target_modules': it has rank, alpha, .*targets"),
        ("last_blocks(n=1)", "last_blocks has no setting 'n': it has k"),
        ("ia3(target_modules=['nothing'], feedforward_modules=[])", "choose its layers with target_modules, among"),
    ],
)
def test_a_message_names_the_words_of_the_subset(subset, words):
    with pytest.raises(SubsetError, match=words) as error:
        Subset(subset).apply(make("MambaForCausalLM"))
    assert "\n" not in str(error.value)
