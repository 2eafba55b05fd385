"""The one engine of fair comparison: a candidate against its rivals, on one task or on many.

It takes what every contender scored, seed by seed and row by row, and gives paired differences with bootstrap intervals
over seeds and rows, their verdicts corrected for the number of tasks, the mean gain over tasks, and all that in words.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from .statistics import (
    LEVEL,
    RESAMPLES,
    Evaluation,
    Interval,
    better,
    check_pairing,
    holm,
    in_points,
    interval,
    mean_of_units,
    p_value,
    resampled,
    unit_of,
    wilcoxon,
)

WIN, LOSS, TIE = "win", "loss", "tie"

# task -> contender -> one evaluation per seed of training, the same seeds in the same order for all. One evaluation
# alone stands for every seed: of what is not trained.
Results = Mapping[str, Mapping[str, Sequence[Evaluation]]]


@dataclass(frozen=True)
class Difference:
    """Candidate minus rival on one task; positive where the candidate is better, whatever the metric.

    Attributes:
        task: by name.
        rival: by name; of several that stand for one, the better.
        metric: of the scores.
        interval: in points (`in_points`), over seeds and test rows, not corrected.
        p: two-sided, corrected by Holm for the number of tasks.
        relative: by how many percent of the rival's score the candidate's is better.
        seeds: how many.
        rows: how many test rows.
    """

    task: str
    rival: str
    metric: str
    interval: Interval
    p: float
    relative: float
    seeds: int
    rows: int

    @property
    def verdict(self) -> str:
        """``win`` or ``loss`` where the interval excludes zero and so does the corrected p, else ``tie``."""
        if self.p > 1 - self.interval.level:
            return TIE
        return {"higher": WIN, "lower": LOSS}.get(self.interval.verdict, TIE)


@dataclass(frozen=True)
class Rivalry:
    """The candidate against one rival over all tasks.

    Attributes:
        rival: the name that was asked for, which may stand for several contenders.
        differences: one for each task.
        gain: mean over tasks, with an interval over tasks, seeds and rows.
        p: of Wilcoxon's signed-rank test over tasks, corrected by Holm for the number of rivals.
    """

    rival: str
    differences: tuple[Difference, ...]
    gain: Interval
    p: float

    def count(self, verdict: str) -> int:
        """On how many tasks it is a ``win``, a ``loss`` or a ``tie``."""
        return sum(difference.verdict == verdict for difference in self.differences)

    @property
    def ahead(self) -> int:
        """On how many tasks the candidate's mean over seeds is the higher one, whether that is certain or not."""
        return sum(difference.interval.estimate > 0 for difference in self.differences)


@dataclass(frozen=True)
class Comparison:
    """A candidate against all its rivals."""

    candidate: str
    rivalries: tuple[Rivalry, ...]

    @property
    def sentences(self) -> list[str]:
        """The verdict on each rival, a plain sentence for each."""
        return [_sentence(self.candidate, rivalry) for rivalry in self.rivalries]

    @property
    def verdict(self) -> str:
        """The verdict on all rivals."""
        return " ".join(self.sentences)

    def records(self) -> list[dict[str, Any]]:
        """Every difference as JSON or a CSV can hold it."""
        return [
            {
                "candidate": self.candidate,
                "against": rivalry.rival,
                "rival": difference.rival,
                "task": difference.task,
                "metric": difference.metric,
                "difference": difference.interval.estimate,
                "low": difference.interval.low,
                "high": difference.interval.high,
                "relative": difference.relative,
                "p": difference.p,
                "verdict": difference.verdict,
                "seeds": difference.seeds,
                "rows": difference.rows,
            }
            for rivalry in self.rivalries
            for difference in rivalry.differences
        ]


def compare(
    results: Results,
    metrics: Mapping[str, str],
    candidate: str,
    rivals: Mapping[str, Sequence[str]] | Sequence[str] | None = None,
    *,
    resamples: int = RESAMPLES,
    level: float = LEVEL,
    seed: int = 0,
) -> Comparison:
    """Compare a candidate with its rivals.

    Args:
        results: what everybody scored. A task on which the candidate or a rival is missing is left out for that rival.
        metrics: the metric of each task.
        candidate: by name.
        rivals: names; or by name several contenders that stand for one, of whom on each task the one with the higher
            mean test score counts, which favours the rival. All other contenders if None.
        resamples: draws of the bootstrap.
        level: of all intervals.
        seed: of the draws.

    Raises:
        ValueError: two contenders were scored on other rows or seeds, or there is nothing to compare.
    """
    if rivals is None:
        rivals = list(dict.fromkeys(name for arms in results.values() for name in arms if name != candidate))
    groups = dict(rivals) if isinstance(rivals, Mapping) else {name: (name,) for name in rivals}
    draws: dict[tuple[str, str], np.ndarray] = {}

    def drawn(task: str, name: str) -> np.ndarray:
        if (task, name) not in draws:
            scores = resampled(results[task][name], metrics[task], resamples=resamples, seed=seed)
            draws[task, name] = in_points(metrics[task], scores)
        return draws[task, name]

    rivalries = []
    for group, names in groups.items():
        tasks = [t for t, arms in results.items() if candidate in arms and any(name in arms for name in names)]
        if tasks:
            chosen = {task: _best(results[task], names, metrics[task]) for task in tasks}
            rivalries.append(_rivalry(results, metrics, candidate, group, chosen, drawn, level, seed))
    if not rivalries:
        raise ValueError(f"nothing to compare {candidate!r} with: no task has it and a rival among {sorted(groups)}")
    corrected = holm({rivalry.rival: rivalry.p for rivalry in rivalries})
    return Comparison(candidate, tuple(Rivalry(r.rival, r.differences, r.gain, corrected[r.rival]) for r in rivalries))


