"""Make a notebook of every example beside its script, from the same source: ``make notebooks``.

A line ``# %%`` begins a cell of code. The script's docstring is the first cell, as text. Notebooks hold no outputs;
what each example reaches is in ``examples/results.csv``.
"""

import ast
import json
import re
from pathlib import Path

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
_CELL = re.compile(r"^# %%\n", re.MULTILINE)


def cells(script: Path) -> list[tuple[str, str]]:
    """Kind and content of each cell of a script."""
    head, *code = _CELL.split(script.read_text(encoding="utf-8"))
    title, _, text = (ast.get_docstring(ast.parse(head)) or "").partition("\n")
    return [("markdown", f"# {title}\n{text}".strip()), *(("code", part.strip("\n")) for part in code)]


def notebook(script: Path) -> str:
    """The notebook of a script, as its file holds it."""
    made = []
    for number, (kind, text) in enumerate(cells(script)):
        cell = {"cell_type": kind, "id": f"cell-{number}", "metadata": {}, "source": text.splitlines(keepends=True)}
        made.append(cell | ({"execution_count": None, "outputs": []} if kind == "code" else {}))
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    content = {"cells": made, "metadata": {"kernelspec": kernel}, "nbformat": 4, "nbformat_minor": 5}
    return json.dumps(content, indent=1, ensure_ascii=False) + "\n"


def scripts() -> list[Path]:
    return sorted(path for path in EXAMPLES.glob("*.py") if not path.name.startswith("_"))


if __name__ == "__main__":
    for script in scripts():
        script.with_suffix(".ipynb").write_text(notebook(script), encoding="utf-8")
