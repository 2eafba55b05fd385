"""What a worker process does in the tests of storages; importable, so that a fresh process can run it."""

from __future__ import annotations

import socket
import time
from pathlib import Path

import optuna

from bioadapt.search import ThompsonSampler
from bioadapt.search.storage import open_storage, recover, settled, ticket

FOREVER = 600
LEVELS = {"a": 5, "b": 5, "c": 5}


def value_of(params):
    return params["a"] - params["b"] * params["c"]


def work(url, name, log, *, hang=False, elsewhere=False, heartbeat=1, grace=2):
    """Take tickets until none is left and none may come back.

    Args:
        url: of the storage.
        name: of the study.
        log: a folder, in which every finished run of a trial leaves a file ``NUMBER.PID``.
        hang: stay in the middle of the first trial for ever.
        elsewhere: say that this process runs on another machine.
        heartbeat, grace: in seconds, for databases.
    """
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    if elsewhere:
        socket.gethostname = lambda: "elsewhere"
    storage = open_storage(url, heartbeat=heartbeat, grace=grace)
    study = optuna.load_study(study_name=name, storage=storage, sampler=ThompsonSampler(seed=0))
    while True:
        recover(study)
        with ticket(study) as trial:
            if trial is not None:
                params = {key: trial.suggest_int(key, 0, levels - 1) for key, levels in LEVELS.items()}
                trial.report(0.0, step=0)
                time.sleep(FOREVER if hang else 0.002)
                study.tell(trial, value_of(params))
                Path(log, f"{trial.number}.{trial.user_attrs['worker']['pid']}").touch()
                continue
        if settled(study):
            break
        time.sleep(0.05)
