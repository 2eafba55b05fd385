"""Metrics as functions of rows, and intervals for scores and their differences.

A score is a function of test rows, and so is the difference of two scores on the same rows. The bootstrap draws rows
again, and where a model was trained with several seeds, seeds too: the same ones for both models of a difference.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from .._extras import require

RESAMPLES = 2000
LEVEL = 0.95

# metric -> statistic(values, gold), both with one row per test row.
Statistic = Callable[[np.ndarray, np.ndarray], float]


@dataclass(frozen=True)
class Evaluation:
    """What a model reached on a split.

    ``scores``: metric -> percent (perplexity as it is). ``rows``: metric -> what each test row contributed, as (n,) or
    (n, k): a reciprocal rank, a hit, a similarity, cluster numbers. ``gold`` (n,): the reference where the metric
    needs one.
    """

    scores: dict[str, float]
    rows: dict[str, np.ndarray]
    gold: np.ndarray

    def difference_from(self, other: Evaluation) -> float:
        """The largest absolute difference of any score (as a fraction) and of any row."""
        gaps = [abs(self.scores[metric] - other.scores[metric]) / 100 for metric in self.scores]
        gaps += [float(np.abs(self.rows[metric] - other.rows[metric]).max(initial=0.0)) for metric in self.rows]
        return max(gaps, default=0.0)

    def of_rows(self, places: Sequence[int]) -> Evaluation:
        """The same for some of the rows alone, such as those that are clean of overlaps."""
        chosen = np.asarray(places, dtype=int)
        rows = {metric: values[chosen] for metric, values in self.rows.items()}
        gold = self.gold[chosen]
        scores = {
            metric: STATISTICS[metric](values, gold) if len(chosen) else float("nan") for metric, values in rows.items()
        }
        return Evaluation(scores, rows, gold)


@dataclass(frozen=True)
class Interval:
    """A score, or a difference in points (`in_points`), and the bounds of its bootstrap interval."""

    estimate: float
    low: float
    high: float
    level: float

    @property
    def verdict(self) -> str:
        """``higher`` or ``lower`` where the interval excludes zero, else ``undecided``."""
        return "higher" if self.low > 0 else "lower" if self.high < 0 else "undecided"

    def __str__(self) -> str:
        return f"{self.estimate:+.2f} [{self.low:+.2f}, {self.high:+.2f}]"


# -- metrics --


def mean(values: np.ndarray, gold: np.ndarray) -> float:
    """Mean of the rows, in percent."""
    return 100.0 * float(np.mean(values))


def spearman(values: np.ndarray, gold: np.ndarray) -> float:
    """Rank correlation of similarities (n,) and gold scores (n,), in percent; 0 where either is constant."""
    rankdata = require("scipy.stats").rankdata
    first, second = rankdata(values), rankdata(gold)
    first, second = first - first.mean(), second - second.mean()
    size = np.sqrt(first @ first * (second @ second))
    return 100.0 * float(first @ second / size) if size else 0.0


def average_precision(values: np.ndarray, gold: np.ndarray) -> float:
    """Average precision of similarities (n,) for the rows with gold label 1, in percent; 0 where there are none.

    As scikit-learn has it, in fewer steps: the bootstrap asks for it thousands of times.
    """
    order = np.argsort(-values, kind="stable")
    ordered, right = values[order], gold[order].astype(bool)
    ends = np.flatnonzero(np.append(np.diff(ordered) != 0, True))  # equals are one threshold
    hits = np.cumsum(right)[ends]
    if not hits[-1]:
        return 0.0
    return 100.0 * float(np.sum(np.diff(hits, prepend=0) / hits[-1] * hits / (ends + 1)))


def f1(values: np.ndarray, gold: np.ndarray) -> float:
    """F1 of predictions (n,) of 0 or 1, in percent."""
    both = float(np.sum(values * gold))
    total = float(np.sum(values) + np.sum(gold))
    return 100.0 * 2 * both / total if total else 0.0


def v_measure(values: np.ndarray, gold: np.ndarray) -> float:
    """V-measure of clusters (n, repeats) against gold classes (n,), mean over the repeats, in percent."""
    return 100.0 * float(np.mean([_v_measure(clusters, gold) for clusters in values.T]))


def _v_measure(clusters: np.ndarray, gold: np.ndarray) -> float:
    """As scikit-learn has it, from one table of counts: the bootstrap asks for it thousands of times."""
    width = int(gold.max()) + 1
    table = np.bincount(clusters * width + gold).astype(float)
    table = np.resize(np.append(table, np.zeros(-len(table) % width)), (-(-len(table) // width), width))
    of_both, of_clusters, of_gold = (_entropy(counts) for counts in (table.ravel(), table.sum(1), table.sum(0)))
    if not of_clusters or not of_gold:
        return 1.0 if of_clusters == of_gold else 0.0
    return 2 * (of_clusters + of_gold - of_both) / (of_clusters + of_gold)


def _entropy(counts: np.ndarray) -> float:
    shares = counts[counts > 0] / counts.sum()
    return float(-(shares * np.log(shares)).sum())


def perplexity(values: np.ndarray, gold: np.ndarray) -> float:
    """Exponential of the mean loss per token of texts (n, 2), of which the columns are summed loss and tokens."""
    loss, tokens = values.sum(0)
    return float(np.exp(loss / tokens))


STATISTICS: dict[str, Statistic] = {
    "mrr@10": mean,
    "ndcg@10": mean,
    "accuracy@1": mean,
    "accuracy": mean,
    "spearman": spearman,
    "average_precision": average_precision,
    "f1": f1,
    "v_measure": v_measure,
    "perplexity": perplexity,
}
LOWER_IS_BETTER = frozenset({"perplexity"})


def better(metric: str) -> int:
    """1 where a higher score is the better one, -1 where a lower one is."""
    return -1 if metric in LOWER_IS_BETTER else 1


def in_points(metric: str, score: Any) -> Any:
    """Scores in points, of which more are better and whose differences mean the same on every task.

    They are percent, as most scores are already. Of a perplexity they are hundredths of a nat per token, below zero:
    the perplexity of texts that are hard to foretell falls by more than that of easy ones for the same gain.

    Args:
        metric: of the scores.
        score: a number, or an array of them.
    """
    return -100.0 * np.log(score) if metric == "perplexity" else score


def unit_of(metric: str) -> str:
    """What differences between scores in points are, in words."""
    return "hundredths of a nat" if metric == "perplexity" else f"points of {metric}"


def best_threshold(values: np.ndarray, gold: np.ndarray, metric: str) -> float:
    """The threshold at and above which calling a row 1 gives the best ``accuracy`` or ``f1``.

    Args:
        values: similarities (n,).
        gold: labels (n,), 0 or 1.
        metric: which of the two.
    """
    order = np.argsort(-values, kind="stable")
    ordered, right = values[order], gold[order]
    called = np.arange(len(order) + 1)
    hits = np.append(0, np.cumsum(right))
    score = hits - (called - hits) if metric == "accuracy" else 2 * hits / (called + hits[-1] + 1e-12)
    # No threshold can part values that are equal.
    possible = np.concatenate([[True], np.diff(ordered) != 0, [True]])
    best = int(np.argmax(np.where(possible, score, -np.inf)))
    if best == 0:
        return float("inf")
    return float(ordered[best - 1] if best == len(order) else (ordered[best - 1] + ordered[best]) / 2)


# -- intervals --


def score_interval(
    evaluation: Evaluation, metric: str, *, resamples: int = 1000, level: float = LEVEL, seed: int = 0
) -> Interval:
    """Percentile bootstrap interval of one model's score over rows.

    Returns:
        `Interval`, in percent.
    """
    drawn = resampled([evaluation], metric, resamples=resamples, seed=seed)[0]
    low, high = np.nanquantile(drawn, [(1 - level) / 2, (1 + level) / 2])
    return Interval(evaluation.scores[metric], float(low), float(high), level)


def paired_interval(
    first: Evaluation | Sequence[Evaluation],
    second: Evaluation | Sequence[Evaluation],
    metric: str,
    *,
    resamples: int = RESAMPLES,
    level: float = LEVEL,
    seed: int = 0,
) -> Interval:
    """Bootstrap interval of ``first - second`` in points, over test rows, and over seeds where there are several.

    Args:
        first, second: an evaluation, or one for each seed of training, the same seeds in the same order.
        metric: which of their scores.
        resamples: how often to draw.
        level: of the interval.
        seed: of the draws.

    Returns:
        `Interval`, in points (`in_points`).

    Raises:
        ValueError: the two were not evaluated on the same rows or seeds.
    """
    one, two = ([given] if isinstance(given, Evaluation) else list(given) for given in (first, second))
    check_pairing(one, two, metric)
    values = [in_points(metric, np.array([run.scores[metric] for run in runs])) for runs in (one, two)]
    drawn = [in_points(metric, resampled(runs, metric, resamples=resamples, seed=seed)) for runs in (one, two)]
    return interval(values[0] - values[1], drawn[0] - drawn[1], level=level, seed=seed)


def check_pairing(first: Sequence[Evaluation], second: Sequence[Evaluation], metric: str) -> None:
    """Raise `ValueError` unless both were evaluated on the same rows and as many seeds."""
    if len(first) != len(second):
        raise ValueError(f"a paired interval needs the same seeds twice, got {len(first)} and {len(second)}")
    for a, b in zip(first, second, strict=True):
        if a.rows[metric].shape != b.rows[metric].shape or not np.array_equal(a.gold, b.gold):
            raise ValueError(
                f"a paired interval needs the same rows twice, got {a.rows[metric].shape} and {b.rows[metric].shape}"
            )


def resampled(runs: Sequence[Evaluation], metric: str, *, resamples: int = RESAMPLES, seed: int = 0) -> np.ndarray:
    """Scores of every seed on drawn rows, (seeds, resamples); the draws depend on ``seed`` and the count of rows alone.

    Args:
        runs: of one model, on the same rows.
        metric: which of their scores.
        resamples: how often to draw.
        seed: of the draws.
    """
    statistic, count = STATISTICS[metric], len(runs[0].gold)
    generator = np.random.default_rng(seed)
    statistics = np.empty((len(runs), resamples))
    for number in range(resamples):
        drawn = generator.integers(count, size=count)
        for place, run in enumerate(runs):
            statistics[place, number] = statistic(run.rows[metric][drawn], run.gold[drawn])
    return statistics


def interval(values: np.ndarray, drawn: np.ndarray, *, level: float = LEVEL, seed: int = 0) -> Interval:
    """Interval of a mean over units (seeds, or tasks) of which each was itself drawn again.

    With n units the percentile bootstrap is too narrow: a mean over units drawn with replacement varies by the factor
    (n - 1) / n too little, and normal quantiles are taken where t quantiles should be. What the draws of units add is
    therefore stretched by both ("expanded percentile": Hesterberg 2015, What teachers should know about the bootstrap).

    Args:
        values: of the units, (n,).
        drawn: of the units on drawn rows, (n, resamples).
        level: of the interval.
        seed: of the draws of units.
    """
    return _bounds(values, mean_of_units(drawn, level=level, seed=seed), level)


def mean_of_units(drawn: np.ndarray, *, level: float = LEVEL, seed: int = 0) -> np.ndarray:
    """Means over drawn units, (resamples,), of values (units, resamples) on drawn rows; see `interval`."""
    units, resamples = drawn.shape
    centre = np.nanmean(drawn, axis=0)
    if units == 1:
        return centre
    stats = require("scipy.stats")
    tail = (1 + level) / 2
    stretch = np.sqrt(units / (units - 1)) * stats.t.ppf(tail, units - 1) / stats.norm.ppf(tail)
    chosen = np.random.default_rng([seed, units]).integers(units, size=(units, resamples))
    return centre + stretch * (np.nanmean(np.take_along_axis(drawn, chosen, axis=0), axis=0) - centre)


def _bounds(values: np.ndarray, means: np.ndarray, level: float) -> Interval:
    low, high = np.nanquantile(means, [(1 - level) / 2, (1 + level) / 2])
    return Interval(float(np.mean(values)), float(low), float(high), level)


def p_value(means: np.ndarray) -> float:
    """Two-sided p of a difference from its bootstrap draws (resamples,): how often they fall on zero's other side."""
    count = len(means)
    beyond = min(int(np.sum(means <= 0)), int(np.sum(means >= 0)))
    return min(1.0, 2 * (beyond + 1) / (count + 1))


def holm(p_values: Mapping[str, float]) -> dict[str, float]:
    """p values adjusted for their number (Holm 1979, A simple sequentially rejective multiple test procedure)."""
    adjusted: dict[str, float] = {}
    least = 0.0
    for rank, (name, p) in enumerate(sorted(p_values.items(), key=lambda item: item[1])):
        least = max(least, min(1.0, p * (len(p_values) - rank)))
        adjusted[name] = least
    return {name: adjusted[name] for name in p_values}


def wilcoxon(gains: Sequence[float]) -> float:
    """Two-sided p of Wilcoxon's signed-rank test that gains, one per task, lie around zero; 1 if all are zero."""
    if not np.any(gains):
        return 1.0
    return float(require("scipy.stats").wilcoxon(gains).pvalue)
