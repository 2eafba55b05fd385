"""What the study of local attention runs on: docstrings as texts, and a language model with a window of eight tokens.

    python -m experiments.window.prepare FOLDER

writes FOLDER/base, a model that was trained on the docstrings of numpy and scipy, and FOLDER/sklearn, rows of another
library to adapt it to. Texts are read from the files of the installed libraries.
"""

from __future__ import annotations

import argparse
import ast
import csv
import gzip
import hashlib
from collections.abc import Iterable, Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path

from bioadapt.evaluation import load_task
from bioadapt.evaluation.models import load_model
from bioadapt.evaluation.training import without_progress_bars

HERE = Path(__file__).parent
BASE, NEW = ("numpy", "scipy"), ("sklearn",)
LEAST_WORDS = 60
ROWS = {"test": 500, "dev": 200, "train": 2000}


def docstrings(package: str) -> Iterator[str]:
    """Of all modules, classes and functions in the files of a package, as one line each, the long ones alone."""
    spec = find_spec(package)
    assert spec is not None and spec.origin is not None, f"{package} is not installed"
    for path in sorted(Path(spec.origin).parent.rglob("*.py")):
        if "tests" in path.parts:
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
                words = (ast.get_docstring(node) or "").split()
                if len(words) >= LEAST_WORDS:
                    yield " ".join(words)


def write(folder: Path, packages: Iterable[str]) -> None:
    """Rows of the packages in three splits, by the hash of what stands in them."""
    texts = {text for package in packages for text in docstrings(package)}
    ordered = iter(sorted(texts, key=lambda text: hashlib.sha1(text.encode()).digest()))
    folder.mkdir(parents=True, exist_ok=True)
    for split, count in ROWS.items():
        with gzip.open(folder / f"{split}.tsv.gz", "wt", encoding="utf-8", newline="\n") as file:
            writer = csv.writer(file, delimiter="\t", quoting=csv.QUOTE_NONE, quotechar=None, lineterminator="\n")
            writer.writerow(["text"])
            writer.writerows([text] for _, text in zip(range(count), ordered, strict=False))


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args(argv).folder
    for name, packages in (("numpy-scipy", BASE), ("sklearn", NEW)):
        write(folder / name, packages)
    task = load_task("numpy-scipy:language_modelling", folder)
    with without_progress_bars():
        base = load_model(str(HERE / "config.json"), task, "cpu", folder / "models")
        base.model.save_pretrained(folder / "base")
        base.tokenizer.save_pretrained(folder / "base")
    for name in ("numpy-scipy", "sklearn"):
        score = load_task(f"{name}:language_modelling", folder).evaluate(base).scores
        print(f"{name}: perplexity {score['perplexity']:.2f}")


if __name__ == "__main__":
    main()
