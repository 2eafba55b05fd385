"""What was measured of every mechanism: the screen and what has been confirmed since, shipped with the package.

``record.csv`` is written by ``python -m experiments.record.publish`` from the values in ``experiments/record``; no line
of it is written by hand.
"""

from __future__ import annotations

import csv
from dataclasses import dataclass
from functools import cache
from importlib.resources import files

FAMILIES = ("sts", "pairs", "clustering", "classification")


@dataclass(frozen=True)
class Finding:
    """One mechanism on one task, trained together with a LoRA r=8, in points of the task's metric.

    ``over_lora``: more than the LoRA alone; ``over_equal``: more than the best LoRA up to the next size above
    the pair; ``over_placebo``: more than the best of the placebos over the same LoRA (a GELU bottleneck, a linear one,
    plain gains), at the same steps. ``low``, ``high``: the 95 % interval of ``over_equal`` over seeds, None where there
    is one seed. ``factor``: the best learning rate as a multiple of the LoRA's. ``stage``: ``screen`` (few rows, on the
    split on which the rate was chosen: it says where to look) or ``confirmed`` (on a test split, fresh seeds).
    """

    primitive: str
    family: str
    task: str
    over_lora: float
    over_equal: float
    over_placebo: float
    low: float | None
    high: float | None
    seeds: int
    factor: float
    params: int
    stage: str

    def __str__(self) -> str:
        interval = "" if self.low is None or self.high is None else f" [{self.low:+.2f}, {self.high:+.2f}]"
        seeds = f"{self.seeds} seed" + ("s" if self.seeds > 1 else "")
        return (
            f"{self.task}: {self.over_equal:+.2f}{interval} over a LoRA of its size, {self.over_placebo:+.2f} over a "
            f"placebo ({self.stage}, {seeds}, {self.factor:g} x the LoRA's rate)"
        )


@cache
def record() -> tuple[Finding, ...]:
    """All findings, as they stand in the file."""
    text = files("bioadapt").joinpath("record.csv").read_text(encoding="utf-8")
    return tuple(
        Finding(
            **{name: row[name] for name in ("primitive", "family", "task", "stage")},
            **{name: float(row[name]) for name in ("over_lora", "over_equal", "over_placebo", "factor")},
            **{name: float(row[name]) if row[name] else None for name in ("low", "high")},
            **{name: int(row[name]) for name in ("seeds", "params")},
        )
        for row in csv.DictReader(text.splitlines())
    )


def findings(primitive: str) -> tuple[Finding, ...]:
    """What was found of one primitive; empty for one that was not measured."""
    return tuple(finding for finding in record() if finding.primitive == primitive)
