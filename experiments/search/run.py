"""Does the Thompson sampler come closer to the best configuration than Optuna's samplers with the same trials?

    python -m experiments.search.run            # everything; writes beside this file
    python -m experiments.search.run --quick    # under a minute, into quick/; says nothing

README.md beside this file states claim, set-up and result. A run that was broken off goes on where it stopped: what is
in results.csv is not run again.
"""

from __future__ import annotations

import csv
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import optuna
from matplotlib.figure import Figure
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.samplers import BaseSampler, GPSampler, RandomSampler, TPESampler

from bioadapt.search import ThompsonSampler
from bioadapt.search.thompson.features import FeatureMap
from experiments import ledger
from experiments.ledger import COLOURS, Claim, markdown, parser, publish

HERE = Path(__file__).resolve().parent
TRIALS, QUICK_TRIALS = 300, 60
MARKS = (25, 50, 100, 150, 200, 300)
SEEDS = 20
THOMPSON, NAMED, GP = "Thompson", "Thompson, named features", "Gaussian process"
Params = Mapping[str, Any]


# -- planted problems --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Problem:
    """Something to maximise: scores are ``value`` plus normal noise; without noise, random ones have mean 0 and sd 1.

    Attributes:
        best: the highest value; of the structured problem, the highest that a long local search finds.
        features: what the sampler is told of the structure.
    """

    space: dict[str, BaseDistribution]
    value: Callable[[Params], float]
    noise: float
    best: float
    features: FeatureMap | None = None


def levels(seed: int, *, pairs: int, noise: float, relevant: int = 8, irrelevant: int = 0) -> Problem:
    """Parameters of four levels with normal effects, a few pairs of parameters that interact, and binary decoys."""
    generator = np.random.default_rng([seed, relevant, pairs])
    main = generator.normal(size=(relevant, 4))
    chosen = list(combinations(range(relevant), 2))
    joint = {chosen[i]: generator.normal(size=(4, 4)) for i in generator.permutation(len(chosen))[:pairs]}
    everything = np.indices((4,) * relevant)
    values = sum(main[i][level] for i, level in enumerate(everything))
    values = values + sum((table[everything[i], everything[j]] for (i, j), table in joint.items()), 0.0)
    values = (values - values.mean()) / values.std()
    names = [f"x{i}" for i in range(relevant)]
    space: dict[str, BaseDistribution] = {name: CategoricalDistribution(range(4)) for name in names}
    space |= {f"z{i}": CategoricalDistribution([0, 1]) for i in range(irrelevant)}
    return Problem(space, lambda p: float(values[tuple(p[name] for name in names)]), noise, float(values.max()))


SLOTS, PRIMITIVES, SITES, STRENGTHS = 4, 50, 6, (-1.0, 0.0, 1.0)
NONE = "none"


def stack_features(params: Params) -> dict[str | tuple[str, ...], float]:
    """A stack of up to four primitives: which, where, how strong, in which company and order."""
    found: dict[str | tuple[str, ...], float] = {}
    present: list[str] = []
    for slot in range(SLOTS):
        name = params[f"primitive {slot}"]
        if name == NONE:
            continue
        place = f"{name} @ {params[f'site {slot}']}"
        found[place] = found.get(place, 0.0) + 0.5
        found[f"{name} strength"] = found.get(f"{name} strength", 0.0) + params[f"strength {slot}"] / 3
        found[name] = 1.0
        present.extend([name] if name not in present else [])
    for first, second in combinations(present, 2):
        pair = (first, second) if first < second else (second, first)
        found[pair] = 1.0
        found["before", *pair] = 0.5 if pair[0] == first else -0.5
    return found


