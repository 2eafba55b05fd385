"""From the cells of the screen, and of what was confirmed, to the record of the package and the page that shows it.

python -m experiments.record.publish     # reads cells.csv and ../evidence/*/cells.csv; writes the record and READMEs
"""

from __future__ import annotations

import csv
import math
import runpy
import statistics
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from bioadapt import BioConfig, list_primitives
from bioadapt.evaluation.cells import CELLS, TUNING, Trial, at_edges
from bioadapt.evaluation.cells import Cell as EvaluationCell
from bioadapt.evaluation.statistics import in_points
from bioadapt.record import Finding
from experiments.cells import identity, read
from experiments.ledger import over_seeds, paired
from experiments.record.bench import task_family
from experiments.record.promises import PROMISES
from experiments.record.run import (
    ALONE,
    ALONE_TASKS,
    HERE,
    IMAGE_TASKS,
    LANGUAGE_TASKS,
    PLACEBOS,
    TASKS,
    Cell,
    Result,
)

RECORD = Path(__file__).parents[2] / "src" / "bioadapt" / "record.csv"
README_TABLE = Path(__file__).parents[2] / "scripts" / "readme_table.py"
EVIDENCE = HERE.parent / "evidence"
LORA = "lora-r8"


@dataclass(frozen=True)
class Question:
    """Arms of `bioadapt evaluate` that belong together: ``own`` with the mechanism, ``equals`` of its size."""

    own: str
    equals: tuple[str, str]
    placebo: str


BESIDE = Question("lora+bio", ("lora-equal@lora-sites", "lora-equal@bio-sites"), "lora+placebo")
INSTEAD = Question("bio", ("lora-bio-size@lora-sites", "lora-bio-size@bio-sites"), "placebo")
Scores = Mapping[int, float]  # by seed


def findings(results: Sequence[Result]) -> list[Finding]:
    """One for every mechanism and task that has a cell, and one for the mechanism alone where that was tried."""
    found = []
    for task in (*TASKS, *PROMISES, *IMAGE_TASKS, *LANGUAGE_TASKS):
        own = [result for result in results if result.task == task]
        arms = {result.arm for result in own}
        loras = [at_best(own, arm) for arm in sorted(arms) if arm.startswith("lora-")]
        for way in ("", ALONE):
            placebos = [at_best(own, arm + way)[1] for arm in PLACEBOS if arm + way in arms]
            for name in list_primitives():
                if name in PLACEBOS or name + way not in arms:
                    continue
                best, scores = at_best(own, name + way)
                largest = next_size([lora.params for lora, _ in loras], best.params)
                equals = [rival for lora, rival in loras if lora.params <= largest]
                trained = {key: getattr(best, key) for key in ("factor", "zero_scale", "params")}
                finding = compared(name, task, scores, at_best(own, LORA)[1], equals, placebos, trained)
                found.append(replace(finding, alone=way == ALONE))
    return sorted(found, key=lambda finding: (finding.primitive, finding.task, finding.alone))


def confirmed(folder: Path) -> list[Finding]:
    """Of the cells of `bioadapt evaluate` for one mechanism: one for every task that has all its arms.

    Args:
        folder: with ``cells.csv``, and with ``adapter_config.json`` that names the mechanism.
    """
    (entry,) = BioConfig.from_pretrained(str(folder)).primitives
    with (folder / "cells.csv").open(newline="", encoding="utf-8") as file:
        cells = list(csv.DictReader(file))
    question = BESIDE if any(cell["arm"] == BESIDE.own for cell in cells) else INSTEAD
    found = []
    for task in dict.fromkeys(cell["task"] for cell in cells):
        arms: dict[str, dict[int, float]] = {}
        last = {cell["arm"]: cell for cell in cells if cell["task"] == task}
        for cell in cells:
            if cell["task"] == task:
                arms.setdefault(cell["arm"], {})[int(cell["seed"])] = points(cell)
        if not {question.own, "lora", *question.equals, question.placebo} <= arms.keys() or not task_family(task):
            continue
        own, equals = arms[question.own], [arms[arm] for arm in question.equals]
        trained = {
            "factor": float(last[question.own]["rate"]) / float(last["lora"]["rate"]),
            "zero_scale": entry["zero_scale"],
            "params": int(last[question.own]["params"]),
        }
        finding = compared(entry["name"], task, own, arms["lora"], equals, [arms[question.placebo]], trained)
        found.append(replace(finding, stage="confirmed", alone=question is INSTEAD))
    return found


