"""The screen: every mechanism over a LoRA on four tasks, trained together with it, on validation splits alone.

    OMP_NUM_THREADS=1 python -m experiments.record.run --data-dir FOLDER    # hours; resumes; appends to cells.csv
    OMP_NUM_THREADS=1 python -m experiments.record.run --data-dir FOLDER --part promises
    OMP_NUM_THREADS=1 python -m experiments.record.run --data-dir FOLDER --table

One line of cells.csv is one training. `arm` is `lora-r8` and so on, `NAME` for the mechanism or placebo NAME over a
LoRA r=8, or `NAME alone`. The rate of the LoRA is chosen on the validation split. A mechanism is tried at it, gets
further seeds at the best of what was tried, and then four times and a quarter of that rate. What is chosen and scored
on the same split flatters all arms alike: the screen decides what is worth a confirmation on fresh rows, it confirms
nothing. Its parts: `tasks`; `promises`, where mechanisms are asked what their biology promises (see `promises.py`);
`alone`, without a LoRA; and `other-models`, a vision transformer and a causal language model (see `other_models.py`).
"""

from __future__ import annotations

import argparse
import random
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model

from bioadapt import BioConfig, list_primitives, primitive_info
from experiments.cells import append, identity, read
from experiments.record import placebo
from experiments.record.bench import Bench, TextBench
from experiments.record.other_models import ImageBench, LanguageBench
from experiments.record.promises import PROMISES

HERE = Path(__file__).parent
TASKS = ("stackoverflow", "sst2", "stsb", "snli")  # one of each family
ROWS, EPOCHS = 640, 2
RATES = (1e-3, 2e-3, 4e-3, 8e-3)
RANKS = (8, 16, 32)
SEEDS = 3
FACTORS = (1.0, 4.0, 0.25)
FAR = 4.0  # points behind the LoRA at which a promise is tried at the smallest factor too
PARTS = ("tasks", "promises", "alone", "other-models")
ALONE, ALONE_FACTORS, ALONE_TASKS = " alone", (1.0, 4.0), TASKS[:2]
IMAGE_TASKS, LANGUAGE_TASKS = ("digits", "cifar10"), ("searchsnippets:language_modelling",)
PLACEBOS = (placebo.PlainGain.name, placebo.GeluBottleneck.name, placebo.LinearBottleneck.name)


@dataclass(frozen=True)
class Cell:
    """What is trained: ``rate`` of the LoRA, ``factor`` by which the mechanism's differs from it.

    ``zero_scale``: of the mechanism, as new adapters had it when the cell was trained; 1 for a LoRA.
    """

    task: str
    arm: str
    seed: int
    rate: float
    factor: float = 1.0
    zero_scale: float = 1.0


@dataclass(frozen=True)
class Result(Cell):
    params: int = 0
    dev: float = 0.0
    seconds: float = 0.0


