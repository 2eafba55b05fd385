"""What an evaluation has found so far: cells in CSV files of one folder, which several processes may fill together.

A line is appended once a cell is done, so that a run that is ended, in whatever way, goes on from there. Who begins a
cell claims it with a file, so that no two processes train the same one.
"""

from __future__ import annotations

import csv
import json
import os
import socket
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from .statistics import Evaluation
from .tasks import Task

CELLS, TUNING, TEST_LOG = "cells.csv", "tuning.csv", "test_log.csv"
_ROWS, _CLAIMS = "rows", "claims"
_DIGITS = 4


@dataclass(frozen=True)
class Cell:
    """One arm on one task with one seed.

    ``params``: trained numbers; ``dev``, ``test``, ``test_clean``: the main score on the validation rows, on all test
    rows, and on those that stand in no other set (NaN where there are none); ``seconds``: training and scoring;
    ``rate``: the learning rate; ``steps``: of training; ``rows``, ``test_rows``, ``clean_rows``: how many; ``others``:
    further scores on the test rows as JSON.
    """

    task: str
    arm: str
    seed: int
    params: int
    dev: float
    test: float
    test_clean: float
    seconds: float
    metric: str
    rate: float
    steps: int
    rows: int
    test_rows: int
    clean_rows: int
    others: str = "{}"


@dataclass(frozen=True)
class Trial:
    """The score on the validation rows of one arm at one learning rate, with the seed that rates are chosen by."""

    task: str
    arm: str
    rate: float
    params: int
    dev: float
    seconds: float


def at_edges(cells: Sequence[Cell], rates: Sequence[float]) -> dict[float, list[str]]:
    """Tasks and arms that took the lowest or the highest of several rates, by rate: one beyond may suit them better."""
    edges = {min(rates), max(rates)} if len(set(rates)) > 1 else set()
    found: dict[float, dict[str, None]] = {rate: {} for rate in sorted(edges)}
    for cell in cells:
        if cell.rate in edges:
            found[cell.rate][f"{cell.task}: {cell.arm}"] = None
    return {rate: list(arms) for rate, arms in found.items() if arms}


class TakenElsewhere(Exception):
    """Another process is at this cell."""


class Cells:
    """The folder of an evaluation.

    Args:
        folder: is made if it is not there.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        for name in (_ROWS, _CLAIMS):
            (self.folder / name).mkdir(parents=True, exist_ok=True)

    def done(self) -> list[Cell]:
        """All cells that are done; of one that two machines did, the first."""
        first: dict[tuple[str, str, int], Cell] = {}
        for cell in _read(self.folder / CELLS, Cell):
            first.setdefault((cell.task, cell.arm, cell.seed), cell)
        return list(first.values())

    def trials(self) -> list[Trial]:
        """All trials of learning rates that are done."""
        first: dict[tuple[str, str, float], Trial] = {}
        for trial in _read(self.folder / TUNING, Trial):
            first.setdefault((trial.task, trial.arm, trial.rate), trial)
        return list(first.values())

    def opened(self) -> int:
        """How often test rows have been opened."""
        path = self.folder / TEST_LOG
        return len(path.read_text(encoding="utf-8").splitlines()) - 1 if path.is_file() else 0

    def add(self, record: Cell | Trial) -> None:
        """Append a line; other processes may do so at the same time."""
        values = {
            name: round(value, _DIGITS) if isinstance(value, float) and name != "rate" else value
            for name, value in asdict(record).items()
        }
        _append(self.folder / (CELLS if isinstance(record, Cell) else TUNING), values)

    def keep_rows(self, cell: Cell, evaluation: Evaluation, clean: list[int]) -> None:
        """Write what each test row contributed to a cell's scores, for intervals."""
        path = self._rows_of(cell)
        unfinished = path.with_suffix(f".{os.getpid()}.npz")
        arrays: dict[str, Any] = {f"row {metric}": values for metric, values in evaluation.rows.items()}
        np.savez_compressed(unfinished, gold=evaluation.gold, clean=np.array(clean, dtype=int), **arrays)
        unfinished.replace(path)

    def rows(self, cell: Cell, *, clean: bool = False) -> Evaluation:
        """What `keep_rows` wrote, of all test rows or of those that stand in no other set.

        Raises:
            ValueError: the file is gone.
        """
        path = self._rows_of(cell)
        if not path.is_file():
            raise ValueError(f"{path} is missing: remove the line of its cell from {self.folder / CELLS}")
        with np.load(path) as stored:
            rows = {name.removeprefix("row "): stored[name] for name in stored.files if name.startswith("row ")}
            everything = Evaluation({}, rows, stored["gold"])
            places: Sequence[int] = stored["clean"].tolist() if clean else range(len(everything.gold))
            return everything.of_rows(places)

    def _rows_of(self, cell: Cell) -> Path:
        return self.folder / _ROWS / f"{_file_name(cell.task, cell.arm, str(cell.seed))}.npz"

    @contextmanager
    def claimed(self, *key: object) -> Iterator[None]:
        """Work on something that no other process is at.

        Raises:
            TakenElsewhere: one is. A claim whose process has ended on this machine does not count.
        """
        path = self.folder / _CLAIMS / f"{_file_name(*map(str, key))}.json"
        mine = json.dumps({"machine": socket.gethostname(), "process": os.getpid()})
        while True:
            try:
                with path.open("x", encoding="utf-8") as file:
                    file.write(mine)
                break
            except FileExistsError:
                if not _abandoned(path):
                    raise TakenElsewhere(f"{path} is there: another process is at it") from None
                path.unlink(missing_ok=True)
        try:
            yield
        finally:
            path.unlink(missing_ok=True)


