"""Intervals: that they hold what they promise, on data whose truth is known."""

import numpy as np
import pytest

pytest.importorskip("scipy")
pytest.importorskip("sklearn")

from bioadapt.evaluation.statistics import (
    STATISTICS,
    Evaluation,
    Interval,
    best_threshold,
    in_points,
    paired_interval,
    score_interval,
    unit_of,
)


def evaluation(metric, rows, gold=None):
    gold = np.arange(len(rows)) if gold is None else gold
    return Evaluation({metric: STATISTICS[metric](rows, gold)}, {metric: rows}, gold)


def test_the_interval_of_a_mean_covers_the_truth_as_often_as_it_says():
    generator = np.random.default_rng(0)
    covered = 0
    for _ in range(200):
        noise = generator.normal(size=60)  # common to both models: pairing removes it
        a = evaluation("accuracy", noise + generator.normal(0.3, 0.5, size=60))
        b = evaluation("accuracy", noise)
        interval = paired_interval(a, b, "accuracy", resamples=400)
        covered += interval.low <= 30.0 <= interval.high
        assert interval.low <= interval.estimate <= interval.high
    assert 0.88 <= covered / 200 <= 0.99


def test_pairing_is_narrower_than_not_pairing():
    generator = np.random.default_rng(1)
    noise = generator.normal(size=400)
    a, b = evaluation("accuracy", noise + 0.01 * generator.normal(size=400)), evaluation("accuracy", noise)
    alone = score_interval(a, "accuracy")
    together = paired_interval(a, b, "accuracy")
    assert together.high - together.low < 0.1 * (alone.high - alone.low)


@pytest.mark.parametrize("metric", ["spearman", "average_precision", "v_measure", "mrr@10"])
def test_a_difference_in_each_metric_has_its_sign(metric):
    generator = np.random.default_rng(2)
    gold = generator.integers(0, 2, size=150)
    signal = gold + 0.1 * generator.normal(size=150)
    noise = generator.normal(size=150)
    if metric == "v_measure":
        good, bad = np.stack([gold, gold], 1), generator.integers(0, 2, size=(150, 2))
    elif metric == "mrr@10":
        good, bad = np.full(150, 1.0) - 0.01 * generator.random(150), generator.random(150)
    else:
        good, bad = signal, noise
    a, b = evaluation(metric, good, gold), evaluation(metric, bad, gold)
    interval = paired_interval(a, b, metric, resamples=200)
    assert interval.verdict == "higher"
    assert paired_interval(b, a, metric, resamples=200).verdict == "lower"
    assert interval.estimate == pytest.approx(a.scores[metric] - b.scores[metric])
    assert interval == paired_interval(a, b, metric, resamples=200)


def test_perplexities_differ_by_hundredths_of_a_nat_and_less_is_better():
    tokens = np.array([3.0, 5.0, 8.0])
    good, bad = (evaluation("perplexity", np.stack([loss * tokens, tokens], 1)) for loss in (2.0, 2.1))
    interval = paired_interval(good, bad, "perplexity", resamples=50)
    assert (interval.estimate, interval.low, interval.high) == pytest.approx((10.0, 10.0, 10.0))
    assert interval.verdict == "higher"
    assert score_interval(good, "perplexity").estimate == pytest.approx(np.exp(2.0))
    assert in_points("spearman", 81.5) == 81.5 and unit_of("spearman") == "points of spearman"


def test_the_same_rows_differ_by_nothing():
    a = evaluation("accuracy", np.array([0.0, 1.0, 1.0]))
    assert paired_interval(a, a, "accuracy") == Interval(0.0, 0.0, 0.0, 0.95)
    assert paired_interval(a, a, "accuracy").verdict == "undecided"


def test_a_constant_difference_has_no_width():
    a, b = evaluation("accuracy", np.ones(5)), evaluation("accuracy", np.zeros(5))
    assert paired_interval(a, b, "accuracy") == Interval(100.0, 100.0, 100.0, 0.95)


def test_other_rows_are_refused():
    a, b = evaluation("accuracy", np.ones(5)), evaluation("accuracy", np.ones(6))
    with pytest.raises(ValueError, match="the same rows twice"):
        paired_interval(a, b, "accuracy")
    with pytest.raises(ValueError, match="the same rows twice"):
        paired_interval(a, evaluation("accuracy", np.ones(5), np.arange(5)[::-1]), "accuracy")


def test_the_difference_of_two_evaluations_is_that_of_their_worst_row():
    a = Evaluation({"accuracy": 50.0}, {"accuracy": np.array([0.0, 1.0])}, np.arange(2))
    b = Evaluation({"accuracy": 50.0}, {"accuracy": np.array([0.0, 1.0 - 1e-5])}, np.arange(2))
    assert a.difference_from(b) == pytest.approx(1e-5)
    assert a.difference_from(a) == 0.0


# -- metrics are those of the libraries that everybody uses --


def test_metrics_agree_with_scipy_and_scikit_learn():
    from scipy.stats import spearmanr
    from sklearn import metrics

    generator = np.random.default_rng(3)
    for _ in range(20):
        values = generator.integers(0, 6, size=40) / 5.0  # many equals
        gold = generator.integers(0, 2, size=40)
        graded = generator.integers(0, 5, size=40)
        clusters = generator.integers(0, 4, size=(40, 3))
        assert STATISTICS["spearman"](values, graded) == pytest.approx(100 * spearmanr(values, graded).statistic)
        expected = 100 * metrics.average_precision_score(gold, values)
        assert STATISTICS["average_precision"](values, gold) == pytest.approx(expected)
        expected = 100 * np.mean([metrics.v_measure_score(graded, run) for run in clusters.T])
        assert STATISTICS["v_measure"](clusters, graded) == pytest.approx(expected)
        assert STATISTICS["f1"](1.0 * (values > 0.5), gold) == pytest.approx(100 * metrics.f1_score(gold, values > 0.5))


@pytest.mark.parametrize("metric", ["accuracy", "f1"])
def test_the_best_threshold_is_the_best_of_all(metric):
    from sklearn import metrics

    score = metrics.accuracy_score if metric == "accuracy" else metrics.f1_score
    generator = np.random.default_rng(4)
    for _ in range(20):
        values, gold = generator.integers(0, 8, size=30) / 7.0, generator.integers(0, 2, size=30)
        found = score(gold, values >= best_threshold(values, gold, metric))
        assert found == max(score(gold, values >= cut) for cut in [*values, np.inf])


def test_a_metric_of_nothing_to_find_is_zero_and_not_a_warning():
    assert STATISTICS["average_precision"](np.ones(3), np.zeros(3)) == 0.0
    assert STATISTICS["f1"](np.zeros(3), np.zeros(3)) == 0.0
    assert STATISTICS["spearman"](np.ones(3), np.arange(3)) == 0.0
    assert STATISTICS["v_measure"](np.zeros((3, 1), int), np.arange(3)) == 0.0
