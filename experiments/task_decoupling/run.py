"""Do adapters of several tasks disturb each other less when they are FlyLoRAs than when they are LoRAs?

    python -m experiments.task_decoupling.run --data-dir FOLDER            # everything; writes beside this file
    python -m experiments.task_decoupling.run --data-dir FOLDER --quick    # under a minute, into quick/; says nothing

README.md beside this file states claim, set-up and result. A run that was broken off goes on where it stopped: trained
adapters are kept in adapters/, scores in results.csv.
"""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import peft
import torch
from matplotlib.figure import Figure
from peft import LoraConfig, PeftModel, get_peft_model

from bioadapt import FlyLoraConfig
from bioadapt.evaluation import Interval, Task
from bioadapt.evaluation.training import Schedule, adapt, fit, trainable_parameters, without_progress_bars
from experiments import sentence_task
from experiments.ledger import COLOURS, Claim, markdown, over_seeds, paired, publish
from experiments.sentence_task import BATCH, PROJECTIONS, fresh_encoder, load_task, parser

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

HERE = Path(__file__).resolve().parent
TASKS = ("stsb", "qqp", "searchsnippets", "banking77")  # no text of one stands in another
RATES = (5e-4, 2e-3, 8e-3)
ROWS, QUICK_ROWS = (384, 300), (32, 16)  # training rows, and validation or test rows, per task
SINGLE, ZERO_SHOT = "single", "zero-shot"


@dataclass(frozen=True)
class Method:
    """A kind of adapter: its configuration for a seed, the ways to merge, the share of it that a token activates."""

    config: Callable[[int], peft.PeftConfig]
    ways: tuple[str, ...]
    activated: float = 1.0


METHODS = {
    "LoRA r=8": Method(lambda seed: LoraConfig(r=8, lora_alpha=16, target_modules=PROJECTIONS), ("cat",)),
    "LoRA r=32": Method(lambda seed: LoraConfig(r=32, lora_alpha=64, target_modules=PROJECTIONS), ("cat",)),
    "FlyLoRA r=32 k=8": Method(
        lambda seed: FlyLoraConfig(r=32, k=8, target_modules=PROJECTIONS, seed=seed),
        ("route", "dense"),
        activated=8 / 32,
    ),
}


@dataclass(frozen=True)
class Score:
    """A line of results.csv. ``way`` is zero-shot, single, or how the tasks' adapters were merged, with ``weight``."""

    train_rows: int
    held_out_rows: int
    method: str
    learning_rate: float
    seed: int
    way: str
    weight: float
    task: str
    split: str
    trained: int
    score: float


class Results:
    """The scores so far, in a file that grows line by line.

    Raises:
        ValueError: the file was made with other numbers of rows.
    """

    def __init__(self, path: Path, train_rows: int, held_out_rows: int) -> None:
        self.path, self.rows = path, (train_rows, held_out_rows)
        self.scores = read_scores(path) if path.is_file() else []
        if any((score.train_rows, score.held_out_rows) != self.rows for score in self.scores):
            raise ValueError(f"{path} was made with other numbers of rows: move it away to begin anew")

    def find(self, **wanted: Any) -> list[Score]:
        """The scores with these values."""
        return [s for s in self.scores if all(getattr(s, name) == value for name, value in wanted.items())]

    def add(self, score: Callable[[], float], trained: int = 0, **place: Any) -> None:
        """Take a score, unless it is known."""
        if self.find(**place):
            return
        one = Score(*self.rows, **place, trained=trained, score=score())
        self.scores.append(one)
        fresh = not self.path.is_file()
        with self.path.open("a", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, [field.name for field in fields(Score)], lineterminator="\n")
            if fresh:
                writer.writeheader()
            writer.writerow(record(one))
        print(f"{one.method:18} seed {one.seed} {one.learning_rate:g} {one.way:9} weight {one.weight:.2f} "
              f"{one.task:15} {one.split:10} {one.score:6.2f}", flush=True)  # fmt: skip


def record(score: Score) -> dict[str, str]:
    """The score as it stands in results.csv."""
    return {**{name: str(value) for name, value in asdict(score).items()}, "score": f"{score.score:.4f}"}


def read_scores(path: Path) -> list[Score]:
    kinds = {"int": int, "float": float, "str": str}
    with path.open(encoding="utf-8", newline="") as file:
        return [Score(**{f.name: kinds[f.type](row[f.name]) for f in fields(Score)}) for row in csv.DictReader(file)]


