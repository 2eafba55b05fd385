"""Reading task files: a folder of ``NAME/{train,dev,test}.tsv.gz``, or the Hugging Face hub.

The files are gzip, UTF-8, one header line, columns parted by one tab, and no quoting: a quotation mark is text.
"""

from __future__ import annotations

import gzip
import json
from pathlib import Path

from .._extras import only_errors_of, require
from .._words import suggest

SPLITS = ("train", "dev", "test")
FAMILIES = ("sts", "pair_classification", "classification", "clustering")
# name -> (repository, family); columns as in the folder format
HUB = {"stsb": ("sentence-transformers/stsb", "sts")}
_HUB_SPLITS = {"train": "train", "dev": "validation", "test": "test"}
_COLUMNS = {
    "sts": ("sentence1", "sentence2", "score"),
    "pair_classification": ("sentence1", "sentence2", "label"),
    "classification": ("text", "label"),
    "clustering": ("text", "label"),
}

Rows = dict[str, list[str]]  # column -> values


def read_tsv(path: Path) -> Rows:
    """A .tsv.gz file as columns, without any unquoting.

    Raises:
        ValueError: no such file, not gzip or not UTF-8, or a row with another number of fields than the header.
    """
    try:
        # newline="\n": other line breaks that may stand inside a text do not end a row.
        with gzip.open(path, "rt", encoding="utf-8", newline="\n") as lines:
            table = [line.rstrip("\r\n").split("\t") for line in lines]
    except (OSError, EOFError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from error
    if not table:
        raise ValueError(f"{path} is empty")
    header, *rows = table
    for number, row in enumerate(rows, start=2):
        if len(row) != len(header):
            raise ValueError(f"{path}, line {number}: {len(row)} fields, the header has {len(header)}")
    return {name: [row[index] for row in rows] for index, name in enumerate(header)}


def names_in(folder: Path) -> list[str]:
    """The tasks of a data folder: its subfolders that hold a test split as text."""
    return sorted(path.parent.name for path in folder.glob("*/test.tsv.gz"))


def read_folder(name: str, folder: Path) -> tuple[str, dict[str, Rows]]:
    """Family and splits of a task from a data folder.

    Raises:
        ValueError: no such folder or task; the folder and the names in it are given.
    """
    if not folder.is_dir():
        raise ValueError(f"--data-dir {folder} is not a folder")
    names = names_in(folder)
    if name not in names:
        hint = suggest(name, names)
        close = f"{hint} " if hint.startswith("did") else ""
        raise ValueError(f"task {name!r} is not in {folder}; {close}accepted: {', '.join(names) or 'there are none'}")
    splits = {
        split: read_tsv(folder / name / f"{split}.tsv.gz")
        for split in SPLITS
        if (folder / name / f"{split}.tsv.gz").is_file()
    }
    family = _declared_family(name, folder) or _family_of(name, tuple(splits["test"]))
    for split, rows in splits.items():
        if tuple(rows) != _COLUMNS[family]:
            raise ValueError(
                f"{folder / name / split}.tsv.gz: columns {', '.join(rows)}; "
                f"a task of family {family} has {', '.join(_COLUMNS[family])}"
            )
    return family, splits


def read_hub(name: str) -> tuple[str, dict[str, Rows]]:
    """Family and splits of a task from the Hugging Face hub.

    Raises:
        ValueError: a task that we know no repository for, or one that cannot be reached.
    """
    if name not in HUB:
        raise ValueError(
            f"task {name!r} is not loaded from the hub ({suggest(name, ('api-search', *HUB))}): "
            f"give the folder that holds {name}/test.tsv.gz with --data-dir"
        )
    repository, family = HUB[name]
    datasets = require("datasets")
    try:
        with only_errors_of("huggingface_hub"):
            splits = {split: datasets.load_dataset(repository, split=theirs) for split, theirs in _HUB_SPLITS.items()}
    except Exception as error:  # offline, refused, moved: each raises something else
        raise ValueError(
            f"task {name!r} could not be loaded from {repository} on the hub "
            f"({type(error).__name__}); give the folder that holds {name}/test.tsv.gz with --data-dir"
        ) from error
    columns = _COLUMNS[family]
    return family, {split: {c: [str(v) for v in rows[c]] for c in columns} for split, rows in splits.items()}


def thinned(rows: Rows, limit: int | None) -> Rows:
    """At most ``limit`` rows, evenly spread: files may be sorted, and their head may hold few of the classes."""
    count = len(next(iter(rows.values()), []))
    if limit is None or count <= limit:
        return rows
    places = [index * count // limit for index in range(limit)]
    return {column: [values[place] for place in places] for column, values in rows.items()}


def _declared_family(name: str, folder: Path) -> str | None:
    index = folder / "index.json"
    if not index.is_file():
        return None
    family = json.loads(index.read_text(encoding="utf-8")).get(name, {}).get("task")
    if family is not None and family not in FAMILIES:
        raise ValueError(f"task {name!r} of {folder} is of family {family!r}; accepted: {', '.join(FAMILIES)}")
    return family


def _family_of(name: str, columns: tuple[str, ...]) -> str:
    for family, expected in _COLUMNS.items():  # text and label alone mean classification
        if columns == expected:
            return family
    raise ValueError(
        f"task {name!r} has columns {', '.join(columns)}; accepted: "
        + "; ".join(f"{', '.join(expected)} ({family})" for family, expected in _COLUMNS.items())
    )
