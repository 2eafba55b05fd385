"""The page of what works with what has a line for every test that is marked for it, no other, and none that fails."""

from __future__ import annotations

import ast
import re
import runpy
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PAGE = (ROOT / "docs" / "compatibility.md").read_text(encoding="utf-8")
MARK = re.compile(r'\bcompatible\(\s*"([^"]+)",\s*(?:"([^"]+)"|name)\s*\)')
script = runpy.run_path(str(ROOT / "scripts" / "compatibility.py"))


def model_types() -> list[str]:
    """The cases of tests/tuner/test_targets.py, whose marks are the only ones made from a list."""
    tree = ast.parse((ROOT / "tests" / "tuner" / "test_targets.py").read_text(encoding="utf-8"))
    (cases,) = [node.value for node in tree.body if ast.unparse(node).startswith("CASES = ")]
    return [key.value for key in cases.keys]


def test_every_line_has_its_tests_and_every_marked_test_its_line():
    marked = set()
    for path in (ROOT / "tests").rglob("test_*.py"):
        for group, line in MARK.findall(path.read_text(encoding="utf-8")):
            marked |= {(group, name) for name in ([line] if line else model_types())}
    found = script["lines"](PAGE)
    assert len(found) > 80
    assert sorted(marked - found) == [], "run `make compatibility`"
    assert sorted(found - marked) == [], "run `make compatibility`"


def test_no_line_fails():
    assert script["RED"] not in PAGE


def test_a_page_is_written_from_several_reports(tmp_path):
    case = (
        '<testcase name="{0}{3}"><properties><property name="compatible" value="Tools | {0}"/>{1}</properties>{2}'
        "</testcase>"
    )
    said = '<property name="{}" value="{}"/>'
    reports = [
        case.format("a", "", "<failure/>", 0),
        case.format("a", "", "", 0),  # run again
        case.format("a", said.format("limit", "its end"), "", 1),
        case.format("b", said.format("refused", "x | y"), "", 0),
        case.format("c", "", "", 0),
        case.format("c", "", "<failure/>", 1),
        case.format("d", "", "<skipped/>", 0),
        case.format("e", said.format("refused only", "no"), "", 0),
    ]
    for number, report in enumerate(reports):
        (tmp_path / f"{number}.xml").write_text(f"<testsuite>{report}</testsuite>", encoding="utf-8")
    page = script["page"](script["cells"](sorted(tmp_path.glob("*.xml"))))
    assert "| a | works; limit: its end |" in page and "| b | works; refused: x &#124; y |" in page
    assert "| c | **fails** |" in page and "| d | **fails** |" in page and "| e | refused: no |" in page
    assert script["lines"](page) == {("Tools", line) for line in "abcde"}