# -- adapters ----------------------------------------------------------------------------------------------------------


def trained(method: Method, rate: float, seed: int, tasks: dict[str, Task], folder: Path) -> SentenceTransformer:
    """An encoder with one adapter per task, named after it; each was trained alone, now or by the run that saved it."""
    encoder = fresh_encoder()
    model: PeftModel | None = None
    for number, (name, task) in enumerate(tasks.items()):
        own_seed = seed * len(tasks) + number  # every task draws random matrices of its own
        torch.manual_seed(own_seed)
        config = method.config(own_seed)
        if model is None:
            model = adapt(encoder, partial(get_peft_model, peft_config=config, adapter_name=name))
        else:
            model.add_adapter(name, config)
        model.set_adapter(name)
        if (folder / name / "adapter_config.json").is_file():
            peft.set_peft_model_state_dict(model, peft.load_peft_weights(str(folder / name), "cpu"), name)
        else:
            fit(encoder, task, Schedule(1.0, rate, BATCH, own_seed))
            model.save_pretrained(str(folder), selected_adapters=[name])
    return encoder.eval()


def merge(model: PeftModel, way: str, weight: float) -> str:
    """Add the adapter that stands for all of them, each with the same weight, and return its name."""
    names = list(model.peft_config)
    merged = f"{way}_{weight:g}".replace(".", "_")
    model.add_weighted_adapter(names, [weight] * len(names), merged, combination_type=way)
    return merged


def score_of(encoder: SentenceTransformer, adapter: str, task: Task, split: str) -> float:
    encoder[0].model.set_adapter(adapter)
    return sentence_task.score(encoder, task, split)


# -- the run -----------------------------------------------------------------------------------------------------------


class Experiment:
    """Choose a learning rate for each method by validation, then score every method and seed on the test rows once."""

    def __init__(self, tasks: dict[str, Task], results: Results, output: Path, rates: Sequence[float]) -> None:
        self.tasks, self.results, self.output, self.rates = tasks, results, output, rates
        self.weights = (1 / len(tasks), 1.0)

    def run(self, seeds: int) -> None:
        for name in METHODS:
            for rate in self.rates:
                self._validate(name, rate)
        chosen = choose_rates(self.results.scores)
        self._test_unadapted()
        for seed in range(seeds):
            for name in METHODS:
                self._test(name, chosen[name], seed)

    def _validate(self, name: str, rate: float) -> None:
        place = {"method": name, "learning_rate": rate, "seed": 0, "split": "validation"}
        if len(self.results.find(**place)) < len(self.tasks):
            self._score_tasks(self._encoder(name, rate, 0), None, 1.0, **place)

    def _test_unadapted(self) -> None:
        place = {"method": ZERO_SHOT, "learning_rate": 0.0, "seed": 0, "way": ZERO_SHOT, "weight": 0.0, "split": "test"}
        if len(self.results.find(**place)) < len(self.tasks):
            encoder = fresh_encoder()
            for name, task in self.tasks.items():
                self.results.add(partial(sentence_task.score, encoder, task, "test"), **place, task=name)

    def _test(self, name: str, rate: float, seed: int) -> None:
        place = {"method": name, "learning_rate": rate, "seed": seed, "split": "test"}
        settings = [(None, 1.0), *((way, weight) for way in METHODS[name].ways for weight in self.weights)]
        if len(self.results.find(**place)) == len(settings) * len(self.tasks):
            return
        encoder = self._encoder(name, rate, seed)
        for way, weight in settings:
            self._score_tasks(encoder, way, weight, **place)

    def _score_tasks(self, encoder: SentenceTransformer, way: str | None, weight: float, **place: Any) -> None:
        """Every task with its own adapter, or with the merged one."""
        model = encoder[0].model
        model.set_adapter(next(iter(self.tasks)))
        count = trainable_parameters(model)
        merged = None if way is None else merge(model, way, weight)
        for name, task in self.tasks.items():
            score = partial(score_of, encoder, merged or name, task, place["split"])
            self.results.add(score, count, **place, way=way or SINGLE, weight=weight, task=name)
        if merged is not None:
            model.set_adapter(next(iter(self.tasks)))
            model.delete_adapter(merged)

    def _encoder(self, name: str, rate: float, seed: int) -> SentenceTransformer:
        folder = self.output / "adapters" / f"{name.replace(' ', '-')}_{rate:g}_{seed}_{self.results.rows[0]}"
        with without_progress_bars():
            return trained(METHODS[name], rate, seed, self.tasks, folder)


