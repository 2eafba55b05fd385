"""A real PostgreSQL server, and worker processes on one study, one of which is killed."""

from __future__ import annotations

import multiprocessing
import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections import Counter
from multiprocessing import forkserver
from pathlib import Path

import pytest
from helpers.processes import PATIENCE, free_port, until

# "required": a server that is missing fails the tests instead of skipping them.
REQUIRED = "BIOADAPT_TEST_POSTGRESQL"
SERVER = "bioadapt"
# What processes need seconds to import, once for all of them.
PRELOAD = ["bioadapt.search.contest.contest", "alembic.command", "optuna.storages._rdb.models", "psycopg"]


@pytest.fixture(scope="session", autouse=True)
def original():
    """What all processes of these tests are copied from. There is one in a session, and whoever starts it says what it
    imports: without this, processes of a search would import torch each where a test of the storage came first."""
    multiprocessing.set_forkserver_preload(PRELOAD)
    forkserver.ensure_running()


def _binaries():
    """The folder of the newest PostgreSQL: on the path, or where Debian puts it."""
    found = shutil.which("initdb")
    folders = [Path(found).parent] if found else []
    debian = Path("/usr/lib/postgresql").glob("*/bin")
    folders += sorted(debian, key=lambda folder: float(folder.parent.name), reverse=True)
    return next((folder for folder in folders if (folder / "postgres").exists()), None)


class Server:
    """A PostgreSQL server on loopback, which can be ended and started again."""

    def __init__(self, binaries, folder):
        # The server refuses to run as root. Its folder must not be in one that root alone may enter.
        self._as = {"user": "postgres", "group": "postgres", "extra_groups": []} if os.geteuid() == 0 else {}
        if self._as:
            shutil.chown(folder, "postgres", "postgres")
        data, port, self._folder = f"{folder}/data", free_port(), folder
        create = [binaries / "initdb", "-D", data, "-U", SERVER, "-A", "trust", "-E", "UTF8", "--no-sync", "--locale=C"]
        subprocess.run(create, check=True, capture_output=True, cwd=folder, **self._as)
        self._serve = [binaries / "postgres", "-D", data, "-p", str(port), "-k", folder, "-c", "fsync=off"]
        self._serve += ["-c", "listen_addresses=127.0.0.1", "-c", "shared_buffers=16MB", "-c", "max_connections=30"]
        self.url = f"postgresql://{SERVER}@127.0.0.1:{port}"
        self._process = None

    def start(self):
        with open(f"{self._folder}/log", "ab") as log:
            self._process = subprocess.Popen(self._serve, stdout=log, stderr=log, cwd=self._folder, **self._as)
        until(self._answers)

    def stop(self, how=signal.SIGINT):
        """By SIGINT connections are ended and what is committed stays; by SIGQUIT it does not tidy up."""
        self._process.send_signal(how)
        self._process.wait(timeout=30)

    def _answers(self):
        import psycopg

        assert self._process.poll() is None, Path(self._folder, "log").read_text()
        try:
            return psycopg.connect(f"{self.url}/postgres").close() is None
        except psycopg.OperationalError:
            return False


@pytest.fixture(scope="session")
def server():
    """A server that lives as long as the session."""
    binaries = _binaries()
    if binaries is None:
        tell = pytest.fail if os.environ.get(REQUIRED) == "required" else pytest.skip
        tell("PostgreSQL's server is not installed")
    pytest.importorskip("psycopg")
    folder = tempfile.mkdtemp(prefix="bioadapt-postgresql-")
    try:
        server = Server(binaries, folder)
        server.start()
        try:
            yield server
        finally:
            server.stop(signal.SIGQUIT)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="session")
def postgresql(server):
    """The server's address, without the name of a database."""
    return server.url


@pytest.fixture
def database(postgresql):
    """The address of an empty database of one test."""
    import psycopg

    name = f"study_{time.monotonic_ns()}"
    with psycopg.connect(f"{postgresql}/postgres", autocommit=True) as connection:
        connection.execute(f"CREATE DATABASE {name}")
    return f"{postgresql}/{name}"


class Workers:
    """Processes that take the tickets of one study: clean ones, forked from a server that has imported everything."""

    def __init__(self, folder):
        self.folder = folder
        self._context = multiprocessing.get_context("forkserver")
        self.started = []

    def start(self, target, *arguments, **settings):
        process = self._context.Process(target=target, args=arguments, kwargs=settings)
        process.start()
        self.started.append(process)
        return process

    def runs(self):
        """How often each trial was run to its end."""
        return Counter(int(path.name.partition(".")[0]) for path in self.folder.iterdir())

    def stop(self):
        for process in self.started:
            if process.is_alive():
                process.kill()
            process.join()


@pytest.fixture
def workers(tmp_path):
    folder = tmp_path / "runs"
    folder.mkdir()
    found = Workers(folder)
    yield found
    found.stop()


@pytest.fixture
def kill_one_of_two(workers):
    """A study of ten tickets, and two workers of which the first is killed in mid-trial; nothing must be lost."""
    import optuna
    from helpers.ticket_worker import value_of, work
    from optuna.trial import TrialState

    from bioadapt.search.study import open_storage
    from bioadapt.search.study.tickets import DIED

    def run(url, *, tickets=10, elsewhere=False):
        study = optuna.create_study(storage=open_storage(url), study_name="killed", direction="maximize")
        study.enqueue_trial({"a": 4, "b": 0, "c": 3})
        for _ in range(tickets - 1):
            study.enqueue_trial({})
        victim = workers.start(work, url, "killed", workers.folder, hang=True, elsewhere=elsewhere)

        def in_the_middle():
            return study.get_trials(deepcopy=False)[0].intermediate_values

        until(in_the_middle)
        survivor = workers.start(work, url, "killed", workers.folder)
        until(lambda: workers.runs())
        os.kill(victim.pid, signal.SIGKILL)
        survivor.join(timeout=PATIENCE)
        assert survivor.exitcode == 0

        trials = study.get_trials()
        complete = [trial for trial in trials if trial.state == TrialState.COMPLETE]
        assert [trial.state for trial in trials].count(TrialState.FAIL) == 1 and len(trials) == tickets + 1
        assert workers.runs() == Counter(trial.number for trial in complete) and len(complete) == tickets
        assert all(trial.value == value_of(trial.params) for trial in complete)
        killed, again = trials[0], trials[-1]
        assert killed.state == TrialState.FAIL and killed.params == again.params == {"a": 4, "b": 0, "c": 3}
        assert again.system_attrs["retry_history"] == [0] and "retry_history" not in killed.system_attrs
        assert again.user_attrs["worker"]["pid"] == survivor.pid != killed.user_attrs["worker"]["pid"]
        # A heartbeat that stops leaves no reason behind, a process that is gone does.
        assert killed.user_attrs.get("failure") == (None if elsewhere else DIED)
        return study

    return run
