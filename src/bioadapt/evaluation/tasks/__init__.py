"""The tasks by name: ``api-search`` from installed libraries, the others from a folder or the Hugging Face hub."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ..._words import suggest
from ...settings import DEFAULT_TASK
from . import files
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
    name: str = DEFAULT_TASK, data_dir: str | Path | Mapping[str, Any] | None = None, *, limit: int | None = None
) -> Task:
    """A task by name.

    Args:
        name: ``api-search``, ``digits``, or the name of a data set. ``NAME:FAMILY`` reads a set as another family than
            its own, such as ``mr:language_modelling``: the perplexity of its texts.
        data_dir: folder of ``NAME/{train,dev,test}.tsv.gz`` or ``.npz`` files, or a table for each split (see
            `TableTask`); the hub, if None.
        limit: about so many rows per split, for a quick look.

    Raises:
        ValueError: an unknown or unreachable task, or a damaged file; the message names the folder and its tasks.
    """
    if limit is not None and limit < 1:
        raise ValueError(f"limit={limit}: at least 1 row is needed")
    short, _, wanted = name.partition(":")
    if wanted and wanted not in FAMILIES:
        raise ValueError(f"task {name!r}: unknown family {wanted!r}; {suggest(wanted, FAMILIES)}")
    if name == DEFAULT_TASK:
        return ApiSearchTask(limit)
    declared: str | None
    if name == DIGITS:
        declared, splits = ImageTask.family, digits()
    elif isinstance(data_dir, Mapping):
        declared, splits = None, {split: files.as_columns(table) for split, table in data_dir.items()}
    elif data_dir is None:
        declared, splits = files.read_hub(short)
    else:
        declared, splits = files.read_folder(short, Path(data_dir))
    family = declared or _family_of(short, tuple(next(iter(splits.values()), ())))
    if family not in FAMILIES:
        raise ValueError(f"task {short!r} is of family {family!r}; accepted: {', '.join(FAMILIES)}")
    if wanted and wanted != family:
        splits = {split: _read_as(short, wanted, rows, splits) for split, rows in splits.items()}
    task = FAMILIES[wanted or family](name, splits)
    return task if limit is None else thinned(task, limit)


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


def _family_of(name: str, columns: tuple[str, ...]) -> str:
    for family, task in FAMILIES.items():
        if set(task.columns) <= set(columns):
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