def choose_rates(scores: Iterable[Score]) -> dict[str, float]:
    """For each method the learning rate with the best validation score, in the mean over the tasks."""
    by_rate: dict[str, dict[float, list[float]]] = {}
    for score in scores:
        if score.split == "validation":
            by_rate.setdefault(score.method, {}).setdefault(score.learning_rate, []).append(score.score)
    return {method: max(rates, key=lambda rate: np.mean(rates[rate])) for method, rates in by_rate.items()}


# -- what came out -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Line:
    """A line of summary.csv: what (single, merged, drop, difference of drops), of which adapters, with its interval."""

    what: str
    adapters: str
    weight: float
    task: str
    estimate: float
    low: float
    high: float
    seeds: int

    @property
    def interval(self) -> Interval:
        return Interval(self.estimate, self.low, self.high, 0.95)


Measured = dict[tuple[str, float], dict[str, dict[str, dict[int, float]]]]
MEAN = "mean of tasks"
DROP, DIFFERENCE = "drop", "difference of drops"


def label(method: str, way: str) -> str:
    return method if way == "cat" else f"{method.split()[0]} {way}"


def summarise(scores: Iterable[Score]) -> list[Line]:
    """Single and merged scores and their differences (drop = merged - single), and paired differences of drops."""
    found = measured(scores)
    lines = [
        _line(what, adapters, weight, task, list(values.values()))
        for (adapters, weight), of_what in found.items()
        for what, of_task in of_what.items()
        for task, values in of_task.items()
    ]
    for (first, second, weight), gaps in differences(found).items():
        lines.append(_line(DIFFERENCE, f"{first} - {second}", weight, MEAN, gaps))
    return lines


def measured(scores: Iterable[Score]) -> Measured:
    """(adapters, weight) -> what (single, merged, drop) -> task, the mean of tasks last -> seed -> points."""
    test = [score for score in scores if score.split == "test" and score.way != ZERO_SHOT]
    single = {(s.method, s.seed, s.task): s.score for s in test if s.way == SINGLE}
    found: Measured = {}
    for s in (score for score in test if score.way != SINGLE):
        alone = single[s.method, s.seed, s.task]
        of_what = found.setdefault((label(s.method, s.way), s.weight), {})
        for what, value in ((SINGLE, alone), ("merged", s.score), (DROP, s.score - alone)):
            of_what.setdefault(what, {}).setdefault(s.task, {})[s.seed] = value
    for of_task in (of_task for of_what in found.values() for of_task in of_what.values()):
        seeds = sorted(set.intersection(*(set(values) for values in of_task.values())))
        of_task[MEAN] = {seed: float(np.mean([values[seed] for values in of_task.values()])) for seed in seeds}
    return found


def differences(found: Measured) -> dict[tuple[str, str, float], list[float]]:
    """(FlyLoRA's way, LoRA, weight) -> FlyLoRA's drop minus LoRA's, one per seed that both have."""
    gaps = {}
    for (first, weight), ours in found.items():
        for (second, other_weight), theirs in found.items():
            if first.startswith("Fly") and not second.startswith("Fly") and weight == other_weight:
                gaps[first, second, weight] = paired(ours[DROP][MEAN], theirs[DROP][MEAN])
    return gaps


def _line(what: str, adapters: str, weight: float, task: str, values: list[float]) -> Line:
    interval = over_seeds(values)
    return Line(what, adapters, weight, task, interval.estimate, interval.low, interval.high, len(values))


def write_summary(lines: Sequence[Line], path: Path) -> None:
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, [field.name for field in fields(Line)], lineterminator="\n")
        writer.writeheader()
        for line in lines:
            numbers = {name: f"{getattr(line, name):.4f}" for name in ("estimate", "low", "high")}
            writer.writerow({**asdict(line), **numbers})


def claims(scores: Iterable[Score]) -> list[Claim]:
    """One per way of merging FlyLoRAs, rank of LoRA, and weight."""
    return [
        Claim(
            f"Merged with weight {weight:g} each, {first} loses less than {second}", "difference of drops, points", gaps
        )
        for (first, second, weight), gaps in differences(measured(scores)).items()
    ]


