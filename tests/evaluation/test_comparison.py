"""The comparison on data whose truth is known: who wins, by how much, and what is called a tie."""

import math

import numpy as np
import pytest

pytest.importorskip("scipy")
pytest.importorskip("sklearn")

from bioadapt.evaluation.comparison import LOSS, TIE, WIN, compare
from bioadapt.evaluation.statistics import STATISTICS, Evaluation, holm, interval, p_value, wilcoxon


def runs(ability, seeds=5, rows=300, task=0, metric="accuracy", spread=0.0):
    """Evaluations of a contender who is right with a probability of ``ability``; rows are equally hard for all."""
    hardness = np.random.default_rng([7, task]).random(rows)
    found = []
    for seed in range(seeds):
        own = np.random.default_rng([task, seed, int(ability * 1e4)]).normal(0, spread) if spread else 0.0
        right = (hardness < ability + own).astype(float)
        found.append(Evaluation({metric: STATISTICS[metric](right, np.arange(rows))}, {metric: right}, np.arange(rows)))
    return found


def results(**abilities):
    """By contender its abilities on the tasks."""
    count = len(next(iter(abilities.values())))
    return {f"task {n}": {name: runs(of[n], task=n) for name, of in abilities.items()} for n in range(count)}, {
        f"task {n}": "accuracy" for n in range(count)
    }


def test_wins_losses_and_ties_are_told_apart():
    found = compare(*results(bio=[0.8, 0.5, 0.6], lora=[0.5, 0.8, 0.6]), "bio")
    (rivalry,) = found.rivalries
    assert [difference.verdict for difference in rivalry.differences] == [WIN, LOSS, TIE]
    assert (rivalry.count(WIN), rivalry.count(LOSS), rivalry.count(TIE), rivalry.ahead) == (1, 1, 1, 1)
    assert rivalry.differences[2].interval.estimate == 0.0
    assert "1 win, 1 loss and 1 tie" in found.verdict
    assert [record["verdict"] for record in found.records()] == [WIN, LOSS, TIE]


def test_the_gain_over_tasks_is_their_mean_and_its_interval_knows_that_tasks_differ():
    (rivalry,) = compare(*results(bio=[0.75, 0.65, 0.7, 0.72], lora=[0.6, 0.6, 0.6, 0.6]), "bio").rivalries
    estimates = [difference.interval.estimate for difference in rivalry.differences]
    assert rivalry.gain.estimate == pytest.approx(np.mean(estimates))
    assert 0 < rivalry.gain.low < rivalry.gain.estimate < rivalry.gain.high
    widest = max(difference.interval.high - difference.interval.low for difference in rivalry.differences)
    assert rivalry.gain.high - rivalry.gain.low > 0.5 * widest


def test_of_two_rivals_that_stand_for_one_the_better_counts_on_each_task():
    tables, metrics = results(bio=[0.7, 0.7], own=[0.6, 0.5], sites=[0.5, 0.65])
    (rivalry,) = compare(tables, metrics, "bio", {"equal": ("own", "sites")}).rivalries
    assert [difference.rival for difference in rivalry.differences] == ["own", "sites"]
    assert rivalry.rival == "equal"


def test_a_lower_perplexity_is_a_win_and_hard_texts_count_no_more_than_easy_ones():
    def evaluations(loss):
        rows = np.stack([np.full(50, loss) + np.random.default_rng(0).random(50), np.ones(50)], axis=1)
        score = STATISTICS["perplexity"](rows, np.arange(50))
        return [Evaluation({"perplexity": score}, {"perplexity": rows}, np.arange(50))] * 2

    tables = {
        "easy": {"bio": evaluations(1.0), "lora": evaluations(2.0)},
        "hard": {"bio": evaluations(7.9), "lora": evaluations(8.0)},
    }
    found = compare(tables, {"easy": "perplexity", "hard": "perplexity"}, "bio")
    (rivalry,) = found.rivalries
    assert [difference.verdict for difference in rivalry.differences] == [WIN, WIN]
    assert [difference.interval.estimate for difference in rivalry.differences] == pytest.approx([100.0, 10.0])
    assert [difference.relative for difference in rivalry.differences] == pytest.approx(
        [100 * (1 - math.exp(-1.0)), 100 * (1 - math.exp(-0.1))]
    )
    assert rivalry.gain.estimate == pytest.approx(55.0) and "+55.00" in found.verdict
    assert "hundredths of a nat in the mean over 2 tasks" in found.verdict


