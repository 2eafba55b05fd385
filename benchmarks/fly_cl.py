"""What Fly-CL's head costs next to scikit-learn's RidgeCV on the same expanded features.

    python benchmarks/fly_cl.py                              # full size; writes results/fly-cl-<machine>.csv
    python benchmarks/fly_cl.py --units 2000 --samples 2000  # a few seconds

The task: Gaussian classes in 384 dimensions, whose means are themselves Gaussian. `FlyCLClassifier.fit` is timed from
features to weights: expansion, winners, Gram matrix, choice of the penalty, solution. RidgeCV gets the expanded
features ready made, the same eight penalties and no intercept, and its time alone is taken. Then ten tasks of a tenth
of the classes and samples each are learned one after the other; what the last costs, with the solution after it, is set
beside what the first costs.

Full size takes some minutes of processor time and about 6 GB. Seconds are the process's own processor time with one
thread, and by the wall clock with more.

Exit status 1 where a bar is missed: fit below RidgeCV's time, accuracy within half a point of RidgeCV's, the last task
at most a quarter dearer than the first.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass

import numpy as np
import torch
from _measure import RESULTS, clock_of, machine_name, render, write_csv
from numpy.typing import NDArray
from sklearn.linear_model import RidgeCV
from threadpoolctl import threadpool_limits

from bioadapt.circuits.fly_cl import PENALTIES, FlyCLClassifier

FEATURES, CLASSES, TASKS = 384, 100, 10
SPREAD = 0.22  # of the class means, where the noise has 1: hard enough that accuracies differ


@dataclass
class Row:
    """One line of the table; ``ratio`` is to RidgeCV, or to the first task."""

    what: str
    seconds: float
    ratio: float = 1.0
    test_accuracy: float | None = None
    penalty: float | None = None


def samples(count: int, seed: int) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """Features (count, 384) and labels, all classes alike."""
    means = SPREAD * np.random.default_rng(0).normal(size=(CLASSES, FEATURES))
    labels = np.arange(count) % CLASSES
    return means[labels] + np.random.default_rng(seed).normal(size=(count, FEATURES)), labels


def fits(units: int, count: int) -> list[Row]:
    """The head and RidgeCV on the same samples."""
    clock = clock_of("cpu")
    X, y = samples(count, 1)
    Xt, yt = samples(5000, 2)
    head = FlyCLClassifier(units)
    start = clock()
    head.fit(X, y)
    own = clock() - start
    accuracy, penalty = head.score(Xt, yt), head.penalty_
    codes, test_codes = head.codes(X), head.codes(Xt)
    del head  # a gigabyte or two
    rival = RidgeCV(alphas=PENALTIES * np.square(codes).sum() / units, fit_intercept=False)
    start = clock()
    rival.fit(codes, np.eye(CLASSES)[y])
    theirs = clock() - start
    return [
        Row("FlyCLClassifier.fit", own, own / theirs, accuracy, penalty),
        Row("RidgeCV.fit on its codes", theirs, 1.0, np.mean(rival.predict(test_codes).argmax(1) == yt), rival.alpha_),
    ]


def tasks(units: int, count: int) -> list[Row]:
    """The first and the last of ten tasks of one size."""
    clock = clock_of("cpu")
    X, y = samples(count, 1)
    head, rows = FlyCLClassifier(units), []
    for task in range(TASKS):
        mine = y * TASKS // CLASSES == task
        start = clock()
        head.partial_fit(X[mine], y[mine], classes=np.arange(CLASSES))
        if task in (0, TASKS - 1):
            _ = head.coef_  # computed when asked for
            rows.append(Row(f"task {task + 1} of {TASKS}", clock() - start))
            rows[-1].ratio = rows[-1].seconds / rows[0].seconds
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--units", type=int, default=10_000)
    parser.add_argument("--samples", type=int, default=10_000)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--machine", default=None, help="name of the results file")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    with threadpool_limits(options.threads):
        FlyCLClassifier(100).fit(*samples(200, 0))  # libraries start
        rows = [*fits(options.units, options.samples), *tasks(options.units, options.samples)]
    for row in rows:
        row.seconds, row.ratio = round(row.seconds, 2), round(row.ratio, 3)
        row.penalty = row.penalty and float(f"{row.penalty:.6g}")
    print(render(rows))
    conditions = {"units": options.units, "samples": options.samples, "features": FEATURES, "threads": options.threads}
    if (options.units, options.samples) == (10_000, 10_000):
        write_csv(RESULTS / f"fly-cl-{options.machine or machine_name()}.csv", rows, conditions)
    return bars(rows)


def bars(rows: list[Row]) -> int:
    """0 where all bars are met; says which are not."""
    own, rival, _, last = rows
    gap = own.test_accuracy - rival.test_accuracy
    found = {
        f"fit takes {own.ratio:.2f} of RidgeCV's time (below 1)": own.ratio < 1,
        f"accuracy differs by {100 * gap:+.2f} points (within 0.5)": abs(gap) <= 0.005,
        f"the last task takes {last.ratio:.2f} of the first's time (at most 1.25)": last.ratio <= 1.25,
    }
    for text, met in found.items():
        print(f"{'met   ' if met else 'MISSED'} {text}")
    return 0 if all(found.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
