"""Reading task files: a folder of ``NAME/{train,dev,test}.tsv.gz``, ``.csv`` or ``.npz``, or the Hugging Face hub.

Text files are UTF-8 with one header line, gzipped or not. The columns of a .tsv are parted by one tab, without quoting:
a quotation mark is text; a .csv is quoted as usual. Images are arrays ``images`` and ``labels``, or files in a folder
for each class. ``index.json`` may say the family of each set; ``overlap.tsv.gz`` beside the files lists rows that also
stand in other sets.
"""

from __future__ import annotations

import csv
import gzip
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TextIO

import numpy as np

from ..._extras import only_errors_of, require
from ..._words import suggest

# What a split may be called, and what it is.
SPLITS = {"train": "train", "dev": "dev", "validation": "dev", "test": "test"}
ARRAYS = ".npz"
TABLES = (".tsv.gz", ".tsv", ".csv.gz", ".csv", ARRAYS)
_PICTURES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".tif", ".tiff", ".webp")
# name -> (repository, family); columns as in the folder format
HUB = {"stsb": ("sentence-transformers/stsb", "sts")}
_HUB_SPLITS = {"train": "train", "dev": "validation", "test": "test"}
_HUB_COLUMNS = ("sentence1", "sentence2", "score")
_OVERLAP = "overlap.tsv.gz"

Rows = dict[str, Any]  # column -> values, a list, or for images an array


def read_tsv(path: Path) -> dict[str, list[str]]:
    """A .tsv.gz file as columns, without any unquoting.

    Raises:
        ValueError: no such file, not gzip or not UTF-8, or a row with another number of fields than the header.
    """
    # newline="\n": other line breaks that may stand inside a text do not end a row.
    return _table(path, "\n", lambda lines: (line.rstrip("\r\n").split("\t") for line in lines))


def _table(path: Path, newline: str, rows_of: Callable[[TextIO], Iterator[list[str]]]) -> dict[str, list[str]]:
    open_text = gzip.open if path.suffix == ".gz" else open
    try:
        with open_text(path, "rt", encoding="utf-8", newline=newline) as lines:
            table = list(rows_of(lines))
    except (OSError, EOFError, UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"{path} cannot be read: {error}") from error
    if not table:
        raise ValueError(f"{path} is empty")
    header, *rows = table
    for number, row in enumerate(rows, start=2):
        if len(row) != len(header):
            raise ValueError(f"{path}, line {number}: {len(row)} fields, the header has {len(header)}")
    return {name: [row[index] for row in rows] for index, name in enumerate(header)}


