"""Pictures: decoded when a batch is collated, cropped anew at each draw, and found wherever a row may hold them."""

import base64
import gc
import io
import weakref

import datasets
import numpy as np
import pytest
import torch
import transformers
from PIL import Image

from dpft.errors import IsolationError, RecipeError
from dpft.recipe import Recipe
from dpft.runs import RunFolder
from dpft.tasks import ImageClassification, LabelledTask
from dpft.training.batches import Examples
from dpft.training.data import load
from dpft.training.rows import WhenDrawn
from dpft.training.session import Session
from dpft.workflows.setup import load_model, set_up
from dpft.workflows.train import train

LABELS = ["left", "right"]
BLOCKS = dict(hidden_size=16, num_hidden_layers=2, num_attention_heads=2)
SIDE = {"height": 16, "width": 16}
PROCESSORS = {
    "vit": transformers.ViTImageProcessor(size=SIDE),
    "dinov2": transformers.BitImageProcessor(size={"shortest_edge": 18}, crop_size=SIDE),
    "swin": transformers.ViTImageProcessor(size=SIDE),
    "resnet": transformers.ViTImageProcessor(size=SIDE),
    "bit": transformers.ViTImageProcessor(size=SIDE),
}


def config(family):
    if family == "vit":
        return transformers.ViTConfig(image_size=16, patch_size=8, intermediate_size=24, **BLOCKS)
    if family == "dinov2":
        return transformers.Dinov2Config(image_size=16, patch_size=8, mlp_ratio=2, **BLOCKS)
    if family == "swin":
        return transformers.SwinConfig(
            image_size=16, patch_size=2, embed_dim=8, depths=[2, 1], num_heads=[2, 2], window_size=4
        )
    if family == "bit":
        return transformers.BitConfig(embedding_size=8, hidden_sizes=[16, 32], depths=[1, 1], num_groups=4)
    return transformers.ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic")


def checkpoint(folder, family="vit", labels=5):
    """With classes of its own, as checkpoints have that were trained on ImageNet."""
    transformers.set_seed(0)
    made = config(family)
    made.num_labels = labels
    transformers.AutoModelForImageClassification.from_config(made).save_pretrained(folder)
    PROCESSORS[family].save_pretrained(folder)
    return folder


def png(number):
    """Bright on the left or on the right."""
    pixels = np.random.default_rng(number).integers(80, size=(20 + number % 5, 24, 3), dtype=np.uint8)
    half = slice(None, 12) if number % 2 == 0 else slice(12, None)
    pixels[:, half] += 150
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def label(number):
    return LABELS[number % 2]


def recipe(folder, family="vit", subset="head", **more):
    rows = {"image": [png(i) for i in range(16)], "label": [label(i) for i in range(16)]}
    datasets.Dataset.from_dict(rows).to_parquet(folder / "rows.parquet")
    checkpoint(folder / "model", family)
    tables = {
        "subset": subset,
        "model": {"path": str(folder / "model")},
        "task": {"name": "image_classification", "labels": LABELS, **more},
        "data": {"train": str(folder / "rows.parquet"), "validation": str(folder / "rows.parquet"), "units": 16},
        "privacy": {"epsilon": 8.0, "delta": 1e-3, "batch_size": 8, "steps": 4},
    }
    return Recipe.parse(tables)


def task(**settings):
    return ImageClassification(PROCESSORS["vit"], LABELS, patch_size=8, **settings)


@pytest.mark.parametrize("family", ["vit", "dinov2", "swin"])
@pytest.mark.parametrize("subset", ["head", "lora(rank=2)", "bias + norms"])
def test_vision_models_train_from_a_recipe(tmp_path, family, subset):
    """With a head for two classes, although the checkpoint's has five; the card is written and the weights load."""
    run = train(recipe(tmp_path, family, subset), tmp_path / "run")
    assert (run / "card.md").exists() and (run / "weights" / "preprocessor_config.json").exists()


@pytest.mark.parametrize("subset", ["head + norms + sparse(fraction=0.1)", "all"])
def test_convolutions_that_standardise_their_weights_are_exact(tmp_path, subset):
    """A residual network with group norms: each picture's gradient is its own, as the preflight proves."""
    run = train(recipe(tmp_path, "bit", subset), tmp_path / "run")
    assert RunFolder(run).record().released_steps == 4


