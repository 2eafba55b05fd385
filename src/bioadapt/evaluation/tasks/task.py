"""What every task offers: data to train on, a loss for it, and scores on held-out rows."""

from __future__ import annotations

import copy
import hashlib
from abc import ABC, abstractmethod
from collections.abc import Hashable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Self

import numpy as np

from ..._extras import require
from ..statistics import STATISTICS, Evaluation
from .files import SPLITS, Rows, as_columns, is_missing
from .overlap import normal_form

if TYPE_CHECKING:  # heavy, and optional: imported where used
    from datasets import Dataset
    from sentence_transformers import SentenceTransformer
    from torch import nn
    from transformers import Trainer

ENCODE_BATCH = 64
SENTENCES, IMAGES, LANGUAGE = "a sentence encoder", "an image model", "a causal language model"


def embeddings(model: SentenceTransformer, texts: list[str]) -> np.ndarray:
    """Embeddings (n, d) in float32."""
    return model.encode(texts, batch_size=ENCODE_BATCH, show_progress_bar=False, convert_to_numpy=True)


class Task(ABC):
    """Training data, a loss for it, and scores on held-out rows.

    ``metrics`` names its scores, the main one first. ``sizes`` says how many rows each split has. Splits are
    ``train``, ``validation`` (to choose by) and ``test`` (to report). ``reads`` is the kind of model that it is for.
    """

    family: ClassVar[str]
    metrics: ClassVar[tuple[str, ...]]
    reads: ClassVar[str] = SENTENCES
    batch_sampler: ClassVar[str] = "batch_sampler"  # sentence-transformers' name for plain shuffling

    def __init__(self, name: str) -> None:
        self.name = name

    @property
    def source(self) -> str:
        """The set that its rows are of: ``mr`` of ``mr:language_modelling``."""
        return self.name.partition(":")[0]

    @property
    @abstractmethod
    def sizes(self) -> dict[str, int]:
        """Rows per split: training rows, and the rows that a score is made of."""

    @property
    def trainable(self) -> bool:
        """Whether there are rows to train on."""
        return self.sizes.get("train", 0) > 0

    @abstractmethod
    def evaluate(self, model: Any, split: str = "test") -> Evaluation:
        """Scores in percent (perplexity as it is), and what they are made of row by row."""

    @abstractmethod
    def texts(self, split: str) -> list[str]:
        """The different texts of a split, sorted."""

    @abstractmethod
    def keys(self, split: str) -> list[Hashable]:
        """For every row what makes it the same as another one; see `overlap`."""

    @abstractmethod
    def keep(self, split: str, places: Sequence[int]) -> Self:
        """The same task with these rows of a split alone, in this order."""

    @abstractmethod
    def without_test(self) -> Self:
        """The same task without its test rows: who is given it cannot look at them."""

    @abstractmethod
    def _content(self, split: str) -> Any:
        """Everything that decides the scores on a split."""

    def train_dataset(self) -> Dataset:
        """Training rows in the columns that `loss` expects.

        Raises:
            ValueError: the task has no training rows.
        """
        raise NotImplementedError

    def loss(self, model: SentenceTransformer) -> nn.Module:
        """The loss that sentence-transformers trains this kind of data with."""
        raise NotImplementedError

    def trainer(self, model: Any, arguments: Mapping[str, Any], callbacks: list[Any]) -> Trainer:
        """What trains a model on the training rows: sentence-transformers' trainer, with `loss`.

        Args:
            model: as `evaluate` takes it.
            arguments: of transformers' ``TrainingArguments``.
            callbacks: of the trainer.
        """
        library = require("sentence_transformers")
        model.model_card_data.widget = [{"text": ""}]  # examples for a page that is never written, else computed
        return library.SentenceTransformerTrainer(
            model=model,
            args=library.SentenceTransformerTrainingArguments(**arguments, batch_sampler=self.batch_sampler),
            train_dataset=self.train_dataset(),
            loss=self.loss(model),
            callbacks=callbacks,
        )

    def fingerprint(self, split: str = "test") -> str:
        """SHA-256 of a split: two processes that agree in it score the same rows."""
        return hashlib.sha256(repr(self._content(split)).encode()).hexdigest()

    def fingerprints(self) -> dict[str, str]:
        """The fingerprint of each split that has rows."""
        return {split: self.fingerprint(split) for split, count in self.sizes.items() if count}

    def describe(self) -> dict[str, Any]:
        """What results must say about their task."""
        return {"name": self.name, "family": self.family, "rows": self.sizes, "metrics": list(self.metrics)}


