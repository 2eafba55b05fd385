"""Runs a study: tickets, workers that take them, and what is said while they do."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from multiprocessing.connection import wait
from typing import Any, Protocol

import optuna
from optuna.exceptions import DuplicatedStudyError
from optuna.study import Study
from optuna.trial import TrialState
from rich.console import Console
from rich.markup import escape

from .features import FeatureMap
from .isolation import FROM_TERMINAL, Child, Failed, Report, Stopped, handled, processes
from .pruner import ThompsonPruner
from .sampler import ThompsonSampler
from .storage import open_storage, recover, repeated, settled, ticket

FINISHED = (TrialState.COMPLETE, TrialState.PRUNED, TrialState.FAIL)
_POLL, _GLANCE = 0.5, 1.0
# Seconds that workers have to give their trials back.
_GRACE = 10.0


class Objective(Protocol):
    """What a study searches for. It travels to other processes by pickle.

    ``features`` is what the sampler's model sees of parameters; None for the default, see `ThompsonSampler`.
    """

    features: FeatureMap | None

    def suggest(self, trial: optuna.Trial) -> dict[str, Any]:
        """The parameters of a trial."""

    def describe(self, params: Mapping[str, Any]) -> dict[str, Any]:
        """What the trial records of them, as user attributes."""

    def run(self, params: Mapping[str, Any], report: Report) -> float:
        """Train and score, in a process of its own. ``report(step, score)`` may not return: the trial is pruned then.

        What it raises fails the trial, with the message as the reason.
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

    storage: str
    study: str
    objective: Objective
    seed: int = 0
    timeout: float | None = None
    threads: int | None = None


def tickets(study: Study) -> int:
    """How many trials the study is to have. One that is repeated because its worker died counts once."""
    return sum(not _repeats(trial) for trial in study.get_trials(deepcopy=False))


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
    here = tickets(study)
    for number in range(here, count):
        study.enqueue_trial(dict(first[number]) if number < len(first) else {})
    if here < count:
        study.set_user_attr("tickets", count)
    return study


def used(study: Study) -> int:
    """How many of the tickets are used up."""
    return tickets(study) - sum(trial.state not in FINISHED for trial in study.get_trials(deepcopy=False))


def _repeats(trial: optuna.trial.FrozenTrial) -> bool:
    return bool(trial.system_attrs.get("retry_history"))


def work(job: Job) -> None:
    """Take tickets until none is left and none may come back."""
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    study = optuna.load_study(
        study_name=job.study,
        storage=open_storage(job.storage),
        sampler=ThompsonSampler(seed=job.seed, features=job.objective.features),
        pruner=ThompsonPruner(),
    )
    with Child(job.objective.run, job.threads) as child:
        while True:
            recover(study)
            with ticket(study) as trial:
                if trial is not None:
                    _run(study, trial, job, child)
                    continue
            if settled(study):
                return
            time.sleep(_POLL)  # the trial of another worker may yet come back


def _run(study: Study, trial: optuna.Trial, job: Job, child: Child) -> None:
    """One trial, from the proposal to its end; a failure of the training is the trial's, not the worker's."""
    params = job.objective.suggest(trial)
    for name, value in job.objective.describe(params).items():
        trial.set_user_attr(name, value)

    def judge(step: int, score: float) -> bool:
        trial.report(score, step)
        return trial.should_prune()

    started = time.perf_counter()
    value, state, failure = None, TrialState.COMPLETE, None
    try:
        value = float(child.call(params, judge, job.timeout))
        if value != value or abs(value) == float("inf"):
            value, state, failure = None, TrialState.FAIL, f"the score is {value}"
    except Stopped:
        state = TrialState.PRUNED
    except Failed as error:
        state, failure = TrialState.FAIL, str(error)
    trial.set_user_attr("seconds", time.perf_counter() - started)
    if failure is not None:
        trial.set_user_attr("failure", failure)
    study.tell(trial, value, state)