def test_points_of_several_kinds_have_no_name_of_one():
    tables, metrics = results(bio=[0.8], lora=[0.5])
    other = {name: runs(ability, task=1, metric="mrr@10") for name, ability in (("bio", 0.8), ("lora", 0.5))}
    found = compare({**tables, "search": other}, {**metrics, "search": "mrr@10"}, "bio")
    assert "points in the mean over 2 tasks" in found.verdict


def test_what_is_not_trained_stands_for_every_seed():
    tables, metrics = results(bio=[0.8])
    tables["task 0"]["zero-shot"] = runs(0.5, seeds=1)
    (rivalry,) = compare(tables, metrics, "bio").rivalries
    assert rivalry.differences[0].seeds == 5 and rivalry.differences[0].verdict == WIN


def test_other_rows_or_seeds_are_refused():
    tables, metrics = results(bio=[0.8], lora=[0.5])
    tables["task 0"]["lora"] = runs(0.5, rows=200)
    with pytest.raises(ValueError, match="the same rows twice"):
        compare(tables, metrics, "bio")
    tables["task 0"]["lora"] = runs(0.5, seeds=3)
    with pytest.raises(ValueError, match="the same seeds twice"):
        compare(tables, metrics, "bio")
    with pytest.raises(ValueError, match="nothing to compare 'bio' with"):
        compare({"task 0": {"bio": runs(0.5)}}, metrics, "bio")


def test_an_interval_over_five_seeds_covers_the_truth_about_as_often_as_it_says():
    """A plain percentile bootstrap over five seeds would cover it in about 83 of 100 cases."""
    generator, covered = np.random.default_rng(0), 0
    for number in range(300):
        values = generator.normal(1.0, 2.0, size=5)
        found = interval(values, np.repeat(values[:, None], 500, axis=1), seed=number)
        covered += found.low <= 1.0 <= found.high
    assert 0.90 <= covered / 300 <= 0.99


def test_holm_is_as_published():
    assert holm({"a": 0.01, "b": 0.04, "c": 0.03}) == pytest.approx({"a": 0.03, "b": 0.06, "c": 0.06})
    assert holm({"a": 0.6, "b": 0.9}) == pytest.approx({"a": 1.0, "b": 1.0})


def test_p_values():
    assert p_value(np.full(999, 1.0)) == pytest.approx(0.002)
    assert p_value(np.zeros(10)) == 1.0
    assert wilcoxon([0.0, 0.0]) == 1.0
    assert wilcoxon([1.0, 2.0, 3.0, 4.0, 5.0, 6.0]) == pytest.approx(0.03125)


def test_many_tasks_without_an_effect_give_no_wins():
    """Uncorrected, one in twenty would be called a win or a loss."""
    tasks = {
        f"task {n}": {"bio": runs(0.6, task=n, spread=0.03), "lora": runs(0.6001, task=n, spread=0.03)}
        for n in range(20)
    }
    (rivalry,) = compare(tasks, dict.fromkeys(tasks, "accuracy"), "bio", resamples=500).rivalries
    assert rivalry.count(TIE) >= 19


def test_the_report_shows_every_comparison_and_needs_nothing_else(tmp_path):
    import re

    from bioadapt.evaluation.report import write_report

    pytest.importorskip("matplotlib")
    found = compare(*results(bio=[0.8, 0.5, 0.6], lora=[0.5, 0.8, 0.6]), "bio", resamples=200)
    cells = [
        {"task": "task 0", "arm": "bio<1>", "metric": "accuracy", "params": 1234, "rate": 0.002, "dev": 1.0,
         "test": 2.0, "test_clean": 3.0, "seconds": 4.0},
    ]  # fmt: skip
    write_report(tmp_path / "report.html", found, cells, {"seeds": 5})
    page = (tmp_path / "report.html").read_text()
    for word in (">win<", ">loss<", ">tie<", "bio&lt;1&gt;", "1,234", "over lora: mean of 3 tasks"):
        assert word in page
    assert page.count("<svg") == 1
    assert not re.findall(r'(?:src|href)="(?!#)', page)