class TableTask(Task):
    """A task whose splits are tables.

    Args:
        name: what it is called in results.
        splits: a table for each of ``train``, ``dev`` (or ``validation``) and ``test``, of which any may be missing: a
            dict of columns, a pandas DataFrame, a `datasets.Dataset`, or the path of a .csv or .tsv file, gzipped or
            not.

    Raises:
        ValueError: a column is missing, or holds what it must not.
    """

    columns: ClassVar[tuple[str, ...]]
    text_columns: ClassVar[tuple[str, ...]]
    also: ClassVar[Mapping[str, str]] = {}  # other names that columns may have

    def __init__(self, name: str, splits: Mapping[str, Any]) -> None:
        super().__init__(name)
        self._splits: dict[str, Rows] = {}
        for split, table in splits.items():
            if split not in SPLITS:
                raise ValueError(f"task {name!r}: split {split!r} is not understood; accepted: {', '.join(SPLITS)}")
            rows, where = as_columns(table), f"task {name!r}, {split}"
            for column in self.columns:
                if column not in rows and self.also.get(column) in rows:
                    rows[column] = rows[self.also[column]]
                if column not in rows:
                    raise ValueError(f"{where}: no column {column!r}; it has {', '.join(map(str, rows))}")
            rows = {column: list(rows[column]) for column in self.columns}
            if len(set(map(len, rows.values()))) > 1:
                counts = ", ".join(f"{len(values)} {column}" for column, values in rows.items())
                raise ValueError(f"{where}: columns of different lengths: {counts}")
            for column, values in rows.items():
                if (place := next((i for i, value in enumerate(values) if is_missing(value)), None)) is not None:
                    raise ValueError(f"{where}, row {place}: {column} is missing ({values[place]!r})")
            self._splits["validation" if SPLITS[split] == "dev" else split] = self._checked(rows, where)

    def _checked(self, rows: Rows, where: str) -> Rows:
        """The rows with their texts as strings and their labels in the type that the family has."""
        for column in self.text_columns:
            rows[column] = [str(value) for value in rows[column]]
        return rows

    @property
    def sizes(self) -> dict[str, int]:
        return {split: len(rows[self.columns[0]]) for split, rows in self._splits.items()}

    def rows(self, split: str) -> Rows:
        """The columns of a split.

        Raises:
            ValueError: the task has no such rows.
        """
        if not self.sizes.get(split):
            raise ValueError(f"task {self.name!r} has no {split} rows")
        return self._splits[split]

    def texts(self, split: str) -> list[str]:
        rows = self.rows(split)
        return sorted({text for column in self.text_columns for text in rows[column]})

    def keys(self, split: str) -> list[Hashable]:
        rows = self.rows(split)
        columns = ([normal_form(text) for text in rows[column]] for column in self.text_columns)
        return [tuple(sorted(texts)) for texts in zip(*columns, strict=True)]

    def keep(self, split: str, places: Sequence[int]) -> Self:
        rows = self._splits[split]
        kept = copy.copy(self)
        kept._splits = {
            **self._splits,
            split: {column: [values[place] for place in places] for column, values in rows.items()},
        }
        return kept

    def split_off(self, new: str, old: str, places: Sequence[int]) -> Self:
        """The same task with some rows of one split as another split of their own."""
        chosen = set(places)
        rows, rest = self._splits[old], [place for place in range(self.sizes[old]) if place not in chosen]
        changed = self.keep(old, rest)
        changed._splits[new] = {column: [values[place] for place in places] for column, values in rows.items()}
        return changed

    def without_test(self) -> Self:
        sealed = copy.copy(self)
        sealed._splits = {split: table for split, table in self._splits.items() if split != "test"}
        return sealed

    def _content(self, split: str) -> Any:
        return tuple(self.rows(split)[column] for column in self.columns)

    def _evaluation(self, rows: Mapping[str, np.ndarray], gold: np.ndarray) -> Evaluation:
        """Every metric of the task from what each row contributes to it."""
        scores = {metric: STATISTICS[metric](values, gold) for metric, values in rows.items()}
        return Evaluation(scores=scores, rows=dict(rows), gold=gold)
