"""What a proposal of the Thompson sampler costs, next to Optuna's TPE, Gaussian process and random search.

    python benchmarks/sampler.py                       # everything; writes results/sampler-<machine>.csv
    python benchmarks/sampler.py --only named --only stacks
    python benchmarks/sampler.py --quick               # few trials and proposals: a trial of the machinery

A study in memory gets so many finished random trials; then proposals are asked for and told a random score, one after
the other, in one thread. `first_ms` is the first one of a sampler that has not seen the study; the mean and the largest
of the others follow (of `proposals` of them: those of ours in which scales are judged afresh are among them). Times are
processor time. `kept_kib` is what stays allocated per proposal once a few have been made, the trial that it becomes
included: random search shows what that takes. `peak_mib` is the most that is allocated during a proposal beyond what
was there before.

Subjects: `pairs`, 17 binary parameters (153 features: each, and all pairs); `wide`, 150 binary parameters (650: each,
and 500 pairs); `named`, the same with 150 features that the user names; `numbers`, 17 numbers between 0 and 1 (374:
line, bend and 12 steps of each, and all pairs); `many numbers`, 150 of them (1,400: with fewer steps, and 500 pairs);
`stacks`, 6 slots of 66 primitives, 27 places and 3 strengths with named features of primitives, places, strengths,
pairs and order. The Gaussian process is measured on `pairs` alone, with three proposals.
"""

from __future__ import annotations

import argparse
import gc
import sys
import time
import tracemalloc
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import numpy as np
import optuna
import torch
from _measure import RESULTS, machine_name, render, write_csv
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution
from optuna.samplers import BaseSampler, GPSampler, RandomSampler, TPESampler

import bioadapt
from bioadapt.search import FeatureMap, ThompsonSampler

Params = Mapping[str, Any]
# Of a proposal on `pairs` and on `named` with 1,000 finished trials, in the mean.
BAR_MS, BARRED = 50.0, ("pairs", "named")
_BINS = 8


@dataclass(frozen=True)
class Subject:
    """A search space and, where there is one, the user's map to features."""

    space: dict[str, BaseDistribution]
    features: FeatureMap | None = None


@dataclass
class Row:
    """One line of the table and of the CSV."""

    subject: str
    sampler: str
    trials: int
    first_ms: float
    mean_ms: float
    largest_ms: float
    proposals: int
    kept_kib: float | None
    peak_mib: float | None


def subjects() -> dict[str, Subject]:
    binary, number = CategoricalDistribution([0, 1]), FloatDistribution(0.0, 1.0)
    wide: dict[str, BaseDistribution] = {f"x{i}": binary for i in range(150)}
    stacks: dict[str, BaseDistribution] = {}
    for slot in range(6):
        stacks[f"primitive {slot}"] = CategoricalDistribution(["none", *(f"p{i:02}" for i in range(65))])
        stacks[f"place {slot}"] = CategoricalDistribution(range(27))
        stacks[f"strength {slot}"] = CategoricalDistribution([-1.0, 0.0, 1.0])
    return {
        "pairs": Subject({f"x{i}": binary for i in range(17)}),
        "wide": Subject(wide),
        "named": Subject(wide, lambda params: {name: 1.0 for name, value in params.items() if value}),
        "numbers": Subject({f"x{i}": number for i in range(17)}),
        "many numbers": Subject({f"x{i}": number for i in range(150)}),
        "stacks": Subject(stacks, stack),
    }


def stack(params: Params) -> dict[str | tuple[str, ...], float]:
    """Which primitives, where, how strong, in which company and order."""
    found: dict[str | tuple[str, ...], float] = {}
    for slot in range(6):
        name = params[f"primitive {slot}"]
        if name != "none":
            found[name] = 1.0
            found[f"{name} @ {params[f'place {slot}']}"] = 0.5
            found[f"{name} strength"] = params[f"strength {slot}"]
    present = [name for name in found if isinstance(name, str) and " " not in name]
    for pair in combinations(present, 2):
        found[min(pair), max(pair)] = 1.0
        found["before", min(pair), max(pair)] = 0.5 if pair[0] < pair[1] else -0.5
    return found


