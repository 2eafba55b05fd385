"""Databases that are away for a while: locked by somebody else, or restarted."""

from __future__ import annotations

import sqlite3
import threading
import time
from collections import Counter

import pytest

pytest.importorskip("optuna")
pytest.importorskip("scipy")
pytest.importorskip("psutil")
pytest.importorskip("sqlalchemy")

import optuna
from helpers.fake_objective import FakeObjective, value_of
from helpers.processes import until
from optuna.exceptions import StorageInternalError
from optuna.storages import RDBStorage
from optuna.trial import TrialState
from sqlalchemy.exc import OperationalError

from bioadapt.search.study import Job, open_storage, prepare, run_study
from bioadapt.search.study import database as databases
from bioadapt.search.study.tickets import count_tickets, ticket


@pytest.fixture
def locked(tmp_path, monkeypatch):
    """A study in SQLite, which gives up early by itself; and what locks the file for some seconds."""
    monkeypatch.setattr(databases, "SQLITE_WAITS", 0.05)
    study = optuna.create_study(storage=open_storage(f"sqlite:///{tmp_path}/s.db"), study_name="s")
    begun, held = threading.Event(), []

    def hold(seconds):
        with sqlite3.connect(tmp_path / "s.db", isolation_level=None) as other:
            other.execute("BEGIN EXCLUSIVE")
            begun.set()
            time.sleep(seconds)
            other.execute("ROLLBACK")

    def lock(seconds):
        held.append(threading.Thread(target=hold, args=(seconds,)))
        held[-1].start()
        begun.wait()

    yield study, lock
    for thread in held:
        thread.join()


def test_a_long_lock_is_waited_for(locked):
    study, lock = locked
    lock(1.0)
    began = time.monotonic()
    study.set_user_attr("x", 1)
    study.enqueue_trial({})
    assert time.monotonic() - began > 0.8
    assert study.user_attrs == {"x": 1} and len(study.trials) == 1


def test_patience_ends(locked):
    study, lock = locked
    study._storage._backend.patience = 0.2
    lock(2.0)
    began = time.monotonic()
    with pytest.raises(StorageInternalError):
        study.set_user_attr("x", 1)
    assert time.monotonic() - began < 1.5


def test_a_process_that_has_to_end_does_not_wait(locked, monkeypatch):
    study, lock = locked
    monkeypatch.setattr("bioadapt.search.study.tickets.GIVES_BACK_WITHIN", 0.2)
    study.enqueue_trial({})
    began = None
    with pytest.raises(KeyboardInterrupt), ticket(study):
        lock(2.0)
        began = time.monotonic()
        raise KeyboardInterrupt
    assert time.monotonic() - began < 1.8


def test_other_errors_are_not_waited_for(tmp_path):
    storage = open_storage(f"sqlite:///{tmp_path}/s.db")
    with storage.engine.begin() as connection:
        connection.exec_driver_sql("drop table study_user_attributes")
    study = optuna.create_study(storage=storage)
    began = time.monotonic()
    with pytest.raises(StorageInternalError):
        study.set_user_attr("x", 1)
    assert time.monotonic() - began < 5


def test_what_a_database_did_before_it_went_away_is_not_done_twice(tmp_path, monkeypatch):
    study = optuna.create_study(storage=open_storage(f"sqlite:///{tmp_path}/s.db"), direction="maximize")
    study.enqueue_trial({})
    does, lost = RDBStorage.set_trial_state_values, []

    def loses_its_answer(self, trial_id, state, values=None):
        done = does(self, trial_id, state, values)
        if state == TrialState.COMPLETE and not lost:
            lost.append(trial_id)
            answer = OperationalError("", {}, sqlite3.OperationalError("database is locked"))
            raise StorageInternalError from answer
        return done

    monkeypatch.setattr(RDBStorage, "set_trial_state_values", loses_its_answer)
    with ticket(study) as trial:
        study.tell(trial, 3.0)
    assert lost and [(trial.state, trial.value) for trial in study.trials] == [(TrialState.COMPLETE, 3.0)]


@pytest.mark.parametrize("workers", [1, 2])
def test_a_study_goes_on_through_a_restart_of_its_server(server, database, tmp_path, workers):
    log = tmp_path / "log"
    log.mkdir()
    study = prepare(database, "s", 8)

    def restart():
        until(lambda: len(list(log.iterdir())) >= 2)
        server.stop()
        time.sleep(1.5)
        server.start()

    thread = threading.Thread(target=restart)
    thread.start()
    try:
        done = run_study(Job(database, "s", FakeObjective(seconds=0.5, log=str(log))), workers)
    finally:
        thread.join()
    assert study.study_name == done.study_name and count_tickets(done) == 8
    assert Counter(trial.state in (TrialState.COMPLETE, TrialState.PRUNED) for trial in done.trials) == {True: 8}
    complete = [trial for trial in done.trials if trial.state == TrialState.COMPLETE]
    assert complete and all(trial.value == value_of(trial.params) for trial in complete)
    assert len(list(log.iterdir())) == 8  # none was run twice