def structured(seed: int) -> Problem:
    """What a search over adapters looks like; effects of primitives, sites, strengths, pairs and order are planted."""
    generator = np.random.default_rng([seed, 99])
    names = [f"p{i:02}" for i in range(PRIMITIVES)]
    main, slope = generator.normal(0, 0.6, PRIMITIVES), generator.normal(0, 0.2, PRIMITIVES)
    site = generator.normal(0, 0.3, (PRIMITIVES, SITES))
    pair, order = generator.normal(0, [[[0.15]], [[0.08]]], (2, PRIMITIVES, PRIMITIVES))

    space: dict[str, BaseDistribution] = {}
    for slot in range(SLOTS):
        space[f"primitive {slot}"] = CategoricalDistribution([NONE, *names])
        space[f"site {slot}"] = CategoricalDistribution(range(SITES))
        space[f"strength {slot}"] = CategoricalDistribution(STRENGTHS)

    def raw(params: Params) -> float:
        value, present = 0.0, []
        for slot in range(SLOTS):
            if params[f"primitive {slot}"] == NONE:
                continue
            p = int(params[f"primitive {slot}"][1:])
            if p not in present:  # a primitive that is there twice adds nothing
                value += main[p] + site[p, params[f"site {slot}"]] + slope[p] * params[f"strength {slot}"]
                present.append(p)
        for first, second in combinations(present, 2):
            a, b = sorted((first, second))
            value += pair[a, b] + (order[a, b] if first == a else -order[a, b])
        return value

    drawn = [{name: d.choices[generator.integers(len(d.choices))] for name, d in space.items()} for _ in range(1000)]
    values = np.array([raw(params) for params in drawn])
    middle, sd = values.mean(), values.std()
    starts = [drawn[i] for i in np.argsort(-values)[:20]]
    best = max(_climbed(raw, space, start) for start in starts)
    return Problem(space, lambda p: float((raw(p) - middle) / sd), 0.3, float((best - middle) / sd), stack_features)


def _climbed(value: Callable[[Params], float], space: Mapping[str, Any], start: Params) -> float:
    """Coordinate ascent until nothing improves."""
    params, height = dict(start), -np.inf
    while (now := value(params)) > height:
        height = now
        for name, distribution in space.items():
            params = max(({**params, name: choice} for choice in distribution.choices), key=value)
    return height


def cliff(seed: int) -> Problem:
    """A training that is tuned: hardly any slope along its rate up to where it diverges, and then a long way down.

    The rest is four parameters of four levels with two pairs, and a rank of which a little more is a little better.
    Random configurations that do not diverge have about sd 1.
    """
    generator = np.random.default_rng([seed, 98])
    rest = levels(seed, pairs=2, noise=0.3, relevant=4)
    best_rate = generator.uniform(-4.0, -2.5)  # log10, as are the edge and what follows
    edge = best_rate + generator.uniform(0.3, 1.0)
    space = {
        **rest.space,
        "rate": FloatDistribution(1e-5, 1e-1, log=True),
        "rank": IntDistribution(1, 64, log=True),
        "decay": FloatDistribution(0.0, 0.3),  # no effect
    }

    def value(params: Params) -> float:
        rate = np.log10(params["rate"])
        fall = 5.0 + 10.0 * (rate - edge) if rate > edge else 0.0
        return float(rest.value(params) - 0.3 * (rate - best_rate) ** 2 - 0.5 / params["rank"] - fall)

    return Problem(space, value, 0.3, rest.best - 0.5 / 64)


PROBLEMS: dict[str, Callable[[int], Problem]] = {
    "additive": lambda seed: levels(seed, pairs=0, noise=0.3),
    "interactions": lambda seed: levels(seed, pairs=8, noise=0.3),
    "noisy": lambda seed: levels(seed, pairs=4, noise=1.0),
    "60 decoys": lambda seed: levels(seed, pairs=3, noise=0.3, relevant=6, irrelevant=60),
    "cliff": cliff,
    "structured": structured,
}


# -- searching ---------------------------------------------------------------------------------------------------------


def samplers(problem: Problem, seed: int) -> dict[str, Callable[[], BaseSampler]]:
    """Ours and Optuna's, each with its own defaults."""
    all_samplers: dict[str, Callable[[], BaseSampler]] = {
        THOMPSON: lambda: ThompsonSampler(seed=seed),
        "random": lambda: RandomSampler(seed=seed),
        "TPE": lambda: TPESampler(seed=seed),
        "TPE univariate": lambda: TPESampler(seed=seed, multivariate=False),
        GP: lambda: GPSampler(seed=seed),
    }
    if problem.features is not None:
        all_samplers[NAMED] = lambda: ThompsonSampler(seed=seed, features=problem.features)
    return all_samplers


