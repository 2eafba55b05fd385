"""Scores with intervals: a metric as a function of rows, and the paired bootstrap of a difference.

The interval covers the choice of test rows. It does not cover the seed of the training: run several seeds for that.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from .._extras import require

# metric -> statistic(values, gold), both with one row per test row; scores are in percent.
Statistic = Callable[[np.ndarray, np.ndarray], float]


@dataclass(frozen=True)
class Evaluation:
    """What a model reached on a split.

    ``scores``: metric -> percent. ``rows``: metric -> what each test row contributed, as (n,) or (n, repeats): a
    reciprocal rank, a hit, a similarity, cluster numbers. ``gold`` (n,): the reference where the metric needs one.
    """

    scores: dict[str, float]
    rows: dict[str, np.ndarray]
    gold: np.ndarray

    def difference_from(self, other: Evaluation) -> float:
        """The largest absolute difference of any score (as a fraction) and of any row."""
        gaps = [abs(self.scores[metric] - other.scores[metric]) / 100 for metric in self.scores]
        gaps += [float(np.abs(self.rows[metric] - other.rows[metric]).max(initial=0.0)) for metric in self.rows]
        return max(gaps, default=0.0)


@dataclass(frozen=True)
class Interval:
    """An estimate in percent (points, where it is a difference) and the bounds of its bootstrap interval."""

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


def mean(values: np.ndarray, gold: np.ndarray) -> float:
    """Mean of the rows, in percent."""
    return 100.0 * float(np.mean(values))


def spearman(values: np.ndarray, gold: np.ndarray) -> float:
    """Rank correlation of similarities (n,) and gold scores (n,), in percent."""
    return 100.0 * float(require("scipy.stats").spearmanr(values, gold).statistic)


def average_precision(values: np.ndarray, gold: np.ndarray) -> float:
    """Average precision of similarities (n,) for the rows with gold label 1, in percent."""
    return 100.0 * float(require("sklearn.metrics").average_precision_score(gold, values))


def v_measure(values: np.ndarray, gold: np.ndarray) -> float:
    """V-measure of clusters (n, repeats) against gold classes (n,), mean over the repeats, in percent."""
    score = require("sklearn.metrics").v_measure_score
    return 100.0 * float(np.mean([score(gold, clusters) for clusters in values.T]))


STATISTICS: dict[str, Statistic] = {
    "mrr@10": mean,
    "accuracy@1": mean,
    "accuracy": mean,
    "spearman": spearman,
    "average_precision": average_precision,
    "v_measure": v_measure,
}


def score_interval(evaluation: Evaluation, metric: str, *, resamples: int = 1000, level: float = 0.95, seed: int = 0):
    """Bootstrap interval of one model's score.

    Returns:
        `Interval`, in percent.
    """
    statistic = STATISTICS[metric]
    estimate = evaluation.scores[metric]
    return _bootstrap(estimate, statistic, [evaluation.rows[metric]], evaluation.gold, resamples, level, seed)


def paired_interval(
    first: Evaluation, second: Evaluation, metric: str, *, resamples: int = 2000, level: float = 0.95, seed: int = 0
) -> Interval:
    """Bootstrap interval of ``first - second``: every resample draws the same rows for both models.

    Returns:
        `Interval`, in points of a percentage.

    Raises:
        ValueError: the two were not evaluated on the same rows.
    """
    a, b = first.rows[metric], second.rows[metric]
    if a.shape != b.shape or not np.array_equal(first.gold, second.gold):
        raise ValueError(f"a paired interval needs the same rows twice, got {a.shape} and {b.shape}")
    statistic = STATISTICS[metric]
    estimate = first.scores[metric] - second.scores[metric]
    return _bootstrap(estimate, statistic, [a, b], first.gold, resamples, level, seed)


def _bootstrap(
    estimate: float,
    statistic: Statistic,
    values: list[np.ndarray],
    gold: np.ndarray,
    resamples: int,
    level: float,
    seed: int,
) -> Interval:
    """Of one statistic, or of the difference of two, over drawn rows; BCa for means, percentiles for the others."""
    if len(values) == 2 and np.array_equal(values[0], values[1]):
        return Interval(0.0, 0.0, 0.0, level)

    if statistic is mean:
        # The difference of two means is the mean of differences: one vectorised pass, and the jackknife costs nothing.
        rows = values[0] - values[1] if len(values) == 2 else values[0]
        data: tuple[np.ndarray, ...] = (100.0 * rows,)
        settings = {"statistic": np.mean, "vectorized": True, "axis": 0, "method": "BCa"}
    else:
        # Resampling row numbers keeps what belongs to one row together, whatever its shape.
        def of_rows(drawn: np.ndarray) -> float:
            scores = [statistic(part[drawn], gold[drawn]) for part in values]
            return scores[0] - scores[1] if len(scores) == 2 else scores[0]

        data = (np.arange(len(gold)),)
        settings = {"statistic": of_rows, "vectorized": False, "method": "percentile"}
    if np.ptp(data[0]) == 0:  # nothing varies, and BCa would divide by zero
        return Interval(estimate, estimate, estimate, level)
    found = require("scipy.stats").bootstrap(
        data, n_resamples=resamples, confidence_level=level, rng=np.random.default_rng(seed), **settings
    )
    low, high = found.confidence_interval
    return Interval(estimate, float(low), float(high), level)
