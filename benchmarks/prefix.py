"""What the cache of frozen prefix activations saves in a trial of a search.

    python benchmarks/prefix.py --data-dir DATA      # about ten minutes; writes results/prefix-<machine>.csv
    python benchmarks/prefix.py --data-dir DATA --only trial

all-MiniLM-L6-v2 with one adapter (lateral inhibition) on block 1, 3 or 5 of 0 to 5, on the task stsb. `validation`
scores the validation split; `trial` is all that a search does for one configuration: load, train, score twice. It has
an eighth of the validation rows, and 3.8 epochs of as many training rows, so that both are in the proportion that they
have in one epoch of the whole. `trial, no dropout` is the same with the model's dropout at zero, so that the cache
serves training, too; there later epochs find what the first one has left, also when filling.

`filling` is the first run with the cache, which finds nothing and writes; `without` and `cached` alternate after it,
and the fastest round of each is given. Seconds are processor time of one thread. `mib` is what then lies on the disk.
`share` is how many of the configurations that are drawn uniformly from the whole space have their lowest adapter there;
for fewer slots it is printed.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from _measure import RESULTS, machine_name, render, write_csv
from sentence_transformers import SentenceTransformer

import bioadapt
from bioadapt.evaluation import Task, load_task
from bioadapt.evaluation.prefix import cached_prefix, frozen_blocks
from bioadapt.evaluation.training import DEFAULT_MODEL, transformer_of
from bioadapt.search.contest.bench import Bench, without_test
from bioadapt.search.contest.bio import Below, BioObjective
from bioadapt.search.space.model import SearchedModel
from bioadapt.search.space.space import SLOTS, SearchSpace

BLOCKS = (1, 3, 5)
WHAT = ("validation", "trial", "trial, no dropout")
DRAWS = 2000
ROWS, EPOCHS = 187, 3.8  # of a trial


@dataclass
class Row:
    """One line of the table and of the CSV."""

    what: str
    frozen_blocks: int
    share: float
    without: float
    filling: float
    cached: float
    ratio: float
    mib: float


class DryBench(Bench):
    """The model without its dropout."""

    def encoder(self, seed: int, below: str | Path | None = None) -> SentenceTransformer:
        encoder = super().encoder(seed, below)
        for module in encoder.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        return encoder


def stsb(folder: str, limit: int | None = None) -> Task:
    return without_test(load_task("stsb", folder, limit=limit))


def measured(what: str, block: int, share: float, rounds: int, run: Callable[[str | None], object]) -> Row:
    """`run` without the cache and with one, in turns."""
    with tempfile.TemporaryDirectory() as folder:
        filling = seconds(run, folder)
        pairs = [(seconds(run, None), seconds(run, folder)) for _ in range(rounds)]
        size = sum(file.stat().st_size for file in Path(folder).rglob("*.*"))
    without, cached = (min(times) for times in zip(*pairs, strict=True))
    return Row(
        what=what,
        frozen_blocks=block,
        share=share,
        without=round(without, 2),
        filling=round(filling, 2),
        cached=round(cached, 2),
        ratio=round(cached / without, 2),
        mib=round(size / 2**20, 1),
    )


def seconds(run: Callable[[str | None], object], folder: str | None) -> float:
    start = time.process_time()
    run(folder)
    return time.process_time() - start


def trials(bench: Bench, space: SearchSpace, block: int) -> Callable[[str | None], object]:
    params = only_at(space, block)
    return lambda folder: BioObjective(space, replace(bench, prefix=folder), Below(), 0.0).run(params, lambda *_: None)


def validations(bench: Bench, space: SearchSpace, block: int) -> Callable[[str | None], object]:
    encoder = bench.encoder(0)
    bench.bio(encoder, space.configs(space.realise(only_at(space, block))))
    encoder.eval()
    assert frozen_blocks(transformer_of(encoder).get_base_model())[1] == block

    def run(folder: str | None) -> None:
        with cached_prefix(encoder, bench.task, folder):
            bench.validate(encoder)

    return run


def only_at(space: SearchSpace, block: int) -> dict[str, object]:
    return space.alone("lateral_inhibition") | {"slot1.layers": str(block), "slot1.modules": "all"}


def shares(space: SearchSpace) -> dict[int, float]:
    """How many of the drawn configurations have their lowest slot in each block."""
    generator = np.random.default_rng(0)
    lowest = []
    for _ in range(DRAWS):
        params = {name: generator.choice(np.array(d.choices, dtype=object)) for name, d in space.distributions.items()}
        slots = space.realise(params).slots
        sites = [i for slot in slots for i in space.places[slot.layers, slot.modules]]
        lowest.append(min((space.host.sites[i].layer for i in sites), default=-1))
    return {block: round(lowest.count(block) / DRAWS, 3) for block in sorted({*lowest, *BLOCKS})}


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--data-dir", required=True, help="folder with the data set stsb, as for bioadapt search")
    parser.add_argument("--only", action="append", choices=WHAT, help="measure this; repeatable; writes no CSV")
    parser.add_argument("--rounds", type=int, default=1, help="of each of the two")
    parser.add_argument("--machine", default=None, help="name of the CSV (default: processor, cores, torch version)")
    return parser.parse_args()


def main() -> int:
    given = arguments()
    torch.set_num_threads(1)
    bench = Bench(DEFAULT_MODEL, stsb(given.data_dir), device="cpu")
    short = replace(bench, task=stsb(given.data_dir, ROWS), epochs=EPOCHS)
    dry = DryBench(**vars(short))
    host = SearchedModel.of(transformer_of(bench.encoder(0)))
    for slots in (1, 2, 3, SLOTS):
        space = SearchSpace(host, slots=slots)
        share = shares(space)
        print(f"at most {slots} slots, share by lowest adapted block (-1: none): {share}")
    subjects = zip(WHAT, (bench, short, dry), (validations, trials, trials), strict=True)
    rows = []
    for what, own, subject in subjects:
        for block in BLOCKS if what in (given.only or WHAT) else ():
            rows.append(measured(what, block, share[block], given.rounds, subject(own, space, block)))
            print(render(rows[-1:]).splitlines()[-1], file=sys.stderr, flush=True)
    print(render(rows))
    if given.only:
        print("Part of a run: no CSV is written.")
    else:
        conditions: dict[str, str | int] = {"rounds": given.rounds, "bioadapt": bioadapt.__version__}
        write_csv(RESULTS / f"prefix-{given.machine or machine_name()}.csv", rows, conditions)
    return 0


if __name__ == "__main__":
    sys.exit(main())