def points(cell: Mapping[str, str]) -> float:
    """The score on clean test rows in points, of which more are better."""
    return in_points(cell.get("metric", ""), float(cell["test_clean"]))


def compared(
    primitive: str,
    task: str,
    scores: Scores,
    lora: Scores,
    equals: Sequence[Scores],
    placebos: Sequence[Scores],
    trained: Mapping[str, Any],
) -> Finding:
    """A mechanism's scores beside those of its rivals, as a finding of the screen."""
    over_equal = differences(scores, equals)
    low, high = bounds(over_equal)
    return Finding(
        primitive=primitive,
        family=PROMISES[task].family if task in PROMISES else task_family(task),
        task=task,
        over_lora=mean(differences(scores, [lora])),
        over_equal=mean(over_equal),
        over_placebo=mean(differences(scores, placebos)),
        low=low,
        high=high,
        seeds=len(over_equal),
        stage="screen",
        alone=False,
        **trained,
    )


def table_of_cells(folder: Path) -> str:
    """Means over seeds on clean test rows, by task and arm, and what `confirmed` makes of them."""
    with (folder / "cells.csv").open(newline="", encoding="utf-8") as file:
        cells = list(csv.DictReader(file))
    arms = list(dict.fromkeys(cell["arm"] for cell in cells))
    lines = [
        f"| task | {' | '.join(arms)} | over the better LoRA of its size | over the placebo |",
        "|---" * (len(arms) + 3) + "|",
    ]
    for found in confirmed(folder):
        means = [
            statistics.fmean(float(c["test_clean"]) for c in cells if (c["task"], c["arm"]) == (found.task, arm))
            for arm in arms
        ]
        over = f"{found.over_equal:+.2f} [{found.low:+.2f}, {found.high:+.2f}]"
        lines.append(f"| {found.task} | {' | '.join(f'{m:.2f}' for m in means)} | {over} | {found.over_placebo:+.2f} |")
    return "\n".join(lines)


def table_of_rates(folders: Iterable[Path]) -> str:
    """How many arms of `bioadapt evaluate` took the lowest, the highest, or another one of their rates."""
    counts: dict[str, Counter[str]] = {kind: Counter() for kind in ("LoRA", "mechanism", "placebo")}
    for folder in folders:
        cells = [cell for cell in read(folder / CELLS, EvaluationCell) if cell.rate]
        rates = [trial.rate for trial in read(folder / TUNING, Trial)]
        edges = at_edges(cells, rates)
        for task, arm in dict.fromkeys((cell.task, cell.arm) for cell in cells):
            kind = "placebo" if "placebo" in arm else "mechanism" if "bio" in arm.split("+") else "LoRA"
            taken = [rate for rate, places in edges.items() if f"{task}: {arm}" in places]
            counts[kind]["between" if not taken else "lowest" if taken == [min(rates)] else "highest"] += 1
    ends = ("lowest", "between", "highest")
    lines = [f"| {kind} | {' | '.join(str(found[end]) for end in ends)} |" for kind, found in counts.items()]
    return "\n".join([f"| arms | {' | '.join(ends)} |", "|---" * 4 + "|", *lines])


def at_best(results: Iterable[Result], arm: str) -> tuple[Result, Scores]:
    """The best cell of an arm's first seed, and the scores of all seeds at its rates."""
    own = [result for result in results if result.arm == arm]
    best = max((result for result in own if result.seed == 0), key=lambda result: result.dev)
    same = [result for result in own if replace(identity(result, Cell), seed=0) == identity(best, Cell)]
    return best, {result.seed: result.dev for result in same}


def next_size(sizes: Sequence[int], params: int) -> int:
    """The smallest of some sizes that is at least as many parameters, or the largest there is."""
    return next((size for size in sorted(sizes) if size >= params), max(sizes))


def differences(scores: Scores, rivals: Sequence[Scores]) -> list[float]:
    """To the rival with the best mean over the seeds that it has in common, seed by seed."""
    common = {seed for seed in scores if all(seed in rival for rival in rivals)} if rivals else set()
    if not common:
        return []
    best = max(rivals, key=lambda rival: statistics.fmean(rival[seed] for seed in common))
    return paired(scores, {seed: best[seed] for seed in common})


def mean(values: Sequence[float]) -> float:
    return round(statistics.fmean(values), 3) if values else math.nan


