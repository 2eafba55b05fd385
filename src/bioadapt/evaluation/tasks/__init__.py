"""The tasks: ``api-search`` from installed libraries, others by name from a folder or the hub, and one's own rows."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ..._words import suggest
from ...settings import DEFAULT_TASK
from . import files
from .cuts import in_three
from .images import ImageTask, digits
from .labelled import ClassificationTask, ClusteringTask
from .language import LanguageModellingTask, MultipleChoiceTask
from .overlap import Overlap
from .pairs import PairClassificationTask, StsTask
from .retrieval import ApiSearchTask, RetrievalTask
from .task import TableTask, Task

__all__ = [
    "DEFAULT_TASK",
    "DIGITS",
    "FAMILIES",
    "ApiSearchTask",
    "ClassificationTask",
    "ClusteringTask",
    "ImageTask",
    "LanguageModellingTask",
    "MultipleChoiceTask",
    "Overlap",
    "PairClassificationTask",
    "RetrievalTask",
    "StsTask",
    "Task",
    "is_name",
    "list_tasks",
    "load_task",
    "thinned",
]

DIGITS = "digits"
# In the order in which columns are compared: text and label alone mean classification.
FAMILIES: dict[str, type[TableTask]] = {
    task.family: task
    for task in (
        StsTask,
        PairClassificationTask,
        ClassificationTask,
        ClusteringTask,
        RetrievalTask,
        ImageTask,
        MultipleChoiceTask,
        LanguageModellingTask,
    )
}


def load_task(
    name: Any = DEFAULT_TASK, data_dir: str | Path | Mapping[str, Any] | None = None, *, limit: int | None = None
) -> Task:
    """A task by name, or of one's own rows.

    What kind of task rows are is told by their columns. A single table is cut into training, validation and test rows
    by what stands in it, so that it is cut alike in every process; equal rows stay together.

    Args:
        name: ``api-search``, ``digits``, or the name of a data set. ``NAME:FAMILY`` reads a set as another family than
            its own, such as ``mr:language_modelling``: the perplexity of its texts. Or rows: a `Task`, a DataFrame, a
            `datasets.Dataset` or ``DatasetDict``, a dict of columns or of such tables by split, the path of a .csv,
            .tsv or .npz file, or of a folder that holds one for each split, or images in a folder for each class.
        data_dir: folder of ``NAME/{train,dev,test}.tsv.gz`` or ``.npz`` files, or a table for each split (see
            `TableTask`); the hub, if None.
        limit: about so many rows per split, for a quick look.

    Raises:
        ValueError: an unknown or unreachable task, or a damaged file; the message names the folder and its tasks.
    """
    if limit is not None and limit < 1:
        raise ValueError(f"limit={limit}: at least 1 row is needed")
    if isinstance(name, str) and name == DEFAULT_TASK:
        return ApiSearchTask(limit)
    task = _by_name(name, data_dir) if is_name(name, data_dir) else _of_rows(name)
    return task if limit is None else thinned(task, limit)


def is_name(task: Any, data_dir: Any = None) -> bool:
    """Whether this is the name of a task, rather than rows or where they are.

    With a data folder a word is a name of it, even if there is a file or a folder of that name here as well.
    """
    if not isinstance(task, str):
        return False
    place, _ = _parted(task)
    if place in (DEFAULT_TASK, DIGITS, *files.HUB):
        return True
    if "/" in place or os.sep in place or place.endswith(files.TABLES):
        return False
    return data_dir is not None or not Path(place).exists()


def _parted(task: str) -> tuple[str, str]:
    """``mr:sts`` is ``mr`` and the family ``sts``; without a colon there is no family."""
    place, _, family = task.rpartition(":")
    return (place, family) if place and "/" not in family else (task, "")


def _by_name(name: str, data_dir: str | Path | Mapping[str, Any] | None) -> Task:
    short, wanted = _parted(name)
    if wanted and wanted not in FAMILIES:  # before anything is looked for
        raise ValueError(f"task {name!r}: unknown family {wanted!r}; {suggest(wanted, FAMILIES)}")
    declared: str | None
    if name == DIGITS:
        declared, splits = ImageTask.family, digits()
    elif isinstance(data_dir, Mapping):
        declared, splits = None, {split: files.as_columns(table) for split, table in data_dir.items()}
    elif data_dir is None:
        declared, splits = files.read_hub(short)
    else:
        declared, splits = files.read_folder(short, Path(data_dir))
    return _task(name, splits, declared)


def _of_rows(rows: Any) -> Task:
    if isinstance(rows, Task):
        return rows
    if isinstance(rows, (str, Path)):
        place, family = _parted(str(rows))
        path = Path(place)
        name, splits = path.name.partition(".")[0] or path.name, files.read_path(path)
        name += f":{family}" if family else ""
    else:
        tables = rows if isinstance(rows, Mapping) and set(rows) & set(files.SPLITS) else {"train": rows}
        name, splits = "own", {split: files.as_columns(table) for split, table in tables.items()}
    task = _task(name, splits)
    return in_three(task) if set(task.sizes) == {"train"} else task


def _task(name: str, splits: dict[str, files.Rows], family: str | None = None) -> TableTask:
    """The task of these rows; if no family is given, the first one whose columns are there."""
    short, wanted = _parted(name)
    if wanted and wanted not in FAMILIES:
        raise ValueError(f"task {name!r}: unknown family {wanted!r}; {suggest(wanted, FAMILIES)}")
    family = family or _family_of(short, next(iter(splits.values()), {}))
    if family not in FAMILIES:
        raise ValueError(f"task {short!r} is of family {family!r}; accepted: {', '.join(FAMILIES)}")
    if wanted and wanted != family:
        splits = {split: _read_as(short, wanted, rows, splits) for split, rows in splits.items()}
    return FAMILIES[wanted or family](name, splits)


def list_tasks(data_dir: str | Path | None = None) -> list[str]:
    """The names that `load_task` accepts, given a data folder or without one."""
    own = [DEFAULT_TASK, DIGITS]
    return sorted([*own, *(files.HUB if data_dir is None else files.names_in(Path(data_dir)))])


def thinned(task: Task, limit: int) -> Task:
    """At most ``limit`` rows of each split, evenly spread: files may be sorted, and their head lack most classes."""
    for split, count in task.sizes.items():
        if count > limit:
            task = task.keep(split, [index * count // limit for index in range(limit)])
    return task


def _family_of(name: str, columns: files.Rows) -> str:
    for family, task in FAMILIES.items():
        if all(column in columns or task.also.get(column) in columns for column in task.columns):
            return family
    raise ValueError(
        f"task {name!r} has columns {', '.join(columns)}; accepted: "
        + "; ".join(f"{', '.join(task.columns)} ({family})" for family, task in FAMILIES.items())
    )


def _read_as(name: str, family: str, rows: files.Rows, splits: Mapping[str, files.Rows]) -> files.Rows:
    """The rows of one split in the columns of another family, where that can be done."""
    if set(FAMILIES[family].columns) <= set(rows):
        return rows
    texts = [column for column in ("text", "sentence1", "sentence2") if column in rows]
    if family == LanguageModellingTask.family and texts:
        return {"text": [" ".join(map(str, row)) for row in zip(*(rows[column] for column in texts), strict=True)]}
    if family == MultipleChoiceTask.family and {"text", "label"} <= set(rows):
        labels = sorted({str(label) for table in splits.values() for label in table["label"]})
        number = {label: place for place, label in enumerate(labels)}
        places = [number[str(label)] for label in rows["label"]]
        return {"context": rows["text"], "choices": [labels] * len(places), "label": places}
    if family == ImageTask.family and isinstance(next(iter(rows.values())), np.ndarray):
        return rows
    raise ValueError(f"task {name!r} has columns {', '.join(rows)} and cannot be read as {family}")