def read_arrays(path: Path) -> dict[str, np.ndarray]:
    """The arrays of an .npz file by name.

    Raises:
        ValueError: no such file, or a damaged one.
    """
    try:
        with np.load(path, allow_pickle=False) as arrays:
            return dict(arrays)
    except (OSError, EOFError, ValueError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from error


def as_columns(table: Any) -> Rows:
    """A table as a dict of columns.

    Args:
        table: a dict of columns, a DataFrame, a `datasets.Dataset`, or the path of a .csv, .tsv or .npz file.

    Raises:
        ValueError: a file that cannot be read, or something else.
    """
    if isinstance(table, Mapping):
        return dict(table)
    if isinstance(table, (str, Path)):
        path = Path(table)
        if path.suffix == ARRAYS:
            return dict(read_arrays(path))
        if path.name.removesuffix(".gz").endswith(".csv"):
            return dict(_table(path, "", csv.reader))
        return dict(read_tsv(path))
    names = getattr(table, "column_names", None)  # of a datasets.Dataset
    if names is None:
        names = getattr(table, "columns", None)  # of a DataFrame
    if names is None:
        raise ValueError(
            f"a table of type {type(table).__name__} is not understood; accepted are a dict of columns, a DataFrame, "
            "a datasets.Dataset, or the path of a .csv, .tsv or .npz file"
        )
    return {str(name): list(table[name]) for name in names}


def is_missing(value: Any) -> bool:
    """Whether this is None, or what pandas puts where nothing is."""
    return (
        value is None or (isinstance(value, float) and value != value) or type(value).__name__ in ("NAType", "NaTType")
    )


def names_in(folder: Path) -> list[str]:
    """The tasks of a data folder: its subfolders that hold a test split.

    Raises:
        ValueError: no such folder.
    """
    if not folder.is_dir():
        raise ValueError(f"--data-dir {folder} is not a folder")
    return sorted({path.parent.name for kind in TABLES for path in folder.glob(f"*/test{kind}")})


def split_files(folder: Path) -> dict[str, Path]:
    """The table of each split that a folder holds.

    Raises:
        ValueError: two files of the same split.
    """
    paths: dict[str, Path] = {}
    for path in sorted(folder.iterdir()):
        for name, split in SPLITS.items():
            if path.name in [name + kind for kind in TABLES]:
                if split in paths:
                    raise ValueError(f"{folder}: {paths[split].name} and {path.name} are both the {split} rows")
                paths[split] = path
    return {split: paths[split] for split in SPLITS.values() if split in paths}


def read_pictures(folder: Path) -> Rows:
    """Image files that lie in a folder for each class, as ``images`` (height, width[, channels]) and ``labels``.

    Raises:
        ValueError: there are none, or one cannot be read.
    """
    library = require("PIL.Image")
    files = [file for file in sorted(folder.glob("*/*")) if file.suffix.lower() in _PICTURES]
    if not files:
        raise ValueError(f"{folder} holds no folders of images")
    try:
        pictures = [library.open(file) for file in files]
        grey = all(picture.mode in ("1", "L") for picture in pictures)
        images = [np.asarray(picture.convert("L" if grey else "RGB")) for picture in pictures]
    except OSError as error:
        raise ValueError(f"{folder}: {error}") from error
    return {"images": images, "labels": [file.parent.name for file in files]}


def read_path(path: Path) -> dict[str, Rows]:
    """The splits of a file, or of a folder with a table or a folder of images for each; a single table is ``train``.

    Raises:
        ValueError: nothing is there that can be read.
    """
    if path.is_file():
        return {"train": as_columns(path)}
    if not path.is_dir():
        raise ValueError(f"{path} is neither a file nor a folder")
    if tables := split_files(path):
        return {split: as_columns(file) for split, file in tables.items()}
    if parts := {split: path / name for name, split in SPLITS.items() if (path / name).is_dir()}:
        return {split: read_pictures(part) for split, part in parts.items()}
    try:
        return {"train": read_pictures(path)}
    except ValueError:
        kinds = ", ".join(TABLES)
        raise ValueError(
            f"{path} holds neither train, dev and test as {kinds}, nor images in a folder for each class"
        ) from None


def read_folder(name: str, folder: Path) -> tuple[str | None, dict[str, Rows]]:
    """Declared family (None if ``index.json`` does not say it) and splits of a task from a data folder.

    Raises:
        ValueError: no such folder or task; the folder and the names in it are given.
    """
    names = names_in(folder)
    if name not in names:
        hint = suggest(name, names)
        close = f"{hint} " if hint.startswith("did") else ""
        raise ValueError(f"task {name!r} is not in {folder}; {close}accepted: {', '.join(names) or 'there are none'}")
    return _declared_family(name, folder), read_path(folder / name)


def read_overlap(name: str, folder: Path) -> dict[str, set[int]]:
    """By split, the rows of a set that its ``overlap.tsv.gz`` lists; nothing if there is no such file.

    Raises:
        ValueError: the file is damaged.
    """
    path = folder / name / _OVERLAP
    if not path.is_file():
        return {}
    table = read_tsv(path)
    listed: dict[str, set[int]] = {}
    for column in ("split", "row"):
        if column not in table:
            raise ValueError(f"{path}: no column {column!r}; it has {', '.join(table)}")
    for split, row in zip(table["split"], table["row"], strict=True):
        if not row.isdigit():
            raise ValueError(f"{path}: row {row!r} is no number")
        listed.setdefault(split, set()).add(int(row))
    return listed


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
    return family, {split: {column: list(rows[column]) for column in _HUB_COLUMNS} for split, rows in splits.items()}


def _declared_family(name: str, folder: Path) -> str | None:
    index = folder / "index.json"
    if not index.is_file():
        return None
    try:
        content = json.loads(index.read_text(encoding="utf-8"))
        return content.get(name, {}).get("task")
    except (ValueError, AttributeError) as error:
        raise ValueError(f"{index} is damaged: {error}") from error
