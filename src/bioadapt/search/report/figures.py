"""The figures of a report: SVG to stand within a page, whose style sheet gives the colours, by day and by night."""

from __future__ import annotations

import io
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..._extras import require

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# The page decides on colours: matplotlib gets stand-ins, each to be replaced by a variable of the style sheet.
INK, FAINT, GOOD, BAD, OTHER = "#010101", "#020202", "#030303", "#040404", "#050505"
_VARIABLES = {INK: "currentColor", FAINT: "var(--faint)", GOOD: "var(--good)", BAD: "var(--bad)", OTHER: "var(--other)"}
_STYLE = {
    "svg.fonttype": "none",
    "svg.hashsalt": "bioadapt",
    "text.parse_math": False,
    "font.family": "DejaVu Sans",
    "font.size": 10,
    "axes.edgecolor": FAINT,
    "axes.labelcolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "xtick.color": INK,
    "ytick.color": INK,
    "text.color": INK,
    "legend.frameon": False,
}
_WIDTH = 8.0
# Larger numbers are drawn as multiples of this one, since matplotlib's sums of them would overflow.
_LARGE = 1e300


@dataclass(frozen=True)
class Bar:
    """A line of a forest plot: an estimate with its interval, and whether it speaks for something."""

    name: str
    estimate: float
    low: float
    high: float
    colour: str = OTHER


@dataclass(frozen=True)
class ReportedScores:
    """What a trial reported on its way."""

    steps: Sequence[float]
    values: Sequence[float]
    kind: str


# Lines differ in dash and width as well as in colour.
CURVES: Mapping[str, Mapping[str, Any]] = {
    "complete": {"color": OTHER, "linewidth": 1.0, "alpha": 0.6},
    "pruned": {"color": BAD, "linewidth": 1.0, "alpha": 0.8, "linestyle": "--", "marker": "x"},
    "failed": {"color": FAINT, "linewidth": 1.0, "linestyle": ":", "marker": "+"},
    "best": {"color": GOOD, "linewidth": 2.5, "marker": "o"},
}


def forest(bars: Sequence[Bar], label: str, name: str) -> str:
    """Estimates with intervals, one below the other, about a line at zero.

    Args:
        bars: from top to bottom.
        label: of the axis, with the unit.
        name: of the figure, unique on its page.
    """
    unit, label = _unit((value for bar in bars for value in (bar.low, bar.estimate, bar.high)), label)
    with _styled():
        figure, axes = _figure(0.9 + 0.34 * len(bars))
        axes.axvline(0.0, color=FAINT, linewidth=1)
        for place, bar in enumerate(bars):
            reach = [_in(bar.low, unit), _in(bar.high, unit)]
            axes.plot(reach, [place, place], color=bar.colour, linewidth=2, solid_capstyle="butt")
            axes.plot([_in(bar.estimate, unit)], [place], "o", color=bar.colour, markersize=6)
        axes.set_yticks(range(len(bars)), [bar.name for bar in bars])
        axes.set_ylim(len(bars) - 0.4, -0.6)
        axes.tick_params(axis="y", length=0)
        axes.spines["left"].set_visible(False)
        axes.set_xlabel(label)
        return _svg(figure, name)


def curves(lines: Sequence[ReportedScores], label: str, name: str) -> str:
    """Reported scores against the step at which they were reported.

    Args:
        lines: with kinds out of ``CURVES``.
        label: of the score, with the unit.
        name: of the figure, unique on its page.
    """
    unit, label = _unit((value for line in lines for value in line.values), label)
    with _styled():
        figure, axes = _figure(3.6)
        labelled = set()
        for kind in CURVES:
            for line in (line for line in lines if line.kind == kind):
                first = kind not in labelled
                axes.plot(
                    line.steps,
                    [_in(value, unit) for value in line.values],
                    label=kind if first else None,
                    **CURVES[kind],
                )
                labelled.add(kind)
        steps = sorted({step for line in lines for step in line.steps})
        if len(steps) <= 12:
            axes.set_xticks(steps)
        axes.set_xlabel("step")
        axes.set_ylabel(label)
        _legend(axes)
        return _svg(figure, name)


def progress(studies: Mapping[str, tuple[Sequence[int], Sequence[float], bool]], label: str, name: str) -> str:
    """Scores of the trials in their order, and the best so far, for several studies.

    Args:
        studies: title -> (places in the order of trials, scores, whether higher is better), two at most.
        label: of the score, with the unit.
        name: of the figure, unique on its page.
    """
    unit, label = _unit((score for _, scores, _ in studies.values() for score in scores), label)
    with _styled():
        figure, axes = _figure(3.6)
        for (title, (places, scores, higher)), colour, marker in zip(
            studies.items(), (GOOD, OTHER), ("o", "x"), strict=False
        ):
            scores = [_in(score, unit) for score in scores]
            axes.plot(places, scores, marker, color=colour, markersize=4, alpha=0.7, label=f"{title}: a trial")
            best = list(scores)
            for i in range(1, len(best)):
                best[i] = max(best[i - 1], best[i]) if higher else min(best[i - 1], best[i])
            axes.step(places, best, where="post", color=colour, linewidth=2, label=f"{title}: best so far")
        axes.xaxis.set_major_locator(require("matplotlib.ticker", "search").MaxNLocator(integer=True))
        axes.set_xlabel("number of the trial")
        axes.set_ylabel(label)
        _legend(axes)
        return _svg(figure, name)


def _unit(values: Iterable[float], label: str) -> tuple[float, str]:
    """What values are drawn in, and the label that says so where it is not 1."""
    large = any(abs(value) > _LARGE for value in values)
    return (_LARGE, f"{label} / {_LARGE:.0e}") if large else (1.0, label)


def _in(value: float, unit: float) -> float:
    """Infinity lies at the end of the numbers."""
    return max(-sys.float_info.max, min(value, sys.float_info.max)) / unit if unit != 1.0 else value


def _styled() -> Any:
    return require("matplotlib", "search").rc_context(_STYLE)


def _figure(height: float) -> tuple[Figure, Axes]:
    figure = require("matplotlib.figure", "search").Figure(figsize=(_WIDTH, height), layout="constrained")
    return figure, figure.subplots()


def _legend(axes: Axes) -> None:
    """Above the axes, where it covers no point."""
    axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=4, borderaxespad=0)


def _svg(figure: Figure, name: str) -> str:
    """An ``svg`` element whose ids are its own, whose text is text and whose colours are the page's."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<(metadata|style).*?</\1>", "", text, flags=re.DOTALL)
    text = re.sub(r'\bid="', f'id="{name}-', text)
    text = re.sub(r'(xlink:href="|url\()#', rf"\1#{name}-", text)
    text = re.sub(
        r'<svg [^>]*?(viewBox="[^"]*")[^>]*>', r'<svg xmlns:xlink="http://www.w3.org/1999/xlink" \1>', text, count=1
    )
    text = text.replace("'DejaVu Sans'", "system-ui, sans-serif")
    for colour, variable in _VARIABLES.items():
        text = text.replace(colour, variable)
    return text