@pytest.mark.parametrize("family", ["vit", "dinov2", "swin", "bit"])
def test_a_head_by_itself_is_learned_over_any_frozen_network(tmp_path, family):
    tables = recipe(tmp_path, family).model_dump()
    without = {"epsilon": None, "noise_multiplier": 0.0, "batch_size": None, "steps": 40}
    tables["privacy"] |= without
    learned = Recipe.parse(tables)
    assert learned.method == "head-descent"
    run = RunFolder(train(learned, tmp_path / "run"))
    assert run.metrics()["accuracy"] == 1.0  # bright on the left, or on the right
    assert run.record().trainable_parameters < 2 * 100
    for key, value in (("crop", 0.5), ("flip", True)):
        with pytest.raises(RecipeError, match=f"task.{key} is set, which .*as they are: remove it"):
            Recipe.parse(tables | {"task": {**tables["task"], key: value}})


def test_a_frozen_prefix_of_pictures_is_kept_and_none_is_decoded_again(tmp_path, monkeypatch):
    decoded, pixels = [], ImageClassification._pixels
    monkeypatch.setattr(ImageClassification, "_pixels", lambda *given: decoded.append(1) or pixels(*given))
    setup = set_up(recipe(tmp_path))
    plan = setup.recipe.plan()
    with Session(setup.model, plan, setup.task, setup.train, tmp_path / "run", frozen_prefix="on") as session:
        assert session.prefix.name == "vit" and set(session.step_examples.costs) == {1}
        decoded.clear()
        for draw in session.draws():
            session.step(draw)
        assert not decoded
    with pytest.raises(RecipeError, match="draws each example anew"):
        cropped = task(crop=0.5)
        with Session(setup.model, plan, cropped, setup.train, tmp_path / "other", frozen_prefix="on"):
            pass


def test_a_model_with_batch_norm_is_refused_with_the_way_out(tmp_path):
    setup = set_up(recipe(tmp_path, "resnet", "all"))
    with pytest.raises(IsolationError, match="BatchNorm.*: ") as refused:
        with Session(setup.model, setup.recipe.plan(), setup.task, setup.train, tmp_path / "run"):
            pass
    assert str(refused.value).count(". ") == 0


# -- where a picture is --------------------------------------------------------------------------------------------


def cells(folder):
    """One picture in every way that a row may hold it."""
    content, path = png(3), folder / "3.png"
    path.write_bytes(content)
    uri = f"data:image/png;base64,{base64.b64encode(content).decode()}"
    objects = [{"bytes": content, "path": None}, {"bytes": None, "path": str(path)}]
    with Image.open(path) as picture:
        picture.load()
    return [str(path), content, *objects, uri, uri.encode(), picture]


def test_a_picture_is_the_same_wherever_it_lies(tmp_path):
    pictures = cells(tmp_path)
    features = task().encode({"image": pictures, "label": ["right"] * len(pictures)})
    batch = task().collate(features)
    assert batch["pixel_values"].shape == (len(pictures), 3, 16, 16) and batch["labels"].tolist() == [1] * 7
    assert all(torch.equal(one, batch["pixel_values"][0]) for one in batch["pixel_values"])


@pytest.mark.parametrize("kind", ["csv", "parquet", "image", "paths"])
def test_files_of_rows(tmp_path, kind):
    """Paths go from the data file's folder on; ``datasets.Image`` and ``ClassLabel`` are read as files and names."""
    made = recipe(tmp_path)
    (tmp_path / "pictures").mkdir()
    paths = [f"pictures/{i}.png" for i in range(16)]
    for i, path in enumerate(paths):
        (tmp_path / path).write_bytes(png(i))
    file = tmp_path / f"data.{'csv' if kind == 'csv' else 'parquet'}"
    rows = datasets.Dataset.from_dict({"label": [label(i) for i in range(16)], "image": paths})
    if kind == "image":
        whole = [str(tmp_path / path) for path in paths]
        features = datasets.Features(image=datasets.Image(), label=datasets.ClassLabel(names=LABELS))
        rows = datasets.Dataset.from_dict({"image": whole, "label": [i % 2 for i in range(16)]}, features=features)
    rows.to_csv(file, index=False) if kind == "csv" else rows.to_parquet(file)
    if kind == "parquet":
        file = tmp_path / "rows.parquet"
    made = made.model_copy(update=dict(data=made.data.model_copy(update=dict(train=str(file), validation=None))))
    train_rows, _ = load(made)
    found = task().collate(list(Examples.encode(train_rows, task()).features))["pixel_values"]
    wanted = task().collate(
        task().encode({"image": [png(i) for i in range(16)], "label": [label(i) for i in range(16)]})
    )
    assert torch.equal(found, wanted["pixel_values"])


