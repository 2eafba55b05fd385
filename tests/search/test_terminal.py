"""The command in a real terminal: what it shows there, how it ends, and that the same command goes on."""

from __future__ import annotations

import os
import re
import signal
import time
from multiprocessing import forkserver

import pytest

pytest.importorskip("optuna")
pytest.importorskip("scipy")
pytest.importorskip("psutil")
pytest.importorskip("sqlalchemy")

import psutil
from helpers.fake_objective import FakeObjective
from helpers.processes import PATIENCE, until
from helpers.terminal import TRIALS, Command, assert_all_done, in_session, one_of_two_is_killed, states
from optuna.trial import TrialState
from rich.console import Console

from bioadapt.search.study import Job, isolation, prepare, progress, runner
from bioadapt.search.study.tickets import INTERRUPTED

INTERRUPT = b"\x03"
SHOW_CURSOR, HIDE_CURSOR = "\x1b[?25h", "\x1b[?25l"
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
