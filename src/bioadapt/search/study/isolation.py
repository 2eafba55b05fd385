"""A process of its own for everything that may crash, run out of memory, hang or poison what it leaves behind."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from multiprocessing.connection import Connection, wait
from types import TracebackType
from typing import Any, TextIO

import cloudpickle
import optuna

Report = Callable[[int, float], None]
Target = Callable[[Any, Report], Any]

# What a terminal sends to all processes in it at once: Ctrl-C, and that it is closed.
FROM_TERMINAL = tuple(getattr(signal, name) for name in ("SIGINT", "SIGHUP") if hasattr(signal, name))
_GRACE = 5.0
_OURS = __name__.partition(".")[0]


def processes(target: Any = None) -> Any:
    """How processes are made here: as copies of one that has imported what they need and done nothing else.

    So a new one is there at once. Where the system cannot do that, each one starts from nothing.

    Args:
        target: what they are to run; its module is imported with this one if it is bioadapt's.
    """
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    from multiprocessing import forkserver

    context = multiprocessing.get_context("forkserver")
    home = getattr(target, "__module__", None) or ""
    preloaded = [f"{_OURS}._quiet", __name__, *([home] if home.partition(".")[0] == _OURS else [])]
    context.set_forkserver_preload(preloaded)
    # Ctrl-C during its imports would end the server, and nobody would then report how its copies ended.
    with handled(FROM_TERMINAL, signal.SIG_IGN):
        forkserver.ensure_running()
    return context


@contextmanager
def handled(signals: Iterable[signal.Signals], handler: Any) -> Iterator[None]:
    """``handler`` gets these signals while the block runs. Only a main thread may ask for that: elsewhere all stays."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {sign: signal.signal(sign, handler) for sign in signals}
    try:
        yield
    finally:
        for sign, former in before.items():
            signal.signal(sign, former)


def packed(thing: Any) -> bytes:
    """What another process gets; `pickle.loads` opens it. What a notebook or a script has defined travels by value.

    Raises:
        ValueError: it cannot travel.
    """
    try:
        return cloudpickle.dumps(thing)
    except Exception as error:
        reason = error
    try:
        return pickle.dumps(thing)  # a function of a script may name what cannot be copied, and be found again by name
    except Exception:
        raise ValueError(
            f"{_name(thing)} cannot be sent to another process: {reason}; what it needs there and cannot be copied, "
            "such as a lock, an open file or a connection, it has to make itself when it is called"
        ) from reason


def _name(thing: Any) -> str:
    return getattr(thing, "__qualname__", None) or f"a {type(thing).__qualname__}"


class Failed(RuntimeError):
    """A call did not return; the message says why, in words for a report."""


class NotFound(RuntimeError):
    """The target does not load in another process; the message says why."""


class Stopped(Exception):
    """Raised in the child, out of ``report``, when the other side asks for the end; and in the parent once it ended."""


