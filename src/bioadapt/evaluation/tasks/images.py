"""Images with a class each: a model of images is trained with a head, and scored by a linear probe on its features."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from ..._extras import require
from ..statistics import Evaluation
from .files import Rows
from .labelled import probe
from .task import IMAGES, TableTask

if TYPE_CHECKING:
    from transformers import Trainer

    from ..models import ImageModel

_BATCH = 128
_LEAST_SPREAD = 1e-6
# scikit-learn's digits in published order: the last 300 are by writers that the first ones lack.
_DIGITS = {"train": (0, 1200), "dev": (1200, 1497), "test": (1497, 1797)}


def digits() -> dict[str, Rows]:
    """scikit-learn's bundled 8 x 8 digits, cut in published order."""
    bunch = require("sklearn.datasets").load_digits()
    images = np.round(bunch.images * 255 / 16).astype(np.uint8)
    return {
        split: {"images": images[start:end], "labels": bunch.target[start:end]}
        for split, (start, end) in _DIGITS.items()
    }


class ImageTask(TableTask):
    """Accuracy of a logistic regression on the standardised features of all training images.

    Images are (height, width) or (height, width, channels) of uint8, or of Pillow; they may differ in size, since each
    is brought to the model's. Classes are numbers or names. The head that an adapter is trained with is thrown away, so
    that every arm, the frozen model too, is scored alike.
    """

    family = "image_classification"
    metrics = ("accuracy",)
    reads = IMAGES
    columns = ("images", "labels")
    text_columns = ()
    also: ClassVar[Mapping[str, str]] = {"images": "image", "labels": "label"}  # as `datasets` has them

    def __init__(self, name: str, splits: Mapping[str, Any]) -> None:
        super().__init__(name, splits)
        classes = sorted({label for rows in self._splits.values() for label in rows["labels"]})
        self.classes = len(classes)
        self._number = {label: number for number, label in enumerate(classes)}

    def _checked(self, rows: Rows, where: str) -> Rows:
        rows["images"] = [np.asarray(image) for image in rows["images"]]
        for place, image in enumerate(rows["images"]):
            if image.ndim not in (2, 3) or image.dtype != np.uint8:
                raise ValueError(
                    f"{where}, row {place}: an image of shape {image.shape} and type {image.dtype}; accepted are "
                    "(height, width) and (height, width, channels) of uint8"
                )
        if len({image.shape[2:] for image in rows["images"]}) > 1:
            raise ValueError(f"{where}: some images have colours, others have none")
        named = any(isinstance(label, str) for label in rows["labels"])
        rows["labels"] = [str(label) if named else int(label) for label in rows["labels"]]
        return rows

    def texts(self, split: str) -> list[str]:
        return []

    def keys(self, split: str) -> list[Hashable]:
        return [(image.tobytes(),) for image in self.rows(split)["images"]]

    def _content(self, split: str) -> Any:
        rows = self.rows(split)
        return [image.tobytes() for image in rows["images"]], rows["labels"]

    def labels(self, split: str) -> np.ndarray:
        """Class numbers (n,)."""
        return np.array([self._number[label] for label in self.rows(split)["labels"]])

    def pixels(self, split: str, model: ImageModel) -> Tensor:
        """Images as the model reads them: (n, channels, height, width) in float32."""
        return as_pixels(self.rows(split)["images"], model.channels, model.size)

    def evaluate(self, model: ImageModel, split: str = "test") -> Evaluation:
        gold = self.labels(split)
        known, asked = (features(model, self.pixels(part, model)) for part in ("train", split))
        # Features of an image model may hardly vary about a large mean, which a probe would not see.
        centre, spread = known.mean(0), known.std(0) + _LEAST_SPREAD
        predicted = probe((known - centre) / spread, self.labels("train"), (asked - centre) / spread)
        return self._evaluation({"accuracy": (predicted == gold).astype(np.float64)}, gold)

    def trainer(self, model: ImageModel, arguments: Mapping[str, Any], callbacks: list[Any]) -> Trainer:
        library = require("transformers")
        columns = {"pixel_values": self.pixels("train", model), "labels": torch.from_numpy(self.labels("train"))}
        return library.Trainer(
            model=model.with_head(self.classes),
            args=library.TrainingArguments(**arguments, remove_unused_columns=False),
            train_dataset=require("datasets")
            .Dataset.from_dict({name: list(values.numpy()) for name, values in columns.items()})
            .with_format("torch"),
            callbacks=callbacks,
        )


def as_pixels(images: Sequence[np.ndarray], channels: int, size: int) -> Tensor:
    """uint8 images, each (height, width[, channels]), as (n, channels, size, size) around zero."""
    alike = len({image.shape for image in images}) == 1
    parts = [np.stack(images)] if alike else [image[None] for image in images]
    return torch.cat([_as_pixels(part, channels, size) for part in parts])


def _as_pixels(images: np.ndarray, channels: int, size: int) -> Tensor:
    pixels = torch.tensor(images).float() / 127.5 - 1
    pixels = pixels[:, None] if pixels.dim() == 3 else pixels.movedim(-1, 1)
    if pixels.shape[1] != channels:
        pixels = pixels.mean(1, keepdim=True).expand(-1, channels, -1, -1)
    if pixels.shape[-2:] != (size, size):
        pixels = nn.functional.interpolate(pixels, (size, size), mode="bilinear", antialias=True)
    return pixels.contiguous()


@torch.no_grad()
def features(model: ImageModel, pixels: Tensor) -> np.ndarray:
    """What the head reads of each image, (n, d)."""
    model.model.eval()
    parts = [model.features(part.to(model.device)) for part in pixels.split(_BATCH)]
    return torch.cat(parts).float().cpu().numpy()
