"""The report of an evaluation: one page that needs nothing else, on which ties are as visible as wins."""

from __future__ import annotations

import html
import io
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from .._extras import require
from .comparison import LOSS, WIN, Comparison, Difference, Rivalry
from .statistics import Interval, unit_of

_COLOURS = {WIN: "#1b7837", LOSS: "#b2182b"}
_OTHER, _MEAN = "#555555", "#0b3c6f"
_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 62rem; padding: 0 1rem; color: #1a1a1a; }
h1 { font-size: 1.6rem; } h2 { font-size: 1.2rem; margin-top: 2.2rem; }
table { border-collapse: collapse; width: 100%; font-size: 0.88rem; display: block; overflow-x: auto; }
th, td { text-align: right; padding: 0.25rem 0.6rem; border-bottom: 1px solid #ddd; white-space: nowrap; }
th:first-child, td:first-child, th:nth-child(2), td:nth-child(2) { text-align: left; }
svg { max-width: 100%; height: auto; }
.win { color: #1b7837; } .loss { color: #b2182b; } .verdict { font-weight: 600; }
"""


def write_report(
    path: str | Path, comparison: Comparison, cells: Sequence[Mapping[str, Any]], facts: Mapping[str, Any]
) -> None:
    """Write the page.

    Args:
        path: of the .html file.
        comparison: of the candidate with its rivals.
        cells: as `EvaluationSettings`' run returns them.
        facts: what else the reader has to know, such as settings and machine, by name.
    """
    parts = [
        f"<h1>{_text(comparison.candidate)}, compared fairly</h1>",
        *(f'<p class="verdict">{_text(sentence)}</p>' for sentence in comparison.sentences),
        forest(comparison),
        "<p>Points are percent of a metric; of a perplexity they are hundredths of a nat per token. Dots are means "
        "over seeds, bars 95 % intervals over seeds and test rows, and for a mean over tasks over those, too. Green "
        "and red are wins and losses after Holm's correction for the number of tasks; grey is a tie.</p>",
        *(_differences(comparison.candidate, rivalry) for rivalry in comparison.rivalries),
        "<h2>Every arm</h2>",
        _arms(cells),
        "<h2>How it was done</h2>",
        _table(("what", "value"), ((name, str(value)) for name, value in facts.items())),
    ]
    page = (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{_text(comparison.candidate)}, compared fairly</title><style>{_STYLE}</style></head><body>\n"
        + "\n".join(parts)
        + "\n</body></html>\n"
    )
    Path(path).write_text(page, encoding="utf-8")


def forest(comparison: Comparison) -> str:
    """Forest plot as SVG: for every rival the mean over tasks, and each task below it."""
    lines: list[tuple[str, Interval, str, bool]] = []
    for rivalry in comparison.rivalries:
        several = len(rivalry.differences) > 1
        if several:
            lines.append((f"over {rivalry.rival}: mean of {len(rivalry.differences)} tasks", rivalry.gain, _MEAN, True))
        for difference in rivalry.differences:
            name = difference.task if several else f"over {rivalry.rival}: {difference.task}"
            lines.append((name, difference.interval, _COLOURS.get(difference.verdict, _OTHER), False))
    require("matplotlib")
    figure = require("matplotlib.figure").Figure(figsize=(9, 1.0 + 0.28 * len(lines)), layout="constrained")
    axes = figure.subplots()
    axes.axvline(0.0, color="#999999", linewidth=1)
    for place, (_, interval, colour, mean) in enumerate(lines):
        axes.plot([interval.low, interval.high], [place, place], color=colour, linewidth=4 if mean else 2)
        axes.plot([interval.estimate], [place], "D" if mean else "o", color=colour, markersize=8 if mean else 5)
    axes.set_yticks(range(len(lines)), [name for name, *_ in lines])
    axes.set_ylim(len(lines) - 0.4, -0.6)
    axes.set_xlabel(f"{comparison.candidate} minus its rival, points (right: {comparison.candidate} is better)")
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(axis="y", length=0)
    with require("matplotlib").rc_context({"svg.fonttype": "none", "svg.hashsalt": "bioadapt"}):
        stream = io.StringIO()
        figure.savefig(stream, format="svg", metadata={"Date": None})
    return stream.getvalue()[stream.getvalue().index("<svg") :]


def _differences(candidate: str, rivalry: Rivalry) -> str:
    header = (
        "task",
        "rival",
        "difference",
        "in",
        "95 % interval",
        "relative",
        "p (Holm)",
        "verdict",
        "seeds",
        "rows",
    )
    rows = (_difference(difference) for difference in rivalry.differences)
    return f"<h2>{_text(candidate)} against {_text(rivalry.rival)}</h2>{_table(header, rows)}"


def _difference(difference: Difference) -> tuple[str, ...]:
    interval = difference.interval
    return (
        difference.task,
        difference.rival,
        f"{interval.estimate:+.2f}",
        unit_of(difference.metric),
        f"[{interval.low:+.2f}, {interval.high:+.2f}]",
        f"{difference.relative:+.1f} %",
        f"{difference.p:.3g}",
        difference.verdict,
        str(difference.seeds),
        f"{difference.rows:,}",
    )


def _arms(cells: Sequence[Mapping[str, Any]]) -> str:
    groups: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
    for cell in cells:
        groups.setdefault((cell["task"], cell["arm"]), []).append(cell)
    header = ("task", "arm", "metric", "numbers", "rate", "seeds", "dev", "test", "clean", "seconds")
    rows = []
    for (task, arm), own in groups.items():
        means = (sum(cell[name] for cell in own) / len(own) for name in ("dev", "test", "test_clean", "seconds"))
        first = own[0]
        counts = (first["metric"], f"{first['params']:,}", f"{first['rate']:g}", str(len(own)))
        rows.append((task, arm, *counts, *(f"{mean:.2f}" for mean in means)))
    return _table(header, rows)


def _table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    head = "".join(f"<th>{_text(name)}</th>" for name in header)
    body = "".join(f"<tr>{''.join(map(_cell, row))}</tr>" for row in rows)
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def _cell(value: str) -> str:
    kind = f' class="{value}"' if value in _COLOURS else ""
    return f"<td{kind}>{_text(value)}</td>"


def _text(value: str) -> str:
    return html.escape(value)
