"""A journal file that a full disk or a kill in mid-write cannot spoil."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from optuna.storages.journal import JournalFileBackend, JournalFileSymlinkLock

_BLOCK = 2**16


class Journal(JournalFileBackend):
    """Optuna's journal file, the same on disk. A write that fails leaves nothing behind, and a torn line is seen.

    Args:
        path: of the file, which is made if it is not there.

    Raises:
        ValueError: a line in the middle of the file is no record; the message names it and says what to do.
    """

    def __init__(self, path: Path) -> None:
        # The lock is a link to the file. With a relative path it would lead nowhere, and one that a killed process has
        # left behind would never be released.
        self._path = path.absolute()
        self._writing = JournalFileSymlinkLock(str(self._path))
        super().__init__(str(self._path), self._writing)
        line = _last_line(self._path)
        if line.endswith(b"\n") and not _is_record(line):
            raise ValueError(_diagnosis(self._path))
        if line and not line.endswith(b"\n"):
            with suppress(OSError), self._alone():  # who may not write reads the lines before it
                _end_last_line(self._path)

    def append_logs(self, logs: list[dict[str, Any]]) -> None:
        """All of these records, or none of them."""
        lines = "".join(json.dumps(log, separators=(",", ":")) + "\n" for log in logs)
        with self._alone():
            _end_last_line(self._path)
            with self._path.open("ab", buffering=0) as file:
                size, rest = file.tell(), lines.encode()
                try:
                    while rest:
                        rest = rest[file.write(rest) :]
                    os.fsync(file.fileno())
                except BaseException:
                    os.truncate(self._path, size)
                    raise

    def read_logs(self, log_number_from: int) -> Iterator[dict[str, Any]]:
        records = super().read_logs(log_number_from)
        while True:
            try:
                record = next(records)
            except StopIteration:
                return
            except ValueError:
                raise ValueError(_diagnosis(self._path)) from None
            yield record

    @contextmanager
    def _alone(self) -> Iterator[None]:
        self._writing.acquire()
        try:
            yield
        finally:
            self._writing.release()


def _last_line(path: Path) -> bytes:
    """With its end, if it has one."""
    line = b""
    with path.open("rb") as file:
        start = file.seek(0, os.SEEK_END)
        while start and b"\n" not in line[:-1]:
            start, end = max(start - _BLOCK, 0), start
            file.seek(start)
            line = file.read(end - start) + line
    return line[line.rfind(b"\n", 0, -1) + 1 :]


def _end_last_line(path: Path) -> None:
    """Cut what somebody began to write and did not end; if nothing but its end is missing, add that.

    Only for who has the lock.
    """
    line = _last_line(path)
    if line.endswith(b"\n"):
        return
    if _is_record(line):
        with path.open("ab") as file:
            file.write(b"\n")
    else:
        os.truncate(path, path.stat().st_size - len(line))


def _is_record(line: bytes) -> bool:
    try:
        return isinstance(json.loads(line), dict)
    except ValueError:
        return False


def _diagnosis(path: Path) -> str:
    """Which line is no record, and how to get rid of it.

    Where a write failed, the next one went on in the same line: what stands before it never was a record.
    """
    with path.open("rb") as file:
        number, line = next((n, line) for n, line in enumerate(file, start=1) if not _is_record(line))
    starts = [i for i in range(1, len(line)) if line.startswith(b'{"op_code"', i)]
    torn = next((start for start in starts if _is_record(line[start:])), None)
    if torn is None:
        remedy = "take the file from a backup, or cut it before that line, which loses all that came after: "
        remedy += f"sed -i.bak '{number},$d' '{path}'"
    else:
        remedy = f"the first {torn} bytes are left of a write that failed; cut them: "
        remedy += f"LC_ALL=C sed -i.bak '{number}s/^.\\{{{torn}\\}}//' '{path}'"
    return f"storage {path}, line {number} is no record of a journal; end what writes to it, then {remedy}"
