"""The picture of a comparison: how the scores grew, and how far apart they ended."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .._extras import require
from .statistics import Interval, score_interval, unit_of
from .tasks.task import Task

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_COLOURS = ("#7f7f7f", "#1f77b4", "#17becf", "#2ca02c", "#d62728", "#9467bd")


def draw(
    contenders: Sequence[Any],
    task: Task,
    candidate: str,
    differences: Mapping[str, Mapping[str, Interval]],
    path: Path,
) -> None:
    """Write a PNG with validation curves, test scores and paired differences.

    Args:
        contenders: objects with ``name``, ``test`` (an `Evaluation`) and ``curve`` (epoch, validation score).
        task: names the metric.
        candidate: whose differences they are.
        differences: name -> metric -> interval of "candidate minus it".
        path: where the picture goes.
    """
    figures = require("matplotlib.figure")  # pyplot would want a display
    metric = task.metrics[0]
    figure = figures.Figure(figsize=(13, 4), layout="constrained")
    curves, scores, gaps = figure.subplots(1, 3)
    colours = dict(zip((contender.name for contender in contenders), _COLOURS, strict=False))
    _draw_curves(curves, contenders, colours, metric)
    _draw_intervals(
        scores, {c.name: score_interval(c.test, metric) for c in contenders}, colours, f"test {metric}, percent"
    )
    gaps.axvline(0.0, color="black", linewidth=0.8)
    _draw_intervals(
        gaps,
        {name: intervals[metric] for name, intervals in differences.items()},
        colours,
        f"{candidate} minus it, {unit_of(metric)}",
    )
    figure.suptitle(f"{task.name}: bars are 95 % bootstrap intervals over test rows, one training seed")
    figure.savefig(path, dpi=120)


def _draw_curves(axes: Axes, contenders: Sequence[Any], colours: dict[str, str], metric: str) -> None:
    for contender in contenders:
        if contender.curve:
            epochs, values = zip(*contender.curve, strict=True)
            axes.plot(epochs, values, marker="o", markersize=3, color=colours[contender.name], label=contender.name)
    axes.set_xlabel("epochs")
    axes.set_ylabel(f"validation {metric}, percent")
    if axes.has_data():
        axes.legend(frameon=False)
    else:
        axes.text(0.5, 0.5, "no validation split", ha="center", transform=axes.transAxes)


def _draw_intervals(axes: Axes, intervals: dict[str, Interval], colours: dict[str, str], label: str) -> None:
    for place, (name, interval) in enumerate(intervals.items()):
        reach = [[max(0.0, interval.estimate - interval.low)], [max(0.0, interval.high - interval.estimate)]]
        axes.errorbar([interval.estimate], [place], xerr=reach, fmt="o", capsize=4, color=colours[name])
    axes.set_yticks(range(len(intervals)), list(intervals))
    axes.invert_yaxis()
    axes.margins(y=0.2)
    axes.set_xlabel(label)
