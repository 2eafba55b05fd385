"""Storages: which address means what, and tickets that are neither lost nor counted twice."""

from __future__ import annotations

import socket
import subprocess
import sys
import threading
import warnings
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import pytest

pytest.importorskip("optuna")
pytest.importorskip("scipy")
pytest.importorskip("sqlalchemy")

import optuna
import psutil
from helpers.processes import free_port, until
from optuna.storages import GrpcStorageProxy, JournalStorage, RDBStorage
from optuna.trial import TrialState, create_trial

from bioadapt.search.study import database, open_storage, recover, settled, ticket, tickets
from bioadapt.search.study.address import hidden
from bioadapt.search.study.tickets import (
    DIED,
    INTERRUPTED,
    RETRIES,
    repeated,
    this_worker,
)

FILES = {"journal": "{}/study.journal", "sqlite": "sqlite:///{}/study.db"}


@pytest.fixture(params=FILES)
def url(request, tmp_path):
    return FILES[request.param].format(tmp_path)


@pytest.fixture
def study(url):
    return study_in(url)


def study_in(url, tickets=1, storage=None):
    storage = storage or open_storage(url)
    study = optuna.create_study(storage=storage, study_name="s", direction="maximize", load_if_exists=True)
    for _ in range(tickets):
        study.enqueue_trial({"x": 0.5})
    return study


def states(study):
    return [trial.state.name for trial in study.get_trials(deepcopy=False)]


# -- addresses -------------------------------------------------------------------------------------------------------


def test_an_address_opens_its_kind_of_storage_and_makes_what_is_missing(tmp_path):
    for url in (f"{tmp_path}/a/b.log", f"{tmp_path}/a/c.journal", f"journal:{tmp_path}/d/e"):
        assert isinstance(open_storage(url), JournalStorage)
    assert sorted(path.name for path in tmp_path.rglob("*") if path.is_file()) == ["b.log", "c.journal", "e"]
    database = open_storage(f"sqlite:///{tmp_path}/f/g.db", heartbeat=7, grace=9)
    assert isinstance(database, RDBStorage) and (tmp_path / "f" / "g.db").exists()
    assert database.get_heartbeat_interval() == 7 and database.grace_period == 9


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("postgres://localhost/x", "'postgres'.*did you mean 'postgresql'"),
        ("redis://localhost", "unknown kind 'redis'.*sqlite:///PATH"),
        ("search.db", "'search.db'.*has to end in .journal or .log.*sqlite:///PATH"),
        ("", "''.*has to end in"),
        ("journal:", "path is missing"),
        ("sqlite://", "in memory.*sqlite:///PATH"),
        ("grpc:///x", "host is missing"),
        ("postgresql://me:secret@host:port/x", r"'postgresql://me:\*\*\*@host:port/x'.*not an address"),
    ],
)
def test_another_address_is_refused_with_those_that_are_accepted(url, words):
    with pytest.raises(ValueError, match=words):
        open_storage(url)