def test_a_picture_that_is_none_is_refused_before_anything_is_charged(tmp_path):
    rows = datasets.Dataset.from_dict({"image": [png(0), png(1)[:10]], "label": LABELS})
    with pytest.raises(RecipeError, match="row 2, .*column 'image' .UnidentifiedImageError.: repair the file"):
        Examples.encode(rows, task())
    cut_off = task().encode({"image": [png(0)[:-60]], "label": ["left"]})
    with pytest.raises(RecipeError, match="begins as a picture and cannot be decoded"):
        task().collate(cut_off)


def test_a_file_that_is_not_there_is_refused_with_its_row(tmp_path):
    made = recipe(tmp_path)
    (tmp_path / "0.png").write_bytes(png(0))
    (tmp_path / "rows.csv").write_text("image,label\n0.png,left\nmissing.png,right\n")
    data = made.data.model_copy(update=dict(train=str(tmp_path / "rows.csv"), units=2))
    with pytest.raises(RecipeError, match="row 2 names a file in column 'image' that is not there: ") as refused:
        load(made.model_copy(update=dict(data=data)))
    assert "missing" not in str(refused.value)


def test_relative_paths_of_two_folders_are_refused(tmp_path):
    made = recipe(tmp_path)
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "rows.csv").write_text("image,label\n0.png,left\n")
    data = made.data.model_copy(update=dict(train=[str(tmp_path / name / "rows.csv") for name in ("a", "b")]))
    with pytest.raises(RecipeError, match="lie in 2 folders"):
        load(made.model_copy(update=dict(data=data)))


def test_a_processor_whose_pictures_have_several_shapes_is_refused(tmp_path):
    made = recipe(tmp_path)
    processor = transformers.BitImageProcessor(size={"shortest_edge": 16}, do_center_crop=False)
    processor.save_pretrained(tmp_path / "model")
    with pytest.raises(RecipeError, match="2 shapes.*height and a width in preprocessor_config.json"):
        load_model(made)


# -- when it is decoded ---------------------------------------------------------------------------------------------


@pytest.fixture
def decoded(monkeypatch):
    """Weak references to the pixels of every batch, in order."""
    made, collate = [], ImageClassification.collate

    def watched(self, features):
        batch = collate(self, features)
        made.append(weakref.ref(batch["pixel_values"]))
        return batch

    monkeypatch.setattr(ImageClassification, "collate", watched)
    return made


def test_nothing_is_decoded_before_it_is_drawn_and_nothing_is_kept(tmp_path, decoded):
    setup = set_up(recipe(tmp_path))
    examples = Examples.encode(setup.train, setup.task)
    assert len(examples) == 16 and not decoded
    with Session(
        setup.model,
        setup.recipe.plan(),
        setup.task,
        setup.train,
        tmp_path / "run",
        token_budget=10,
        frozen_prefix="off",
    ) as session:
        for draw in session.draws():
            for batch, units in draw:
                gc.collect()
                alive = [one() for one in decoded if one() is not None]
                assert len(alive) == 1 and alive[0] is batch["pixel_values"] and len(units) <= 2
                del batch, alive
            session.step(draw)
            gc.collect()
            assert not any(one() is not None for one in decoded)
    assert decoded


def test_rows_of_bytes_are_not_kept_and_paths_are(tmp_path):
    rows = {"image": [png(i) for i in range(4)], "label": [label(i) for i in range(4)]}
    assert not isinstance(Examples.encode(datasets.Dataset.from_dict(rows), task()).features, list)
    assert isinstance(
        Examples.encode(datasets.Dataset.from_dict({**rows, "image": cells(tmp_path)[:1] * 4}), task()).features, list
    )


class Counted(torch.utils.data.Dataset):
    """As image people write it: a random picture whenever a row is read."""

    def __init__(self):
        self.read = 0

    def __len__(self):
        return 12

    def __getitem__(self, number):
        self.read += 1
        return {"pixel_values": torch.rand(3, 16, 16), "labels": number % 2}


def stacked(features):
    labels = torch.tensor([one["labels"] for one in features])
    return {"pixel_values": torch.stack([torch.as_tensor(one["pixel_values"]) for one in features]), "labels": labels}


def transformed():
    pixels = lambda rows: {"pixel_values": torch.rand(len(rows["labels"]), 3, 16, 16), "labels": rows["labels"]}
    return datasets.Dataset.from_dict({"labels": [i % 2 for i in range(12)]}).with_transform(pixels)


@pytest.mark.parametrize("rows", [Counted, transformed])
def test_a_user_s_transform_is_drawn_anew_and_held_still_for_the_preflight(tmp_path, plan, rows):
    model = transformers.ViTForImageClassification(config("vit"))
    settings = plan(units=12, sample_rate=0.9, steps=3)
    with Session(model, settings, LabelledTask(stacked), rows(), tmp_path / "run", token_budget=4) as session:
        assert session.preflight.exact and session.prefix is None
        drawn = []
        for draw in session.draws():
            for batch, _ in draw:
                drawn += [float(one[0, 0, 0]) for one in batch["pixel_values"]]
            session.step(draw)
        assert len(set(drawn)) == len(drawn) > 12