class Screen:
    def __init__(self, data_dir: Path, output: Path, rows: int = ROWS) -> None:
        self.data_dir, self.output, self.rows = data_dir, output, rows
        self.benches: dict[str, Bench] = {}
        self.results = {identity(result, Cell): result for result in read(output, Result)}

    def run(self, cell: Cell) -> Result:
        """The result of a cell, from the file if it is there."""
        if cell not in self.results:
            result = self.results[cell] = self._train(cell)
            append(self.output, result)
            print(f"{cell.task} {cell.arm} seed {cell.seed}, rate {cell.rate:g} x {cell.factor:g}: {result.dev:.2f}")
        return self.results[cell]

    def _train(self, cell: Cell) -> Result:
        bench = self._bench(cell.task)
        name = cell.arm.removesuffix(ALONE)
        torch.manual_seed(cell.seed)
        model: Any = bench.model
        if name == cell.arm:
            model = get_peft_model(model, _lora(cell.arm, bench))
        if not name.startswith("lora-"):
            model = get_peft_model(model, BioConfig([{"name": name, "zero_scale": cell.zero_scale}], seed=cell.seed))
            for parameter_name, parameter in model.named_parameters():
                if "lora_" in parameter_name:
                    parameter.requires_grad_(True)
        params, dev, seconds = bench.run(model, {"lora_": cell.rate, "": cell.rate * cell.factor}, cell.seed)
        return Result(**asdict(cell), params=params, dev=dev, seconds=seconds)

    def _bench(self, task: str) -> Bench:
        if task not in self.benches:
            self.benches[task] = self._new_bench(task)
        return self.benches[task]

    def _new_bench(self, task: str) -> Bench:
        if task in PROMISES:
            return PROMISES[task].bench(self.data_dir, self.rows, EPOCHS)
        if task in IMAGE_TASKS:
            return ImageBench(task, self.data_dir, self.rows, EPOCHS)
        if task in LANGUAGE_TASKS:
            return LanguageBench(task, self.data_dir, self.rows, EPOCHS)
        return TextBench(task, self.data_dir, self.rows, self.rows, EPOCHS)

    def best_rate(self, task: str) -> float:
        """Of LoRA r=8 by its first seed."""
        return max(RATES, key=lambda rate: self.run(Cell(task, "lora-r8", 0, rate)).dev)

    def tasks(self) -> None:
        """All cells of the four tasks in an order in which the screen may stop anywhere.

        Every mechanism is tried once at the LoRA's rate; further seeds and rates go to what leads first.
        """
        arms = _shuffled(list_primitives())
        for task in TASKS:
            self._loras(task, 0)
            for arm in sorted(arms, key=lambda arm: sum(result.arm == arm for result in self.results.values())):
                self._try(task, arm, FACTORS[0])
        for seed in range(1, SEEDS):
            for task in TASKS:
                self._loras(task, seed)
            for arm in self._leading_first(arms):
                for task in TASKS:
                    self._again(task, arm, seed)
        for factor in FACTORS[1:]:
            for arm in self._leading_first(arms):
                for task in TASKS:
                    self._try(task, arm, factor)

    def promises(self) -> None:
        """What is asked of some mechanisms alone, each with all its seeds before the next one is asked."""
        for task, promise in PROMISES.items():
            asked = [name for name in list_primitives() if name not in PLACEBOS and promise.of(primitive_info(name))]
            for seed in range(SEEDS):
                self._loras(task, seed)
            for arm in _shuffled(asked):
                self._try(task, arm, FACTORS[0])
                if self._is_far_behind(task, arm):  # the LoRA's rate was too much for the two together
                    self._try(task, arm, min(FACTORS))
                for seed in range(1, SEEDS):
                    self._again(task, arm, seed)

    def alone(self) -> None:
        """Without a LoRA."""
        for factor in ALONE_FACTORS:
            for task in ALONE_TASKS:
                for arm in _shuffled(list_primitives()):
                    self._try(task, f"{arm}{ALONE}", factor)

    def other_models(self) -> None:
        """A vision transformer on images, a language model on texts."""
        for task in (*IMAGE_TASKS, *LANGUAGE_TASKS):
            self._loras(task, 0)
            for arm in _shuffled(list_primitives()):
                self._try(task, arm, FACTORS[0])

    def _loras(self, task: str, seed: int) -> None:
        for rank in RANKS:
            self.run(Cell(task, f"lora-r{rank}", seed, self.best_rate(task)))

    def _is_far_behind(self, task: str, arm: str) -> bool:
        best, lora = (max(result.dev for result in self._tried(task, each)) for each in (arm, "lora-r8"))
        return best < lora - FAR

    def _again(self, task: str, arm: str, seed: int) -> None:
        """With another seed, at the best of what the first one has tried."""
        best = max(self._tried(task, arm), key=lambda result: result.dev)
        self.run(Cell(task, arm, seed, best.rate, best.factor, best.zero_scale))

    def _try(self, task: str, arm: str, factor: float) -> None:
        if not any(result.factor == factor for result in self._tried(task, arm)):
            scale = primitive_info(arm.removesuffix(ALONE)).fresh_zero_scale
            self.run(Cell(task, arm, 0, self.best_rate(task), factor, scale))

    def _leading_first(self, arms: list[str]) -> list[str]:
        """By the sum of their differences to LoRA r=8 in the first seed's cells."""

        def lead(arm: str) -> float:
            return sum(
                max(result.dev for result in self._tried(task, arm))
                - max(result.dev for result in self._tried(task, "lora-r8"))
                for task in TASKS
            )

        return sorted(arms, key=lead, reverse=True)

    def _tried(self, task: str, arm: str) -> list[Result]:
        """What the first seed has tried of an arm; another ``zero_scale`` of earlier days is another rate."""
        own = (result for result in self.results.values() if (result.task, result.arm) == (task, arm))
        return [result for result in own if result.seed == 0]


def _lora(arm: str, bench: Bench) -> LoraConfig:
    rank = int(arm.removeprefix("lora-r")) if arm.startswith("lora-") else RANKS[0]
    return LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=list(bench.lora_targets))


def _shuffled(names: Sequence[str]) -> list[str]:
    """Placebos first, the rest in an order that is always the same and has nothing to do with the names."""
    rest = [name for name in names if name not in PLACEBOS]
    random.Random(0).shuffle(rest)
    return [*PLACEBOS, *rest]


def table(results: Sequence[Result]) -> str:
    """Every arm's mean difference to LoRA r=8 over the tasks, at the best factor of each, best arm first."""
    lora: dict[tuple[str, int], float] = {}
    for result in results:
        if result.arm == "lora-r8":
            key = (result.task, result.seed)
            lora[key] = max(result.dev, lora.get(key, -1.0))
    lines = []
    for arm in {result.arm for result in results} - {"lora-r8"}:
        by_task: dict[str, list[float]] = {}
        for task in TASKS:
            own = [result for result in results if result.arm == arm and result.task == task]
            if own:
                first = max((result for result in own if result.seed == 0), key=lambda result: result.dev)
                kept = [result for result in own if replace(identity(result, Cell), seed=0) == identity(first, Cell)]
                by_task[task] = [result.dev - lora[task, result.seed] for result in kept]
        means = {task: statistics.fmean(found) for task, found in by_task.items()}
        mean = statistics.fmean(means.values())
        cells = " | ".join(f"{means[task]:+.2f} ({len(by_task[task])})" if task in means else "" for task in TASKS)
        lines.append((mean, f"| {arm} | {cells} | {mean:+.2f} |"))
    head = [f"| arm | {' | '.join(TASKS)} | mean |", "|---" * (len(TASKS) + 2) + "|"]
    return "\n".join([*head, *(line for _, line in sorted(lines, reverse=True))])


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", type=Path, required=True, help="holds TASK/{train,dev}.tsv.gz")
    parser.add_argument("--output", type=Path, default=HERE / "cells.csv")
    parser.add_argument("--part", choices=PARTS, help="all, if not given")
    parser.add_argument("--table", action="store_true", help="print what there is, train nothing")
    options = parser.parse_args(argv)
    if options.table:
        print(table(list(read(options.output, Result))))
        return
    torch.set_num_threads(1)
    screen = Screen(options.data_dir, options.output)
    for part in [options.part] if options.part else PARTS:
        getattr(screen, part.replace("-", "_"))()


if __name__ == "__main__":
    main()
