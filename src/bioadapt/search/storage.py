"""Where a study lives, and how its tickets are handed out so that none is lost and none counted twice.

A study has as many tickets as it is to have trials: waiting trials, enqueued in advance. Any number of workers, on any
number of machines, take tickets until none is left:

    study = optuna.load_study(study_name=name, storage=open_storage(url), sampler=ThompsonSampler(seed=0))
    while True:
        recover(study)
        with ticket(study) as trial:
            if trial is not None:
                study.tell(trial, train(trial))
                continue
        if settled(study):
            break
        time.sleep(1)  # somebody else's trial may yet come back

A worker that dies leaves a running trial behind. It fails, and a new ticket with the same parameters takes its place
(``retry_history`` says which trial it repeats). Three things notice the death: the worker itself, when Ctrl-C or an
error ends its block; another worker on the same machine, which sees that the process is gone; and on databases Optuna's
heartbeat, which any machine sees stop.
"""

from __future__ import annotations

import os
import socket
import time
import warnings
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import psutil
from optuna.exceptions import ExperimentalWarning, UpdateFinishedTrialError
from optuna.storages import BaseStorage, GrpcStorageProxy, JournalStorage, RDBStorage, fail_stale_trials
from optuna.storages._heartbeat import get_heartbeat_thread
from optuna.storages.journal import JournalFileBackend
from optuna.study import Study
from optuna.trial import FrozenTrial, Trial, TrialState, create_trial

from .._extras import require
from .._words import suggest

# Seconds between two heartbeats, and after the last one until a trial counts as dead.
HEARTBEAT, GRACE = 30, 120
# A configuration that takes its worker down (out of memory, a crash in a kernel) is tried so often again.
RETRIES = 2
DIED, INTERRUPTED = "worker died", "interrupted"
# A trial that has no worker yet, or a failed one that has no successor yet, is in somebody's hands for a moment.
MOMENT = timedelta(seconds=60)
GRPC_PORT = 13000

_DRIVERS = {"postgresql": "psycopg", "mysql": "pymysql"}
_SCHEMES = ("journal", "sqlite", "grpc", *_DRIVERS)
_ACCEPTED = (
    "PATH.journal or PATH.log, journal:PATH, sqlite:///PATH, postgresql://USER:PASSWORD@HOST/DATABASE, "
    "mysql://USER:PASSWORD@HOST/DATABASE, grpc://HOST:PORT"
)
# The extra that brings the drivers.
_EXTRA = "cluster"


def open_storage(url: str, *, heartbeat: int = HEARTBEAT, grace: int = GRACE, create: bool = True) -> BaseStorage:
    """The storage of studies behind an address. What does not exist yet is made: folder, file, tables.

    A journal file or SQLite serves the workers of one machine, PostgreSQL or MySQL any number of machines, and a gRPC
    proxy (Optuna's ``run_grpc_proxy_server``) relieves a database of many nodes.

    Args:
        url: ``PATH.journal``, ``PATH.log`` or ``journal:PATH``; ``sqlite:///PATH``; ``postgresql://…`` or
            ``mysql://…``, with the driver where another than psycopg or pymysql is meant; ``grpc://HOST:PORT``.
        heartbeat: databases only: seconds between the signs of life of a running trial.
        grace: databases only: seconds without one after which the trial fails and is enqueued again.
        create: whether a file that does not exist is made.

    Raises:
        FileNotFoundError: there is no such file, and none is to be made.
        ValueError: the address is of no known kind.
        ImportError: the driver is not installed; the message names the extra that brings it.
        ConnectionError: nothing answers at the address, or it refuses.
    """
    scheme, colon, rest = url.partition(":")
    if not colon or len(scheme) < 2:
        if Path(url).suffix not in (".log", ".journal"):
            raise ValueError(f"storage {url!r}: a file has to end in .journal or .log; accepted: {_ACCEPTED}")
        return _journal(url, create)
    kind, _, driver = scheme.partition("+")
    if kind not in _SCHEMES:
        raise ValueError(
            f"storage {_hidden(url)!r}: unknown kind {kind!r}, {suggest(kind, _SCHEMES)} In full: {_ACCEPTED}"
        )
    if kind == "journal":
        return _journal(rest.removeprefix("//"), create)
    if kind == "grpc":
        return _proxy(url)
    return _database(url, kind, driver, heartbeat, grace, create)


def this_worker() -> dict[str, Any]:
    """What a trial records of the process that runs it: ``host``, ``pid``, and since when it has been running."""
    return {"host": socket.gethostname(), "pid": os.getpid(), "started": psutil.Process().create_time()}


