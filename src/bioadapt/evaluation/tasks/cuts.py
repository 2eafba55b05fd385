"""Cutting rows into splits by what stands in them, so that neither their order nor chance decides."""

from __future__ import annotations

import hashlib
from collections.abc import Hashable
from typing import TypeVar

from .task import TableTask, Task

T = TypeVar("T", bound=Task)

VALIDATION_SHARE, TEST_SHARE = 0.1, 0.2
_MOST_VALIDATION = 500
_FEWEST = 10


def drawn(task: T, split: str, count: int) -> T:
    """So many rows of a split, in their old order: files may be sorted, so that their first rows lack most classes."""
    return task.keep(split, sorted(_by_content(task, split)[:count]))


def with_validation(task: Task) -> Task:
    """The task itself, or one in which a tenth of the training rows, 500 at most, serves as the validation rows."""
    if task.sizes.get("validation") or not task.trainable:
        return task
    assert isinstance(task, TableTask)  # the others have validation rows
    order = _by_content(task, "train")
    count = max(1, min(_MOST_VALIDATION, round(VALIDATION_SHARE * len(order))))
    return task.split_off("validation", "train", sorted(order[:count]))


def in_three(task: TableTask) -> TableTask:
    """Training rows alone as a tenth for validation, a fifth for the test, and the rest; equal rows stay together.

    Raises:
        ValueError: there are fewer than ten different rows.
    """
    order = sorted(set(task.keys("train")), key=_digest)
    if len(order) < _FEWEST:
        raise ValueError(
            f"task {task.name!r} has {len(order)} different rows, too few to be cut into training, validation and test "
            f"rows ({_FEWEST} at least): give a table for each of train, validation and test"
        )
    start = 0
    for split, share in (("validation", VALIDATION_SHARE), ("test", TEST_SHARE)):
        end = start + round(share * len(order))
        chosen = set(order[start:end])
        task = task.split_off(split, "train", [i for i, key in enumerate(task.keys("train")) if key in chosen])
        start = end
    return task


def _by_content(task: Task, split: str) -> list[int]:
    """Places of a split's rows in an order that depends on what is in them alone."""
    digests = [_digest(key) for key in task.keys(split)]
    return sorted(range(len(digests)), key=digests.__getitem__)


def _digest(key: Hashable) -> bytes:
    return hashlib.sha1(repr(key).encode()).digest()
