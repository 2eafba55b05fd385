"""Databases that may be away for a while: restarted, or locked by somebody else."""

from __future__ import annotations

import logging
import random
import time
import warnings
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any, TypeVar

from optuna.exceptions import ExperimentalWarning, UpdateFinishedTrialError
from optuna.storages import BaseStorage, RDBStorage
from optuna.trial import TrialState

from ..._extras import require
from .address import DRIVERS, hidden, parsed
from .optuna_private import DATABASE_METHODS

# Seconds for which a study waits for a database that it had before.
PATIENCE = 600.0
# Seconds to the second try; twice as many to each further one, up to the longest.
SOON, LONGEST = 0.1, 15.0
# Seconds that SQLite itself waits for a lock.
SQLITE_WAITS = 60.0
# The extra that brings the drivers.
EXTRA = "cluster"

_logger = logging.getLogger(__name__)
T = TypeVar("T")


def unreachable(error: BaseException | None) -> bool:
    """Whether a database could not be reached or was locked, so that the same call may succeed later."""
    from sqlalchemy.exc import DBAPIError, InterfaceError, OperationalError

    while error is not None and not isinstance(error, DBAPIError):
        error = error.__cause__  # Optuna's own error has the database's as its cause
    if error is None:
        return False
    if type(error.orig).__module__ == "sqlite3":
        return any(word in str(error.orig) for word in ("locked", "busy"))
    return error.connection_invalidated or isinstance(error, (InterfaceError, OperationalError))


def patiently(call: Callable[[], T], patience: Callable[[], float]) -> T:
    """What ``call`` returns, tried again with growing pauses while its database is away, for so many seconds."""
    started, pause, warned = time.monotonic(), SOON, False
    while True:
        try:
            return call()
        except Exception as error:
            if not unreachable(error) or time.monotonic() - started > patience():
                raise
            if not warned and pause > 1:
                _logger.warning("the database is away; waiting for it for up to %.0f s", patience())
                warned = True
        until = time.monotonic() + pause * random.uniform(0.5, 1.0)
        while time.monotonic() < min(until, started + patience()):
            time.sleep(0.05)
        pause = min(2 * pause, LONGEST)


class PatientStorage(RDBStorage):
    """Optuna's storage in a database, the same in there; what fails while the database is away is tried again.

    Attributes:
        patience: seconds until a call is given up; a process that has to end lowers it.
    """

    patience = PATIENCE

    def set_trial_state_values(self, trial_id: int, state: TrialState, values: Any = None) -> bool:
        tries = 0

        def attempt() -> bool:
            nonlocal tries
            tries += 1
            try:
                return RDBStorage.set_trial_state_values(self, trial_id, state, values)
            except UpdateFinishedTrialError:
                # The database went away when it had done its work and before it could say so.
                if tries > 1 and self.get_trial(trial_id).state == state:
                    return True
                raise

        return patiently(attempt, lambda: self.patience)


def _patient(method: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(method)
    def call(self: PatientStorage, *args: Any, **kwargs: Any) -> Any:
        return patiently(lambda: method(self, *args, **kwargs), lambda: self.patience)

    return call


_OWN = {"remove_session", "set_trial_state_values"}
_PUBLIC = {name for name in vars(BaseStorage).keys() & vars(RDBStorage).keys() if not name.startswith("_")} - _OWN
for _name in (*_PUBLIC, *DATABASE_METHODS, "record_heartbeat"):
    setattr(PatientStorage, _name, _patient(getattr(RDBStorage, _name)))


def open_database(
    address: str,
    heartbeat: int,
    grace: int,
    create: bool,
    on_stale: Callable[..., None],
) -> PatientStorage:
    """The storage in a database; its tables are made if they are missing. See `open_storage`."""
    from sqlalchemy.exc import DBAPIError

    url = parsed(address)
    kind, _, driver = url.drivername.partition("+")
    if kind == "sqlite":
        if url.database in (None, "", ":memory:"):
            raise ValueError(f"storage {address!r}: a database in memory cannot be shared; accepted: sqlite:///PATH")
        make_room(url.database, create)
        arguments: dict[str, Any] = {"timeout": SQLITE_WAITS}
    else:
        driver = driver or DRIVERS[kind]
        url = url.set(drivername=f"{kind}+{driver}")
        require(driver, EXTRA)
        arguments = {"connect_timeout": 10}

    def opened() -> PatientStorage:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ExperimentalWarning)
            return PatientStorage(
                url.render_as_string(hide_password=False),
                engine_kwargs={"connect_args": arguments, "pool_pre_ping": True},
                heartbeat_interval=heartbeat,
                grace_period=grace,
                heartbeat_stale_trial_callback=on_stale,
            )

    try:
        storage = _among_others(opened)
    except DBAPIError as error:
        said = " ".join(str(error.orig).split())
        raise ConnectionError(f"storage {hidden(address)!r} cannot be opened: {said}") from None
    if kind == "sqlite":
        _write_first(storage)
    return storage


def make_room(path: str | Path, create: bool) -> None:
    """The folder of a file that is to be made; an error if the file has to be there and is not."""
    if not create and not Path(path).exists():
        raise FileNotFoundError(f"storage {path}: there is no such file")
    Path(path).parent.mkdir(parents=True, exist_ok=True)


def _among_others(opened: Callable[[], T]) -> T:
    """Workers that start together all make the tables of a new database, and all but one fail at it once."""
    from sqlalchemy.exc import DBAPIError

    for wait in (0.2, 1.0):
        try:
            return opened()
        except DBAPIError:
            time.sleep(wait)
    return opened()


def _write_first(storage: RDBStorage) -> None:
    """SQLite knows no ``SELECT … FOR UPDATE``, by which other databases give a waiting trial to one worker only.

    Every transaction takes the write lock when it begins, so that nobody writes between its reading and its writing.
    """
    from sqlalchemy import event

    def leave_transactions_to_us(connection: Any, record: Any) -> None:
        connection.isolation_level = None

    def begin(connection: Any) -> None:
        connection.exec_driver_sql("BEGIN IMMEDIATE")

    storage.engine.dispose()
    event.listen(storage.engine, "connect", leave_transactions_to_us)
    event.listen(storage.engine, "begin", begin)
