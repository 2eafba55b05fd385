"""The command in a real terminal: what it shows there, how it ends, and that the same command goes on."""

from __future__ import annotations

import fcntl
import multiprocessing
import os
import pty
import re
import select
import signal
import struct
import sys
import tempfile
import termios
import time
from collections import Counter
from multiprocessing import forkserver

import pytest

pytest.importorskip("optuna")
pytest.importorskip("scipy")
pytest.importorskip("psutil")
pytest.importorskip("sqlalchemy")

import optuna
import psutil
from optuna.trial import TrialState
from rich.console import Console
from search.conftest import PATIENCE, until
from search.fake_objective import FakeObjective

from bioadapt.search import contest
from bioadapt.search.study import Job, isolation, open_storage, prepare, progress, run_study, runner
from bioadapt.search.study.tickets import DIED, INTERRUPTED, count_tickets

INTERRUPT = b"\x03"
SHOW_CURSOR, HIDE_CURSOR = "\x1b[?25h", "\x1b[?25l"
TRIALS = 6


class FakeSearch:
    """What the command takes for a search: no training; every trial leaves a file that names its process."""

    log, seconds = "", 0.0

    def __init__(self, settings, console):
        objective = FakeObjective(self.seconds, log=self.log)
        self.job = Job(settings.storage, "fake", objective)
        self.trials, self.workers, self.console = settings.trials, settings.workers, console

    def run(self):
        prepare(self.job.storage, "fake", self.trials)
        self.join()

    def join(self):
        run_study(self.job, self.workers, self.console, "searching")


def command(terminal, folder, seconds, *words):
    """`bioadapt search` in a process of its own that has this terminal, if any."""
    # Whoever runs the tests in the background has them ignore this, and the command would, too.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    if terminal is not None:
        os.setsid()
        os.login_tty(os.open(terminal, os.O_RDWR))
    tempfile.tempdir = str(folder / "temporary")
    FakeSearch.log, FakeSearch.seconds, contest.Search = str(folder / "log"), seconds, FakeSearch
    # Copies of this process: one that they are copied from would first import torch.
    isolation.processes = runner.processes = lambda target=None: multiprocessing.get_context("fork")
    sys.argv = ["bioadapt", "search", "--trials", str(TRIALS), *words]
    from bioadapt.cli import main

    main()


class Command:
    """A running command, and the terminal that it has."""

    def __init__(self, workers, folder, seconds, *words, columns=80):
        for name in ("log", "temporary"):
            (folder / name).mkdir(exist_ok=True)
        self.folder, self.shown = folder, ""
        self._master, slave = pty.openpty()
        fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
        self.process = workers.start(command, os.ttyname(slave), folder, seconds, *words)
        until(self.trials)
        os.close(slave)

    def trials(self):
        """Which processes have begun a trial, one number for each."""
        self.read()
        return [int(path.name.partition("-")[0]) for path in (self.folder / "log").iterdir()]

    def read(self):
        while self._master is not None and select.select([self._master], [], [], 0)[0]:
            try:
                self.shown += os.read(self._master, 1 << 16).decode()
            except OSError:  # nobody has the other side any more
                return

    def send(self, what):
        if isinstance(what, bytes):
            os.write(self._master, what)
        elif what == "close":
            os.close(self._master)
            self._master = None
        else:
            os.kill(self.process.pid, what)

    def ended(self):
        """Exit status."""
        until(lambda: self.read() or self.process.exitcode is not None)
        self.read()
        return self.process.exitcode


def in_session(leader):
    """Processes that were started in a terminal and have not ended."""
    found = []
    for process in psutil.process_iter():
        try:
            if os.getsid(process.pid) == leader and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process.pid)
        except (psutil.Error, OSError):
            continue
    return found


def states(url):
    """How the trials of a study have ended, and with which failures."""
    study = optuna.load_study(study_name="fake", storage=open_storage(url))
    assert count_tickets(study) == TRIALS
    return Counter((trial.state, trial.user_attrs.get("failure")) for trial in study.trials)


def assert_all_done(url, failure, number):
    """Every ticket has come to something, beside so many trials that were lost by this failure."""
    found = states(url)
    assert found.pop((TrialState.FAIL, failure), 0) == number
    assert sum(found.values()) == TRIALS and {state for state, _ in found} <= {TrialState.COMPLETE, TrialState.PRUNED}


GIVEN_BACK = (TrialState.FAIL, INTERRUPTED)


