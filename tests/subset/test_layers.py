"""Structure of models: BatchNorm's replacement."""

import torch
import transformers
from torch import nn

from dpft.gradients.engine import Engine
from dpft.gradients.preflight import preflight
from dpft.subset import Subset, replace_batchnorm
from dpft.tasks.task import class_losses


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