class Child:
    """Runs ``target(argument, report)`` in a process that is started when needed, and again when it is gone.

    An exception leaves the process as it is, unless memory ran out: what else is in there could suffer from that.

    Args:
        target: what to run; it and its arguments and results travel by pickle.
        threads: how many threads torch may use there; its own choice if None.
    """

    def __init__(self, target: Target, threads: int | None = None) -> None:
        self._target, self._threads = target, threads
        self._process: Any = None
        self._connection: Connection | None = None
        self._log: TextIO | None = None

    def __enter__(self) -> Child:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None and self._process is not None and self._connection is not None:
            with suppress(ConnectionError):
                self._connection.send(())  # it is idle, and ends in an orderly way
            self._process.join(_GRACE)
        self.end()

    def call(
        self,
        argument: Any,
        judge: Callable[[int, float], bool] = lambda step, score: False,
        timeout: float | None = None,
    ) -> Any:
        """Run the target once.

        Args:
            argument: its first argument.
            judge: called with what the target reports; True ends it.
            timeout: seconds that it may take; no limit if None.

        Raises:
            Stopped: ``judge`` has ended it, or it pruned itself by `optuna.TrialPruned`.
            Failed: it raised, crashed, was killed or took too long.
            NotFound: the target does not load in the process.
        """
        connection = self.start()
        deadline = None if timeout is None else time.monotonic() + timeout
        try:
            connection.send((argument,))
            while True:
                left = None if deadline is None else max(deadline - time.monotonic(), 0.0)
                if not connection.poll(left):
                    raise Failed(f"timeout: not done after {timeout:g} s")
                kind, *content = connection.recv()
                if kind == "report":
                    connection.send(judge(*content))
                elif kind == "done":
                    return content[0]
                elif kind == "stopped":
                    raise Stopped
                else:
                    reason, poisoned = content
                    if poisoned:
                        self.end()
                    break
        except (EOFError, ConnectionError):
            reason = self._why_it_ended()
        except Stopped:
            raise
        except BaseException:
            self.end()
            raise
        raise Failed(reason)

    def end(self) -> None:
        """End the process, whatever it is doing."""
        if self._process is not None:
            self._process.kill()
            self._process.join()
            self._forget()

    def start(self) -> Connection:
        """Have the process ready, if it is not.

        Raises:
            NotFound: the target does not load there.
            ValueError: it cannot be sent there.
        """
        if self._process is None:
            content = packed(self._target)
            making = processes(self._target)
            here, there = making.Pipe()
            handle, name = tempfile.mkstemp(prefix="bioadapt-", suffix=".log")
            self._log = os.fdopen(handle, errors="replace")
            try:
                process = making.Process(target=_serve, args=(there, self._threads, name), daemon=True)
                process.start()
                there.close()
                self._process, self._connection = process, here
                here.send_bytes(content)
                problem = here.recv()  # imports are done: from here on time is the target's
            except (EOFError, ConnectionError):
                if self._process is None:
                    raise
                raise Failed(self._why_it_ended()) from None
            finally:
                os.unlink(name)  # both sides have it open by now, and however they end, nothing stays behind
            if problem:
                self.end()
                raise NotFound(f"{_name(self._target)} does not load in another process: {problem}")
        assert self._connection is not None
        return self._connection

    def _why_it_ended(self) -> str:
        """Why the process is gone."""
        self._process.join(_GRACE)
        code = self._process.exitcode
        last = self._last_line()
        self.end()
        if code is None:
            return f"the connection to the process was lost{last}"
        if code == -signal.SIGKILL:
            return "killed (signal 9), which is what happens where memory runs out"
        if code < 0:
            return f"crashed (signal {-code}, {signal.Signals(-code).name}){last}"
        return f"the process ended with exit code {code}{last}"

    def _last_line(self) -> str:
        assert self._log is not None
        lines = [line for line in self._log.read().splitlines() if line.strip()]
        return f": {lines[-1].strip()[:300]}" if lines else ""

    def _forget(self) -> None:
        if self._connection is not None:
            self._connection.close()
        if self._log is not None:
            self._log.close()
        self._process = self._connection = self._log = None


def _serve(connection: Connection, threads: int | None, log: str) -> None:
    """What the child does: one call after the other, until the other side is gone."""
    for sign in (signal.SIGTERM, *FROM_TERMINAL):
        signal.signal(sign, signal.SIG_IGN)  # the worker decides what they end
    threading.Thread(target=_die_with_parent, daemon=True).start()
    _write_to(log)
    try:
        target: Target = pickle.loads(connection.recv_bytes())
    except Exception as error:
        connection.send(_in_words(error)[0])
        return
    if threads is not None:
        with suppress(ImportError):
            import torch

            torch.set_num_threads(threads)

    def report(step: int, score: float) -> None:
        connection.send(("report", int(step), float(score)))
        if connection.recv():
            raise Stopped

    connection.send(None)
    while message := connection.recv():
        (argument,) = message
        try:
            answer: tuple[Any, ...] = ("done", target(argument, report))
        except (Stopped, optuna.TrialPruned):
            answer = ("stopped",)
        except Exception as error:
            answer = ("failed", *_in_words(error))
        try:
            connection.send(answer)
        except (pickle.PicklingError, TypeError, AttributeError) as error:
            connection.send(("failed", f"what was returned cannot be sent back: {error}", False))


def _in_words(error: Exception) -> tuple[str, bool]:
    """What happened, and whether the process had better not be used again."""
    text = " ".join(str(error).split())[:500]
    if isinstance(error, MemoryError) or "out of memory" in text.lower() or "can't allocate memory" in text.lower():
        return f"out of memory: {text}" if text else "out of memory", True
    return f"{type(error).__name__}: {text}", "CUDA" in text


def _die_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    wait([parent.sentinel])
    os._exit(1)


def _write_to(log: str) -> None:
    """Libraries talk: into a file, whose last line tells what a crash said."""
    file = os.open(log, os.O_WRONLY | os.O_APPEND)
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os.dup2(file, 1)
    os.dup2(file, 2)
    os.close(file)
