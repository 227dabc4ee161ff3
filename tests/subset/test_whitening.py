"""A LoRA whose A reads whitened inputs: from public examples alone, with the model unchanged and A kept."""

import pytest
import torch

from dpft.errors import RecipeError, SubsetError
from dpft.recipe import Recipe
from dpft.subset import Subset
from dpft.subset.weights import load_kept, save_kept
from dpft.workflows.setup import set_up
from dpft.workflows.train import train
from tests.support.recipes import NAMES, classifier_in, language_in, write
from tests.support.zoo import llama as tiny_llama

WHITENED = "lora(rank=3, freeze_a=True, init='whitened')"


@pytest.fixture
def texts():
    torch.manual_seed(1)
    return [torch.randint(0, 60, (1, 30)) for _ in range(8)]


def adapted(texts, expression=WHITENED):
    torch.manual_seed(0)
    model = tiny_llama()
    run = lambda some: model(input_ids=torch.cat(some)).logits
    return Subset(expression).apply(model, run, texts), run


def inputs_of(layer, run, texts):
    seen = []
    hook = layer.register_forward_pre_hook(lambda module, args: seen.append(args[0].flatten(0, -2)))
    with torch.no_grad():
        for text in texts:
            run([text])
    hook.remove()
    return torch.cat(seen).double()


def test_a_reads_uncorrelated_numbers_of_equal_width(texts):
    model, run = adapted(texts)
    layers = [m for name, m in model.named_modules() if name.endswith("lora_A.default")]
    assert layers
    for layer in layers:
        read = inputs_of(layer, run, texts) @ layer.weight.detach().double().T
        spread = torch.cov(read.T)
        assert (spread - torch.eye(3) * spread.diagonal().mean()).abs().max() < 0.15 * spread.diagonal().mean()


def test_the_mean_square_of_what_a_reads_is_that_of_the_random_start(texts):
    random, run = adapted(texts, "lora(rank=3)")
    before = [
        m.weight.detach().double().clone() for name, m in random.named_modules() if name.endswith("lora_A.default")
    ]
    model, run = adapted(texts)
    layers = [m for name, m in model.named_modules() if name.endswith("lora_A.default")]
    for layer, old in zip(layers, before, strict=True):
        inputs = inputs_of(layer, run, texts)
        assert not torch.equal(layer.weight.detach().double(), old)
        sizes = [float((inputs @ rows.T).square().mean()) for rows in (old, layer.weight.detach().double())]
        assert sizes[0] == pytest.approx(sizes[1], rel=1e-4)


def test_the_model_is_as_it_was_and_b_alone_trains(texts):
    model, run = adapted(texts)
    torch.manual_seed(0)
    with torch.no_grad():
        assert torch.equal(run(texts[:1]), tiny_llama()(input_ids=texts[0]).logits)
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    assert trained and all(".lora_B." in name for name in trained)


def test_a_checkpoint_keeps_the_frozen_a(texts, tmp_path):
    model, _ = adapted(texts)
    save_kept(model, tmp_path / "kept.safetensors")
    other, _ = adapted(texts[:2])  # as another machine's public text would have it
    place = next(name for name, _ in model.named_parameters() if ".lora_A." in name)
    assert not torch.allclose(other.get_parameter(place), model.get_parameter(place))
    load_kept(other, tmp_path / "kept.safetensors")
    for (name, one), (_, two) in zip(model.named_parameters(), other.named_parameters(), strict=True):
        assert torch.equal(one, two), name


def test_without_public_examples_or_with_too_many_directions_it_is_refused(texts):
    with pytest.raises(SubsetError, match="give public data"):
        Subset(WHITENED).apply(tiny_llama())
    with pytest.raises(SubsetError, match=r"lower the rank"):
        adapted(texts, "lora(rank=99, init='whitened')")
    with pytest.raises(SubsetError, match="choose random or whitened"):
        Subset("lora(init='white')")


def test_a_language_model_makes_up_its_own_and_a_classifier_needs_public_data(tmp_path):
    language = language_in(tmp_path / "language") | {"subset": WHITENED.replace("rank=3", "rank=2")}
    train(Recipe.parse(language), tmp_path / "run")
    assert (tmp_path / "run" / "weights" / "adapter_config.json").exists()
    classifier = classifier_in(tmp_path / "classifier") | {"subset": f"{WHITENED} + head"}
    with pytest.raises(RecipeError, match=r"declare public data in data\.public"):
        set_up(Recipe.parse(classifier))
    classifier["data"] |= {"public": classifier["data"]["validation"], "validation": None}
    assert set_up(Recipe.parse(classifier)).model is not None


def test_the_start_does_not_follow_the_training_data(tmp_path):
    recipe = language_in(tmp_path) | {"subset": WHITENED.replace("rank=3", "rank=2")}
    starts = []
    for rows in (40, 20):
        write(tmp_path / "train.csv", [("text",), *[(f"{NAMES[0]} {NAMES[i % 9]}",) for i in range(rows)]])
        recipe["data"]["units"] = rows
        model = set_up(Recipe.parse(recipe)).model
        starts.append([p for name, p in model.named_parameters() if ".lora_A." in name])
    assert starts[0] and all(torch.equal(one, two) for one, two in zip(*starts, strict=True))
