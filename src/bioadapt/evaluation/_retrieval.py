"""The API search as a task."""

from __future__ import annotations

import copy
from dataclasses import replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, Self

import numpy as np

from .._extras import require
from ._task import ENCODE_BATCH, Task
from .api_search import ApiCorpus, Search, build_api_corpus
from .statistics import Evaluation

if TYPE_CHECKING:
    from datasets import Dataset
    from sentence_transformers import SentenceTransformer
    from torch import nn

_DEPTH = 10  # ranks beyond it count as not found


class ApiSearchTask(Task):
    """Find the function or class from the first sentence of its docstring; split by library.

    Only what is asked for is read: a process that merely scores the test library does not walk the others.
    """

    family = "retrieval"
    metrics = ("mrr@10", "accuracy@1")
    batch_sampler = "no_duplicates"  # a text that occurs twice in a batch would be its own negative

    def __init__(self, limit: int | None = None) -> None:
        super().__init__("api-search")
        self._limit = limit

    @cached_property
    def corpus(self) -> ApiCorpus:
        return build_api_corpus(limit=self._limit)

    @cached_property
    def _test(self) -> Search:
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
        documents = {split: len(self._search(split).documents) for split in ("validation", "test")}
        return {**super().describe(), "documents": documents, "versions": self.corpus.versions}

    def texts(self, split: str) -> list[str]:
        if split == "train":
            return sorted({text for pair in self.corpus.train for text in pair})
        search = self._search(split)
        return sorted({*search.queries, *search.documents})

    def without_test(self) -> Self:
        sealed = copy.copy(self)
        nothing = replace(self.corpus.test, queries=(), answers=(), documents=())
        vars(sealed)["corpus"] = replace(self.corpus, test=nothing)
        vars(sealed).pop("_test", None)
        return sealed

    def train_dataset(self) -> Dataset:
        sentences, documents = zip(*self.corpus.train, strict=True)
        columns = {"anchor": list(sentences), "positive": list(documents)}
        return require("datasets").Dataset.from_dict(columns)

    def loss(self, model: SentenceTransformer) -> nn.Module:
        return require("sentence_transformers.sentence_transformer.losses").MultipleNegativesRankingLoss(model)

    def evaluate(self, model: SentenceTransformer, split: str = "test") -> Evaluation:
        search = self._search(split)
        evaluator = _ranking_evaluator()(
            queries={f"q{index}": query for index, query in enumerate(search.queries)},
            corpus={f"d{index:06d}": document for index, document in enumerate(search.documents)},
            relevant_docs={f"q{index}": {f"d{answer:06d}"} for index, answer in enumerate(search.answers)},
            mrr_at_k=[_DEPTH], ndcg_at_k=[_DEPTH], accuracy_at_k=[1], precision_recall_at_k=[1], map_at_k=[_DEPTH],
            batch_size=ENCODE_BATCH, write_csv=False,
        )  # fmt: skip
        found = evaluator(model)
        ranks = np.array(evaluator.ranks, dtype=np.float64)
        return Evaluation(
            scores={metric: 100 * float(found[f"{model.similarity_fn_name}_{metric}"]) for metric in self.metrics},
            rows={"mrr@10": 1 / ranks, "accuracy@1": (ranks == 1).astype(np.float64)},
            gold=np.array(search.answers),
        )

    def _search(self, split: str) -> Search:
        return self._test if split == "test" else self.corpus.validation

    def _content(self, split: str) -> Any:
        return self.corpus.train if split == "train" else self._search(split)


def _ranking_evaluator() -> type:
    """sentence-transformers' evaluator, which also keeps the rank of each query's answer (inf: not found)."""
    base = require("sentence_transformers.sentence_transformer.evaluation").InformationRetrievalEvaluator

    class RankingEvaluator(base):  # type: ignore[misc, valid-type]
        ranks: list[float]

        def compute_metrics(self, queries_result_list: list[Any]) -> dict[str, Any]:
            self.ranks = [
                self._rank(query, hits) for query, hits in zip(self.queries_ids, queries_result_list, strict=True)
            ]
            return super().compute_metrics(queries_result_list)

        def _rank(self, query: str, hits: list[dict[str, Any]]) -> float:
            ordered = sorted(hits, key=lambda hit: (-hit["score"], hit["corpus_id"]))[:_DEPTH]
            right = self.relevant_docs[query]
            return next((float(rank) for rank, hit in enumerate(ordered, 1) if hit["corpus_id"] in right), np.inf)

    return RankingEvaluator