def study_of(subject: Subject, count: int, sampler: BaseSampler) -> optuna.Study:
    """So many finished trials; scores depend on a third of the parameters' values."""
    generator = np.random.default_rng(count)
    worth = {name: generator.normal(size=_kinds(d)) for name, d in list(subject.space.items())[::3]}
    trials = []
    for _ in range(count):
        drawn = {name: int(generator.integers(_kinds(d))) for name, d in subject.space.items()}
        score = sum(worth[name][drawn[name]] for name in worth) + generator.normal()
        params = {
            name: d.choices[drawn[name]]
            if isinstance(d, CategoricalDistribution)
            else (drawn[name] + generator.random()) / _BINS
            for name, d in subject.space.items()
        }
        trials.append(optuna.create_trial(params=params, distributions=subject.space, value=float(score)))
    study = optuna.create_study(direction="maximize", sampler=sampler)
    study.add_trials(trials)
    return study


def _kinds(distribution: BaseDistribution) -> int:
    """Of values that are worth the same: a number's range is parted into some."""
    return len(distribution.choices) if isinstance(distribution, CategoricalDistribution) else _BINS


def proposed(study: optuna.Study, subject: Subject, generator: np.random.Generator) -> float:
    """Milliseconds of one proposal, which then gets a score."""
    start = time.process_time()
    trial = study.ask(dict(subject.space))
    spent = time.process_time() - start
    study.tell(trial, float(generator.normal()))
    return 1e3 * spent


def measure(
    name: str, subject: Subject, sampler: str, make: Callable[[], BaseSampler], count: int, proposals: int
) -> Row:
    generator = np.random.default_rng(0)
    study = study_of(subject, count, make())
    gc.collect()
    first, *others = (proposed(study, subject, generator) for _ in range(proposals + 1))
    kept = peak = None
    if sampler != "gp":
        kept, peak = memory(study, subject, generator, max(proposals // 2, 2))
    return Row(
        subject=name,
        sampler=sampler,
        trials=count,
        first_ms=round(first, 1),
        mean_ms=round(float(np.mean(others)), 1),
        largest_ms=round(max(others), 1),
        proposals=len(others),
        kept_kib=kept,
        peak_mib=peak,
    )


def memory(
    study: optuna.Study, subject: Subject, generator: np.random.Generator, proposals: int
) -> tuple[float, float]:
    """KiB that stay after a proposal, in the mean, and MiB at the peak of one."""
    tracemalloc.start()
    for _ in range(2):
        proposed(study, subject, generator)
    gc.collect()
    before = tracemalloc.get_traced_memory()[0]
    tracemalloc.reset_peak()
    for _ in range(proposals):
        proposed(study, subject, generator)
    peak = tracemalloc.get_traced_memory()[1]
    gc.collect()
    after = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    return round((after - before) / proposals / 2**10, 1), round((peak - before) / 2**20, 1)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--only", action="append", choices=list(subjects()), help="measure this subject; repeatable")
    parser.add_argument("--quick", action="store_true", help="30 trials, 3 proposals")
    parser.add_argument("--machine", default=None, help="name of the CSV (default: processor, cores, torch version)")
    return parser.parse_args()


def main() -> int:
    given = arguments()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    torch.set_num_threads(1)
    counts, proposals = ((30,), 3) if given.quick else ((100, 300, 1000), 25)
    rows = []
    for name, subject in subjects().items():
        if given.only and name not in given.only:
            continue
        makers: dict[str, Callable[[], BaseSampler]] = {
            "thompson": lambda subject=subject: ThompsonSampler(seed=0, features=subject.features),
            "tpe": lambda: TPESampler(seed=0),
            "random": lambda: RandomSampler(seed=0),
        }
        if name == "pairs":
            makers["gp"] = lambda: GPSampler(seed=0)
        for count in counts:
            for sampler, make in makers.items():
                rows.append(measure(name, subject, sampler, make, count, 3 if sampler == "gp" else proposals))
                print(render(rows[-1:]).splitlines()[-1], file=sys.stderr, flush=True)
    print(render(rows))
    slow = [
        row
        for row in rows
        if (row.sampler, row.trials) == ("thompson", 1000) and row.subject in BARRED and row.mean_ms >= BAR_MS
    ]
    for row in slow:
        print(f"{row.subject}: {row.mean_ms} ms per proposal, which is not below {BAR_MS:g}")
    if given.only or given.quick:
        print("Part of a run: no CSV is written.")
    else:
        conditions = {
            "optuna": optuna.__version__,
            "numpy": np.__version__,
            "bioadapt": bioadapt.__version__,
        }
        write_csv(RESULTS / f"sampler-{given.machine or machine_name()}.csv", rows, conditions)
    return int(bool(slow))


if __name__ == "__main__":
    sys.exit(main())
