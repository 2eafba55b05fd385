"""Benches of the models that are no sentence encoders: a small vision transformer and a small language model.

No weights of such models come with a package, so each is trained first, as ``bioadapt evaluate`` does it: the vision
model to tell by how much an image was turned, the language model to foresee the sentences of film reviews.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from bioadapt.evaluation.arms import lora_paths
from bioadapt.evaluation.models import SMALL_LM, SMALL_VIT, ImageModel, load_model
from bioadapt.evaluation.tasks import LanguageModellingTask, Task, load_task
from bioadapt.evaluation.tasks.images import ImageTask
from bioadapt.evaluation.tasks.language import losses, padded
from experiments.record.bench import Bench

REVIEWS = "mr:language_modelling"  # what the language model has read before
READING_STEPS = 600


class ImageBench(Bench):
    """Images with a class each. Adapters learn with a fresh head; the score is that of a linear probe without it.

    Args:
        task: ``digits``, or the name of a set of images.
        data_dir: holds TASK/{train,dev}.npz.
        rows: at most so many images are trained on. The vision model has seen all of them.
        epochs: of a training.
    """

    def __init__(self, task: str, data_dir: Path, rows: int, epochs: int) -> None:
        given = load_task(task, data_dir).without_test()
        assert isinstance(given, ImageTask)
        with _loaded(SMALL_VIT, given) as self._images:
            self.model = self._images.model.requires_grad_(False)
        given = given.keep("train", np.random.default_rng(0).permutation(given.sizes["train"])[:rows].tolist())
        self.task, self.epochs, self.lora_targets = given, epochs, tuple(lora_paths(self.model))
        self.labels = {split: given.labels(split) for split in ("train", "validation")}
        self._pixels = given.pixels("train", self._images)

    def train(self, model: nn.Module, rates: dict[str, float], seed: int) -> float:
        torch.manual_seed(seed)
        with_head = ImageModel(model).with_head(self.task.classes)
        return super().train(with_head, {"head.": rates["lora_"], **rates}, seed)

    def loss(self, model: nn.Module, chosen: np.ndarray) -> Tensor:
        labels = torch.as_tensor(self.labels["train"][chosen])
        loss: Tensor = model(pixel_values=self._pixels[chosen], labels=labels)["loss"]
        return loss

    def score(self, model: nn.Module) -> float:
        return self.task.evaluate(ImageModel(model), "validation").scores["accuracy"]


class LanguageBench(Bench):
    """Texts of a set for a model that has read film reviews. The score is the loss, a point being a hundredth of a nat.

    As long as they are a few, a point more is one per cent less perplexity.

    Args:
        task: ``NAME:language_modelling``.
        data_dir: holds NAME/{train,dev}.tsv.gz.
        rows: at most so many of each split.
        epochs: of a training.
    """

    def __init__(self, task: str, data_dir: Path, rows: int, epochs: int) -> None:
        reviews, given = (load_task(name, data_dir).without_test() for name in (REVIEWS, task))
        assert isinstance(given, LanguageModellingTask)
        with _loaded(SMALL_LM, reviews, READING_STEPS) as self._language:
            self.model = self._language.model.requires_grad_(False)
        self.epochs, self.lora_targets = epochs, tuple(lora_paths(self.model))
        for split in ("train", "validation"):
            chosen = np.random.default_rng(0).permutation(given.sizes[split])[:rows]
            given = given.keep(split, chosen.tolist())
        self._examples = {split: given.examples(self._language, split) for split in ("train", "validation")}
        self.labels = {split: np.arange(len(examples)) for split, examples in self._examples.items()}

    def loss(self, model: nn.Module, chosen: np.ndarray) -> Tensor:
        loss: Tensor = model(**padded([self._examples["train"][place] for place in chosen])).loss
        return loss

    def score(self, model: nn.Module) -> float:
        self._language.model = model
        return -100 * float(np.concatenate(losses(self._language, self._examples["validation"])).mean())


@contextmanager
def _loaded(name: str, task: Task, steps: int | None = None) -> Iterator[Any]:
    """A small model that was trained on the rows of a task; its files are thrown away."""
    with tempfile.TemporaryDirectory() as folder:
        yield load_model(name, task, "cpu", folder, steps=steps)
