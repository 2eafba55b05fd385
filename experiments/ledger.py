"""The claims ledger: what the experiments share. Values over seeds become intervals, intervals become verdicts.

An experiment is a folder with a ``run.py``, started as ``python -m experiments.FOLDER.run`` from the root of the
repository, and a README.md that states claim, set-up and command and has two marks between which `publish` writes what
was found. Beside it stand ``results.csv`` (every single value), ``claims.csv`` (what was judged) and ``results.png``.
"""

from __future__ import annotations

import argparse
import csv
import os
import platform
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from matplotlib.figure import Figure
from scipy import stats

from bioadapt.evaluation import Interval

START, END = "<!-- results -->", "<!-- end of results -->"
LEVEL = 0.95
# Okabe and Ito's, which colour-blind readers can tell apart.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")

SUPPORTED, NOT_SUPPORTED, UNDECIDED, UNTESTABLE = "supported", "not supported", "undecided", "not testable here"


@dataclass(frozen=True)
class Claim:
    """A statement of the source, the measured number that decides on it, and where that number has to lie.

    Attributes:
        text: the claim in one sentence.
        measure: what ``values`` are, with their unit; differences name the minuend first.
        values: one per seed; paired differences where two things are compared. Empty: not testable here.
        side: the claim holds where the mean over seeds is ``above`` or ``below`` the bound, or ``within`` plus and
            minus the bound.
        bound: in the unit of the values.
        note: one sentence for the reader: a reason why it cannot be tested, or a restriction.
    """

    text: str
    measure: str
    values: Sequence[float]
    side: Literal["above", "below", "within"] = "above"
    bound: float = 0.0
    note: str = ""

    @property
    def interval(self) -> Interval:
        return over_seeds(self.values)

    @property
    def verdict(self) -> str:
        """Supported or not supported where the whole interval lies on one side of the bound, else undecided."""
        if not len(self.values):
            return UNTESTABLE
        low, high = self.interval.low, self.interval.high
        if self.side == "within":
            inside, outside = -self.bound < low and high < self.bound, low > self.bound or high < -self.bound
        else:
            above, below = low > self.bound, high < self.bound
            inside, outside = (above, below) if self.side == "above" else (below, above)
        return SUPPORTED if inside else NOT_SUPPORTED if outside else UNDECIDED

    def record(self) -> dict[str, Any]:
        """A line of claims.csv."""
        interval = self.interval if len(self.values) else Interval(*[float("nan")] * 3, LEVEL)
        numbers = {"estimate": interval.estimate, "low": interval.low, "high": interval.high}
        return {
            "claim": self.text,
            "measure": self.measure,
            "side": self.side,
            "bound": f"{self.bound:g}",
            **{name: f"{value:.6g}" for name, value in numbers.items()},
            "seeds": len(self.values),
            "verdict": self.verdict,
            "note": self.note,
        }


def by_seed(rows: Iterable[Mapping[str, Any]], column: str = "value", **wanted: object) -> dict[int, float]:
    """A column of those rows that hold all that is wanted, in the order of seeds."""
    mine = {row["seed"]: row[column] for row in rows if all(row[name] == value for name, value in wanted.items())}
    return dict(sorted(mine.items()))


def paired(first: Mapping[int, float], second: Mapping[int, float]) -> list[float]:
    """First minus second, for every seed that both have."""
    return [first[seed] - second[seed] for seed in sorted(first.keys() & second.keys())]


def over_seeds(values: Sequence[float]) -> Interval:
    """Mean with its 95 % t interval; without bounds for a single seed."""
    mean = float(np.mean(values))
    if len(values) < 2:
        return Interval(mean, float("nan"), float("nan"), LEVEL)
    reach = float(stats.t.ppf((1 + LEVEL) / 2, len(values) - 1) * np.std(values, ddof=1) / np.sqrt(len(values)))
    return Interval(mean, mean - reach, mean + reach, LEVEL)


def parser(description: str, seeds: int) -> argparse.ArgumentParser:
    """The options that every experiment has."""
    options = argparse.ArgumentParser(description=description.splitlines()[0])
    options.add_argument("--seeds", type=int, default=seeds, help="how many seeds (default %(default)s)")
    options.add_argument("--quick", action="store_true", help="under a minute, into quick/; says nothing")
    return options


def markdown(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """A table in Markdown."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines)


def hardware() -> str:
    """What the results were computed on, for the reader."""
    threads = torch.get_num_threads()
    return f"{os.cpu_count()} CPU cores ({platform.machine()}), {threads} thread(s), torch {torch.__version__}"


def publish(
    folder: Path,
    rows: Sequence[Mapping[str, Any]],
    claims: Sequence[Claim],
    tables: str,
    figure: Figure,
    *,
    quick: bool = False,
) -> None:
    """Write results.csv, claims.csv, results.png and the results part of README.md.

    Args:
        folder: the experiment's own; with ``quick`` everything goes to its subfolder quick/ and README.md stays.
        rows: every single value, one mapping per line, all with the same keys; floats are written with six digits.
        claims: what is judged.
        tables: Markdown that goes above the table of claims.
        figure: the picture.
        quick: the run was only a trial of the machinery.
    """
    target = folder / "quick" if quick else folder
    target.mkdir(exist_ok=True)
    _write_csv(target / "results.csv", [{name: _digits(value) for name, value in row.items()} for row in rows])
    _write_csv(target / "claims.csv", [claim.record() for claim in claims])
    figure.savefig(target / "results.png", dpi=120)
    text = "\n".join([tables, "", claims_table(claims), "", f"Intervals: 95 % t over seeds. {hardware()}."])
    print(text)
    if not quick:
        readme = folder / "README.md"
        readme.write_text(between_marks(readme.read_text(encoding="utf-8"), text), encoding="utf-8")


def claims_table(claims: Sequence[Claim]) -> str:
    """Claims with their intervals and verdicts, in Markdown."""
    rows = []
    for claim in claims:
        wanted = f"within ±{claim.bound:g}" if claim.side == "within" else f"{claim.side} {claim.bound:g}"
        shown = _signed(claim.interval) if len(claim.values) else "-"
        note = f" ({claim.note})" if claim.note else ""
        rows.append([claim.text, claim.measure, wanted, shown, len(claim.values), claim.verdict + note])
    return markdown(["claim", "measure", "holds if", "mean and interval", "seeds", "verdict"], rows)


def between_marks(page: str, text: str) -> str:
    """The page with the text in the place of what stood between the marks.

    Raises:
        ValueError: the page has no marks.
    """
    if START not in page or END not in page:
        raise ValueError(f"the page lacks {START} and {END}")
    before, rest = page.split(START, 1)
    return f"{before}{START}\n{text}\n{END}{rest.split(END, 1)[1]}"


def _signed(interval: Interval) -> str:
    return f"{interval.estimate:+.3g} [{interval.low:+.3g}, {interval.high:+.3g}]"


def _digits(value: Any) -> Any:
    return f"{value:.6g}" if isinstance(value, float | np.floating) else value


def _write_csv(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
