"""What the search takes for granted of Optuna beyond its documented interface: this fails when it changes."""

from __future__ import annotations

import inspect

import pytest

pytest.importorskip("optuna")
pytest.importorskip("psutil")
pytest.importorskip("sqlalchemy")

import optuna
from optuna.storages import BaseStorage, RDBStorage, RetryHeartbeatStaleTrialCallback
from optuna.storages._cached_storage import _CachedStorage
from optuna.trial import TrialState

from bioadapt.search.study import optuna_private as private
from bioadapt.search.study.database import PatientStorage


@pytest.fixture
def study():
    study = optuna.create_study()
    study.enqueue_trial({"x": 0.5})
    return study


def test_a_storage_is_asked_for_a_waiting_trial_by_its_id(study):
    storage, (trial,) = private.storage_of(study), study.get_trials(deepcopy=False)
    assert isinstance(storage, BaseStorage)
    assert storage.set_trial_state_values(private.id_of(trial), state=TrialState.RUNNING)
    assert not storage.set_trial_state_values(private.id_of(trial), state=TrialState.RUNNING)
    assert private.trial_to_work_with(study, private.id_of(trial)).suggest_float("x", 0, 1) == 0.5


def test_asking_reads_the_list_of_trials_anew(study):
    source = inspect.getsource(optuna.Study.ask)
    assert "self._thread_local.cached_all_trials = None" in source


def test_an_enqueued_trials_parameters_are_where_we_write_them(study):
    assert study.trials[0].system_attrs[private.ENQUEUED] == {"x": 0.5}


def test_optuna_reads_which_trials_are_repeated(study):
    marks = {private.FIRST: 3, private.REPEATS: [3, 4]}
    trial = optuna.trial.create_trial(state=TrialState.WAITING, system_attrs=marks)
    assert RetryHeartbeatStaleTrialCallback.retried_trial_number(trial) == 3
    assert RetryHeartbeatStaleTrialCallback.retry_history(trial) == [3, 4]


def test_a_database_has_a_cache_before_it_and_a_heartbeat(tmp_path):
    database = RDBStorage(f"sqlite:///{tmp_path}/s.db", heartbeat_interval=1)
    study = optuna.create_study(storage=database)
    storage = private.storage_of(study)
    assert isinstance(storage, _CachedStorage) and private.uncached(storage) is database
    trial = study.ask()
    with private.heartbeat(storage, trial._trial_id):
        pass
    with database.engine.connect() as connection:
        beats = connection.exec_driver_sql("select trial_id from trial_heartbeats").fetchall()
    assert beats == [(trial._trial_id,)]


def test_all_that_the_cache_calls_of_a_database_is_patient():
    source = inspect.getsource(_CachedStorage)
    called = {part.partition("(")[0] for part in source.split("self._backend.")[1:]}
    # These ask the database for nothing.
    called -= {"get_heartbeat_interval", "get_heartbeat_stale_trial_callback", "remove_session"}
    called = {name for name in called if name.isidentifier()}
    assert "_get_trials" in called and called <= vars(PatientStorage).keys()
