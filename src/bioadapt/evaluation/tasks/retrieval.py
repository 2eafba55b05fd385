"""Tasks of finding the right document for a query."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, Self

import numpy as np

from ..._extras import require
from ..statistics import Evaluation
from .api_search import ApiCorpus, RankingProblem, build_api_corpus
from .overlap import normal_form
from .task import TableTask, Task, embeddings

if TYPE_CHECKING:
    from datasets import Dataset
    from sentence_transformers import SentenceTransformer
    from torch import nn

_DEPTH = 10  # ranks beyond it count as not found
_METRICS = ("mrr@10", "ndcg@10", "accuracy@1")


def ranking(model: SentenceTransformer, problem: RankingProblem) -> dict[str, np.ndarray]:
    """Reciprocal rank, nDCG and hit of every query, by the name of the metric, each (n,)."""
    scores = model.similarity(embeddings(model, list(problem.queries)), embeddings(model, list(problem.documents)))
    # Of equals the first document comes first, in every process.
    hits = np.argsort(-scores.numpy(), axis=1, kind="stable")[:, :_DEPTH]
    right = [set(answers) for answers in problem.answers]
    gains = np.array([[place in own for place in row] for row, own in zip(hits, right, strict=True)], dtype=float)
    discount = 1 / np.log2(np.arange(2, gains.shape[1] + 2))
    best = np.array([discount[: len(own)].sum() for own in right])
    first = np.where(gains.any(1), gains.argmax(1), np.inf)
    return {"mrr@10": 1 / (first + 1), "ndcg@10": gains @ discount / best, "accuracy@1": gains[:, 0]}


class RankingTask(Task):
    """Queries and documents; trained with the other documents of a batch as the wrong ones."""

    family = "retrieval"
    metrics = _METRICS
    batch_sampler = "no_duplicates"  # a text that occurs twice in a batch would be its own negative

    def pairs(self) -> Sequence[tuple[str, str]]:
        """Training rows: a query and a document that answers it."""
        raise NotImplementedError

    def problem(self, split: str) -> RankingProblem:
        """The ranking problem of a split.

        Raises:
            ValueError: the task has no such rows.
        """
        raise NotImplementedError

    def train_dataset(self) -> Dataset:
        queries, documents = zip(*self.pairs(), strict=True)
        return require("datasets").Dataset.from_dict({"anchor": list(queries), "positive": list(documents)})

    def loss(self, model: SentenceTransformer) -> nn.Module:
        return require("sentence_transformers.sentence_transformer.losses").MultipleNegativesRankingLoss(model)

    def evaluate(self, model: SentenceTransformer, split: str = "test") -> Evaluation:
        problem = self.problem(split)
        rows = ranking(model, problem)
        statistics = {metric: 100 * float(values.mean()) for metric, values in rows.items()}
        return Evaluation(statistics, rows, np.array([min(answers) for answers in problem.answers]))


class RetrievalTask(TableTask, RankingTask):
    """Rows of a query and a document that answers it; a query of several rows has several right documents.

    The documents of a split are all that stand in its rows.
    """

    columns = ("query", "document")
    text_columns = ("query", "document")

    def pairs(self) -> Sequence[tuple[str, str]]:
        rows = self.rows("train")
        return list(zip(rows["query"], rows["document"], strict=True))

    def keys(self, split: str) -> list[Hashable]:
        queries = self.problem(split).queries if split == "test" else self.rows(split)["query"]
        return [(normal_form(query),) for query in queries]

    def problem(self, split: str) -> RankingProblem:
        rows = self.rows(split)
        documents = tuple(dict.fromkeys(rows["document"]))
        place = {document: number for number, document in enumerate(documents)}
        answers: dict[str, set[int]] = {}
        for query, document in zip(rows["query"], rows["document"], strict=True):
            answers.setdefault(query, set()).add(place[document])
        return RankingProblem(tuple(answers), tuple(frozenset(right) for right in answers.values()), documents)


class ApiSearchTask(RankingTask):
    """Find the function or class from the first sentence of its docstring; split by library.

    Only what is asked for is read: a process that merely scores the test library does not walk the others.
    """

    def __init__(self, limit: int | None = None) -> None:
        super().__init__("api-search")
        self._limit = limit

    @cached_property
    def corpus(self) -> ApiCorpus:
        return build_api_corpus(limit=self._limit)

    @cached_property
    def _test(self) -> RankingProblem:
        if "corpus" in vars(self):
            return self.corpus.test
        return build_api_corpus(train=(), validation=(), limit=self._limit).test

    @property
    def sizes(self) -> dict[str, int]:
        corpus = self.corpus
        return {
            "train": len(corpus.train),
            "validation": len(corpus.validation.queries),
            "test": len(corpus.test.queries),
        }

    @property
    def trainable(self) -> bool:
        return True  # known without reading the libraries

    def describe(self) -> dict[str, Any]:
        documents = {split: len(self.problem(split).documents) for split in ("validation", "test")}
        return {**super().describe(), "documents": documents, "versions": self.corpus.versions}

    def texts(self, split: str) -> list[str]:
        if split == "train":
            return sorted({text for pair in self.corpus.train for text in pair})
        problem = self.problem(split)
        return sorted({*problem.queries, *problem.documents})

    def keys(self, split: str) -> list[Hashable]:
        sentences = [pair[0] for pair in self.corpus.train] if split == "train" else self.problem(split).queries
        return [(normal_form(sentence),) for sentence in sentences]

    def keep(self, split: str, places: Sequence[int]) -> Self:
        if split == "train":
            corpus = replace(self.corpus, train=tuple(self.corpus.train[place] for place in places))
        else:
            problem = self.problem(split)
            kept = replace(
                problem,
                queries=tuple(problem.queries[place] for place in places),
                answers=tuple(problem.answers[place] for place in places),
            )
            changed: dict[str, Any] = {split: kept}
            corpus = replace(self.corpus, **changed)
        return self._with(corpus)

    def without_test(self) -> Self:
        nothing = replace(self.corpus.test, queries=(), answers=(), documents=())
        return self._with(replace(self.corpus, test=nothing))

    def _with(self, corpus: ApiCorpus) -> Self:
        changed = type(self)(self._limit)
        vars(changed)["corpus"] = corpus
        return changed

    def pairs(self) -> Sequence[tuple[str, str]]:
        return self.corpus.train

    def problem(self, split: str) -> RankingProblem:
        return self._test if split == "test" else self.corpus.validation

    def _content(self, split: str) -> Any:
        return self.corpus.train if split == "train" else self.problem(split)