def bounds(values: Sequence[float]) -> tuple[float | None, float | None]:
    """Of the interval over seeds, or nothing where there is one value."""
    if len(values) < 2:
        return None, None
    interval = over_seeds(values)
    return round(interval.low, 3), round(interval.high, 3)


def table(found: Sequence[Finding], tasks: Iterable[str] = TASKS) -> str:
    """Mechanisms by their mean difference to a LoRA of their size, nulls and losses with the rest."""
    by_name: dict[str, dict[str, Finding]] = {}
    for finding in found:
        if finding.task in tasks:
            by_name.setdefault(finding.primitive, {})[finding.task] = finding
    lines = []
    for name, own in by_name.items():
        over_equal = statistics.fmean(finding.over_equal for finding in own.values())
        over_placebo = statistics.fmean(finding.over_placebo for finding in own.values())
        cells = " | ".join(in_words(own[task]) if task in own else "" for task in tasks)
        lines.append((over_equal, f"| {name} | {cells} | {over_equal:+.2f} | {over_placebo:+.2f} |"))
    head = f"| mechanism | {' | '.join(tasks)} | mean | over the placebo |"
    return "\n".join([head, "|---" * (len(list(tasks)) + 3) + "|", *(line for _, line in sorted(lines, reverse=True))])


def in_words(finding: Finding) -> str:
    interval = "" if finding.low is None else f" [{finding.low:+.2f}, {finding.high:+.2f}]"
    return f"{finding.over_equal:+.2f}{interval}"


def promised(found: Sequence[Finding]) -> str:
    """One table for each promise, the mechanism that keeps it best on top."""
    tables = []
    for task, promise in PROMISES.items():
        own = sorted((finding for finding in found if finding.task == task), key=lambda one: -one.over_equal)
        lines = [
            f"| {one.primitive} | {in_words(one)} | {one.over_lora:+.2f} | {one.over_placebo:+.2f} | {one.seeds} |"
            for one in own
        ]
        head = f"| {promise.family} (`{task}`) | over an equal LoRA | over the LoRA | over the placebo | seeds |"
        tables.append("\n".join([head, "|---" * 5 + "|", *lines]))
    return "\n\n".join(tables)


def question_of(finding: Finding) -> tuple[str, str, bool]:
    """What the record answers once: of a second study of the same, the task is named after the study as well."""
    return finding.primitive, finding.task, finding.alone


def put_into(page: Path, lines: str, mark: str = "table") -> None:
    """Between the marks of a page."""
    first, last = f"<!-- {mark} -->", f"<!-- end of {mark} -->"
    text = page.read_text(encoding="utf-8")
    before, after = text.split(first)[0], text.split(last)[1]
    page.write_text(f"{before}{first}\n{lines}\n{last}{after}", encoding="utf-8")


def main() -> None:
    studies = [cells.parent for cells in sorted(EVIDENCE.glob("*/cells.csv"))]
    sure: dict[tuple[str, str, bool], Finding] = {}
    for study in studies:
        for finding in confirmed(study):
            again = question_of(finding) in sure
            told = replace(finding, task=f"{finding.task} ({study.name})") if again else finding
            sure[question_of(told)] = told
    screened = findings(list(read(HERE / "cells.csv", Result)))
    left = (finding for finding in screened if question_of(finding) not in sure)
    found = sorted([*left, *sure.values()], key=question_of)
    with RECORD.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, [field.name for field in fields(Finding)], lineterminator="\n")
        writer.writeheader()
        for finding in found:
            row = vars(finding)
            writer.writerow({name: "" if value is None else value for name, value in row.items()})
    beside = [finding for finding in screened if not finding.alone]
    put_into(HERE / "README.md", table(beside))
    put_into(HERE / "README.md", promised(beside), "promises")
    put_into(HERE / "README.md", table([finding for finding in screened if finding.alone], ALONE_TASKS), "alone")
    put_into(HERE / "README.md", table(beside, IMAGE_TASKS), "images")
    put_into(HERE / "README.md", table(beside, LANGUAGE_TASKS), "language")
    for study in studies:
        put_into(EVIDENCE / "README.md", table_of_cells(study), study.name)
    put_into(EVIDENCE / "README.md", table_of_rates(studies), "rates")
    runpy.run_path(str(README_TABLE))["update"]()


if __name__ == "__main__":
    main()
