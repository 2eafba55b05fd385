"""Tasks on single texts with a class each: classification (a linear probe) and clustering (k-means)."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING, Any

import numpy as np

from ..._extras import require
from ..statistics import Evaluation
from .task import TableTask, embeddings

if TYPE_CHECKING:
    from collections.abc import Mapping

    from datasets import Dataset
    from sentence_transformers import SentenceTransformer
    from torch import nn

_PROBE_ROWS, _PROBE_ROWS_PER_CLASS = 3_000, 50
_PROBE_C = 10.0
_KMEANS_SEEDS = 10


def probe(features: np.ndarray, classes: np.ndarray, held_out: np.ndarray) -> np.ndarray:
    """Classes (m,) that a logistic regression on features (n, d) of known classes (n,) gives to others, (m, d)."""
    regression = require("sklearn.linear_model").LogisticRegression(C=_PROBE_C, max_iter=1_000)
    return regression.fit(features, classes).predict(held_out)


class LabelledTask(TableTask):
    """Texts with a class each; trained with a triplet loss on batches that hold several texts of a class."""

    columns = ("text", "label")
    text_columns = ("text",)
    batch_sampler = "group_by_label"

    def __init__(self, name: str, splits: Mapping[str, Any]) -> None:
        super().__init__(name, splits)
        labels = sorted({str(label) for rows in self._splits.values() for label in rows["label"]})
        self._number = {label: number for number, label in enumerate(labels)}

    def train_dataset(self) -> Dataset:
        texts, classes = self._of("train")
        return require("datasets").Dataset.from_dict({"text": texts, "label": classes.tolist()})

    def loss(self, model: SentenceTransformer) -> nn.Module:
        losses = require("sentence_transformers.sentence_transformer.losses")
        # The default, Euclidean with margin 5, can never be met by vectors of length one.
        distance = losses.BatchHardTripletLossDistanceFunction.cosine_distance
        return losses.BatchAllTripletLoss(model, distance_metric=distance, margin=0.3)

    def _of(self, split: str) -> tuple[list[str], np.ndarray]:
        """Texts (n) and class numbers (n,)."""
        rows = self.rows(split)
        return rows["text"], np.array([self._number[str(label)] for label in rows["label"]])


class ClassificationTask(LabelledTask):
    """Accuracy of a logistic regression on the embeddings of training rows.

    These are the 3,000 whose texts have the smallest SHA-1, so that neither order nor chance decides; all rows, where
    3,000 would be fewer than fifty for each class.
    """

    family = "classification"
    metrics = ("accuracy",)

    def evaluate(self, model: SentenceTransformer, split: str = "test") -> Evaluation:
        texts, classes = self._of("train")
        places = self._probe_rows(texts, len(np.unique(classes)))
        held_out, gold = self._of(split)
        known = embeddings(model, [texts[place] for place in places])
        predicted = probe(known, classes[places], embeddings(model, held_out))
        return self._evaluation({"accuracy": (predicted == gold).astype(np.float64)}, gold)

    @staticmethod
    def _probe_rows(texts: list[str], classes: int) -> list[int]:
        if len(texts) <= _PROBE_ROWS or _PROBE_ROWS_PER_CLASS * classes > _PROBE_ROWS:
            return list(range(len(texts)))
        digests = [hashlib.sha1(text.encode()).digest() for text in texts]
        return sorted(sorted(range(len(texts)), key=digests.__getitem__)[:_PROBE_ROWS])


class ClusteringTask(LabelledTask):
    """V-measure of k-means (one k-means++ start, k = number of classes), mean over ten seeds.

    Training uses the labels of the training rows, so a score after training is no longer unsupervised.
    """

    family = "clustering"
    metrics = ("v_measure",)

    def evaluate(self, model: SentenceTransformer, split: str = "test") -> Evaluation:
        texts, gold = self._of(split)
        vectors = embeddings(model, texts)
        kmeans = require("sklearn.cluster").KMeans
        count = min(len(np.unique(gold)), len(texts))
        runs = [kmeans(count, n_init=1, random_state=seed).fit_predict(vectors) for seed in range(_KMEANS_SEEDS)]
        return self._evaluation({"v_measure": np.stack(runs, axis=1)}, gold)