def _best(arms: Mapping[str, Sequence[Evaluation]], names: Sequence[str], metric: str) -> str:
    present = [name for name in names if name in arms]
    return max(present, key=lambda name: np.mean(_points(arms[name], metric)))


def _points(runs: Sequence[Evaluation], metric: str) -> np.ndarray:
    """Of each seed, (n,)."""
    return in_points(metric, np.array([run.scores[metric] for run in runs]))


def _rivalry(
    results: Results,
    metrics: Mapping[str, str],
    candidate: str,
    group: str,
    chosen: Mapping[str, str],
    drawn: Any,
    level: float,
    seed: int,
) -> Rivalry:
    gaps: dict[str, tuple[np.ndarray, np.ndarray]] = {}
    p_values = {}
    for task, rival in chosen.items():
        metric = metrics[task]
        own, other = _paired(results[task][candidate], results[task][rival])
        check_pairing(own, other, metric)
        on_rows = drawn(task, candidate) - drawn(task, rival)  # one row broadcasts over all seeds
        gaps[task] = _points(own, metric) - _points(other, metric), on_rows
        p_values[task] = p_value(mean_of_units(on_rows, level=level, seed=seed))
    corrected = holm(p_values)
    differences = []
    for task, (values, on_rows) in gaps.items():
        rival, metric = chosen[task], metrics[task]
        score, of_rival = (np.mean([run.scores[metric] for run in results[task][n]]) for n in (candidate, rival))
        differences.append(
            Difference(
                task,
                rival,
                metric,
                interval(values, on_rows, level=level, seed=seed),
                corrected[task],
                100 * better(metric) * float(score / of_rival - 1) if of_rival else float("nan"),
                len(values),
                len(results[task][rival][0].gold),
            )
        )
    means = np.stack([mean_of_units(rows, level=level, seed=seed) for _, rows in gaps.values()])
    estimates = np.array([difference.interval.estimate for difference in differences])
    gain = interval(estimates, means, level=level, seed=seed + 1)
    return Rivalry(group, tuple(differences), gain, wilcoxon(estimates.tolist()))


def _paired(
    first: Sequence[Evaluation], second: Sequence[Evaluation]
) -> tuple[Sequence[Evaluation], Sequence[Evaluation]]:
    """What is not trained has one evaluation, which holds for every seed of the other."""
    seeds = max(len(first), len(second))
    return (list(first) * seeds if len(first) == 1 else first), (list(second) * seeds if len(second) == 1 else second)


def _sentence(candidate: str, rivalry: Rivalry) -> str:
    gain, count = rivalry.gain, len(rivalry.differences)
    if count == 1:
        (only,) = rivalry.differences
        what = f"{only.interval} {unit_of(only.metric)}"
        words = {WIN: "is better than", LOSS: "is worse than"}.get(only.verdict)
        if words is None:
            return f"Undecided: {candidate} has {what} against {only.rival}, and the interval includes zero."
        return f"{candidate} {words} {only.rival}: {what}."
    wins, losses, ties = (rivalry.count(verdict) for verdict in (WIN, LOSS, TIE))
    words = {"higher": "is better than", "lower": "is worse than"}.get(gain.verdict, "is not told apart from")
    return (
        f"{candidate} {words} {rivalry.rival}: {gain} {_unit(rivalry)} in the mean over {count} tasks; "
        f"{_number(wins, 'win')}, {_number(losses, 'loss')} and {_number(ties, 'tie')} (corrected for their number), "
        f"ahead by the mean on {rivalry.ahead}; Wilcoxon's p over tasks {rivalry.p:.2g}."
    )


def _unit(rivalry: Rivalry) -> str:
    """Of a mean over tasks: what the points of all of them are, or points of any kind."""
    units = {unit_of(difference.metric) for difference in rivalry.differences}
    return units.pop() if len(units) == 1 else "points"


def _number(count: int, word: str) -> str:
    plural = {"loss": "losses"}.get(word, f"{word}s")
    return f"{count} {word if count == 1 else plural}"
