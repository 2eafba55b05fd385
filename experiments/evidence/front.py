"""Which adapters are worth their numbers: validation scores at small budgets, for every arm at the same learning rates.

    OMP_NUM_THREADS=1 python -m experiments.evidence.front --data-dir FOLDER --arm lora-r2 --arm gain_field    # resumes
    python -m experiments.evidence.front --table

An arm is one adapter, or several joined by ``+``, trained together: ``lora-r4`` on query and value, ``lora-gain-r4`` on
the modules where gains act, ``lora-all-r1`` on every linear layer of a block, ``ia3``, ``ln``, ``vera-r64``, or the
name of a mechanism or a placebo. ``gain_field@all`` puts a mechanism on every linear layer, ``@gain`` on the gains'
modules, ``@residual`` on the writers to the residual stream, ``@norm`` on the norms; ``gelu_bottleneck/2`` gives it a
rank of its own, ``gain_field*16`` a ``zero_scale``.

The upper two blocks of MiniLM are adapted, on some rows of eight tasks. Test splits are never read: what leads here is
a candidate, which `bioadapt evaluate` confirms or refutes.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from peft import IA3Config, LNTuningConfig, LoraConfig, PeftConfig, VeraConfig, get_peft_model

from bioadapt import BioConfig
from experiments.cells import append, identity, read
from experiments.record.bench import FAMILIES, Bench, TextBench
from experiments.record.placebo import GeluBottleneck as GeluBottleneck  # registers the placebos

HERE = Path(__file__).parent
TRAIN_ROWS, DEV_ROWS, EPOCHS = 800, 1000, 1
RATES = (5e-4, 2e-3, 8e-3)
STEP = 4.0
SITES = {
    "": ["query", "value"],
    "gain": r".*(key|value|layer\.\d+\.output\.dense)",
    "all": r".*(query|key|value|dense)",
    "residual": r".*output\.dense",
    "norm": r".*LayerNorm",
}
FEED_FORWARD = r".*layer\.\d+\.output\.dense"


@dataclass(frozen=True)
class Cell:
    """One training."""

    task: str
    arm: str
    seed: int
    rate: float


@dataclass(frozen=True)
class Result(Cell):
    params: int = 0
    dev: float = 0.0
    seconds: float = 0.0


def configurations(arm: str, seed: int) -> list[PeftConfig]:
    """What is put into the model for an arm, the lowest first."""
    return [_configuration(part, seed) for part in arm.split("+")]


def _configuration(part: str, seed: int) -> PeftConfig:
    kind, _, rank = part.rpartition("-r")
    if kind.startswith("lora"):
        where = SITES[kind.removeprefix("lora").removeprefix("-")]
        return LoraConfig(r=int(rank), lora_alpha=2 * int(rank), target_modules=where)
    if kind == "vera":
        return VeraConfig(r=int(rank), target_modules=["query", "value"], projection_prng_key=seed)
    if part == "ia3":
        return IA3Config(target_modules=SITES["gain"], feedforward_modules=FEED_FORWARD)
    if part == "ln":
        return LNTuningConfig(target_modules=["LayerNorm"])
    name, _, sites = part.partition("@")
    name, _, zero_scale = name.partition("*")
    name, _, rank = name.partition("/")
    entry: dict[str, Any] = {"name": name}
    entry |= ({"rank": int(rank)} if rank else {}) | ({"zero_scale": float(zero_scale)} if zero_scale else {})
    given: dict[str, Any] = {"target_modules": SITES[sites]} if sites else {}
    return BioConfig([entry], seed=seed, **given)


class Front:
    """Cells of a file; trains those that are missing."""

    def __init__(self, data_dir: Path, output: Path) -> None:
        self.data_dir, self.output = data_dir, output
        self.benches: dict[str, Bench] = {}
        self.results = {identity(result, Cell): result for result in read(output, Result)}

    def run(self, cell: Cell) -> Result:
        if cell not in self.results:
            result = self.results[cell] = self._train(cell)
            append(self.output, result)
            print(f"{cell.task} {cell.arm} seed {cell.seed} at {cell.rate:g}: {result.dev:.2f}", flush=True)
        return self.results[cell]

    def _train(self, cell: Cell) -> Result:
        if cell.task not in self.benches:
            self.benches[cell.task] = TextBench(cell.task, self.data_dir, TRAIN_ROWS, DEV_ROWS, EPOCHS)
        bench = self.benches[cell.task]
        torch.manual_seed(cell.seed)
        model: Any = bench.model
        for config in configurations(cell.arm, cell.seed):
            kept = [parameter for parameter in model.parameters() if parameter.requires_grad]
            model = get_peft_model(model, config)
            for parameter in kept:
                parameter.requires_grad_(True)
        params, dev, seconds = bench.run(model, {"": cell.rate}, cell.seed)
        return Result(**asdict(cell), params=params, dev=dev, seconds=seconds)


def best(results: Sequence[Result]) -> dict[tuple[str, str], float]:
    """Mean over seeds of an arm on a task, at the rate that is best there by seed 0."""
    found = {}
    for arm, task in {(result.arm, result.task) for result in results}:
        own = [result for result in results if (result.arm, result.task) == (arm, task)]
        first = max((result for result in own if result.seed == 0), key=lambda result: result.dev, default=None)
        if first:
            found[arm, task] = statistics.fmean(result.dev for result in own if result.rate == first.rate)
    return found


def table(results: Sequence[Result], against: str = "lora-r8") -> str:
    """Every arm with its size and its mean difference to a LoRA, over the tasks that it has; the smallest first."""
    scores = best(results)
    sizes = {result.arm: result.params for result in results}
    tasks = [task for task in FAMILIES if any(key[1] == task for key in scores)]
    lines = [f"| arm | numbers | {' | '.join(tasks)} | mean |", "|---" * (len(tasks) + 3) + "|"]
    for arm in sorted(sizes, key=sizes.__getitem__):
        differences = {
            task: scores[arm, task] - scores[against, task]
            for task in tasks
            if (arm, task) in scores and (against, task) in scores
        }
        if differences:
            cells = " | ".join(f"{differences[task]:+.2f}" if task in differences else "" for task in tasks)
            lines.append(f"| {arm} | {sizes[arm]:,} | {cells} | {statistics.fmean(differences.values()):+.2f} |")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", type=Path, help="holds TASK/{train,dev}.tsv.gz")
    parser.add_argument("--arm", action="append", default=[], help="may be given several times")
    parser.add_argument("--task", action="append", help="one of the eight; all, if not given")
    parser.add_argument("--seed", type=int, default=0, help="0 tries all rates, others the best of them")
    parser.add_argument("--output", type=Path, default=HERE / "front.csv")
    parser.add_argument("--table", action="store_true", help="print what there is, train nothing")
    options = parser.parse_args(argv)
    if not options.table:
        torch.set_num_threads(1)
        front = Front(options.data_dir, options.output)
        for arm in options.arm:
            for task in options.task or FAMILIES:
                front_of(front, arm, task, options.seed)
    lines = table(list(read(options.output, Result)))
    print(lines)
    if options.output.parent == HERE:
        page = HERE / "README.md"
        before, mark, rest = page.read_text(encoding="utf-8").partition("<!-- front -->\n")
        page.write_text(
            f"{before}{mark}{lines}\n<!-- /front -->{rest.partition('<!-- /front -->')[2]}", encoding="utf-8"
        )


def front_of(front: Front, arm: str, task: str, seed: int) -> None:
    """All rates for seed 0, further ones while the best is the lowest or highest; that one for another seed."""

    def score(rate: float) -> float:
        return front.run(Cell(task, arm, 0, rate)).dev

    rate = max(RATES, key=score)
    step = {RATES[0]: 1 / STEP, RATES[-1]: STEP}.get(rate, 1.0)
    while step != 1 and score(round(rate * step, 9)) > score(rate):
        rate = round(rate * step, 9)
    if seed:
        front.run(Cell(task, arm, seed, rate))


if __name__ == "__main__":
    main()
