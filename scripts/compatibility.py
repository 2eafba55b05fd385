"""Write docs/compatibility.md from a run of the tests that its cells stand for: those marked with `compatible`.

    python scripts/compatibility.py [REPORT ...]

REPORT is what `pytest -m compatible --junitxml=REPORT` has written, in one run or in several; without it the tests are
run first, which takes some minutes. Of a test that stands in several the last report counts. A test that refuses
something keeps the sentence by `record_property("refused", ...)`, by "refused only" if nothing else works there, and
one that meets a limit of another library by `record_property("limit", ...)`. A cell whose tests failed, or were skipped
all, is red: the page is written nonetheless, and the exit status is 1.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from bioadapt._extras import versions

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "compatibility.md"
LIBRARIES = (
    "accelerate", "trl", "sentence-transformers", "bitsandbytes", "torchao", "hqq", "optimum-quanto", "onnx",
    "onnxruntime", "timm", "diffusers", "lm-eval", "mteb",
)  # fmt: skip
RED = "**fails**"
WORDS = {"refused": "refused", "refused only": "refused", "limit": "limit"}  # by the name of a property
INTRODUCTION = """# What works with what

Every line was tried out: `make compatibility` runs the tests behind them on a CPU and writes this page from what they
found. "Refused" is what bioadapt says instead of doing something wrong; "limit" is where another library ends, for its
own methods too. The suite fails when a line fails here, is missing, or has lost its tests.

Versions: {versions}.
"""
MANY = 20  # a group with more lines has those with the same text in one row
BETWEEN = " · "


@dataclass
class Cell:
    """What the tests of one line have found."""

    outcomes: list[str] = field(default_factory=list)
    said: list[str] = field(default_factory=list)
    positive: bool = False  # whether a test passed that has met neither a refusal nor a limit

    def text(self) -> str:
        if "failed" in self.outcomes or "passed" not in self.outcomes:
            return RED
        return "; ".join([*(["works"] if self.positive else []), *dict.fromkeys(self.said)])


def cells(reports: Iterable[Path]) -> dict[str, dict[str, Cell]]:
    """The cells by group and line, in the order of the tests."""
    found: dict[str, dict[str, Cell]] = {}
    cases = [case for report in reports for case in ElementTree.parse(report).iter("testcase")]
    for case in {(case.get("classname"), case.get("name")): case for case in cases}.values():
        properties = [(p.get("name"), p.get("value") or "") for p in case.iter("property")]
        said = [f"{WORDS[name]}: {' '.join(value.split())}" for name, value in properties if name in WORDS]
        failed = any(case.find(tag) is not None for tag in ("failure", "error"))
        outcome = "failed" if failed else "skipped" if case.find("skipped") is not None else "passed"
        works = outcome == "passed" and not any(name in ("refused only", "limit") for name, _ in properties)
        for name, value in properties:
            if name == "compatible":
                group, line = value.split(" | ")
                cell = found.setdefault(group, {}).setdefault(line, Cell())
                cell.outcomes.append(outcome)
                cell.said += said
                cell.positive |= works
    return found


def page(found: dict[str, dict[str, Cell]]) -> str:
    """The whole page."""
    installed = ", ".join(f"{name} {version.partition('+')[0]}" for name, version in versions(*LIBRARIES).items())
    parts = [INTRODUCTION.format(versions=installed)]
    for group in sorted(found):
        texts = {line: cell.text().replace("|", "&#124;") for line, cell in sorted(found[group].items())}
        rows = list(texts.items())
        if len(rows) > MANY:
            alike = {text: [line for line in texts if texts[line] == text] for text in texts.values()}
            rows = [(BETWEEN.join(lines), text) for text, lines in alike.items()]
        table = [f"| {line} | {text} |" for line, text in rows]
        parts.append("\n".join([f"\n## {group}\n", "| with | found |", "|---|---|", *table, ""]))
    return "".join(parts)


def lines(text: str) -> set[tuple[str, str]]:
    """Group and line of everything that a page has."""
    found: set[tuple[str, str]] = set()
    for section in text.split("\n## ")[1:]:
        group, _, table = section.partition("\n")
        rows = [row.split(" | ")[0].removeprefix("| ") for row in table.splitlines() if row.startswith("| ")][1:]
        found |= {(group, line) for row in rows for line in row.split(BETWEEN)}
    return found


def main(arguments: list[str], path: Path = PAGE) -> int:
    with tempfile.TemporaryDirectory() as folder:
        reports = [Path(argument) for argument in arguments] or [Path(folder, "report.xml")]
        if not arguments:
            command = [sys.executable, "-m", "pytest", "-q", "-m", "compatible", f"--junitxml={reports[0]}"]
            subprocess.run(command, cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}, check=False)
        written = page(cells(reports))
    path.write_text(written)
    return int(RED in written)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
