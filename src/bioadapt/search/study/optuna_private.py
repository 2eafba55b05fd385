"""All that the search uses of Optuna beyond its documented interface, with the reason for each.

As it is in Optuna 5.0; ``tests/search/test_optuna_private.py`` fails where a later version differs. Most of it can go
when Optuna can hand out a waiting trial by itself: `Study.ask` makes a new one where none waits.
"""

from __future__ import annotations

from contextlib import AbstractContextManager

from optuna.storages import BaseStorage
from optuna.storages._heartbeat import get_heartbeat_thread
from optuna.study import Study
from optuna.trial import FrozenTrial, Trial

# System attributes of a trial. Its parameters, decided when it was enqueued: as `Study.enqueue_trial` writes them.
ENQUEUED = "fixed_params"
# Numbers of the trials that it repeats, and of the first of them: as `RetryHeartbeatStaleTrialCallback` writes them,
# whose functions and whose readers (the dashboard) know them.
REPEATS, FIRST = "retry_history", "failed_trial"

# What Optuna's cache calls of a database, beside the documented methods of a storage: these, too, must be patient.
DATABASE_METHODS = (
    "_create_new_trial",
    "_get_best_trial_id",
    "_get_stale_trial_ids",
    "_get_trials",
    "_set_trial_param",
)


def storage_of(study: Study) -> BaseStorage:
    """The storage itself decides which of several callers gets a waiting trial; `Study` does not ask it that."""
    return study._storage


def uncached(storage: BaseStorage) -> BaseStorage:
    """The storage that `open_storage` has made: `Study` puts a cache before a database."""
    return getattr(storage, "_backend", storage)


def id_of(trial: FrozenTrial) -> int:
    """What a storage knows a trial by; the public number counts within a study."""
    return trial._trial_id


def trial_to_work_with(study: Study, trial_id: int) -> Trial:
    """A trial to work with. As in `Study.ask`, the list of all trials that samplers share is read anew for it."""
    study._thread_local.cached_all_trials = None
    return Trial(study, trial_id)


def heartbeat(storage: BaseStorage, trial_id: int) -> AbstractContextManager[None]:
    """Optuna's heartbeat, while the block runs, where the storage keeps one; else only `Study.optimize` has it."""
    return get_heartbeat_thread(trial_id, storage)
