"""Single weights: which are chosen, that only they exist, and that they are saved and loaded."""

import pytest
import torch
from torch import nn

from dpft.errors import RecipeError, SubsetError
from dpft.gradients.engine import Engine
from dpft.gradients.preflight import preflight
from dpft.gradients.rules import sparse as rule
from dpft.subset import Sparse, Subset, load_weights, save_weights
from dpft.subset.sparse import deltas, fold


def vectors(model):
    return {name: delta for name, (_, delta) in deltas(model).items()}


def weights(model):
    return {name.replace(".parametrizations", "").removesuffix(".original"): p for name, p in model.named_parameters()}


def test_the_largest_weights_of_each_layer_are_chosen(case):
    model = Subset("sparse(fraction=0.1)").apply(case("bert").model)
    found = vectors(model)
    assert len(found) == 12 and all(name.startswith("bert.encoder.layer.") for name in found)
    for name, delta in found.items():
        weight = weights(model)[name].abs().flatten()
        assert len(delta.values) == round(0.1 * len(weight))
        rest = torch.ones_like(weight, dtype=torch.bool)
        rest[delta.indices] = False
        assert weight[delta.indices].min() >= weight[rest].max()
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == sum(len(d.values) for d in found.values())


def test_over_the_model_the_count_is_of_all_weights_together(case):
    model = Subset("sparse(number=100, over='model')").apply(case("bert").model)
    found = vectors(model)
    assert sum(len(delta.values) for delta in found.values()) == 100
    chosen = torch.cat([weights(model)[name].abs().flatten()[delta.indices] for name, delta in found.items()])
    every = torch.cat(
        [
            weights(model)[name].abs().flatten()
            for name in vectors(Subset("sparse(fraction=1.0)").apply(case("bert").model))
        ]
    )
    assert torch.equal(chosen.sort().values, every.topk(100).values.sort().values)


def test_the_random_control_has_as_many_and_depends_on_its_seed_alone(case):
    by_size, one, again, two = (
        vectors(Subset(f"sparse(fraction=0.1, {more})").apply(case("bert").model))
        for more in ("choose='magnitude'", "choose='random'", "choose='random'", "choose='random', seed=1")
    )
    assert [len(d.values) for d in by_size.values()] == [len(d.values) for d in one.values()]
    assert all(torch.equal(one[name].indices, again[name].indices) for name in one)
    assert not any(torch.equal(one[name].indices, two[name].indices) for name in one)


@pytest.mark.parametrize("family", ["bert", "gpt2"])
@pytest.mark.parametrize(("group", "along"), [("rows", 1), ("columns", 0)])
def test_groups_are_whole_rows_or_columns_in_both_ways_of_storing_a_matrix(family, group, along, case):
    model = Subset(f"sparse(number=2, group='{group}')").apply(case(family).model)
    stored_transposed = family == "gpt2"
    for name, delta in vectors(model).items():
        weight = weights(model)[name]
        mask = torch.zeros_like(weight, dtype=torch.bool)
        mask.view(-1)[delta.indices] = True
        mask = mask.T if stored_transposed else mask
        whole = mask.all(along)
        assert whole.sum() == 2 and mask.sum() == 2 * mask.shape[along]
        norms = (weight.T if stored_transposed else weight).norm(dim=along)
        assert norms[whole].min() >= norms[~whole].max()


