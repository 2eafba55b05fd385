"""Tasks on pairs of sentences: graded similarity (sts) and yes or no (pair_classification)."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np

from ..._extras import require
from ..statistics import Evaluation, best_threshold
from .files import Rows
from .task import TableTask, embeddings

if TYPE_CHECKING:
    from datasets import Dataset
    from sentence_transformers import SentenceTransformer
    from torch import nn


class PairTask(TableTask):
    """Sentence pairs with a number each; trained with CoSENT, which uses the order of the numbers alone."""

    text_columns = ("sentence1", "sentence2")

    def _checked(self, rows: Rows, where: str) -> Rows:
        rows = super()._checked(rows, where)
        column = self.columns[-1]
        for row, value in enumerate(rows[column]):
            try:
                rows[column][row] = self._number(value)
            except (TypeError, ValueError):
                raise ValueError(f"{where}, row {row}: {column}={value!r}; accepted is {self._accepted}") from None
        return rows

    _accepted = "a finite number"

    def _number(self, value: Any) -> float:
        number = float(value)
        if not math.isfinite(number):
            raise ValueError
        return number

    def train_dataset(self) -> Dataset:
        rows = self.rows("train")
        columns = {column: rows[column] for column in self.text_columns}
        return require("datasets").Dataset.from_dict({**columns, "score": [float(v) for v in rows[self.columns[-1]]]})

    def loss(self, model: SentenceTransformer) -> nn.Module:
        return require("sentence_transformers.sentence_transformer.losses").CoSENTLoss(model)

    def evaluate(self, model: SentenceTransformer, split: str = "test") -> Evaluation:
        gold = np.array(self.rows(split)[self.columns[-1]])
        return self._evaluation({self.metrics[0]: self._similarity(model, split)}, gold)

    def _similarity(self, model: SentenceTransformer, split: str) -> np.ndarray:
        """How alike the model finds the two sentences of each row, (n,)."""
        # Sorted: a set's order differs from process to process, and with it the batches and the last digits.
        texts = self.texts(split)
        vectors = dict(zip(texts, embeddings(model, texts), strict=True))
        first, second = (np.stack([vectors[text] for text in self.rows(split)[c]]) for c in self.text_columns)
        return model.similarity_pairwise(first, second).numpy().astype(np.float64)


class StsTask(PairTask):
    """Semantic textual similarity: Spearman correlation of similarity and gold score."""

    family = "sts"
    metrics = ("spearman",)
    columns = ("sentence1", "sentence2", "score")


class PairClassificationTask(PairTask):
    """Same meaning or not: average precision of similarity.

    On the test rows there are accuracy and F1 too, at the thresholds that are best on the validation rows.
    """

    family = "pair_classification"
    metrics = ("average_precision", "accuracy", "f1")
    columns = ("sentence1", "sentence2", "label")
    _accepted = "0 (not the same) or 1 (the same)"

    def _number(self, value: Any) -> int:
        number = float(value)
        if number not in (0.0, 1.0):
            raise ValueError
        return int(number)

    def evaluate(self, model: SentenceTransformer, split: str = "test") -> Evaluation:
        gold, similarity = np.array(self.rows(split)["label"]), self._similarity(model, split)
        rows = {"average_precision": similarity}
        if split == "test" and self.sizes.get("validation"):
            known, truth = self._similarity(model, "validation"), np.array(self.rows("validation")["label"])
            of_accuracy, of_f1 = (best_threshold(known, truth, metric) for metric in ("accuracy", "f1"))
            rows["accuracy"] = ((similarity >= of_accuracy) == gold).astype(np.float64)
            rows["f1"] = (similarity >= of_f1).astype(np.float64)
        return self._evaluation(rows, gold)
