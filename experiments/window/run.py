"""Where attention is local, does a memory over a LoRA foresee text, and say what it was about, better than a LoRA?

OMP_NUM_THREADS=1 python -m experiments.window.run FOLDER --data-dir DATA           # an hour; resumes; writes here
OMP_NUM_THREADS=1 python -m experiments.window.run FOLDER --data-dir DATA --quick   # minutes, into quick/; says nothing

FOLDER is where the texts go (docstrings of installed libraries, read from their files), the language model that is
trained on some of them, and the cells of `bioadapt evaluate`. DATA holds searchsnippets/{train,dev,test}.tsv.gz.
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

import numpy as np
from matplotlib.figure import Figure

from bioadapt.evaluation import evaluate, load_task
from bioadapt.evaluation.models import load_model
from bioadapt.evaluation.training import without_progress_bars
from experiments.ledger import Claim, by_seed, markdown, over_seeds, paired, parser, publish

HERE = Path(__file__).parent
BASE, NEW = ("numpy", "scipy"), ("sklearn",)
PACKAGES = ("numpy", "scipy", "sklearn", "transformers")
LEAST_WORDS = 60
ROWS = {"test": 500, "dev": 200, "train": 2000}
MEMORY = "leaky_integrator"
TEXTS, TOPICS, LIBRARIES = "new-texts:language_modelling", "topics:multiple_choice", "libraries:multiple_choice"
ASKED, ASKED_WORDS = {"test": 500, "validation": 200, "train": 1000}, 40
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


def by_hash(texts: Iterable[str]) -> list[str]:
    """Each text once, in an order that depends on nothing but what stands in them."""
    return sorted(set(texts), key=lambda text: hashlib.sha1(text.encode()).digest())


def write_split(folder: Path, split: str, columns: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    with gzip.open(folder / f"{split}.tsv.gz", "wt", encoding="utf-8", newline="\n") as file:
        writer = csv.writer(file, delimiter="\t", quoting=csv.QUOTE_NONE, quotechar=None, lineterminator="\n")
        writer.writerow(columns)
        writer.writerows(rows)


def write_texts(folder: Path, packages: Iterable[str]) -> None:
    """Texts of the packages in three splits."""
    ordered = iter(by_hash(text for package in packages for text in docstrings(package)))
    for split, count in ROWS.items():
        write_split(folder, split, ["text"], ([text] for _, text in zip(range(count), ordered, strict=False)))


def write_topics(folder: Path, data_dir: Path) -> None:
    """Search snippets, and after each the question which of the eight topics it belongs to."""
    task = load_task("searchsnippets", data_dir)
    choices = sorted(set(task.rows("train")["label"]))
    for split, count in ASKED.items():
        rows = task.rows(split)
        drawn = np.random.default_rng(0).permutation(task.sizes[split])[:count]  # files are sorted by label
        asked = ((rows["text"][row], choices.index(rows["label"][row])) for row in drawn)
        write_questions(folder, split, "topic", choices, asked)


def write_libraries(folder: Path) -> None:
    """The first words of docstrings, and after each the question which of four libraries it stands in."""
    ordered = [iter(by_hash(docstrings(package))) for package in PACKAGES]
    for split, count in ASKED.items():
        share = count // len(PACKAGES)
        asked = [
            (" ".join(text.split()[:ASKED_WORDS]), label)
            for label, texts in enumerate(ordered)
            for _, text in zip(range(share), texts, strict=False)
        ]
        write_questions(folder, split, "library", PACKAGES, asked)


def write_questions(
    folder: Path, split: str, question: str, choices: Sequence[str], asked: Iterable[tuple[str, int]]
) -> None:
    columns = ("context", "choices", "label")
    write_split(folder, split, columns, ((f"{text} {question}:", " | ".join(choices), label) for text, label in asked))


def prepare(folder: Path, data_dir: Path, quick: bool) -> Path:
    """Texts, questions and the base model, once; returns where the model is."""
    base = folder / "base"
    if not base.is_dir():
        for name, packages in (("base-texts", BASE), ("new-texts", NEW)):
            write_texts(folder / name, packages)
        task = load_task("base-texts:language_modelling", folder)
        with without_progress_bars():
            made = load_model(str(HERE / "config.json"), task, "cpu", folder / "models", steps=20 if quick else None)
            made.tokenizer.save_pretrained(base)
            made.model.save_pretrained(base)
    if not (folder / "libraries").is_dir():
        write_topics(folder / "topics", data_dir)
        write_libraries(folder / "libraries")
    return base


# -- what is claimed --


def rows_of(cells: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    return [
        {key: cell[key] for key in ("task", "arm", "seed", "rate", "params", "dev", "test", "test_clean", "seconds")}
        for cell in cells
    ]


def better_by(rows: Sequence[Mapping[str, Any]], task: str, rivals: Sequence[str]) -> list[float]:
    """How far the pair is ahead of the better one of the rivals, seed by seed.

    In points of accuracy, or by how many percent the perplexity is lower.
    """
    pair, *others = (by_seed(rows, "test_clean", task=task, arm=arm) for arm in (PAIR, *rivals))
    rank = min if task == TEXTS else max
    best = rank(others, key=lambda own: over_seeds(list(own.values())).estimate)
    if task == TEXTS:
        return [100 * (1 - own / best[seed]) for seed, own in pair.items()]
    return paired(pair, best)


def claims(rows: Sequence[Mapping[str, Any]]) -> list[Claim]:
    found = []
    for task, says, measure in (
        (TEXTS, "foresees text", "lower perplexity, percent"),
        (TOPICS, "tells the topic of a snippet", "accuracy, points"),
        (LIBRARIES, "tells the library of a docstring", "accuracy, points"),
    ):
        for against, rivals in (("a LoRA of its size", EQUAL), ("a GELU bottleneck in its places", [PLACEBO])):
            claim = f"A LoRA with a memory {says} better than {against}"
            found.append(Claim(claim, measure, better_by(rows, task, rivals)))
        found.append(Claim(f"It {says} better than the LoRA below it", measure, better_by(rows, task, [LORA])))
    return found


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    lines = []
    for task, arm in dict.fromkeys((row["task"], row["arm"]) for row in rows):
        own = [row for row in rows if (row["task"], row["arm"]) == (task, arm)]
        clean = over_seeds([row["test_clean"] for row in own])
        interval = "" if len(own) < 2 else f" [{clean.low:.2f}, {clean.high:.2f}]"
        score = f"{clean.estimate:.2f}{interval}"
        lines.append([task.split(":")[0], arm, f"{own[0]['params']:,}", f"{own[0]['rate']:g}", score])
    return markdown(["question", "arm", "trained", "rate chosen", "perplexity or accuracy, test"], lines)


def picture(rows: Sequence[Mapping[str, Any]]) -> Figure:
    tasks = list(dict.fromkeys(row["task"] for row in rows))
    figure = Figure(figsize=(10, 3), layout="constrained")
    for axes, task in zip(figure.subplots(1, len(tasks), sharey=True, squeeze=False)[0], tasks, strict=True):
        arms = list(dict.fromkeys(row["arm"] for row in rows if row["task"] == task))
        for place, arm in enumerate(reversed(arms)):
            scores = list(by_seed(rows, "test_clean", task=task, arm=arm).values())
            colour = "#d55e00" if arm == PAIR else "#0072b2"
            axes.plot(scores, [place] * len(scores), "o", color=colour, alpha=0.6)
        axes.set_yticks(range(len(arms)), list(reversed(arms)))
        axes.set_title(task.split(":")[0])
        axes.set_xlabel("perplexity (lower is better)" if task == TEXTS else "accuracy, %")
        axes.grid(axis="x", alpha=0.3)
    return figure


def main(argv: Sequence[str] | None = None) -> None:
    options = parser(__doc__, seeds=3)
    options.add_argument("folder", type=Path)
    options.add_argument("--data-dir", type=Path, required=True)
    given = options.parse_args(argv)
    folder = given.folder / "quick" if given.quick else given.folder
    base = prepare(folder, given.data_dir, given.quick)
    rows = []
    for task in (TEXTS, TOPICS, LIBRARIES):
        results = evaluate(
            task, data_dir=str(folder), model=str(base), primitives=[MEMORY], epochs=2.0, batch_size=16, device="cpu",
            seeds=1 if given.quick else given.seeds, limit=40 if given.quick else None,
            output=str(folder / f"cells-{task.split(':')[0]}"),
        )  # fmt: skip
        rows += rows_of(results["cells"])
    publish(HERE, rows, claims(rows), table(rows), picture(rows), quick=given.quick)


if __name__ == "__main__":
    main()