def regrets(problem: Problem, sampler: BaseSampler, seed: int, trials: int) -> tuple[list[float], float, float]:
    """After each trial: the best value less the noise-free value of the configuration with the best score so far.

    Also such a difference for the configuration that `ThompsonSampler.recommend` names when it has seen all trials,
    whoever proposed them; and the smallest of any configuration that was tried, whatever its score.
    """
    noise = np.random.default_rng([seed, 7]).normal(0, problem.noise, trials)
    values: list[float] = []
    scores: list[float] = []
    course: list[float] = []

    study = optuna.create_study(direction="maximize", sampler=sampler)
    for error in noise:
        trial = study.ask(problem.space)
        values.append(problem.value(trial.params))
        scores.append(values[-1] + error)
        course.append(problem.best - values[int(np.argmax(scores))])
        study.tell(trial, scores[-1])
    own = isinstance(sampler, ThompsonSampler)
    model = sampler if own else ThompsonSampler(seed=seed, features=problem.features)
    return course, problem.best - values[model.recommend(study).number], problem.best - max(values)


def run_seed(
    seed: int,
    quick: bool = False,
    slow: bool = False,
    known: Sequence[Mapping[str, Any]] = (),
    keep: Callable[[dict[str, Any]], object] = print,
) -> list[dict[str, Any]]:
    """Every problem and sampler that is not known yet with this seed; each row goes to ``keep`` as soon as it is there.

    The seed varies the planted effects, the noise and the sampler's own draws. ``slow``: the Gaussian process, in the
    place of the others.
    """
    done = {(row["problem"], row["sampler"], row["seed"]) for row in known}
    trials = QUICK_TRIALS if quick else TRIALS
    rows = []
    for name, make in PROBLEMS.items():
        problem = make(seed)
        for sampler, build in samplers(problem, seed).items():
            if (name, sampler, seed) in done or slow != (sampler == GP):
                continue
            began = time.process_time()
            course, recommended, tried = regrets(problem, build(), seed, trials)
            spent = time.process_time() - began
            at_marks = {f"regret {mark}": round(course[min(mark, trials) - 1], 6) for mark in MARKS}
            row = {"problem": name, "sampler": sampler, "seed": seed, **at_marks}
            row |= {"recommended": round(recommended, 6), "tried": round(tried, 6), "seconds": round(spent, 2)}
            rows.append(row)
            keep(row)
    return rows


# -- what came out -----------------------------------------------------------------------------------------------------

LAST, RECOMMENDED = f"regret {MARKS[-1]}", "recommended"


def paired(
    rows: Sequence[Mapping[str, Any]], problem: str, first: str, second: str, of: str = LAST, against: str = LAST
) -> list[float]:
    """One final regret of the first sampler less one of the second, for each seed that both have."""
    ours = ledger.by_seed(rows, of, problem=problem, sampler=first)
    return ledger.paired(ours, ledger.by_seed(rows, against, problem=problem, sampler=second))


# What is compared: how the sentence goes on, our regret, the rival's.
COMPARED = (
    ("recommends a better configuration than the best trial of", RECOMMENDED, LAST),
    ("has a better best trial than", LAST, LAST),
    ("has trials from which our model recommends better than from those of", RECOMMENDED, RECOMMENDED),
)


def claims(rows: Sequence[Mapping[str, Any]]) -> list[Claim]:
    """Three for each problem and rival; ours is told the features where the problem has some."""
    found = []
    for problem in dict.fromkeys(row["problem"] for row in rows):
        names = list(dict.fromkeys(row["sampler"] for row in rows if row["problem"] == problem))
        ours = NAMED if NAMED in names else THOMPSON
        for words, of, against in COMPARED:
            for rival in names:
                if rival not in (NAMED, THOMPSON):
                    gaps = paired(rows, problem, ours, rival, of, against)
                    found.append(Claim(f"{problem}: {ours} {words} {rival}", "difference of regret, sd", gaps, "below"))
        if ours == NAMED:
            gaps = paired(rows, problem, NAMED, THOMPSON, RECOMMENDED, RECOMMENDED)
            text = f"{problem}: naming the features brings {THOMPSON} closer to the best"
            found.append(Claim(text, "difference of regret, sd", gaps, "below"))
    return found


