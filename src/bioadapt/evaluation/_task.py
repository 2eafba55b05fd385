"""What every task offers: data to train on, a loss for it, and scores on held-out rows."""

from __future__ import annotations

import copy
import hashlib
from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any, ClassVar, Self

import numpy as np

from .statistics import Evaluation

if TYPE_CHECKING:  # heavy, and optional: imported where used
    from datasets import Dataset
    from sentence_transformers import SentenceTransformer
    from torch import nn

ENCODE_BATCH = 64


def embeddings(model: SentenceTransformer, texts: list[str]) -> np.ndarray:
    """Embeddings (n, d) in float32."""
    return model.encode(texts, batch_size=ENCODE_BATCH, show_progress_bar=False, convert_to_numpy=True)


class Task(ABC):
    """A task for a sentence encoder.

    ``metrics`` names its scores, the main one first. ``sizes`` says how many rows each split has. Splits are
    ``train``, ``validation`` (to choose by) and ``test`` (to report).
    """

    family: ClassVar[str]
    metrics: ClassVar[tuple[str, ...]]
    batch_sampler: ClassVar[str] = "batch_sampler"  # sentence-transformers' name for plain shuffling

    def __init__(self, name: str) -> None:
        self.name = name

    @property
    @abstractmethod
    def sizes(self) -> dict[str, int]:
        """Rows per split: training rows, and the rows that a score is made of."""

    @property
    def trainable(self) -> bool:
        """Whether there are rows to train on."""
        return self.sizes.get("train", 0) > 0

    @abstractmethod
    def train_dataset(self) -> Dataset:
        """Training rows in the columns that `loss` expects.

        Raises:
            ValueError: the task has no training rows.
        """

    @abstractmethod
    def loss(self, model: SentenceTransformer) -> nn.Module:
        """The loss that sentence-transformers trains this kind of data with."""

    @abstractmethod
    def evaluate(self, model: SentenceTransformer, split: str = "test") -> Evaluation:
        """Scores in percent, and what they are made of row by row."""

    @abstractmethod
    def texts(self, split: str) -> list[str]:
        """The different texts of a split, sorted."""

    @abstractmethod
    def without_test(self) -> Self:
        """The same task without its test rows: who is given it cannot look at them."""

    @abstractmethod
    def _content(self, split: str) -> Any:
        """Everything that decides the scores on a split."""

    def fingerprint(self, split: str = "test") -> str:
        """SHA-256 of a split: two processes that agree in it score the same rows."""
        return hashlib.sha256(repr(self._content(split)).encode()).hexdigest()

    def describe(self) -> dict[str, Any]:
        """What results must say about their task."""
        return {"name": self.name, "family": self.family, "rows": self.sizes, "metrics": list(self.metrics)}


class TableTask(Task):
    """A task whose splits are tables; a subclass says what is in them."""

    _splits: dict[str, Any]

    def without_test(self) -> Self:
        sealed = copy.copy(self)
        sealed._splits = {split: table for split, table in self._splits.items() if split != "test"}
        return sealed