def run_study(job: Job, workers: int = 1, console: Console | None = None, title: str = "trials") -> Study:
    """Work until every ticket of the study is used.

    Args:
        job: the study, which `prepare` has made.
        workers: how many processes take tickets at the same time.
        console: where progress is shown.
        title: what the trials are, in the line that shows it.

    Raises:
        KeyboardInterrupt: Ctrl-C, SIGTERM, or the terminal was closed. Running trials have been given back, and the
            same call goes on with them.
        RuntimeError: all workers have died.
    """
    if job.threads is None and workers > 1:
        job = replace(job, threads=max(1, (os.cpu_count() or 1) // workers))
    with _ended_by_signals(), _watched(job, console or Console(quiet=True), title):
        if workers == 1:
            work(job)
        else:
            _work_together(job, workers)
    study = optuna.load_study(study_name=job.study, storage=open_storage(job.storage))
    left = sum(trial.state not in FINISHED for trial in study.get_trials(deepcopy=False))
    if left:
        raise RuntimeError(f"study {job.study!r}: all workers have died, {left} trials are left; the same call goes on")
    return study


def _work_together(job: Job, workers: int) -> None:
    making = processes()
    team = [making.Process(target=_worker, args=(job,)) for _ in range(workers)]
    try:
        for worker in team:
            worker.start()
        for worker in team:
            worker.join()
    except BaseException:
        _end([worker for worker in team if worker.pid is not None])
        raise


def _end(team: Sequence[Any]) -> None:
    """Workers give their trials back, unless they are stuck; `recover` does it for those."""
    for worker in team:
        worker.terminate()
    deadline = time.monotonic() + _GRACE
    for worker in team:
        worker.join(max(deadline - time.monotonic(), 0.0))
        worker.kill()
        worker.join()


def _worker(job: Job) -> None:
    """A worker process; the one that started it ends it, also where the terminal tells both."""
    for sign in FROM_TERMINAL:
        signal.signal(sign, signal.SIG_IGN)
    threading.Thread(target=_follow_parent, daemon=True).start()
    with suppress(KeyboardInterrupt), _ended_by_signals():
        work(job)


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


@contextmanager
def _watched(job: Job, console: Console, title: str) -> Iterator[None]:
    """How far the study is, while the block runs: a line that is redrawn on a terminal, a new one elsewhere."""
    if console.quiet:
        yield
        return
    study = optuna.load_study(study_name=job.study, storage=open_storage(job.storage))
    started, over = time.monotonic(), threading.Event()
    before = told = used(study)

    def text() -> str:
        return progress(study, title, time.monotonic() - started, before)

    def say() -> None:
        console.print(text(), highlight=False, markup=False, soft_wrap=True)

    def say_news() -> None:
        nonlocal told
        if used(study) != told:
            told = used(study)
            say()

    def watch(show: Callable[[], None]) -> None:
        while not over.wait(_GLANCE):
            show()

    with ExitStack() as shown:
        # What is called first is entered last: the line of the spinner is gone before the one that stays is written.
        shown.callback(say if console.is_terminal else say_news)
        show = say_news
        if console.is_terminal:
            status = shown.enter_context(console.status(escape(text())))
            show = lambda: status.update(escape(text()))  # noqa: E731
        watcher = threading.Thread(target=watch, args=(show,), daemon=True)
        watcher.start()
        try:
            yield
        finally:
            over.set()
            watcher.join()


def progress(study: Study, title: str, seconds: float, finished_before: int = 0) -> str:
    """One line: trials done, the best, and how long the rest will take at the pace so far.

    Args:
        study: the study.
        title: what its trials are.
        seconds: for how long this call has been running.
        finished_before: tickets that were used up when it began.
    """
    trials = study.get_trials(deepcopy=False)
    done, total = used(study), tickets(study)
    parts = [f"{title}: {done}/{total}"]
    complete = [trial for trial in trials if trial.state == TrialState.COMPLETE]
    if complete:
        best = max(complete, key=lambda trial: trial.value or 0.0)
        parts.append(f"best {best.value:.2f} (trial {best.number})")
    again = repeated(trials)
    for state, word in ((TrialState.PRUNED, "pruned"), (TrialState.FAIL, "failed")):
        count = sum(trial.state == state and trial.number not in again for trial in trials)
        if count:
            parts.append(f"{count} {word}")
    if finished_before < done < total:
        left = seconds / (done - finished_before) * (total - done)
        parts.append(f"about {_in_words(left)} left")
    return ", ".join(parts)


def _in_words(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 90 * 60 else f"{seconds / 3600:.0f} h"
