"""One label for each picture."""

import base64
import io
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
from pydantic import Field
from torch import Tensor, nn

from dpft.errors import RecipeError
from dpft.recipe import Labels, TaskTable
from dpft.tasks.class_metrics import ClassMetrics
from dpft.tasks.losses import declared_class_losses
from dpft.tasks.registry import task
from dpft.tasks.source import Source
from dpft.tasks.task import Columns, Size, Task
from dpft.values import INLINE, Column, class_number, label_fault, plain

if TYPE_CHECKING:
    from PIL.Image import Image as Picture
    from transformers import BaseImageProcessor

PATCH_SIZE = 16  # pixels, where a model's configuration names none
NOISE = 16  # squares of a canary, in each direction


@task("image_classification")
class ImageClassification(Task):
    """Classify pictures into a declared, public list of labels.

    A picture is a file's path, the bytes of a PNG or JPEG file, ``{bytes, path}`` as of ``datasets``, a picture of
    Pillow, or a ``data:`` URI. It is decoded when a batch is collated: features hold what the row holds.

    Args:
        processor: a Hugging Face image processor; all its pictures must have one shape.
        labels: every label there is, declared and never collected from the data.
        image, label: the columns to read.
        crop: the least share of a picture's area that a random crop keeps; None for no crop.
        flip: whether left and right are exchanged by a coin.
        patch_size: pixels, in each direction, of what the model makes one token.
    """

    class Settings(TaskTable):
        image: str = Field(
            "image",
            description="The column with the picture: a path, from the data file's folder on, or the bytes of a file.",
        )
        label: str = Field("label", description="The column with the label, a text or a whole number.")
        labels: Labels = Field([], validate_default=True, description="Every label there is, declared and public.")
        crop: float | None = Field(
            None,
            gt=0,
            le=1,
            description="Crop each picture anew whenever it is drawn, to this share of its area or more; off if unset.",
        )
        flip: bool = Field(False, description="Exchange left and right by a coin whenever a picture is drawn.")
        group: str | None = Field(
            None,
            description="A column of the validation data, such as a clinic, whose values get figures of their own.",
        )

        @property
        def columns(self) -> dict[str, Column]:
            return {self.image: Column("image"), self.label: Column("label", tuple(self.labels))}

    headline = "accuracy"
    groups = "per_class"
    adds_layers = True
    takes_files = True
    template: ClassVar = {"subset": "head", "task": {"labels": ["first label", "second label"]}}

    def __init__(
        self,
        processor: "BaseImageProcessor",
        labels: Sequence[str],
        *,
        columns: tuple[str, str] = ("image", "label"),
        crop: float | None = None,
        flip: bool = False,
        patch_size: int = PATCH_SIZE,
    ) -> None:
        self.processor, self.crop, self.flip = processor, crop, flip
        self.image, self.label = columns
        self.labels = [str(value) for value in labels]
        self.has_chance = crop is not None or flip
        self._index = {value: i for i, value in enumerate(self.labels)}
        self._shape = self._one_shape()
        height, width = self._shape[1:]
        self._size = 1 + -(-height // patch_size) * -(-width // patch_size)

    @classmethod
    def load(cls, settings: Settings, source: Source) -> tuple["ImageClassification", nn.Module]:
        """Raises RecipeError: the processor makes pictures of several shapes."""
        # Pillow's processors need no more than Pillow, and give the same pictures on every machine.
        processor = source.processor("AutoImageProcessor", backend="pil")
        # A head for other classes, as of most checkpoints, is exchanged for a new one.
        model = source.labelled_model("AutoModelForImageClassification", settings.labels, ignore_mismatched_sizes=True)
        patch = getattr(model.config, "patch_size", None)
        task = cls(
            processor,
            settings.labels,
            columns=(settings.image, settings.label),
            crop=settings.crop,
            flip=settings.flip,
            patch_size=patch if isinstance(patch, int) else PATCH_SIZE,
        )
        task.group = settings.group
        return task, model

    def _one_shape(self) -> tuple[int, int, int]:
        """``(C, H, W)`` of what the processor makes of any picture."""
        from PIL import Image

        shapes = {self._pixels(Image.new("RGB", size)).shape for size in ((40, 30), (30, 50))}
        if len(shapes) > 1:
            raise RecipeError(
                f"{type(self.processor).__name__} makes pictures of {len(shapes)} shapes, which are no batch: "
                "give its size a height and a width in preprocessor_config.json, or switch on do_center_crop."
            )
        channels, height, width = shapes.pop()
        return channels, height, width

    def save(self, folder: Path | str) -> None:
        self.processor.save_pretrained(folder)

    def examples(self) -> dict[str, list[str]]:
        random = np.random.default_rng(0)
        return {self.image: [noise(random, 24, 16), noise(random, 16, 20)], self.label: self.labels[:2]}

    def encode(self, rows: Columns) -> list[dict[str, Any]]:
        """Raises RecipeError: a label is not declared, or a file is no picture; the row is counted among these."""
        pictures, values, features = list(rows[self.image]), plain(rows[self.label]), []
        for row, (picture, value) in enumerate(zip(pictures, values, strict=True), 1):
            label = class_number(value, self._index)
            if label is None:
                raise RecipeError(f"Row {row:,} of {len(values):,} {label_fault(value, self.label, len(self.labels))}")
            try:
                with opened(picture):
                    pass
            except (OSError, ValueError, TypeError) as error:
                raise RecipeError(
                    f"Row {row:,} of {len(values):,} has no picture that can be opened in column {self.image!r} "
                    f"({type(error).__name__}): repair the file or remove the row."
                ) from error
            features.append({"image": picture, "labels": label})
        return features

    def size(self, features: Mapping[str, Any]) -> Size:
        """A token for each patch and one for the class; nothing is padded, so all cost the same."""
        return Size(self._size, self._size)

    def draw(self, features: Mapping[str, Any], random: np.random.Generator) -> dict[str, Any]:
        """Where the crop lies and whether it is flipped; :meth:`collate` does it."""
        window = (0.0, 0.0, 1.0, 1.0)
        if self.crop is not None:
            area, aspect = random.uniform(self.crop, 1.0), np.exp(random.uniform(np.log(3 / 4), np.log(4 / 3)))
            width, height = min(1.0, np.sqrt(area * aspect)), min(1.0, np.sqrt(area / aspect))
            left, top = random.uniform(0, 1 - width), random.uniform(0, 1 - height)
            window = (left, top, left + width, top + height)
        return {**features, "window": window, "flipped": self.flip and bool(random.integers(2))}

    def unread(self, features: Mapping[str, Any]) -> dict[str, Any]:
        """Without its picture, which is not decoded where the output of the layers that see it is kept."""
        return {"labels": features["labels"]}

    def collate(self, features: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        """``pixel_values``, ``(B, C, H, W)``, and ``labels``, ``(B,)``; raises RecipeError: a file is damaged."""
        if "image" in features[0]:
            pixels = torch.stack([self._pixels(self._picture(one)) for one in features])
        else:
            pixels = torch.zeros(()).expand(len(features), *self._shape)
        return {"pixel_values": pixels, "labels": torch.tensor([one["labels"] for one in features])}

    def _picture(self, features: Mapping[str, Any]) -> "Picture":
        from PIL import Image

        try:
            with opened(features["image"]) as found:
                picture = found.convert("RGB")
        except (OSError, ValueError, SyntaxError) as error:  # what Pillow raises where a file is cut off
            raise RecipeError(
                f"A file in column {self.image!r} begins as a picture and cannot be decoded ({type(error).__name__}): "
                "find it with Pillow, and repair the file or remove its row."
            ) from error
        if "window" in features:
            sides = (picture.width, picture.height) * 2
            left, top, right, bottom = (
                round(part * side) for part, side in zip(features["window"], sides, strict=True)
            )
            picture = picture.crop((left, top, max(right, left + 1), max(bottom, top + 1)))
            if features["flipped"]:
                picture = picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        return picture

    def _pixels(self, picture: "Picture") -> Tensor:
        """``(C, H, W)``."""
        pixels: Tensor = self.processor(picture, return_tensors="pt")["pixel_values"][0]
        return pixels

    def losses(self, model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
        """Raises RecipeError: the model has fewer classes than the task."""
        return declared_class_losses(model, batch, len(self.labels))

    def metrics(self) -> ClassMetrics:
        return ClassMetrics(self.labels)

    def canary(self, random: np.random.Generator) -> dict[str, str]:
        """Coloured noise with a random label."""
        return {self.image: noise(random, NOISE, NOISE), self.label: self.labels[random.integers(len(self.labels))]}


@contextmanager
def opened(picture: Any) -> Iterator["Picture"]:
    """A picture of Pillow, whose header is read and whose pixels are not; a file is closed again.

    Args:
        picture: a path, a file's bytes, ``{bytes, path}``, a ``data:`` URI or its bytes, or a picture of Pillow.

    Raises:
        OSError, ValueError, TypeError: it is none.
    """
    from PIL import Image

    if isinstance(picture, Image.Image):
        yield picture  # the caller's own
        return
    if isinstance(picture, Mapping):
        picture = picture["path"] if picture.get("bytes") is None else picture["bytes"]
    if isinstance(picture, (bytes, bytearray)) and picture.startswith(INLINE.encode()):
        picture = picture.decode("ascii")
    if isinstance(picture, str) and picture.startswith(INLINE):
        picture = base64.b64decode(picture.partition("base64,")[2], validate=True)
    with Image.open(io.BytesIO(picture) if isinstance(picture, (bytes, bytearray)) else picture) as found:
        yield found


def noise(random: np.random.Generator, width: int, height: int) -> str:
    """A picture of coloured squares at random, as a ``data:`` URI."""
    from PIL import Image

    file = io.BytesIO()
    Image.fromarray(random.integers(256, size=(height, width, 3), dtype=np.uint8)).save(file, "PNG")
    return f"{INLINE}image/png;base64,{base64.b64encode(file.getvalue()).decode('ascii')}"