@pytest.mark.parametrize(
    ("sent", "number"),
    [([INTERRUPT], 2), ([INTERRUPT], 1), ([INTERRUPT, INTERRUPT], 2), ([signal.SIGTERM], 2), (["close"], 2)],
    ids=["ctrl-c", "ctrl-c with one worker", "ctrl-c twice", "sigterm", "closed"],
)
def test_a_search_ends_with_its_terminal_and_the_same_command_goes_on(workers, tmp_path, sent, number):
    url = str(tmp_path / "study.journal")
    words = ["--storage", url, "--workers", str(number)]
    stopped = Command(workers, tmp_path, 600, *words)
    until(lambda: len(set(stopped.trials())) == number)
    for what in sent:
        stopped.send(what)
        time.sleep(0.01)  # the second one comes while the first is being obeyed
    began = time.monotonic()
    status = stopped.ended()
    assert time.monotonic() - began < runner._GRACE
    until(lambda: not in_session(stopped.process.pid))
    assert list((tmp_path / "temporary").iterdir()) == []
    assert states(url) == {GIVEN_BACK: number, (TrialState.WAITING, None): TRIALS}
    if sent != ["close"]:
        assert status == 130
        assert stopped.shown.rfind(SHOW_CURSOR) > stopped.shown.rfind(HIDE_CURSOR)
        assert f"searching: 0/{TRIALS}\r\n" in stopped.shown
        said = stopped.shown.replace("^C", "")  # what a terminal shows of the key
        assert said.endswith("the same command goes on from there\r\n") and "Traceback" not in said

    again = Command(workers, tmp_path, 0, *words)
    assert again.ended() == 0
    assert f"searching: {TRIALS}/{TRIALS}, best " in again.shown and "failed" not in again.shown
    assert_all_done(url, INTERRUPTED, number)


def one_of_two_is_killed(workers, tmp_path, url, killed):
    """A search and one that joined it, of which one is killed in mid-trial; the other one does what is left."""
    seconds = {name: 600 if name == killed else 0.05 for name in ("first", "joined")}
    prepare(url, "fake", TRIALS)
    commands = {}
    for name in sorted(seconds, key=lambda name: name != killed):
        (tmp_path / name).mkdir()
        more = ["--join"] if name == "joined" else []
        commands[name] = Command(workers, tmp_path / name, seconds[name], "--storage", url, *more)
    commands[killed].send(signal.SIGKILL)
    until(lambda: not in_session(commands[killed].process.pid))
    (other,) = commands.keys() - {killed}
    assert commands[other].ended() == 0 and f"searching: {TRIALS}/{TRIALS}, best " in commands[other].shown
    assert_all_done(url, DIED, 1)
    assert len(commands[killed].trials()) == 1 and len(commands[other].trials()) == TRIALS
    again = Command(workers, tmp_path / killed, 0, "--storage", url)
    assert again.ended() == 0 and len(again.trials()) == 1


@pytest.mark.parametrize(
    ("storage", "killed"),
    [("{}/study.journal", "first"), ("{}/study.journal", "joined"), ("sqlite:///{}/study.db", "joined")],
    ids=["journal-first", "journal-joined", "sqlite-joined"],
)
def test_of_a_search_and_one_that_joined_it_one_is_killed(workers, tmp_path, storage, killed):
    one_of_two_is_killed(workers, tmp_path, storage.format(tmp_path), killed)


def test_nothing_but_text_goes_where_no_terminal_is(tmp_path, monkeypatch):
    monkeypatch.setattr(progress, "_GLANCE", 0.02)
    url, shown = str(tmp_path / "study.journal"), tmp_path / "shown"
    study = prepare(url, "fake", 3)
    with shown.open("w") as file:
        console = Console(file=file, width=40)
        with progress.watched(study, console, "searching"):
            study.tell(study.ask(), 1.0)
            until(lambda: shown.stat().st_size)
            study.tell(study.ask(), 2.0)
    first, second = shown.read_text().splitlines()
    assert re.fullmatch(r"searching: 1/3, best 1.00 \(trial 0\), about \d+ s left", first)
    assert re.fullmatch(r"searching: 2/3, best 2.00 \(trial 1\), about \d+ s left", second)


# -- signals ---------------------------------------------------------------------------------------------------------


def test_the_first_signal_ends_the_work_unless_the_process_ignores_it():
    with isolation.handled([signal.SIGHUP], signal.SIG_IGN), runner._ended_by_signals():
        os.kill(os.getpid(), signal.SIGHUP)  # as under nohup
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(PATIENCE)
        os.kill(os.getpid(), signal.SIGTERM)


def test_what_others_are_copied_from_is_not_ended_by_the_terminal(monkeypatch):
    own = forkserver.ForkServer()
    monkeypatch.setattr(forkserver, "ensure_running", own.ensure_running)
    isolation.processes()
    process = psutil.Process(own._forkserver_pid)
    try:
        for sign in isolation.FROM_TERMINAL:
            process.send_signal(sign)
        time.sleep(0.1)
        assert process.status() != psutil.STATUS_ZOMBIE
    finally:
        process.kill()
        process.wait()


def hang(begun):
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    begun.touch()
    time.sleep(PATIENCE)


def test_a_worker_that_is_stuck_is_killed(workers, tmp_path, monkeypatch):
    monkeypatch.setattr(runner, "_GRACE", 0.1)
    stuck = workers.start(hang, tmp_path / "begun")
    until((tmp_path / "begun").exists)
    team = runner._Team(Job("", "fake", FakeObjective()))
    team.members[stuck] = None
    team.end()
    assert stuck.exitcode == -signal.SIGKILL
