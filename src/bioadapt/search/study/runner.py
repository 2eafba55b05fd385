"""Runs a study: workers that take its tickets, each trial in a process of its own."""

from __future__ import annotations

import json
import math
import multiprocessing
import os
import pickle
import signal
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from multiprocessing.connection import Connection, wait
from typing import Any, Protocol

import optuna
from optuna.exceptions import DuplicatedStudyError, StorageInternalError
from optuna.storages import BaseStorage
from optuna.study import Study
from optuna.trial import TrialState
from rich.console import Console

from ..thompson import FeatureMap, ThompsonPruner, ThompsonSampler
from .database import PATIENCE, unreachable
from .isolation import FROM_TERMINAL, Child, Failed, Report, Stopped, handled, packed, processes
from .progress import watched
from .storage import open_storage
from .tickets import count_left, count_tickets, count_used, recover, settled, ticket

_POLL = 0.5
# Seconds that workers have to give their trials back.
_GRACE = 10.0
# A worker that has died is replaced, until each has died so often without a ticket being used up meanwhile.
DEATHS = 3
# Seconds before the first replacement, twice as many before each further one that had no success.
_PAUSE, _LONGEST_PAUSE = 0.5, 30.0


class Objective(Protocol):
    """What a study searches for. It travels to other processes by value (cloudpickle)."""

    @property
    def features(self) -> FeatureMap | None:
        """What the sampler's model sees of parameters; None for the default, see `ThompsonSampler`."""

    def suggest(self, trial: optuna.Trial) -> dict[str, Any]:
        """The parameters of a trial."""

    def describe(self, params: Mapping[str, Any]) -> dict[str, Any]:
        """What the trial records of them, as user attributes: what JSON can hold."""

    def run(self, params: Mapping[str, Any], report: Report) -> float:
        """Train and score, in a process of its own. ``report(step, score)`` may not return: the trial is pruned then.

        What it raises fails the trial, with the message as the reason; so does what is no finite number.
        """


@dataclass(frozen=True)
class Job:
    """What a worker needs to know.

    Attributes:
        storage: as for `open_storage`.
        study: its name.
        objective: what to maximise.
        seed: of the sampler.
        timeout: seconds that a trial may take.
        threads: how many threads a worker's training may use; torch's own choice if None.
    """

    storage: str = field(repr=False)  # it may hold a password
    study: str
    objective: Objective
    seed: int = 0
    timeout: float | None = None
    threads: int | None = None


def prepare(storage: str, name: str, count: int, first: Sequence[Mapping[str, Any]] = ()) -> Study:
    """The study of that name with ``count`` tickets: a new one, or what is there with as many more as it lacks.

    One process does this, the workers may be anywhere. Its user attribute ``tickets`` says when they can begin.

    Args:
        storage: as for `open_storage`.
        name: of the study.
        count: trials in all.
        first: parameters of the first ones; the sampler chooses those of the others.
    """
    backend = open_storage(storage)
    try:
        optuna.logging.set_verbosity(optuna.logging.ERROR)
        study = optuna.create_study(storage=backend, study_name=name, direction="maximize")
    except DuplicatedStudyError:
        study = optuna.load_study(storage=backend, study_name=name)
    here = count_tickets(study)
    for number in range(here, count):
        study.enqueue_trial(dict(first[number]) if number < len(first) else {})
    if here < count:
        study.set_user_attr("tickets", count)
    return study


