"""Many workers on a real PostgreSQL server: one study, one of them killed."""

from __future__ import annotations

import os
import signal

import pytest

pytest.importorskip("optuna")
pytest.importorskip("scipy")
pytest.importorskip("sqlalchemy")

import optuna
from helpers.fake_objective import LEVELS, FakeObjective, value_of
from helpers.processes import PATIENCE, until
from helpers.terminal import one_of_two_is_killed
from helpers.ticket_worker import work
from optuna.trial import TrialState

from bioadapt.search import ThompsonSampler
from bioadapt.search.study import Job, open_storage, prepare
from bioadapt.search.study.runner import work as run_worker
from bioadapt.search.study.tickets import DIED, count_tickets


def test_one_of_the_runners_two_workers_is_killed_in_mid_trial(workers, database, tmp_path):
    study = prepare(database, "search", 8)
    stuck = tmp_path / "stuck"
    stuck.mkdir()
    hanging = FakeObjective(faults=dict.fromkeys(range(LEVELS["a"]), "hang"), log=str(stuck))
    victim = workers.start(run_worker, Job(database, "search", hanging))
    other = workers.start(run_worker, Job(database, "search", FakeObjective(log=str(workers.folder))))
    until(lambda: list(stuck.iterdir()))
    os.kill(victim.pid, signal.SIGKILL)
    other.join(timeout=PATIENCE)
    assert other.exitcode == 0

    (killed,) = (trial for trial in study.trials if trial.state == TrialState.FAIL)
    ended = [trial for trial in study.trials if trial.state != TrialState.FAIL]
    assert killed.user_attrs["failure"] == DIED and killed.user_attrs["worker"]["pid"] == victim.pid
    assert len(ended) == 8 == count_tickets(study) == len(list(workers.folder.iterdir()))
    (again,) = (trial for trial in ended if "retry_history" in trial.system_attrs)
    assert again.system_attrs["retry_history"] == [killed.number] and again.params == killed.params
    complete = [trial for trial in ended if trial.state == TrialState.COMPLETE]
    assert complete and all(trial.value == value_of(trial.params) for trial in complete)
    assert {trial.user_attrs["worker"]["pid"] for trial in ended} == {other.pid}


def test_of_a_search_and_one_that_joined_it_the_first_is_killed(workers, database, tmp_path):
    one_of_two_is_killed(workers, tmp_path, database, "first")


def test_its_heartbeat_tells_of_a_worker_on_another_machine(kill_one_of_two, database):
    kill_one_of_two(database, elsewhere=True)


def test_workers_that_start_together_on_an_empty_database_share_the_tickets(workers, database):
    processes = [workers.start(make_and_work, database, workers.folder) for _ in range(3)]
    for process in processes:
        process.join(timeout=PATIENCE)
    assert [process.exitcode for process in processes] == [0, 0, 0]
    trials = optuna.load_study(study_name="shared", storage=open_storage(database)).get_trials()
    assert [trial.state for trial in trials] == [TrialState.COMPLETE] * 24
    assert workers.runs() == dict.fromkeys(range(24), 1)


def make_and_work(url, log):
    optuna.create_study(storage=open_storage(url), study_name="shared", direction="maximize", load_if_exists=True)
    study = optuna.load_study(study_name="shared", storage=open_storage(url))
    for _ in range(8):
        study.enqueue_trial({})
    work(url, "shared", log)


def test_what_a_worker_reads_is_what_another_one_wrote(database):
    storage = open_storage(database)
    study = optuna.create_study(storage=storage, study_name="é", direction="maximize", sampler=ThompsonSampler(seed=1))
    study.optimize(lambda trial: trial.suggest_float("x", -1, 1), n_trials=12)
    study.set_user_attr("settings", {"model": "a", "trials": 12, "primitives": ["b", "c"], "limit": None})
    again = optuna.load_study(study_name="é", storage=open_storage(database))
    assert again.user_attrs == study.user_attrs and again.trials == study.trials


def test_a_password_is_not_told(postgresql):
    with pytest.raises(ConnectionError) as error:
        open_storage(f"{postgresql}/nowhere".replace("bioadapt@", "bioadapt:secret@"))
    assert "nowhere" in str(error.value) and "***" in str(error.value) and "secret" not in str(error.value)
