"""The page of compatibility: written from a run, green, and neither older nor poorer than the tests it stands for."""

from __future__ import annotations

import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT / "scripts"))
import compatibility  # noqa: E402

PAGE = (ROOT / "docs" / "compatibility.md").read_text()


def lines_of_the_page() -> set[str]:
    found, group = set(), ""
    for line in PAGE.splitlines():
        group = line.removeprefix("## ") if line.startswith("## ") else group
        row = re.match(r"\| (.+?) \| .+ \|$", line)
        if row:
            found.add(f"{group} | {row[1]}")
    return found


def test_every_marked_test_of_this_run_has_its_line(request):
    marked = {value for item in request.session.items for name, value in item.user_properties if name == "compatible"}
    assert marked <= lines_of_the_page(), "make compatibility writes the page anew"
    whole = Path(request.config.args[0]).name == "tests" and not request.config.option.keyword
    if whole and not request.config.option.markexpr:
        assert marked == lines_of_the_page(), "make compatibility writes the page anew"


def test_no_cell_is_red():
    assert compatibility.RED not in PAGE


def test_the_page_is_of_the_versions_that_the_project_pins():
    pinned = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line)
    told = dict(re.findall(r"\b([a-z-]+) (\d+\.\d+\.\d+)", PAGE.split("##")[0]))
    assert told and told == {name: pinned[name] for name in told}


REPORT = """<testsuites><testsuite>{cases}</testsuite></testsuites>"""
CASE = """<testcase name="t">
<properties><property name="compatible" value="Tools | {line}"/>{more}</properties>{end}
</testcase>"""


def test_cells_say_what_the_tests_found(tmp_path):
    said = '<property name="{0}" value="{0} it"/>'
    cases = [
        CASE.format(line="one", more="", end=""),
        CASE.format(line="one", more="", end="<skipped/>"),
        CASE.format(line="two", more="", end="<failure/>"),
        CASE.format(line="two", more="", end=""),
        CASE.format(line="three", more="", end="<skipped/>"),
        CASE.format(line="four", more=said.format("refused"), end=""),
        CASE.format(line="five", more=said.format("limit"), end=""),
    ]
    (tmp_path / "report.xml").write_text(REPORT.format(cases="".join(cases)))
    found = {line: cell.text() for line, cell in compatibility.cells(tmp_path / "report.xml")["Tools"].items()}
    red = compatibility.RED
    assert found == {
        "one": "works", "two": red, "three": red, "four": "works; refused: refused it", "five": "limit: limit it",
    }  # fmt: skip
    assert compatibility.main([str(tmp_path / "report.xml")], tmp_path / "page.md") == 1
    assert "| one | works |" in (tmp_path / "page.md").read_text()
