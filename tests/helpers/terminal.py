"""`bioadapt search` in a terminal of its own, with a search that trains nothing; for tests of how it ends."""

from __future__ import annotations

import fcntl
import multiprocessing
import os
import pty
import select
import signal
import struct
import sys
import tempfile
import termios
from collections import Counter

import optuna
import psutil
from optuna.trial import TrialState

from bioadapt.search import contest
from bioadapt.search.study import Job, isolation, open_storage, prepare, run_study, runner
from bioadapt.search.study.tickets import DIED, count_tickets

from .fake_objective import FakeObjective
from .processes import until

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
