"""Objectives without any training, and what else fresh processes run in the tests; imports nothing heavy."""

from __future__ import annotations

import os
import signal
import threading
import time
from dataclasses import dataclass
from importlib import import_module
from multiprocessing.util import Finalize
from pathlib import Path

import optuna

LEVELS = {"a": 4, "b": 4, "c": 3}
RETURNED = {"text": "very good", "number as text": "0.5", "nothing": None}
BEST = 2.0 + 1.0 + 3.0


def value_of(params):
    """6 at best: a counts for itself, b=2 and c=1 are worth something together."""
    return 2.0 * params["a"] / 3 + (params["c"] == 2) * 1.0 + (3.0 if (params["b"], params["c"]) == (2, 1) else 0.0)


@dataclass
class FakeObjective:
    """A function of three choices.

    Args:
        seconds: how long a trial takes.
        faults: what goes wrong where ``a`` has this value: ``raise``, ``nan``, ``kill``, ``hang``, ``memory``,
            ``exit``, ``text``, ``number as text``, ``nothing``, ``lock``, ``prunes itself``; ``suggest`` and
            ``describe`` go wrong in the worker, and ``worker`` kills that, once if there is a log.
        log: folder in which every started trial leaves a file ``PID-TIME``.
    """

    seconds: float = 0.0
    faults: dict[int, str] | None = None
    log: str | None = None
    features = None

    def suggest(self, trial):
        params = {name: trial.suggest_categorical(name, list(range(levels))) for name, levels in LEVELS.items()}
        fault = (self.faults or {}).get(params["a"])
        if fault == "suggest":
            raise KeyError("no such parameter")
        if fault == "worker":
            once = Path(self.log, "worker")
            if not once.exists():
                once.touch()
                os.kill(os.getpid(), signal.SIGKILL)
        return params

    def describe(self, params):
        if (self.faults or {}).get(params["a"]) == "describe":
            return {"parameters": threading.Lock()}
        return {"parameters": 10 * params["a"], "configuration": {"slots": []}}

    def run(self, params, report):
        if self.log is not None:
            Path(self.log, f"{os.getpid()}-{time.monotonic_ns()}").touch()
        time.sleep(self.seconds / 2)
        fault = (self.faults or {}).get(params["a"])
        if fault == "raise":
            raise ValueError("no such thing")
        if fault == "nan":
            return float("nan")
        if fault == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if fault == "hang":
            time.sleep(600)
        if fault == "memory":
            raise MemoryError
        if fault == "exit":
            os._exit(3)
        if fault in RETURNED:
            return RETURNED[fault]
        if fault == "lock":
            return threading.Lock()
        if fault == "prunes itself":
            raise optuna.TrialPruned
        report(1, value_of(params) / 2)
        time.sleep(self.seconds / 2)
        return value_of(params)


class Unusable(FakeObjective):
    """Loads everywhere; no worker can begin with it."""

    @property
    def features(self):
        raise LookupError("no features")


class Holding(FakeObjective):
    """Has what cannot be copied into another process."""

    def __init__(self):
        super().__init__()
        self.lock = threading.Lock()


class Nowhere(FakeObjective):
    """Loads in no other process."""

    def __reduce__(self):
        return (import_module, ("nowhere",))


def echo(argument, report):
    """What a child runs here: the argument says what."""
    if argument == "raise":
        raise ValueError("no  such\nthing")
    if argument == "memory":
        raise MemoryError
    if argument == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if argument == "exit":
        os.write(2, b"the last words\n")
        os._exit(3)
    if argument == "hang":
        time.sleep(600)
    if argument == "report":
        for step in range(100):
            report(step, step / 2)
    return os.getpid()


class Unimportable:
    """A target that no other process can load."""

    def __call__(self, argument, report):
        return argument

    def __reduce__(self):
        return (import_module, ("nowhere",))


def tidy_up_later(path, report):
    """Leaves a file when its process ends in order."""
    Finalize(None, path.touch, exitpriority=0)


def work_or_end(wanted):
    """As the runner's own worker processes: SIGTERM is an orderly end."""
    from bioadapt.search.study.isolation import packed, processes
    from bioadapt.search.study.runner import _worker

    here, there = processes().Pipe()
    with here, there:
        _worker(packed(wanted), there)
