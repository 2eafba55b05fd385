"""Cells of a study in a CSV file: what was trained is looked up there, what is missing is trained and appended.

A study has a dataclass of what is trained, the cell, and one that inherits from it and adds what came out, the result.
"""

from __future__ import annotations

import csv
from collections.abc import Iterator
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any, TypeVar, get_type_hints

Result = TypeVar("Result")
Cell = TypeVar("Cell")


def identity(result: Any, kind: type[Cell]) -> Cell:
    """What was trained, without what came out."""
    return kind(**{field.name: getattr(result, field.name) for field in fields(kind)})  # type: ignore[arg-type]


def read(path: Path, kind: type[Result]) -> Iterator[Result]:
    """The results in a file; none where there is no file."""
    if path.exists():
        types = get_type_hints(kind)
        with path.open(newline="", encoding="utf-8") as file:
            for row in csv.DictReader(file):
                yield kind(**{field.name: types[field.name](row[field.name]) for field in fields(kind)})  # type: ignore[arg-type]


def append(path: Path, result: Any) -> None:
    """One line, under a head where the file is new."""
    fresh = not path.exists()
    with path.open("a", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, [field.name for field in fields(result)], lineterminator="\n")
        if fresh:
            writer.writeheader()
        writer.writerow(asdict(result))