def runs_here(worker: Mapping[str, Any]) -> bool:
    """Whether this machine runs the process that `this_worker` has described."""
    if worker["host"] != socket.gethostname():
        return False
    try:
        process = psutil.Process(worker["pid"])
        # A process that began later has got the number of one that is gone. Clocks are set, hence the tolerance.
        reused = process.create_time() > worker["started"] + 10
        return not reused and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


@contextmanager
def ticket(study: Study) -> Iterator[Trial | None]:
    """Take one waiting trial, show signs of life while the block runs, and give it back if the block does not end well.

    The block tells the study what came of the trial. Its user attribute ``worker`` says which process has it.

    Yields:
        The trial, or none when no ticket is waiting. Never a trial that was not enqueued.
    """
    storage = study._storage
    trial_id = _take(study)
    if trial_id is None:
        yield None
        return
    with get_heartbeat_thread(trial_id, storage):
        storage.set_trial_user_attr(trial_id, "worker", this_worker())
        # As in Study.ask: the samplers that share a list of all trials make a new one.
        study._thread_local.cached_all_trials = None
        try:
            yield Trial(study, trial_id)
        except BaseException as error:
            # An error in the block is the worker's, and counts as its death; Ctrl-C says nothing about the trial.
            reason = f"{DIED}: {error!r}" if isinstance(error, Exception) else INTERRUPTED
            _give_up(study, storage.get_trial(trial_id), reason)
            raise


