"""How the trials of a study are handed out, so that none is lost and none counted twice.

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
import warnings
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from datetime import datetime, timedelta
from typing import Any

import psutil
from optuna.exceptions import ExperimentalWarning, StorageInternalError, UpdateFinishedTrialError
from optuna.storages import fail_stale_trials
from optuna.study import Study
from optuna.trial import FrozenTrial, Trial, TrialState, create_trial

from .optuna_private import ENQUEUED, FIRST, REPEATS, heartbeat, id_of, storage_of, trial_to_work_with, uncached

# How often a configuration is tried again that took its worker down (out of memory, a crash in a kernel).
RETRIES = 2
DIED, INTERRUPTED = "worker died", "interrupted"
# How long a trial without a worker, or a failed one without a successor, may just be passing from one to the other.
HANDOVER = timedelta(seconds=60)
FINISHED = (TrialState.COMPLETE, TrialState.PRUNED, TrialState.FAIL)
# Seconds for which a process that has to end waits for its database, to give its trial back.
GIVES_BACK_WITHIN = 3.0


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
    storage = storage_of(study)
    trial_id = _take(study)
    if trial_id is None:
        yield None
        return
    with heartbeat(storage, trial_id):
        storage.set_trial_user_attr(trial_id, "worker", this_worker())
        try:
            yield trial_to_work_with(study, trial_id)
        except BaseException as error:
            # An error in the block is the worker's, and counts as its death; Ctrl-C says nothing about the trial.
            reason = f"{DIED}: {error!r}" if isinstance(error, Exception) else INTERRUPTED
            uncached(storage).patience = GIVES_BACK_WITHIN
            with suppress(StorageInternalError, OSError):  # who finds the trial later gives it back
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
        enqueue_again(study, trial)
    return given_up


def count_tickets(study: Study) -> int:
    """How many trials the study is to have. One that is repeated because its worker died counts once."""
    return sum(not _history(trial) for trial in study.get_trials(deepcopy=False))


def count_used(study: Study) -> int:
    """How many of the tickets are used up."""
    return count_tickets(study) - count_left(study)


def count_left(study: Study) -> int:
    """How many trials wait or run."""
    return sum(trial.state not in FINISHED for trial in study.get_trials(deepcopy=False))


def settled(study: Study) -> bool:
    """Whether no ticket is left and none may come back: no trial waits, runs, or is about to be enqueued again."""
    trials = study.get_trials(deepcopy=False)
    return not any(trial.state in (TrialState.WAITING, TrialState.RUNNING) for trial in trials) and not _lost(trials)


def repeated(trials: Iterable[FrozenTrial]) -> set[int]:
    """Numbers of the trials that came to nothing with their worker, and that others repeat."""
    return {number for trial in trials for number in _history(trial)}


def _history(trial: FrozenTrial) -> list[int]:
    return trial.system_attrs.get(REPEATS, [])


def _take(study: Study) -> int | None:
    """The id of a waiting trial that now is ours; storages let one of several callers win."""
    for trial in study.get_trials(deepcopy=False, states=(TrialState.WAITING,)):
        try:
            if storage_of(study).set_trial_state_values(id_of(trial), state=TrialState.RUNNING):
                return id_of(trial)
        except UpdateFinishedTrialError:
            continue
    return None


def _is_dead(trial: FrozenTrial, lost: Collection[str]) -> bool:
    worker = trial.user_attrs.get("worker")
    if worker is None:
        return trial.datetime_start is not None and datetime.now() - trial.datetime_start > HANDOVER
    if worker["host"] != socket.gethostname():
        return worker["host"] in lost
    return not runs_here(worker)


def _give_up(study: Study, trial: FrozenTrial, reason: str) -> bool:
    """Fail a running trial and enqueue it again; false if somebody else was faster or it has ended after all."""
    try:
        storage_of(study).set_trial_user_attr(id_of(trial), "failure", reason)
        storage_of(study).set_trial_state_values(id_of(trial), state=TrialState.FAIL)
    except UpdateFinishedTrialError:
        return False
    enqueue_again(study, storage_of(study).get_trial(id_of(trial)))
    return True


def enqueue_again(study: Study, trial: FrozenTrial) -> None:
    """A new ticket for a trial that came to nothing. Its attributes are not taken over: they name the dead worker.

    Interruptions do not count as tries.
    """
    if _tries(trial, study.get_trials(deepcopy=False)) > RETRIES:
        return
    history = [*_history(trial), trial.number]
    known = {**trial.system_attrs.get(ENQUEUED, {}), **trial.params}
    marks = {ENQUEUED: known, FIRST: history[0], REPEATS: history}
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
        if trial.datetime_complete is not None and abs(datetime.now() - trial.datetime_complete) > HANDOVER
    ]
