"""How far a study is, in a line that is shown while it runs."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

from optuna.study import Study
from optuna.trial import TrialState
from rich.console import Console
from rich.markup import escape

from .tickets import count_tickets, count_used, repeated

_GLANCE = 1.0


@contextmanager
def watched(study: Study, console: Console, title: str) -> Iterator[None]:
    """How far the study is, while the block runs: a line that is redrawn on a terminal, a new one elsewhere."""
    if console.quiet:
        yield
        return
    started, over = time.monotonic(), threading.Event()
    before = last = count_used(study)

    def text() -> str:
        return progress(study, title, time.monotonic() - started, before)

    def say() -> None:
        console.print(text(), highlight=False, markup=False, soft_wrap=True)

    def say_news() -> None:
        nonlocal last
        if (now := count_used(study)) != last:
            last = now
            say()

    def watch(show: Callable[[], None]) -> None:
        while not over.wait(_GLANCE):
            show()

    with ExitStack() as shown:
        # Callbacks run in reverse order: the spinner's line is removed before the line that stays is written.
        shown.callback(say if console.is_terminal else say_news)
        show = say_news
        if console.is_terminal:
            status = shown.enter_context(console.status(escape(text())))
            show = lambda: status.update(escape(text()))  # noqa: E731
        watcher = threading.Thread(target=watch, args=(show,), daemon=True)
        watcher.start()
        try:
            yield
        finally:
            over.set()
            watcher.join()


def progress(study: Study, title: str, seconds: float, finished_before: int = 0) -> str:
    """One line: trials done, the best, and how long the rest will take at the pace so far.

    Args:
        study: the study.
        title: what its trials are.
        seconds: for how long this call has been running.
        finished_before: tickets that were used up when it began.
    """
    trials = study.get_trials(deepcopy=False)
    done, total = count_used(study), count_tickets(study)
    parts = [f"{title}: {done}/{total}"]
    complete = [trial for trial in trials if trial.state == TrialState.COMPLETE]
    if complete:
        best = max(complete, key=lambda trial: trial.value or 0.0)
        parts.append(f"best {best.value:.2f} (trial {best.number})")
    again = repeated(trials)
    for state, word in ((TrialState.PRUNED, "pruned"), (TrialState.FAIL, "failed")):
        count = sum(trial.state == state and trial.number not in again for trial in trials)
        if count:
            parts.append(f"{count} {word}")
    if finished_before < done < total:
        left = seconds / (done - finished_before) * (total - done)
        parts.append(f"about {in_words(left)} left")
    if finished_before:
        parts.append(f"{finished_before} kept from before")
    return ", ".join(parts)


def in_words(seconds: float) -> str:
    """A time in the unit that suits it."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 90 * 60 else f"{seconds / 3600:.0f} h"
