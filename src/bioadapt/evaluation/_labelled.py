"""Tasks on single texts with a class each: classification (a linear probe) and clustering (k-means)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from .._extras import require
from ._task import TableTask, embeddings
from .files import Rows
from .statistics import Evaluation, v_measure

if TYPE_CHECKING:
    from datasets import Dataset
    from sentence_transformers import SentenceTransformer
    from torch import nn

_PROBE_ROWS = 3_000
_PROBE_C = 10.0
_KMEANS_SEEDS = 10


class LabelledTask(TableTask):
    """Texts with a class each; trained with a triplet loss on batches that hold several texts of a class."""

    batch_sampler = "group_by_label"

    def __init__(self, name: str, splits: dict[str, Rows]) -> None:
        super().__init__(name)
        self._splits = {split: (rows["text"], rows["label"]) for split, rows in splits.items()}
        labels = sorted({label for _, labels in self._splits.values() for label in labels})
        self._number = {label: number for number, label in enumerate(labels)}

    @property
    def sizes(self) -> dict[str, int]:
        return {split: len(texts) for split, (texts, _) in self._splits.items()}

    def texts(self, split: str) -> list[str]:
        return sorted(set(self._of(split)[0]))

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
        texts, labels = self._splits.get(split, ([], []))
        if not texts:
            raise ValueError(f"task {self.name!r} has no {split} rows")
        return texts, np.array([self._number[label] for label in labels])

    def _content(self, split: str) -> Any:
        texts, classes = self._of(split)
        return texts, classes.tolist()


class ClassificationTask(LabelledTask):
    """Accuracy of a logistic regression on the embeddings of at most 3,000 training rows."""

    family = "classification"
    metrics = ("accuracy",)

    def evaluate(self, model: SentenceTransformer, split: str = "test") -> Evaluation:
        texts, classes = self._of("train")
        probe = require("sklearn.linear_model").LogisticRegression(C=_PROBE_C, max_iter=1_000)
        probe.fit(embeddings(model, texts[:_PROBE_ROWS]), classes[:_PROBE_ROWS])
        held_out, gold = self._of(split)
        correct = (probe.predict(embeddings(model, held_out)) == gold).astype(np.float64)
        return Evaluation(scores={"accuracy": 100 * float(correct.mean())}, rows={"accuracy": correct}, gold=gold)


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
        count = min(len(self._number), len(texts))
        runs = [kmeans(count, n_init=1, random_state=seed).fit_predict(vectors) for seed in range(_KMEANS_SEEDS)]
        clusters = np.stack(runs, axis=1)
        return Evaluation(scores={"v_measure": v_measure(clusters, gold)}, rows={"v_measure": clusters}, gold=gold)