def test_heads_are_rows_of_one_head_together(case):
    model = Subset("sparse(number=1, group='heads', layers='*attention.*query.weight')").apply(case("bert").model)
    for delta in vectors(model).values():
        rows = (delta.indices // 16).unique()
        assert rows.tolist() in (list(range(8)), list(range(8, 16)))
    with pytest.raises(SubsetError, match="finds no untied weight matrix"):
        Subset("sparse(number=1, group='heads', layers='classifier.weight')").apply(case("bert").model)


def test_gradients_choose_only_on_public_data(case):
    made = case("bert")
    with pytest.raises(SubsetError, match="declare public data"):
        Subset("sparse(number=3, choose='gradient')").apply(made.model)
    expected = dict(made.model.named_parameters())
    names = [f"bert.encoder.layer.{i}.output.dense.weight" for i in (0, 1)]
    made.model.eval()
    mean = torch.autograd.grad(made.losses(made.examples).mean(), [expected[name] for name in names])
    model = Subset("sparse(number=3, choose='gradient')").apply(made.model, made.losses, made.examples)
    for name, gradient in zip(names, mean, strict=True):
        assert set(vectors(model)[name].indices.tolist()) == set(gradient.abs().flatten().topk(3).indices.tolist())


def test_gradients_of_nothing_choose_nothing(case):
    made = case("bert")
    with pytest.raises(SubsetError, match="no usable gradient in 0 public examples"):
        Subset("sparse(fraction=0.01, choose='gradient', over='model')").apply(made.model, made.losses, [])
    assert made.model.training and all(p.requires_grad for p in made.model.parameters())


def test_of_equal_scores_no_more_than_asked_for_are_chosen(case):
    made = case("bert")
    with torch.no_grad():
        for parameter in made.model.parameters():
            parameter.fill_(0.5)
    found = vectors(Subset("sparse(number=30, over='model')").apply(made.model))
    assert sum(len(delta.values) for delta in found.values()) == 30


def test_a_recipe_that_chooses_by_gradients_needs_public_data():
    from dpft.recipe import Recipe
    from tests.support.recipes import changed

    tables = changed("subset", "sparse(fraction=0.01, choose='gradient')")
    with pytest.raises(RecipeError, match="declare public data in data.public"):
        Recipe.parse(tables)
    tables["data"]["public"] = "public.csv"
    assert Recipe.parse(tables).data.public == "public.csv"
    tables["data"]["public"] = ["public.csv", "./" + tables["data"]["train"]]
    with pytest.raises(RecipeError, match="data.public names the private file"):
        Recipe.parse(tables)


@pytest.mark.parametrize(
    "settings",
    ["", "fraction=2.0", "fraction=0.1, number=3", "number=0", "fraction=0.1, choose='best'", "rank=2, over='model'"],
)
def test_what_cannot_be_meant_is_refused(settings):
    with pytest.raises(SubsetError, match="sparse"):
        Subset(f"sparse({settings})")


def test_tied_weights_and_weights_that_train_whole_are_left_out(case):
    model = Subset("sparse(fraction=0.1, layers='*') + last_blocks(1)").apply(case("gpt2").model)
    assert all(name.startswith("transformer.h.0.") or name == "transformer.wpe.weight" for name in vectors(model))


@pytest.mark.parametrize("share", [0.01, 0.5])
@pytest.mark.parametrize("family", ["bert", "gpt2"])
def test_sampled_and_dense_products_agree_where_they_meet(family, share, case, plan, monkeypatch):
    made = case(family)
    made.model = Subset(f"sparse(fraction={share}) + bias").apply(made.model).eval()
    rows = []
    for dense in (0.0, 2.0):
        monkeypatch.setattr(rule, "DENSE", dense)
        with Engine(made.model, plan()) as engine:
            rows.append(engine.capture.rows(made.losses(made.examples)).clone())
    torch.testing.assert_close(*rows)


def step(model, made, plan):
    with Engine(model, plan(noise_multiplier=0.0)) as engine:
        preflight(engine, made.losses, made.examples)
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
        for example in made.examples:
            engine.accumulate(made.losses([example]))
        engine.release()
        optimizer.step()


def logits(model, made):
    with torch.no_grad():
        batch = made.batch(made.examples)
        batch.pop("labels")
        return model.eval()(**batch).logits


BERT, PEFT = "BertForSequenceClassification.from_pretrained", "PeftModel.from_pretrained"


@pytest.mark.parametrize(
    ("subset", "file", "line"),
    [
        ("sparse(fraction=0.1)", "delta.safetensors", "dpft.load_weights"),
        ("sparse(rank=1)", "adapter_model.safetensors", PEFT),
        ("sparse(fraction=0.1) + norms", "model.safetensors", BERT),
        ("sparse(fraction=0.1) + lora(rank=2)", "model.safetensors", BERT),
        ("sparse(fraction=0.1) + lora(rank=2) + head", "model.safetensors", BERT),
        ("ia3 + norms", "model.safetensors", BERT),
        ("prompt_tuning(num_virtual_tokens=3) + norms", "delta.safetensors", "dpft.load_weights"),
        ("p_tuning(num_virtual_tokens=3, encoder_hidden_size=8)", "adapter_model.safetensors", PEFT),
        ("vera(r=4) + head", "adapter_model.safetensors", PEFT),
    ],
)  # fmt: skip
def test_trained_weights_load_as_their_line_says(subset, file, line, case, plan, tmp_path):
    made = case("bert")
    model = made.model = Subset(subset).apply(made.model).eval()
    step(model, made, plan)
    expected = logits(model, made)
    before = logits(case("bert").model, made)
    said = save_weights(model, tmp_path / "weights")
    assert line in said and (tmp_path / "weights" / file).exists()
    assert not torch.allclose(expected, before)
    if "base_model" in said:
        loaded = load_weights(case("bert").model, tmp_path / "weights")
    else:
        loaded = type(case("bert").model).from_pretrained(tmp_path / "weights")
    torch.testing.assert_close(logits(loaded, made), expected)


def test_nothing_is_rounded_away_into_a_bf16_base(case, plan, tmp_path):
    made = case("llama")
    model = made.model = Subset("lora(rank=2) + norms").apply(made.model.to(torch.bfloat16)).eval()
    step(model, made, plan)
    expected = logits(model, made)
    assert "dpft.load_weights" in save_weights(model, tmp_path)
    loaded = load_weights(case("llama").model.to(torch.bfloat16), tmp_path)
    torch.testing.assert_close(logits(loaded, made), expected, rtol=0, atol=0)


def test_a_shira_adapter_is_read_by_peft_itself(case, plan, tmp_path):
    from peft import PeftModel

    made = case("llama")
    model = made.model = Subset("sparse(rank=1)").apply(made.model).eval()
    step(model, made, plan)
    expected = logits(model, made)
    save_weights(model, tmp_path)
    loaded = PeftModel.from_pretrained(case("llama").model, tmp_path)
    assert loaded.peft_config["default"].peft_type == "SHIRA"
    torch.testing.assert_close(logits(loaded, made), expected)
    torch.testing.assert_close(logits(loaded.merge_and_unload(), made), expected)


def test_weights_of_another_model_are_refused(case, plan, tmp_path):
    made = case("bert")
    save_weights(Subset("sparse(fraction=0.1)").apply(made.model), tmp_path)
    with pytest.raises(RecipeError, match="which the model lacks"):
        load_weights(case("vit").model, tmp_path)
    with pytest.raises(RecipeError, match="no adapter"):
        load_weights(case("bert").model, tmp_path / "nothing")


def test_folding_gives_the_plain_model_back(case, plan):
    made = case("bert")
    model = made.model = Subset("sparse(fraction=0.1)").apply(made.model).eval()
    step(model, made, plan)
    expected = logits(model, made)
    fold(model)
    assert not deltas(model) and type(model.classifier) is nn.Linear
    assert {type(m) for m in model.modules() if "Parametriz" in type(m).__name__} == set()
    torch.testing.assert_close(logits(model, made), expected)


def test_the_part_writes_itself():
    assert str(Sparse(fraction=0.01, choose="random")) == "sparse(fraction=0.01, choose='random')"
    assert str(Subset("vera(r=4) + norms")) == "vera(r=4) + norms"