def tables(scores: Sequence[Score], lines: Sequence[Line]) -> str:
    """The tables for README.md."""
    chosen = choose_rates(scores)
    zero = {s.task: s.score for s in scores if s.way == ZERO_SHOT}
    by_place = {(line.what, line.adapters, line.weight, line.task): line for line in lines}
    sets = list(dict.fromkeys(line.adapters for line in lines if line.what == DROP))
    weights = sorted({line.weight for line in lines})
    seeds = max(line.seeds for line in lines)
    head = ["adapters", "trained per task", "of these active at a token", "learning rate", SINGLE]
    head += [f"{what}, weight {weight:g}" for weight in weights for what in ("merged", DROP)]
    rows = []
    for name in sets:
        method = next(m for m in METHODS if name in [label(m, way) for way in METHODS[m].ways])
        count = next(s.trained for s in scores if s.method == method)
        cells = [name, f"{count:,}", f"{round(count * METHODS[method].activated):,}", f"{chosen[method]:g}"]
        cells.append(f"{by_place[SINGLE, name, weights[0], MEAN].estimate:.2f}")
        for weight in weights:
            drop = by_place[DROP, name, weight, MEAN].interval
            cells += [f"{by_place['merged', name, weight, MEAN].estimate:.2f}", str(drop)]
        rows.append(cells)
    by_task = [["(zero-shot score)", "", *(f"{zero[task]:.2f}" for task in zero)]]
    for name in sets:
        for weight in weights:
            drops = [f"{by_place[DROP, name, weight, task].estimate:+.2f}" for task in zero]
            by_task.append([name, f"{weight:g}", *drops])
    intro = (
        f"{seeds} seeds; {scores[0].train_rows} training and at most {scores[0].held_out_rows} test rows per task. "
        f"Scores in percent, mean over the tasks; the zero-shot mean is {np.mean(list(zero.values())):.2f}. "
        f"peft {peft.__version__}."
    )
    return "\n\n".join([intro, markdown(head, rows), markdown(["drop by task", "weight", *zero], by_task)])


def draw(lines: Sequence[Line]) -> Figure:
    """Drops, and differences of drops, with intervals; one row of panels for each weight."""
    weights = sorted({line.weight for line in lines})
    figure = Figure(figsize=(12, 3.1 * len(weights)), layout="constrained")
    for weight, (left, right) in zip(weights, figure.subplots(len(weights), 2, squeeze=False), strict=True):
        own = [line for line in lines if line.weight == weight and line.task == MEAN]
        drops = [line for line in own if line.what == DROP]
        _intervals(left, drops, f"drop, points (weight {weight:g} for each task)", COLOURS)
        right.axvline(0.0, color="black", linewidth=0.8)
        gaps = [line for line in own if line.what == DIFFERENCE]
        _intervals(right, gaps, "difference of drops, points (right: FlyLoRA loses less)", ["black"] * len(gaps))
    figure.suptitle("Merged minus single-task score, mean of four tasks; bars are 95 % t intervals over seeds")
    return figure


def _intervals(axes: Any, lines: Sequence[Line], title: str, colours: Sequence[str]) -> None:
    for place, (line, colour) in enumerate(zip(lines, colours, strict=False)):
        reach = [[line.estimate - line.low], [line.high - line.estimate]]
        axes.errorbar([line.estimate], [place], xerr=reach, fmt="o", capsize=5, color=colour)
    axes.set_yticks(range(len(lines)), [line.adapters for line in lines])
    axes.invert_yaxis()
    axes.margins(y=0.2)
    axes.set_xlabel(title)


# -- command line ------------------------------------------------------------------------------------------------------


def main(argv: list[str] | None = None) -> None:
    given = parser(__doc__, seeds=5).parse_args(argv)
    output, rows = (HERE / "quick", QUICK_ROWS) if given.quick else (HERE, ROWS)
    output.mkdir(exist_ok=True)
    results = Results(output / "results.csv", *rows)
    rates, seeds = (RATES[1:2], 1) if given.quick else (RATES, given.seeds)
    tasks = {name: load_task(name, given.data_dir, *rows) for name in TASKS}
    Experiment(tasks, results, output, rates).run(seeds)
    lines = summarise(results.scores)
    write_summary(lines, output / "summary.csv")
    text = tables(results.scores, lines)
    publish(HERE, list(map(record, results.scores)), claims(results.scores), text, draw(lines), quick=given.quick)


if __name__ == "__main__":
    main()