def test_a_lock_that_a_killed_process_has_left_on_a_journal_is_broken(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    storage = open_storage("a/study.journal")
    lock = storage._backend._lock
    assert lock.acquire()
    assert (tmp_path / "a" / "study.journal.lock").exists()  # what the link leads to: its age is looked at
    lock.grace_period = 0.01
    study_in("a/study.journal", storage=storage)


@pytest.mark.parametrize(("url", "driver"), [("postgresql://h/x", "psycopg"), ("mysql://h/x", "pymysql")])
def test_a_missing_driver_is_named_with_its_extra(url, driver, monkeypatch):
    monkeypatch.setitem(sys.modules, driver, None)
    with pytest.raises(ImportError, match=rf"{driver}.*pip install bioadapt\[cluster\]"):
        open_storage(url)


def test_an_address_where_nothing_answers_is_an_error_in_a_line(monkeypatch):
    pytest.importorskip("psycopg")
    monkeypatch.setattr(database.time, "sleep", lambda seconds: None)
    with pytest.raises(ConnectionError, match=r"me:\*\*\*@127.0.0.1:1/x' cannot be opened: .*refused") as error:
        open_storage("postgresql://me:secret@127.0.0.1:1/x")
    assert "\n" not in str(error.value) and "secret" not in str(error.value)


@pytest.mark.parametrize(
    ("address", "shown"),
    [
        ("postgresql://me:se#cret@h/db", "postgresql://me:***@h/db"),
        ("postgresql://me:se/cret@h/db", "postgresql://me:***@h/db"),
        ("postgresql://me:se?cret@h/db", "postgresql://me:***@h/db"),
        ("postgresql+psycopg://me:se%40cret@h:5432/db", "postgresql+psycopg://me:***@h:5432/db"),
        ("postgresql://h/db?user=me&password=secret", "postgresql://h/db?password=***&user=me"),
        ("postgresql://me@h/db?sslpassword=se%26cret&x=1", "postgresql://me@h/db?sslpassword=***&x=1"),
        ("mysql://me@h/db?passwd=secret", "mysql://me@h/db?passwd=***"),
        ("grpc://me:secret@h:13000", "grpc://me:***@h:13000"),
        ("postgresql://me:secret@h:port/db", "postgresql://me:***@h:port/db"),
        ("postgresql://me:se@cret@h/db", "postgresql://***"),
        ("postgres:me:secret@h/db", "postgres://me:***@h/db"),
        ("sqlite:///a b/ö.db", "sqlite:///a b/ö.db"),
        ("a@b/study.journal", "a@b/study.journal"),
    ],
)
def test_an_address_is_shown_without_its_password(address, shown):
    assert hidden(address) == shown


@pytest.mark.parametrize("password", ["se#cret", "se/cret", "se?cret", "se%40cret", "se@cret", "s@e?c@cret"])
def test_no_error_tells_a_password(password, monkeypatch):
    pytest.importorskip("psycopg")
    pytest.importorskip("grpc")
    monkeypatch.setattr(database.time, "sleep", lambda seconds: None)
    monkeypatch.setattr(
        GrpcStorageProxy, "wait_server_ready", lambda self, timeout: (_ for _ in ()).throw(ConnectionError())
    )
    for kind in ("postgresql", "postgres", "postgresql+psycopg", "grpc"):
        with pytest.raises((ConnectionError, ValueError)) as error:
            open_storage(f"{kind}://me:{password}@127.0.0.1:1/x")
        assert "cret" not in str(error.value) and "***" in str(error.value)
    with pytest.raises(ConnectionError) as error:
        open_storage("postgresql://127.0.0.1:1/x?user=me&password=secret")
    assert "secret" not in str(error.value)


# -- tickets ---------------------------------------------------------------------------------------------------------


def test_tickets_are_taken_in_their_order_and_no_trial_is_made_beside_them(study):
    study.enqueue_trial({"x": 0.25})
    seen = []
    for _ in range(3):
        with ticket(study) as trial:
            if trial is not None:
                seen.append((trial.number, trial.suggest_float("x", 0, 1)))
                assert trial.user_attrs["worker"] == this_worker()
                study.tell(trial, 1.0)
    assert seen == [(0, 0.5), (1, 0.25)] and states(study) == ["COMPLETE"] * 2


def test_each_ticket_goes_to_one_of_many_workers(url):
    study_in(url, tickets=16)
    start = threading.Barrier(4)

    def takes(_):
        mine, study, taken = open_storage(url), None, []
        study = optuna.load_study(study_name="s", storage=mine)
        start.wait()
        while True:
            with ticket(study) as trial:
                if trial is None:
                    return taken
                study.tell(trial, 1.0)
                taken.append(trial.number)

    with ThreadPoolExecutor(4) as pool:
        taken = [number for numbers in pool.map(takes, range(4)) for number in numbers]
    assert sorted(taken) == list(range(16))


@pytest.mark.parametrize(
    ("error", "reason"), [(KeyboardInterrupt(), INTERRUPTED), (MemoryError("full"), f"{DIED}: MemoryError('full')")]
)
def test_a_block_that_ends_early_gives_its_ticket_back(study, error, reason):
    with pytest.raises(type(error)), ticket(study) as trial:
        trial.suggest_float("x", 0, 1)
        trial.suggest_float("y", 0.5, 0.5)
        raise error
    first, second = study.trials
    assert first.user_attrs["failure"] == reason and first.state == TrialState.FAIL
    with ticket(study) as again:
        assert again.number == second.number == 1 and again.suggest_float("x", 0, 1) == 0.5
        assert again.suggest_float("y", 0, 1) == 0.5 and "failure" not in again.user_attrs
        study.tell(again, 1.0)
    assert states(study) == ["FAIL", "COMPLETE"]


# -- recovery --------------------------------------------------------------------------------------------------------


def asked(study):
    """As `Study.ask`, whose warning is about heartbeats, which these tests do without."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        return study.ask()


def running(study, **worker):
    """A running trial of the worker that this one would be but for what is given."""
    trial = asked(study)
    trial.suggest_float("x", 0, 1)
    trial.set_user_attr("worker", {**this_worker(), **worker})
    return trial


def gone():
    """The number of a process that has ended."""
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def test_what_a_dead_worker_left_is_enqueued_again_exactly_once(study):
    running(study, pid=gone())
    assert recover(study) == [0] and recover(study) == []
    first, second = study.trials
    assert (first.state, first.user_attrs["failure"]) == (TrialState.FAIL, DIED)
    assert second.state == TrialState.WAITING and second.user_attrs == {}
    assert second.system_attrs == {"fixed_params": {"x": 0.5}, "failed_trial": 0, "retry_history": [0]}


def test_of_many_that_recover_at_once_one_enqueues(url):
    running(study_in(url), pid=gone())
    start = threading.Barrier(4)

    def recovers(_):
        study = optuna.load_study(study_name="s", storage=open_storage(url))
        start.wait()
        return recover(study)

    with ThreadPoolExecutor(4) as pool:
        assert Counter(map(tuple, pool.map(recovers, range(4)))) == {(0,): 1, (): 3}
    assert states(study_in(url, tickets=0)) == ["FAIL", "WAITING"]


def test_a_process_that_got_a_dead_ones_number_is_not_taken_for_it(study):
    running(study, started=this_worker()["started"] - 1000)
    assert recover(study) == [0]


def test_a_worker_that_was_killed_but_not_yet_waited_for_is_dead(study):
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    running(study, pid=process.pid, started=psutil.Process(process.pid).create_time())
    assert recover(study) == []
    process.kill()
    until(lambda: recover(study) == [0])
    process.wait()


def test_the_living_and_other_machines_are_left_alone_until_they_are_lost(study):
    study.enqueue_trial({})
    running(study)
    running(study, host="node7", pid=gone())
    assert recover(study) == [] == recover(study, lost=["node8"])
    assert recover(study, lost=["node7"]) == [1]
    assert states(study) == ["RUNNING", "FAIL", "WAITING"]


def test_a_trial_that_nobody_signed_is_given_a_moment(study, monkeypatch):
    asked(study)
    assert recover(study) == []
    monkeypatch.setattr(tickets, "HANDOVER", timedelta(0))
    assert recover(study) == [0]


def test_a_configuration_that_kills_its_workers_is_given_up(study):
    for _ in range(RETRIES + 1):
        running(study, pid=gone())
        recover(study)
    assert states(study) == ["FAIL"] * (RETRIES + 1) and settled(study)


def test_interruptions_do_not_count_as_tries(study):
    for _ in range(RETRIES + 3):
        with pytest.raises(KeyboardInterrupt), ticket(study):
            raise KeyboardInterrupt
    assert states(study) == ["FAIL"] * (RETRIES + 3) + ["WAITING"]


def test_who_dies_between_failing_a_trial_and_enqueueing_it_again_loses_nothing(study, monkeypatch):
    # A heartbeat that stops leaves no reason behind.
    for reason in ({"failure": DIED}, {"failure": "out of memory"}, {}):
        worker = {"worker": {**this_worker(), "host": "elsewhere"}}
        marks = {"fixed_params": {"x": 0.125}}
        study.add_trial(create_trial(state=TrialState.FAIL, user_attrs={**worker, **reason}, system_attrs=marks))
    recover(study)
    assert states(study) == ["WAITING", "FAIL", "FAIL", "FAIL"]
    finish_waiting(study)
    assert not settled(study)  # two tickets are yet to come
    monkeypatch.setattr(tickets, "HANDOVER", timedelta(0))
    recover(study)
    recover(study)
    assert [trial.system_attrs.get("retry_history") for trial in study.trials] == [None] * 4 + [[1], [3]]
    assert repeated(study.trials) == {1, 3} and not settled(study)
    finish_waiting(study)
    assert settled(study)


def finish_waiting(study):
    while "WAITING" in states(study):
        trial = asked(study)
        assert not settled(study)
        study.tell(trial, 1.0)


def test_one_of_two_workers_is_killed_in_mid_trial(kill_one_of_two, url):
    kill_one_of_two(url)


def test_on_a_database_the_heartbeat_tells_of_a_worker_elsewhere(kill_one_of_two, tmp_path):
    kill_one_of_two(FILES["sqlite"].format(tmp_path), elsewhere=True)


# -- a proxy for many nodes ------------------------------------------------------------------------------------------


def serve(url, port):
    optuna.storages.run_grpc_proxy_server(optuna.storages.get_storage(open_storage(url)), host="127.0.0.1", port=port)


def test_workers_behind_a_proxy_of_which_one_is_killed(workers, kill_one_of_two, tmp_path):
    pytest.importorskip("grpc")
    pytest.importorskip("google.protobuf")
    port = free_port()
    workers.start(serve, FILES["sqlite"].format(tmp_path), port)
    url = f"grpc://127.0.0.1:{port}"
    until(lambda: answers(port))
    assert isinstance(open_storage(url), GrpcStorageProxy)
    kill_one_of_two(url)


def answers(port):
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def test_no_proxy_at_the_address_is_an_error(monkeypatch):
    pytest.importorskip("grpc")
    refuse = lambda self, timeout: (_ for _ in ()).throw(ConnectionError())  # noqa: E731
    monkeypatch.setattr(GrpcStorageProxy, "wait_server_ready", refuse)
    with pytest.raises(ConnectionError, match="'grpc://127.0.0.1:1': no proxy answers there"):
        open_storage("grpc://127.0.0.1:1")


# -- the dashboard ---------------------------------------------------------------------------------------------------


def test_optunas_dashboard_reads_the_same_storage(study, url):
    dashboard = pytest.importorskip("optuna_dashboard")
    with ticket(study) as trial:
        trial.suggest_float("x", 0, 1)
        study.tell(trial, 2.0)
    status, body = called(dashboard.wsgi(open_storage(url)), "/api/studies")
    assert status.startswith("200") and b'"study_name": "s"' in body


def called(application, path):
    """One GET request to a WSGI application, without a server."""
    from wsgiref.util import setup_testing_defaults

    environment, found = {"PATH_INFO": path}, []
    setup_testing_defaults(environment)
    body = b"".join(application(environment, lambda status, headers, error=None: found.append(status)))
    return found[0], body