class SealedTest:
    """A task's test rows, which can be looked at only by `open`, and every look is written down.

    Args:
        task: with its test rows.
        clean: places of those that stand in no other set.
        cells: where the log is kept, and by whose cells it is known what has been opened.
    """

    def __init__(self, task: Task, clean: list[int], cells: Cells) -> None:
        self._task, self.clean, self._cells = task, clean, cells

    @property
    def size(self) -> int:
        return self._task.sizes["test"]

    def open(self, model: Any, arm: str, seed: int) -> Evaluation:
        """Scores of a model on the test rows.

        Raises:
            RuntimeError: they were opened for this arm and seed, and the result is known.
        """
        if any((c.task, c.arm, c.seed) == (self._task.name, arm, seed) for c in self._cells.done()):
            raise RuntimeError(f"the test rows of {self._task.name!r} were opened for {arm!r} with seed {seed} before")
        now = datetime.now(UTC).isoformat(timespec="seconds")
        line = {"time": now, "task": self._task.name, "arm": arm, "seed": seed}
        _append(self._cells.folder / TEST_LOG, {**line, "fingerprint": self._task.fingerprint()[:16]})
        return self._task.evaluate(model, "test")


def _append(path: Path, record: dict[str, Any]) -> None:
    line = ",".join(_quoted(value) for value in record.values()) + "\n"
    if not path.is_file():
        line = ",".join(record) + "\n" + line
    elif not path.read_bytes().endswith(b"\n"):  # what wrote the last line was ended within it
        line = "\n" + line
    with path.open("a", encoding="utf-8") as file:
        file.write(line)  # in one write, so that lines of several processes do not mix


def _quoted(value: Any) -> str:
    text = str(value)
    return '"' + text.replace('"', '""') + '"' if any(mark in text for mark in ',"\n') else text


def _read(path: Path, kind: Any) -> list[Any]:
    if not path.is_file():
        return []
    convert = {"int": int, "float": float, "str": str}
    types = {field.name: convert[str(field.type)] for field in fields(kind)}
    records = []
    with path.open(encoding="utf-8", newline="") as file:
        for record in csv.DictReader(file):
            if None in record or None in record.values() or record["task"] == "task":
                continue  # a line that lost its end with a machine's power, or a second header
            records.append(kind(**{name: kind_(record[name]) for name, kind_ in types.items()}))
    return records


def _file_name(*parts: str) -> str:
    return "-".join("".join(c if c.isalnum() or c in "@+._" else "_" for c in part) for part in parts)


def _abandoned(path: Path) -> bool:
    """Whether the process of a claim has ended; of one on another machine nobody can tell."""
    try:
        claim = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return not path.exists()
    if claim["machine"] != socket.gethostname() or claim["process"] == os.getpid():
        return claim["machine"] == socket.gethostname()
    try:
        os.kill(claim["process"], 0)
    except ProcessLookupError:
        return True
    except OSError:
        return False
    return False