def run_study(job: Job, workers: int = 1, console: Console | None = None, title: str = "trials") -> Study:
    """Work until every ticket of the study is used.

    A worker that dies is replaced. A database that is away for a while, restarted or locked, is waited for.

    Args:
        job: the study, which `prepare` has made.
        workers: how many processes take tickets at the same time.
        console: where progress is shown.
        title: what the trials are, in the line that shows it.

    Raises:
        KeyboardInterrupt: Ctrl-C, SIGTERM, or the terminal was closed. Running trials have been given back, and the
            same call goes on with them.
        ValueError: the objective cannot be sent to another process.
        RuntimeError: it does not load there, all workers have died, or the storage was away for too long. The same call
            goes on.
    """
    if job.threads is None and workers > 1:
        job = replace(job, threads=max(1, (os.cpu_count() or 1) // workers))
    try:
        study = optuna.load_study(study_name=job.study, storage=open_storage(job.storage))
        with _ended_by_signals(), watched(study, console or Console(quiet=True), title):
            if workers == 1:
                work(job)
            else:
                _work_together(job, workers, study)
        left = count_left(study)
    except (OSError, StorageInternalError) as error:
        raise RuntimeError(f"study {job.study!r}: {_storage_in_words(error)}; the same call goes on") from error
    if left:
        raise RuntimeError(f"study {job.study!r}: all workers have ended, {left} trials left; the same call goes on")
    return study


def work(job: Job) -> None:
    """Take tickets until none is left and none may come back."""
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    study = optuna.load_study(
        study_name=job.study,
        storage=_reopened(job.storage),
        sampler=ThompsonSampler(seed=job.seed, features=job.objective.features),
        pruner=ThompsonPruner(),
    )
    with Child(job.objective.run, job.threads) as child:
        child.start()  # raises here what would fail every trial
        while True:
            recover(study)
            with ticket(study) as trial:
                if trial is not None:
                    _run(study, trial, job, child)
                    continue
            if settled(study):
                return
            time.sleep(_POLL)  # the trial of another worker may yet come back


def _reopened(address: str) -> BaseStorage:
    """The storage of a study that is there: its database may be away at this moment."""
    started = time.monotonic()
    while True:
        try:
            return open_storage(address)
        except ConnectionError:
            if time.monotonic() - started > PATIENCE:
                raise
            time.sleep(_POLL)


def _run(study: Study, trial: optuna.Trial, job: Job, child: Child) -> None:
    """One trial, from the proposal to its end; what the objective gets wrong fails the trial, not the worker."""

    def judge(step: int, score: float) -> bool:
        trial.report(score, step)
        return trial.should_prune()

    started = time.perf_counter()
    value, state, failure = None, TrialState.COMPLETE, None
    try:
        params = _proposed(trial, job.objective)
        value = _score(child.call(params, judge, job.timeout))
    except Stopped:
        state = TrialState.PRUNED
    except Failed as error:
        state, failure = TrialState.FAIL, str(error)
    trial.set_user_attr("seconds", time.perf_counter() - started)
    if failure is not None:
        trial.set_user_attr("failure", failure)
    study.tell(trial, value, state)


def _proposed(trial: optuna.Trial, objective: Objective) -> dict[str, Any]:
    """The parameters of a trial, which records what they stand for."""
    try:
        params = objective.suggest(trial)
        described = objective.describe(params)
        json.dumps(described)
    except (StorageInternalError, OSError):
        raise  # the storage failed, and not the configuration
    except Exception as error:
        raise Failed(f"{type(error).__name__}: {error}") from error
    for name, value in described.items():
        trial.set_user_attr(name, value)
    return params


def _score(returned: Any) -> float:
    """What an objective has returned, as a number; text is refused even where it reads like one."""
    try:
        if isinstance(returned, (str, bytes)):
            raise TypeError
        value = float(returned)
    except (TypeError, ValueError):
        kind = type(returned).__name__
        raise Failed(f"the objective returned {str(returned)[:80]!r} ({kind}), and not a number") from None
    if not math.isfinite(value):
        raise Failed(f"the score is {value}")
    return value


def _work_together(job: Job, workers: int, study: Study) -> None:
    """So many workers at the same time, until each has found that there is nothing left to do."""
    with Child(job.objective.run) as child:
        child.start()  # raises here what would end every worker
    team = _Team(job)
    try:
        for _ in range(workers):
            team.start()
        used, deaths, reason = count_used(study), 0, ""
        while team.members:
            for failed in team.ended():
                now = count_used(study)
                deaths, used, reason = (deaths + 1 if now == used else 1), now, failed
                if deaths > DEATHS * workers:
                    raise RuntimeError(
                        f"study {job.study!r}: all workers have died, {count_left(study)} trials are left; the last "
                        f"one: {reason}; the same call goes on"
                    )
                time.sleep(min(_PAUSE * 2 ** (deaths - 1), _LONGEST_PAUSE))
                team.start()
    except BaseException:
        team.end()
        raise


class _Team:
    """Worker processes, each with the connection by which it says what ended it."""

    def __init__(self, job: Job) -> None:
        self._job = packed(job)
        self._making = processes(job.objective)
        self.members: dict[Any, Connection] = {}

    def start(self) -> None:
        here, there = self._making.Pipe(duplex=False)
        worker = self._making.Process(target=_worker, args=(self._job, there))
        self.members[worker] = here
        worker.start()
        there.close()

    def ended(self) -> list[str]:
        """Wait until a worker ends; the reasons of those that did not end well."""
        wait([worker.sentinel for worker in self.members])
        reasons = []
        for worker in [worker for worker in self.members if worker.exitcode is not None]:
            connection = self.members.pop(worker)
            if worker.exitcode:
                with suppress(EOFError, OSError):
                    reasons.append(connection.recv() if connection.poll() else f"exit code {worker.exitcode}")
            connection.close()
        return reasons

    def end(self) -> None:
        """Workers give their trials back, unless they are stuck; `recover` does it for those."""
        begun = [worker for worker in self.members if worker.pid is not None]
        for worker in begun:
            worker.terminate()
        deadline = time.monotonic() + _GRACE
        for worker in begun:
            worker.join(max(deadline - time.monotonic(), 0.0))
            worker.kill()
            worker.join()


def _worker(packed_job: bytes, connection: Connection) -> None:
    """A worker process; the one that started it ends it, also where the terminal tells both."""
    for sign in FROM_TERMINAL:
        signal.signal(sign, signal.SIG_IGN)
    threading.Thread(target=_follow_parent, daemon=True).start()
    with suppress(KeyboardInterrupt), _ended_by_signals():
        try:
            work(pickle.loads(packed_job))
        except Exception as error:
            connection.send(_storage_in_words(error))
            raise SystemExit(1) from None


def _storage_in_words(error: Exception) -> str:
    """What went wrong with a storage, or with a worker."""
    cause = error.__cause__
    if unreachable(error):
        said = getattr(cause, "orig", None) or error
        return f"the database was away for more than {PATIENCE:.0f} s: {' '.join(str(said).split())}"
    return f"{type(error).__name__}: {' '.join(str(cause or error).split())}"


def _follow_parent() -> None:
    """Without the process that started it a worker gives its trial back and ends."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    wait([parent.sentinel])
    os.kill(os.getpid(), signal.SIGTERM)


@contextmanager
def _ended_by_signals() -> Iterator[None]:
    """SIGTERM and the end of the terminal end the block as Ctrl-C does. Only the first counts, so that giving trials
    back is not interrupted. What the process ignores already, as under nohup, it goes on ignoring.
    """
    listened = [sign for sign in (signal.SIGTERM, *FROM_TERMINAL) if signal.getsignal(sign) != signal.SIG_IGN]

    def interrupt(number: int, frame: Any) -> None:
        for sign in listened:
            signal.signal(sign, signal.SIG_IGN)
        raise KeyboardInterrupt

    with handled(listened, interrupt):
        yield
