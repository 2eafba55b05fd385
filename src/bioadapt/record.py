"""What was measured of every mechanism: the screen and what has been confirmed since, shipped with the package.

``record.csv`` is written by ``python -m experiments.record.publish`` from the values in ``experiments/record``; no line
of it is written by hand.
"""

from __future__ import annotations

import csv
import statistics
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Any

from ._words import suggest as nearest

PROMISES = ("noise", "order", "forgetting", "few rows", "memory")
"""Families of tasks that ask for what the biology of some mechanisms promises; the others were not asked."""

IMAGES, LANGUAGE = "images", "language_modelling"
"""Families of tasks of other models than sentence encoders; what was found of one kind says little of another."""

DOUBT = 4
"""A mechanism that was trained so many times is believed half as what was measured, half as the mean of all."""


@dataclass(frozen=True)
class Finding:
    """One mechanism on one task, trained together with a LoRA r=8, in points of the task's metric.

    ``alone``: in place of that LoRA instead.
    ``over_lora``: more than the LoRA alone; ``over_equal``: more than the best LoRA up to the next size above
    the pair; ``over_placebo``: more than the best of the placebos over the same LoRA (a GELU bottleneck, a linear one,
    plain gains), at the same steps. ``low``, ``high``: the 95 % interval of ``over_equal`` over seeds, None where there
    is one seed. ``factor``: the best learning rate as a multiple of the LoRA's, at this ``zero_scale``. ``stage``:
    ``screen`` (few rows, on the split on which the rate was chosen: it says where to look) or ``confirmed`` (fresh
    seeds, on test rows that stand in no other set).
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
    zero_scale: float
    params: int
    stage: str
    alone: bool

    def __str__(self) -> str:
        interval = "" if self.low is None or self.high is None else f" [{self.low:+.2f}, {self.high:+.2f}]"
        seeds = f"{self.seeds} seed" + ("s" if self.seeds > 1 else "")
        way = f"{self.task}, without a LoRA" if self.alone else self.task
        return (
            f"{way}: {self.over_equal:+.2f}{interval} over a LoRA of its size, {self.over_placebo:+.2f} over a "
            f"placebo ({self.stage}, {seeds}, {self.factor:g} x the LoRA's rate)"
        )


@cache
def record() -> tuple[Finding, ...]:
    """All findings, as they stand in the file."""
    text = files("bioadapt").joinpath("record.csv").read_text(encoding="utf-8")
    return tuple(_finding(row) for row in csv.DictReader(text.splitlines()))


def _finding(row: dict[str, str]) -> Finding:
    return Finding(
        primitive=row["primitive"],
        family=row["family"],
        task=row["task"],
        over_lora=float(row["over_lora"]),
        over_equal=float(row["over_equal"]),
        over_placebo=float(row["over_placebo"]),
        low=float(row["low"]) if row["low"] else None,
        high=float(row["high"]) if row["high"] else None,
        seeds=int(row["seeds"]),
        factor=float(row["factor"]),
        zero_scale=float(row["zero_scale"]),
        params=int(row["params"]),
        stage=row["stage"],
        alone=row["alone"] == "True",
    )


def findings(primitive: str) -> tuple[Finding, ...]:
    """What was found of one primitive; empty for one that was not measured."""
    return tuple(finding for finding in record() if finding.primitive == primitive)


@dataclass(frozen=True)
class Suggestion:
    """A mechanism and what the record says of it on the tasks that were asked for: means of its findings."""

    primitive: str
    over_equal: float
    over_placebo: float
    factor: float
    zero_scale: float
    findings: tuple[Finding, ...]


def suggest(
    task: str | None = None, *, merges: bool = False, causal: bool = False, cheap: bool = False
) -> list[Suggestion]:
    """Mechanisms that were measured beside a LoRA, the one furthest over a LoRA of its size first, losses last.

    One task and one seed say little of the next: the fewer there are of a mechanism, the closer its rank is to that of
    the mean of all. What has won on more tasks than it lost, by intervals beyond zero, comes before what has not,
    however far one task has carried that.

    Args:
        task: a task of the record, or a family of tasks; None for those of sentence encoders but `PROMISES`.
        merges: only those that can become part of a weight.
        causal: only those that see no later token, as a language model needs them.
        cheap: only gains, which have a few numbers for each channel.

    Raises:
        ValueError: nothing was measured on such a task; the nearest names are given.
    """
    known = sorted({finding.task for finding in record()} | {finding.family for finding in record()})
    if task is not None and task not in known:
        raise ValueError(f"task={task!r}: {nearest(task, known)}")
    from .registry import list_primitives, primitive_info  # with torch, which a wrong task need not wait for

    suggestions = []
    for name in list_primitives():
        info, own = primitive_info(name), [finding for finding in findings(name) if _answers(finding, task)]
        wanted = (info.mergeable or not merges) and (info.kind != "global" or not causal) and (info.gain or not cheap)
        if own and wanted:
            over_equal, over_placebo = (
                statistics.fmean(getattr(finding, field) for finding in own) for field in ("over_equal", "over_placebo")
            )
            factor = statistics.median(finding.factor for finding in own)
            zero_scale = statistics.median(finding.zero_scale for finding in own)
            suggestions.append(Suggestion(name, over_equal, over_placebo, factor, zero_scale, tuple(own)))
    usual = statistics.fmean(one.over_equal for one in suggestions) if suggestions else 0.0

    def expected(one: Suggestion) -> float:
        runs = sum(finding.seeds for finding in one.findings)
        measured = sum(finding.seeds * finding.over_equal for finding in one.findings)
        return (measured + DOUBT * usual) / (runs + DOUBT)

    return sorted(suggestions, key=lambda one: (_has_won(one.findings), expected(one)), reverse=True)


def _has_won(findings: Iterable[Finding]) -> bool:
    """Whether more of the intervals lie above zero than below it."""
    bounds = [
        (finding.low, finding.high) for finding in findings if finding.low is not None and finding.high is not None
    ]
    return sum(low > 0 for low, _ in bounds) > sum(high < 0 for _, high in bounds)


def family_of(model: Any) -> str | None:
    """The tasks on which models of this kind were measured, None for those of sentence encoders."""
    plain = model.get_base_model() if hasattr(model, "get_base_model") else model
    if getattr(plain, "main_input_name", None) == "pixel_values":
        return IMAGES
    return LANGUAGE if type(plain).__name__.endswith(("ForCausalLM", "LMHeadModel")) else None


def _answers(finding: Finding, task: str | None) -> bool:
    left_out = (*PROMISES, IMAGES, LANGUAGE)
    asked = finding.family not in left_out if task is None else task in (finding.task, finding.family)
    return asked and not finding.alone
