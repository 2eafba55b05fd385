"""What do FlyLoRA and NeuroLoRA keep of several tasks, learned one after another or merged?

    python -m experiments.several_tasks.run --data-dir FOLDER            # everything; writes beside this file
    python -m experiments.several_tasks.run --data-dir FOLDER --quick    # under a minute, into quick/; says nothing

README.md beside this file states claim, set-up and result.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from matplotlib.figure import Figure
from peft import LoraConfig, PeftConfig, get_peft_model

from bioadapt import FlyLoraConfig, NeuroLoraConfig
from bioadapt.evaluation import Task
from bioadapt.evaluation.training import Schedule, adapt, fit, trainable_parameters, without_progress_bars
from experiments import sentence_task
from experiments.ledger import COLOURS, Claim, markdown, over_seeds, publish
from experiments.sentence_task import BATCH, PROJECTIONS, fresh_encoder, load_task, parser
from experiments.task_decoupling.run import merge, score_of

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

HERE = Path(__file__).resolve().parent
TASKS = ("mpqa", "banking77", "stackoverflow")  # no text of one stands in another
RATES = (5e-4, 2e-3, 8e-3)
ROWS, QUICK_ROWS = (192, 150), (48, 32)  # training rows, and validation or test rows, per task
# What a score is of. A sequence's adapter has learned ``step`` tasks; one that is alone has learned the scored one.
SEQUENCE, ALONE, AVERAGED, SUMMED, ZERO_SHOT = "sequence", "alone", "averaged", "summed", "zero-shot"
LORAS, FLY, NEURO, PLAIN = ("LoRA r=8", "LoRA r=32"), "FlyLoRA", "NeuroLoRA", "NeuroLoRA without orthogonality"

Row = dict[str, Any]


@dataclass(frozen=True)
class Method:
    """A kind of adapter; whether adapters of single tasks are merged too, and whose learning rate it takes."""

    config: Callable[[int], PeftConfig]
    merges: bool = False
    tuned_as: str = ""


METHODS = {
    "LoRA r=8": Method(lambda seed: LoraConfig(r=8, lora_alpha=16, target_modules=PROJECTIONS)),
    "LoRA r=32": Method(lambda seed: LoraConfig(r=32, lora_alpha=64, target_modules=PROJECTIONS)),
    FLY: Method(lambda seed: FlyLoraConfig(r=32, k=8, target_modules=PROJECTIONS, seed=seed), merges=True),
    NEURO: Method(lambda seed: NeuroLoraConfig(r=32, k=8, target_modules=PROJECTIONS, seed=seed), merges=True),
    PLAIN: Method(
        lambda seed: NeuroLoraConfig(r=32, k=8, orthogonality=0.0, target_modules=PROJECTIONS, seed=seed),
        merges=True,
        tuned_as=NEURO,
    ),
}


# -- one run -----------------------------------------------------------------------------------------------------------


def learn(encoder: SentenceTransformer, task: Task, rate: float, seed: int) -> None:
    """One pass over the task's training rows, the adapters' own terms of the loss included."""
    with without_progress_bars():
        fit(encoder, task, Schedule(1.0, rate, BATCH, seed))


def order_of(tasks: Sequence[str], seed: int) -> list[str]:
    """In which order a seed learns the tasks: the same for all methods."""
    return [tasks[place] for place in np.random.default_rng(seed).permutation(len(tasks))]


def apply(name: str, tasks: dict[str, Task], rate: float, seed: int, split: str) -> Iterator[Row]:
    """Scores of one method and seed: tasks in sequence with one adapter, and adapters of single tasks, merged.

    On the validation split only the end of the sequence is scored, which is what learning rates are chosen by.
    """
    method, order, testing = METHODS[name], order_of(list(tasks), seed), split == "test"
    encoder = fresh_encoder()
    place = {"method": name, "learning_rate": rate, "seed": seed, "split": split, "order": " ".join(order)}

    def rows(setting: str, step: int, names: Sequence[str], adapter: Callable[[str], str]) -> Iterator[Row]:
        for task in names:
            score = score_of(encoder, adapter(task), tasks[task], split)
            count = trainable_parameters(encoder[0].model)
            yield {**place, "setting": setting, "step": step, "task": task, "trained": count, "score": score}

    for number, task in enumerate(order if method.merges and testing else order[:1]):
        own_seed = seed * len(tasks) + number  # adapters of several tasks draw random matrices of their own
        torch.manual_seed(own_seed)
        if number:
            encoder[0].model.add_adapter(task, method.config(own_seed))
            encoder[0].model.set_adapter(task)
        else:
            adapt(encoder, partial(get_peft_model, peft_config=method.config(own_seed), adapter_name=task))
        learn(encoder, tasks[task], rate, own_seed)
    first = order[0]
    if testing:
        alone = list(encoder[0].model.peft_config)
        yield from rows(ALONE, 1, alone, lambda task: task)
        yield from rows(SEQUENCE, 1, [first], lambda task: first)
    if testing and method.merges:
        for setting, weight in ((AVERAGED, 1 / len(tasks)), (SUMMED, 1.0)):
            merged = merge(encoder[0].model, "route", weight)
            yield from rows(setting, 1, order, lambda task, merged=merged: merged)
            encoder[0].model.set_adapter(first)
            encoder[0].model.delete_adapter(merged)
    for step, task in enumerate(order[1:], 2):
        encoder[0].model.set_adapter(first)
        learn(encoder, tasks[task], rate, seed * len(tasks) + step - 1)
        last = step == len(order)
        if last or testing:
            yield from rows(SEQUENCE, step, order if last else [task], lambda task: first)


def zero_shot(tasks: dict[str, Task]) -> Iterator[Row]:
    """Scores of the bare encoder."""
    encoder = fresh_encoder()
    place = {"method": ZERO_SHOT, "learning_rate": 0.0, "seed": 0, "split": "test", "order": ""}
    for name, task in tasks.items():
        score = sentence_task.score(encoder, task, "test")
        yield {**place, "setting": ZERO_SHOT, "step": 0, "task": name, "trained": 0, "score": score}


def run_seed(seed: int, tasks: dict[str, Task], rates: dict[str, float]) -> list[Row]:
    """The test scores of all methods."""
    return [row for name in METHODS for row in apply(name, tasks, rates[name], seed, "test")]


def choose_rates(rows: Sequence[Row]) -> dict[str, float]:
    """For each method the rate whose sequence ends with the best mean over tasks, on validation rows."""
    by_rate: dict[str, dict[float, list[float]]] = {}
    for row in rows:
        if row["split"] == "validation":
            by_rate.setdefault(row["method"], {}).setdefault(row["learning_rate"], []).append(row["score"])
    best = {name: max(rates, key=lambda rate: np.mean(rates[rate])) for name, rates in by_rate.items()}
    return best | {name: best[method.tuned_as] for name, method in METHODS.items() if method.tuned_as}


# -- what came out -----------------------------------------------------------------------------------------------------


Measures = dict[str, dict[str, list[float]]]  # method -> measure -> one value per seed


def measures(rows: Sequence[Row]) -> Measures:
    """What claims are made of, in points and in the mean over tasks, per method and seed.

    ``end``: the score after the last task of the sequence. ``forgetting``: of every task but the last, its score right
    after it was learned minus its score at the end. ``drop averaged`` and ``drop summed``: the merged adapter's score
    minus that of the task's own adapter.
    """
    test = [row for row in rows if row["split"] == "test" and row["setting"] != ZERO_SHOT]
    runs: dict[tuple[str, int], dict[tuple[str, int, str], float]] = {}
    for row in test:
        run = runs.setdefault((row["method"], row["seed"]), {})
        run[row["setting"], row["step"], row["task"]] = row["score"]
    orders = {(row["method"], row["seed"]): row["order"].split() for row in test}
    found: Measures = {}
    for (name, seed), run in sorted(runs.items(), key=lambda item: item[0][1]):
        order = orders[name, seed]
        end = [run[SEQUENCE, len(order), task] for task in order]
        learned = [run[SEQUENCE, step, task] for step, task in enumerate(order, 1)]
        values = {"end": np.mean(end), "forgetting": np.mean(np.subtract(learned, end)[:-1])}
        for setting in (AVERAGED, SUMMED):
            if (setting, 1, order[0]) in run:
                values[f"drop {setting}"] = np.mean([run[setting, 1, task] - run[ALONE, 1, task] for task in order])
                values[ALONE] = np.mean([run[ALONE, 1, task] for task in order])
        for measure, value in values.items():
            found.setdefault(name, {}).setdefault(measure, []).append(float(value))
    return found


def claims(rows: Sequence[Row]) -> list[Claim]:
    """In sequence and merged, as differences of what was measured with the same seed."""
    found = measures(rows)

    def gap(measure: str, first: str, second: str) -> list[float]:
        return [a - b for a, b in zip(found[first][measure], found[second][measure], strict=True)]

    listed = []
    for first, second in [(FLY, lora) for lora in LORAS] + [(NEURO, FLY), (NEURO, PLAIN)]:
        forgetting = "difference of forgetting, points"
        text = f"In sequence, {first} forgets less than {second}"
        listed.append(Claim(text, forgetting, gap("forgetting", first, second), side="below"))
    for first, second in [(NEURO, LORAS[0]), (NEURO, LORAS[1]), (NEURO, FLY)]:
        text = f"After a sequence, {first} is better than {second} in the mean over tasks"
        listed.append(Claim(text, "difference of final scores, points", gap("end", first, second)))
    for setting in (AVERAGED, SUMMED):
        for other in (FLY, PLAIN):
            text = f"Adapters of single tasks, {setting}: {NEURO} loses less than {other}"
            listed.append(Claim(text, "difference of drops, points", gap(f"drop {setting}", NEURO, other)))
    return listed


HEADINGS = {
    "end": "end of sequence",
    "forgetting": "forgetting",
    ALONE: "alone",
    f"drop {AVERAGED}": "drop, averaged",
    f"drop {SUMMED}": "drop, summed",
}


def tables(rows: Sequence[Row]) -> str:
    """Scores and differences of every method, for README.md."""
    found, rates = measures(rows), {row["method"]: row["learning_rate"] for row in rows if row["split"] == "test"}
    trained = {row["method"]: row["trained"] for row in rows}
    body = []
    for name, values in found.items():
        cells = [str(over_seeds(values[key])).replace("+", "") if key in values else "-" for key in HEADINGS]
        body.append([name, f"{trained[name]:,}", f"{rates[name]:g}", *cells])
    zero = {row["task"]: row["score"] for row in rows if row["setting"] == ZERO_SHOT}
    bare = ", ".join(f"{task} {score:.2f}" for task, score in zero.items())
    intro = f"Scores in percent, differences in points, mean over the tasks. The bare encoder: {bare}; mean "
    intro += f"{np.mean(list(zero.values())):.2f}. Brackets: 95 % t intervals over seeds."
    return f"{intro}\n\n{markdown(['method', 'trained', 'learning rate', *HEADINGS.values()], body)}"


def draw(rows: Sequence[Row]) -> Figure:
    """Every measure of every method, with its interval and the single seeds."""
    found = measures(rows)
    units = {"end": "score, %", "forgetting": "points lost (left: less)", f"drop {AVERAGED}": "points (right: less)"}
    units[f"drop {SUMMED}"] = "points (right: less)"
    figure = Figure(figsize=(12, 6), layout="constrained")
    for axes, (measure, unit) in zip(figure.subplots(2, 2).flat, units.items(), strict=True):
        shown = [name for name in found if measure in found[name]]
        for place, name in enumerate(shown):
            values, colour = found[name][measure], COLOURS[list(METHODS).index(name)]
            interval = over_seeds(values)
            reach = [[interval.estimate - interval.low], [interval.high - interval.estimate]]
            axes.errorbar([interval.estimate], [place], xerr=reach, fmt="o", capsize=5, color=colour)
            axes.plot(values, [place + 0.25] * len(values), "|", color=colour)
        axes.set_yticks(range(len(shown)), shown)
        axes.invert_yaxis()
        axes.margins(y=0.15)
        axes.set_title(HEADINGS[measure])
        axes.set_xlabel(unit)
    figure.suptitle("Three tasks: one adapter in sequence (above), one adapter each and merged (below); bars: 95 % t")
    return figure


# -- command line ------------------------------------------------------------------------------------------------------


def main(argv: list[str] | None = None) -> None:
    given = parser(__doc__, seeds=4).parse_args(argv)
    rates, seeds = (RATES[1:2], 1) if given.quick else (RATES, given.seeds)
    names, sizes = (TASKS[::2], QUICK_ROWS) if given.quick else (TASKS, ROWS)
    tasks = {name: load_task(name, given.data_dir, *sizes) for name in names}
    rows = list(zero_shot(tasks))
    for name in (name for name, method in METHODS.items() if not method.tuned_as):
        for rate in rates:
            rows += apply(name, tasks, rate, 0, "validation")
    chosen = choose_rates(rows)
    for seed in range(1, seeds + 1):
        rows += run_seed(seed, tasks, chosen)
        print(f"seed {seed} done", flush=True)
    publish(HERE, rows, claims(rows), tables(rows), draw(rows), quick=given.quick)


if __name__ == "__main__":
    main()