def test_what_takes_no_work_and_no_room_is_encoded_once():
    rows = [{"pixel_values": torch.rand(3, 4, 4), "labels": 0}] * 3
    assert isinstance(Examples.encode(rows, LabelledTask(stacked)).features, list)
    tokens = datasets.Dataset.from_dict({"input_ids": [[1, 2], [3]], "labels": [0, 1]})
    assert isinstance(Examples.encode(tokens, LabelledTask(stacked)).features, list)
    arrays = datasets.Dataset.from_dict({"pixel_values": [[[1.0, 2.0]]] * 2, "labels": [0, 1]})
    examples = Examples.encode(arrays, LabelledTask(stacked))
    assert not isinstance(examples.features, list) and not examples.varies


def test_public_pictures_choose_where_gradients_are_large(tmp_path):
    made = recipe(tmp_path)
    data = made.data.model_copy(update=dict(public=made.data.train))
    chosen = made.model_copy(update=dict(data=data, subset="sparse(fraction=0.1, choose='gradient')"))
    assert any(p.requires_grad for p in set_up(chosen).model.parameters())


def test_a_row_that_names_another_number_of_features_is_refused():
    features = WhenDrawn(lambda row: ["a", "b"][: 2 - row], [0, 0, 1, 1])
    assert features[:3] == ["a", "b", "a"] and features[-2] == "a"
    with pytest.raises(RecipeError, match="row 2 made 2 or more features when it was counted and 1 now"):
        features[3]


# -- a step's chance --------------------------------------------------------------------------------------------------


def test_a_crop_is_drawn_anew_within_its_share():
    made, random = task(crop=0.5, flip=True), np.random.default_rng(0)
    (features,) = made.encode({"image": [png(0)], "label": ["left"]})
    drawn = [made.draw(features, random) for _ in range(200)]
    areas = [(r - left) * (b - top) for left, top, r, b in (one["window"] for one in drawn)]
    assert len({one["window"] for one in drawn}) == 200 and min(areas) >= 0.5 * 0.99 and max(areas) <= 1
    assert 60 < sum(one["flipped"] for one in drawn) < 140
    assert all(isinstance(one["image"], bytes) for one in drawn)
    pixels = made.collate(drawn[:8])["pixel_values"]
    assert len({float(one.sum()) for one in pixels}) > 5


def test_a_flip_exchanges_left_and_right():
    made = task(flip=True)
    (features,) = made.encode({"image": [png(0)], "label": ["left"]})
    whole = {**features, "window": (0.0, 0.0, 1.0, 1.0)}
    straight, flipped = made.collate([{**whole, "flipped": False}, {**whole, "flipped": True}])["pixel_values"]
    assert torch.equal(straight, made.collate([features])["pixel_values"][0])
    assert straight[..., :8].mean() > straight[..., 8:].mean() and flipped[..., :8].mean() < flipped[..., 8:].mean()


def test_without_crop_and_flip_there_is_no_chance():
    rows = datasets.Dataset.from_dict({"image": [png(0), png(1)], "label": LABELS})
    assert Examples.encode(rows, task()).chance is None
    assert Examples.encode(rows, task(flip=True)).chance is not None


# -- what it counts -----------------------------------------------------------------------------------------------


def test_a_picture_counts_its_patches_and_one():
    (features,) = task().encode({"image": [png(0)], "label": ["left"]})
    assert task().size(features) == (5, 5)


@pytest.mark.parametrize(
    ("value", "size"),
    [
        (torch.rand(3, 224, 224), 196),
        (np.zeros((80, 3000)), 312),
        (torch.rand(50, 80), 50),
        ([[0.0] * 48] * 48, 48),
        (torch.rand(3, 8, 8), 3),
        (Image.new("RGB", (224, 224)), 196),
        ([1, 2, 3], 3),
        (7, 1),
    ],
)
def test_a_user_s_features_count_by_their_numbers(value, size):
    assert LabelledTask(stacked).size({"x": value, "labels": 0}) == (size, size)


def test_a_canary_is_planted_in_columns_of_every_kind(tmp_path):
    from dpft.audit import canaries

    made = recipe(tmp_path)
    rows, _ = load(made)
    planted = canaries.make(canaries.Planting(canaries=10, kind="random-tokens"), made, task()).planted(rows, made)
    assert len(planted) > len(rows)
    assert len(task().collate(list(Examples.encode(planted, task()).features))["labels"]) == len(planted)
