"""Where attention is local, does a memory over a LoRA foresee text better than a LoRA of the same size?

OMP_NUM_THREADS=1 python -m experiments.window.run FOLDER            # half an hour; resumes; writes beside this file
OMP_NUM_THREADS=1 python -m experiments.window.run FOLDER --quick    # a minute or two, into quick/; says nothing

FOLDER is where the texts go (docstrings of installed libraries, read from their files), the language model that is
trained on some of them, and the cells of `bioadapt evaluate`.
"""

from __future__ import annotations

import ast
import csv
import gzip
import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from bioadapt.evaluation import evaluate, load_task
from bioadapt.evaluation.models import load_model
from bioadapt.evaluation.training import without_progress_bars
from experiments.ledger import Claim, by_seed, markdown, over_seeds, parser, publish

HERE = Path(__file__).parent
BASE, NEW = ("numpy", "scipy"), ("sklearn",)
LEAST_WORDS = 60
ROWS = {"test": 500, "dev": 200, "train": 2000}
MEMORY = "leaky_integrator"
LORA, PAIR, PLACEBO = "lora", "lora+bio", "lora+placebo"
EQUAL = ("lora-equal@lora-sites", "lora-equal@bio-sites")


# -- texts and the model that reads them --


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


def write_rows(folder: Path, packages: Iterable[str]) -> None:
    """Texts of the packages in three splits, by the hash of what stands in them."""
    texts = {text for package in packages for text in docstrings(package)}
    ordered = iter(sorted(texts, key=lambda text: hashlib.sha1(text.encode()).digest()))
    folder.mkdir(parents=True, exist_ok=True)
    for split, count in ROWS.items():
        with gzip.open(folder / f"{split}.tsv.gz", "wt", encoding="utf-8", newline="\n") as file:
            writer = csv.writer(file, delimiter="\t", quoting=csv.QUOTE_NONE, quotechar=None, lineterminator="\n")
            writer.writerow(["text"])
            writer.writerows([text] for _, text in zip(range(count), ordered, strict=False))


def prepare(folder: Path, quick: bool) -> Path:
    """Texts and the base model, once; returns where the model is."""
    base = folder / "base"
    if not base.is_dir():
        for name, packages in (("base-texts", BASE), ("new-texts", NEW)):
            write_rows(folder / name, packages)
        task = load_task("base-texts:language_modelling", folder)
        with without_progress_bars():
            made = load_model(str(HERE / "config.json"), task, "cpu", folder / "models", steps=20 if quick else None)
            made.tokenizer.save_pretrained(base)
            made.model.save_pretrained(base)
    return base


# -- what is claimed --


def rows_of(cells: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    return [
        {key: cell[key] for key in ("task", "arm", "seed", "rate", "params", "dev", "test", "test_clean", "seconds")}
        for cell in cells
    ]


def better_by(rows: Sequence[Mapping[str, Any]], rivals: Sequence[str]) -> list[float]:
    """By how many percent the pair's perplexity is below that of the rival with the lower mean, seed by seed."""
    scores = [by_seed(rows, "test_clean", arm=rival) for rival in rivals]
    best = min(scores, key=lambda own: over_seeds(list(own.values())).estimate)
    return [100 * (1 - own / best[seed]) for seed, own in by_seed(rows, "test_clean", arm=PAIR).items()]


def claims(rows: Sequence[Mapping[str, Any]]) -> list[Claim]:
    measure = "lower perplexity, percent"
    return [
        Claim(
            "A memory over a LoRA foresees text better than a LoRA of the same size", measure, better_by(rows, EQUAL)
        ),
        Claim("It does so better than a GELU bottleneck in its places", measure, better_by(rows, [PLACEBO])),
        Claim("It improves on the LoRA below it", measure, better_by(rows, [LORA])),
    ]


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    lines = []
    for arm in dict.fromkeys(row["arm"] for row in rows):
        own = [row for row in rows if row["arm"] == arm]
        clean = over_seeds([row["test_clean"] for row in own])
        interval = "" if len(own) < 2 else f" [{clean.low:.2f}, {clean.high:.2f}]"
        lines.append([arm, f"{own[0]['params']:,}", f"{own[0]['rate']:g}", f"{clean.estimate:.2f}{interval}"])
    return markdown(["arm", "trained", "rate chosen", "perplexity, test"], lines)


def picture(rows: Sequence[Mapping[str, Any]]) -> Figure:
    figure = Figure(figsize=(7, 3), layout="constrained")
    axes = figure.subplots()
    arms = list(dict.fromkeys(row["arm"] for row in rows))
    for place, arm in enumerate(reversed(arms)):
        scores = list(by_seed(rows, "test_clean", arm=arm).values())
        colour = "#d55e00" if arm == PAIR else "#0072b2"
        axes.plot(scores, [place] * len(scores), "o", color=colour, alpha=0.6)
    axes.set_yticks(range(len(arms)), list(reversed(arms)))
    axes.set_xlabel("perplexity of the test texts, one point for each seed (lower is better)")
    axes.grid(axis="x", alpha=0.3)
    return figure


def main(argv: Sequence[str] | None = None) -> None:
    options = parser(__doc__, seeds=3)
    options.add_argument("folder", type=Path)
    given = options.parse_args(argv)
    folder = given.folder / "quick" if given.quick else given.folder
    base = prepare(folder, given.quick)
    results = evaluate(
        "new-texts:language_modelling", data_dir=str(folder), model=str(base), primitives=[MEMORY], epochs=2.0,
        batch_size=16, device="cpu", seeds=1 if given.quick else given.seeds, limit=40 if given.quick else None,
        output=str(folder / "cells"),
    )  # fmt: skip
    rows = rows_of(results["cells"])
    publish(HERE, rows, claims(rows), table(rows), picture(rows), quick=given.quick)


if __name__ == "__main__":
    main()