def recover(study: Study, lost: Collection[str] = ()) -> list[int]:
    """Give back the running trials of dead workers: each fails with a reason and is enqueued again, exactly once.

    Dead are: processes of this machine that are gone; on a database also what Optuna's heartbeat has given up; and
    whatever ran on the machines in ``lost``. Safe to call from every worker, at any time.

    Args:
        study: with tickets, as the runner makes it. The trials of other studies do not name their workers, and would
            be taken for dead after a minute.
        lost: names of machines that will not come back (the ``host`` of a trial's ``worker``). Needed where there is no
            heartbeat: a journal file that several machines share, or the gRPC proxy.

    Returns:
        Numbers of the trials that were given up by process or by machine.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ExperimentalWarning)
        fail_stale_trials(study)
    given_up = [
        trial.number
        for trial in study.get_trials(deepcopy=False, states=(TrialState.RUNNING,))
        if _is_dead(trial, lost) and _give_up(study, trial, DIED)
    ]
    for trial in _forgotten(study):
        _enqueue_again(study, trial)
    return given_up


def settled(study: Study) -> bool:
    """Whether no ticket is left and none may come back: no trial waits, runs, or is about to be enqueued again."""
    trials = study.get_trials(deepcopy=False)
    return not any(trial.state in (TrialState.WAITING, TrialState.RUNNING) for trial in trials) and not _lost(trials)


def repeated(trials: Iterable[FrozenTrial]) -> set[int]:
    """Numbers of the trials that came to nothing with their worker, and that others repeat."""
    return {number for trial in trials for number in _history(trial)}


def _history(trial: FrozenTrial) -> list[int]:
    return trial.system_attrs.get("retry_history", [])


def _take(study: Study) -> int | None:
    """The id of a waiting trial that now is ours; storages let one of several callers win."""
    for trial in study.get_trials(deepcopy=False, states=(TrialState.WAITING,)):
        try:
            if study._storage.set_trial_state_values(trial._trial_id, state=TrialState.RUNNING):
                return trial._trial_id
        except UpdateFinishedTrialError:
            continue
    return None


def _is_dead(trial: FrozenTrial, lost: Collection[str]) -> bool:
    worker = trial.user_attrs.get("worker")
    if worker is None:
        return trial.datetime_start is not None and datetime.now() - trial.datetime_start > MOMENT
    if worker["host"] != socket.gethostname():
        return worker["host"] in lost
    return not runs_here(worker)


def _give_up(study: Study, trial: FrozenTrial, reason: str) -> bool:
    """Fail a running trial and enqueue it again; false if somebody else was faster or it has ended after all."""
    try:
        study._storage.set_trial_user_attr(trial._trial_id, "failure", reason)
        study._storage.set_trial_state_values(trial._trial_id, state=TrialState.FAIL)
    except UpdateFinishedTrialError:
        return False
    _enqueue_again(study, study._storage.get_trial(trial._trial_id))
    return True


def _enqueue_again(study: Study, trial: FrozenTrial) -> None:
    """A new ticket for a trial that came to nothing. Its attributes are not taken over: they name the dead worker.

    The marks are those of Optuna's ``RetryHeartbeatStaleTrialCallback``, whose functions read them. Interruptions do
    not count as tries.
    """
    if _tries(trial, study.get_trials(deepcopy=False)) > RETRIES:
        return
    history = [*_history(trial), trial.number]
    known = {**trial.system_attrs.get("fixed_params", {}), **trial.params}
    marks = {"fixed_params": known, "failed_trial": history[0], "retry_history": history}
    study.add_trial(create_trial(state=TrialState.WAITING, system_attrs=marks))


def _tries(trial: FrozenTrial, trials: Iterable[FrozenTrial]) -> int:
    """How many workers this trial and those that it repeats have taken down."""
    same = {*_history(trial), trial.number}
    return sum(other.user_attrs.get("failure") != INTERRUPTED for other in trials if other.number in same)


def _lost(trials: Sequence[FrozenTrial]) -> list[FrozenTrial]:
    """Failed trials of dead workers that are to be enqueued again, and are not yet."""
    done = repeated(trials)
    return [
        trial
        for trial in trials
        if trial.state == TrialState.FAIL
        and trial.number not in done
        and "worker" in trial.user_attrs
        # A heartbeat that stops leaves no reason: a failed trial can no longer be given one.
        and trial.user_attrs.get("failure", DIED).startswith((DIED, INTERRUPTED))
        and _tries(trial, trials) <= RETRIES
    ]


def _forgotten(study: Study) -> list[FrozenTrial]:
    """Lost trials that nobody enqueues: who was about to died in that moment."""
    return [
        trial
        for trial in _lost(study.get_trials(deepcopy=False))
        # Machines differ in their clocks, and even in their time zones.
        if trial.datetime_complete is not None and abs(datetime.now() - trial.datetime_complete) > MOMENT
    ]


def _journal(path: str, create: bool) -> JournalStorage:
    if not path:
        raise ValueError(f"storage 'journal:': the path is missing; accepted: {_ACCEPTED}")
    _make_room(path, create)
    # Optuna's lock is a link to the file: with a relative path it leads nowhere, and one that a killed process has left
    # behind is waited for in vain.
    return JournalStorage(JournalFileBackend(str(Path(path).absolute())))


def _make_room(path: str, create: bool) -> None:
    if not create and not Path(path).exists():
        raise FileNotFoundError(f"storage {path}: there is no such file")
    Path(path).parent.mkdir(parents=True, exist_ok=True)


def _proxy(url: str) -> GrpcStorageProxy:
    require("grpc", _EXTRA)
    require("google.protobuf", _EXTRA)
    parts = urlsplit(url)
    if not parts.hostname:
        raise ValueError(f"storage {url!r}: the host is missing; accepted: grpc://HOST:PORT")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ExperimentalWarning)
        proxy = GrpcStorageProxy(host=parts.hostname, port=parts.port or GRPC_PORT)
    try:
        proxy.wait_server_ready(timeout=10)
    except ConnectionError:
        proxy.close()
        raise ConnectionError(f"storage {url!r}: no proxy answers there") from None
    return proxy


def _database(url: str, kind: str, driver: str, heartbeat: int, grace: int, create: bool) -> RDBStorage:
    from sqlalchemy.engine import make_url
    from sqlalchemy.exc import ArgumentError, DBAPIError

    try:
        address = make_url(url)
    except (ArgumentError, ValueError):
        raise ValueError(f"storage {_hidden(url)!r}: not an address; accepted: {_ACCEPTED}") from None
    arguments: dict[str, Any] = {"timeout": 60}
    if kind == "sqlite":
        if address.database in (None, "", ":memory:"):
            raise ValueError(f"storage {url!r}: a database in memory cannot be shared; accepted: sqlite:///PATH")
        _make_room(address.database, create)
    else:
        driver = driver or _DRIVERS[kind]
        address = address.set(drivername=f"{kind}+{driver}")
        require(driver, _EXTRA)
        arguments = {"connect_timeout": 10}
    settings = {"connect_args": arguments, "pool_pre_ping": True}

    def opened() -> RDBStorage:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ExperimentalWarning)
            return RDBStorage(
                address.render_as_string(hide_password=False),
                engine_kwargs=settings,
                heartbeat_interval=heartbeat,
                grace_period=grace,
                heartbeat_stale_trial_callback=_enqueue_again,
            )

    try:
        storage = _patiently(opened)
    except DBAPIError as error:
        said = " ".join(str(error.orig).split())
        raise ConnectionError(f"storage {_hidden(url)!r} cannot be opened: {said}") from None
    if kind == "sqlite":
        _write_first(storage)
    return storage


def _patiently(opened: Any) -> RDBStorage:
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


def _hidden(url: str) -> str:
    """An address without its password."""
    password = urlsplit(url).password
    return url.replace(f":{password}@", ":***@") if password else url
