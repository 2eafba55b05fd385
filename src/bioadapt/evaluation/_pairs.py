"""Tasks on pairs of sentences: graded similarity (sts) and yes or no (pair_classification)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from .._extras import require
from ._task import ENCODE_BATCH, TableTask
from .files import Rows
from .statistics import Evaluation

if TYPE_CHECKING:
    from datasets import Dataset
    from sentence_transformers import SentenceTransformer
    from torch import nn


class PairTask(TableTask):
    """Sentence pairs with a number each; trained with CoSENT, which uses the order of the numbers alone."""

    column: str  # the column that holds the number
    _evaluator: str
    _key: str  # the evaluator's name for the main metric, after or before the similarity's name

    def __init__(self, name: str, splits: dict[str, Rows]) -> None:
        super().__init__(name)
        self._splits = {split: _as_pairs(rows, self.column) for split, rows in splits.items()}

    @property
    def sizes(self) -> dict[str, int]:
        return {split: len(rows[2]) for split, rows in self._splits.items()}

    def texts(self, split: str) -> list[str]:
        first, second, _ = self._of(split)
        return sorted({*first, *second})

    def train_dataset(self) -> Dataset:
        first, second, numbers = self._of("train")
        return require("datasets").Dataset.from_dict({"sentence1": first, "sentence2": second, "score": numbers})

    def loss(self, model: SentenceTransformer) -> nn.Module:
        return require("sentence_transformers.sentence_transformer.losses").CoSENTLoss(model)

    def evaluate(self, model: SentenceTransformer, split: str = "test") -> Evaluation:
        first, second, numbers = self._of(split)
        evaluator = _remembering(self._evaluator)(
            first, second, self._gold(numbers), batch_size=ENCODE_BATCH, write_csv=False
        )
        found = evaluator(model)
        vectors = [np.stack([evaluator.vectors[text] for text in texts]) for texts in (first, second)]
        similarity = model.similarity_pairwise(*vectors).numpy().astype(np.float64)
        metric = self.metrics[0]
        return Evaluation(
            scores={metric: 100 * float(found[self._key.format(model.similarity_fn_name)])},
            rows={metric: similarity},
            gold=np.array(self._gold(numbers)),
        )

    def _gold(self, numbers: list[float]) -> list[Any]:
        return numbers

    def _of(self, split: str) -> tuple[list[str], list[str], list[float]]:
        if not self._splits.get(split, ([], [], []))[2]:
            raise ValueError(f"task {self.name!r} has no {split} rows")
        return self._splits[split]

    def _content(self, split: str) -> Any:
        return self._of(split)


class StsTask(PairTask):
    """Semantic textual similarity: Spearman correlation of cosine similarity and gold score."""

    family = "sts"
    metrics = ("spearman",)
    column = "score"
    _evaluator = "EmbeddingSimilarityEvaluator"
    _key = "spearman_{}"


class PairClassificationTask(PairTask):
    """Same meaning or not: average precision of cosine similarity. No threshold is chosen, so none can flatter."""

    family = "pair_classification"
    metrics = ("average_precision",)
    column = "label"
    _evaluator = "BinaryClassificationEvaluator"
    _key = "{}_ap"

    def _gold(self, numbers: list[float]) -> list[Any]:
        return [int(number) for number in numbers]


def _as_pairs(rows: Rows, column: str) -> tuple[list[str], list[str], list[float]]:
    return rows["sentence1"], rows["sentence2"], [float(value) for value in rows[column]]


def _remembering(name: str) -> type:
    """sentence-transformers' evaluator of that name, which encodes every text once and keeps the vectors."""
    base = getattr(require("sentence_transformers.sentence_transformer.evaluation"), name)

    class RememberingEvaluator(base):  # type: ignore[misc, valid-type]
        vectors: dict[str, np.ndarray] | None = None

        def embed_inputs(self, model: SentenceTransformer, sentences: list[str], **settings: Any) -> np.ndarray:
            if self.vectors is None:
                # Sorted: a set's order differs from process to process, and with it the batches and the last digits.
                texts = sorted({*self.sentences1, *self.sentences2})
                self.vectors = dict(zip(texts, super().embed_inputs(model, texts, **settings), strict=True))
            return np.stack([self.vectors[text] for text in sentences])

    return RememberingEvaluator