def tables(rows: Sequence[Mapping[str, Any]]) -> str:
    """Median regrets and processor time, and the seeds on which ours lost."""
    lines = []
    for problem in dict.fromkeys(row["problem"] for row in rows):
        own = [row for row in rows if row["problem"] == problem]
        names = list(dict.fromkeys(row["sampler"] for row in own))
        ours = NAMED if NAMED in names else THOMPSON
        for name in names:
            mine = [row for row in own if row["sampler"] == name]
            medians = [f"{np.median([row[f'regret {mark}'] for row in mine]):.2f}" for mark in MARKS]
            gaps = np.array(paired(rows, problem, ours, name, RECOMMENDED, LAST))
            count = f"{(gaps < 0).sum()} / {(gaps == 0).sum()} / {(gaps > 0).sum()}" if name != ours else "-"
            seconds = f"{np.median([row['seconds'] for row in mine]):.1f}"
            ends = [f"{np.median([row[end] for row in mine]):.2f}" for end in (RECOMMENDED, "tried")]
            lines.append([problem, name, len(mine), *medians, *ends, count, seconds])
    head = ["problem", "sampler", "seeds", *(f"regret after {mark}" for mark in MARKS)]
    intro = (
        "Regret in standard deviations of a random configuration's value, median over seeds; after so many trials, of "
        "the best observed score. Recommended: of the configuration that our model recommends from all trials, whoever "
        "proposed them. Best tried: the smallest of any configuration in the study, had the scores no noise. Won, "
        "tied, lost: seeds on which what ours recommends (with named features where there are some) is better than "
        "this sampler's best trial, as good, or worse. Seconds: processor time of a study. "
        f"Optuna {optuna.__version__}."
    )
    return "\n\n".join([intro, markdown([*head, "recommended", "best tried", "won / tied / lost", "seconds"], lines)])


def draw(rows: Sequence[Mapping[str, Any]]) -> Figure:
    """Median regret against trials, one panel for each problem, with the quartiles of the seeds for ours."""
    problems = list(dict.fromkeys(row["problem"] for row in rows))
    names = list(dict.fromkeys(row["sampler"] for row in rows))
    figure = Figure(figsize=(3.4 * len(problems), 4.2), layout="constrained")
    for axes, problem in zip(figure.subplots(1, len(problems), squeeze=False)[0], problems, strict=True):
        for name, colour, marker in zip(names, COLOURS, "os^vDPX", strict=False):
            mine = [row for row in rows if row["problem"] == problem and row["sampler"] == name]
            if mine:
                curves = np.array([[row[f"regret {mark}"] for mark in MARKS] for row in mine])
                axes.plot(MARKS, np.median(curves, axis=0), color=colour, marker=marker, label=name)
                if name in (THOMPSON, NAMED):
                    axes.fill_between(MARKS, *np.quantile(curves, (0.25, 0.75), axis=0), color=colour, alpha=0.15)
        axes.set_title(problem)
        axes.set_xlabel("trials")
        axes.set_ylim(bottom=0)
    figure.axes[0].set_ylabel("regret, sd of random values (median)")
    handles = {
        label: line for axes in figure.axes for line, label in zip(*axes.get_legend_handles_labels(), strict=True)
    }
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=len(handles))
    return figure


# -- command line ------------------------------------------------------------------------------------------------------


def read_rows(path: Path) -> list[dict[str, Any]]:
    if not path.is_file():
        return []
    with path.open(encoding="utf-8", newline="") as file:
        return [
            {name: value if name in ("problem", "sampler") else float(value) for name, value in row.items()}
            | {"seed": int(row["seed"])}
            for row in csv.DictReader(file)
        ]


def append_row(path: Path, row: Mapping[str, Any]) -> None:
    fresh = not path.is_file()
    with path.open("a", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(row), lineterminator="\n")
        if fresh:
            writer.writeheader()
        writer.writerow(row)
    print(row["problem"], row["sampler"], row["seed"], row[LAST], row["seconds"], sep="\t", flush=True)


def main(argv: list[str] | None = None) -> None:
    given = parser(__doc__, seeds=SEEDS).parse_args(argv)
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
    output = HERE / "quick" if given.quick else HERE
    output.mkdir(exist_ok=True)
    path = output / "results.csv"
    for slow in (False,) if given.quick else (False, True):
        for seed in range(1 if given.quick else given.seeds):
            run_seed(seed, given.quick, slow, read_rows(path), lambda row: append_row(path, row))
        rows = sorted(read_rows(path), key=lambda row: (list(PROBLEMS).index(row["problem"]), row["seed"]))
        publish(HERE, rows, claims(rows), tables(rows), draw(rows), quick=given.quick)


if __name__ == "__main__":
    main()
