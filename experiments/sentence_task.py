"""What experiments on sentence encoders share: a task's sample, an adapter trained on it, its score.

task = load_task("stsb", FOLDER, train_rows=1500, held_out_rows=1000)
rate, scores = choose_rate(task, lambda seed: LoraConfig(r=1, ...), (5e-4, 2e-3, 8e-3))  # by validation, seed 0
encoder = train_adapter(task, LoraConfig(r=1, ...), rate, seed=1)
score(encoder, task)                                                                    # of the test rows
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from matplotlib.figure import Figure
from peft import PeftConfig, PeftModel, get_peft_model
from torch import nn

from bioadapt import evaluation
from bioadapt.evaluation import Task
from bioadapt.evaluation.training import (
    Schedule,
    adapt,
    fit,
    load_encoder,
    trainable_parameters,
    transformer_of,
    without_progress_bars,
)
from experiments import ledger

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

PROJECTIONS = r".*encoder\.layer\.\d+\..*(query|key|value|dense)"  # all six of a layer, not the pooler
TOKENS = 64  # longer texts are cut: a single one makes a whole batch slow
BATCH = 16

Wrap = PeftConfig | Callable[[nn.Module], PeftModel]
Arms = Mapping[str, Callable[[int], Wrap]]  # name -> from a seed to what is trained
ZERO_SHOT = "zero-shot"


def parser(description: str, seeds: int) -> argparse.ArgumentParser:
    """The options of an experiment on sentences."""
    options = ledger.parser(description, seeds)
    options.add_argument("--data-dir", type=Path, required=True, help="folder of NAME/{train,dev,test}.tsv.gz")
    return options


def sample(task: Task, split: str, count: int) -> Task:
    """The task with that many rows of a split, always the same: files are sorted, so that their head lacks classes."""
    order = np.random.default_rng(0).permutation(task.sizes[split])[:count]
    return task.keep(split, order.tolist())


def load_task(name: str, data_dir: Path, train_rows: int, held_out_rows: int) -> Task:
    """A fixed sample of a task's splits train, validation (in the files: dev) and test.

    Args:
        name: of a folder in ``data_dir``.
        data_dir: holds ``NAME/{train,dev,test}.tsv.gz``.
        train_rows: at most so many rows to train on.
        held_out_rows: at most so many of the validation rows, and of the test rows.

    Raises:
        ValueError: no such task, or a damaged file.
    """
    task = evaluation.load_task(name, data_dir)
    for split, count in {"train": train_rows, "validation": held_out_rows, "test": held_out_rows}.items():
        task = sample(task, split, count) if split in task.sizes else task
    return task


def fresh_encoder() -> SentenceTransformer:
    """all-MiniLM-L6-v2 in eval mode, its texts cut after `TOKENS`."""
    encoder = load_encoder()
    encoder.max_seq_length = TOKENS
    return encoder.eval()


def wrapped(wrap: Wrap) -> SentenceTransformer:
    """A fresh encoder with a fresh adapter."""
    encoder = fresh_encoder()
    adapt(encoder, partial(get_peft_model, peft_config=wrap) if isinstance(wrap, PeftConfig) else wrap)
    return encoder


def train_adapter(task: Task, wrap: Wrap, rate: float, seed: int, epochs: float = 1.0) -> SentenceTransformer:
    """A fresh encoder with an adapter, trained on the task's training rows; in eval mode.

    Args:
        task: gives rows and loss.
        wrap: a PEFT configuration, or what makes a PeftModel of the bare transformer.
        rate: peak learning rate; a tenth of the steps is warm-up, then it decays linearly to zero.
        seed: decides what the adapter draws, the order of rows and dropout.
        epochs: passes through the training rows, in batches of `BATCH`.
    """
    torch.manual_seed(seed)
    encoder = wrapped(wrap)
    with without_progress_bars():
        fit(encoder, task, Schedule(epochs, rate, BATCH, seed))
    return encoder


def trained_count(wrap: Wrap) -> int:
    """How many numbers an adapter trains."""
    return trainable_parameters(transformer_of(wrapped(wrap)))


def score(encoder: SentenceTransformer, task: Task, split: str = "test") -> float:
    """The task's main score of a split, in percent."""
    return task.evaluate(encoder, split).scores[task.metrics[0]]


def choose_rate(
    task: Task, make: Callable[[int], Wrap], rates: Sequence[float], seed: int = 0, epochs: float = 1.0
) -> tuple[float, dict[float, float]]:
    """The learning rate with the best validation score of one seed, and the validation scores of all.

    Args:
        task: scored on its validation split.
        make: from a seed to what `train_adapter` takes.
        rates: those to try; of equals the first wins.
        seed: should not be among those that are reported on.
        epochs: as for `train_adapter`.
    """
    scores = {rate: score(train_adapter(task, make(seed), rate, seed, epochs), task, "validation") for rate in rates}
    return max(scores, key=scores.__getitem__), scores


# -- several kinds of adapters, compared on one task --


def tune(task: Task, arms: Arms, rates: Sequence[float]) -> list[dict[str, Any]]:
    """The validation scores of every arm at every rate, with seed 0, and the test score of the bare encoder."""
    bare = score(fresh_encoder(), task)
    rows = [_row(ZERO_SHOT, 0, 0.0, 0, "test", bare)]
    for name, make in arms.items():
        count = trained_count(make(0))
        _, scores = choose_rate(task, make, rates)
        rows += [_row(name, count, rate, 0, "validation", value) for rate, value in scores.items()]
    return rows


def run_seed(task: Task, arms: Arms, tuned: Sequence[Mapping[str, Any]], seed: int) -> list[dict[str, Any]]:
    """The test scores of one seed, every arm at the rate that `tune` found best for it."""
    rows = []
    for name, make in arms.items():
        trials = [row for row in tuned if row["arm"] == name]
        best = max(trials, key=lambda row: row["score"])
        encoder = train_adapter(task, make(seed), best["rate"], seed)
        rows.append(_row(name, best["trained"], best["rate"], seed, "test", score(encoder, task)))
    return rows


def _row(arm: str, count: int, rate: float, seed: int, split: str, value: float) -> dict[str, Any]:
    return {"arm": arm, "trained": count, "rate": rate, "seed": seed, "split": split, "score": value}


def run(task: Task, arms: Arms, rates: Sequence[float], seeds: int) -> list[dict[str, Any]]:
    """All rows: what `tune` gives, then the seeds from 1 on, none of which a rate was chosen by."""
    rows = tune(task, arms, rates)
    tuned = list(rows)
    for seed in range(1, seeds + 1):
        rows += run_seed(task, arms, tuned, seed)
        for row in rows[-len(arms) :]:
            print("seed {seed} {arm:34} rate {rate:g} {score:6.2f}".format(**row), flush=True)
    return rows


def scores_of(rows: Sequence[Mapping[str, Any]], arm: str) -> np.ndarray:
    """Of an arm, in the order of seeds; of the bare encoder as often as there are seeds."""
    seeds = sorted({row["seed"] for row in rows if row["split"] == "test" and row["arm"] != ZERO_SHOT})
    own = ledger.by_seed(rows, "score", split="test", arm=arm)
    return np.array([own[0 if arm == ZERO_SHOT else seed] for seed in seeds])


def differences(rows: Sequence[Mapping[str, Any]], first: str, second: str) -> list[float]:
    """Test score of the first arm minus that of the second, seed by seed."""
    return (scores_of(rows, first) - scores_of(rows, second)).tolist()


def experiment(
    folder: Path,
    options: argparse.Namespace,
    name: str,
    arms: Arms,
    rates: Sequence[float],
    claims: Callable[[Sequence[Mapping[str, Any]]], Sequence[ledger.Claim]],
    rows: tuple[int, int] = (384, 400),
) -> None:
    """Compare arms on a task, and write what was found.

    Args:
        folder: the experiment's own.
        options: of `parser`.
        name: of the task.
        arms: what is compared.
        rates: what each arm's learning rate is chosen from.
        claims: what the rows of `run` say about the claims.
        rows: how many to train on, and how many of the validation and of the test rows to score.
    """
    train_rows, held_out_rows, seeds = (32, 60, 2) if options.quick else (*rows, options.seeds)
    task = load_task(name, options.data_dir, train_rows, held_out_rows)
    cells = run(task, arms, rates[:1] if options.quick else rates, seeds)
    measure = f"{name}: {task.metrics[0].replace('_', ' ')} on the test rows, %"
    ledger.publish(folder, cells, claims(cells), tables(cells), draw(cells, measure), quick=options.quick)


def tables(rows: Sequence[Mapping[str, Any]]) -> str:
    """Test scores by arm, and what the rates were chosen by."""
    arms = [arm for arm in dict.fromkeys(row["arm"] for row in rows) if arm != ZERO_SHOT]
    bare = scores_of(rows, ZERO_SHOT)[0]
    rates = sorted({row["rate"] for row in rows if row["split"] == "validation"})
    lines = []
    for arm in arms:
        own = [row for row in rows if row["arm"] == arm]
        tried = {row["rate"]: row["score"] for row in own if row["split"] == "validation"}
        chosen = next(row["rate"] for row in own if row["split"] == "test")
        interval = ledger.over_seeds(scores_of(rows, arm))
        shown = f"{interval.estimate:.2f} [{interval.low:.2f}, {interval.high:.2f}]"
        lines.append([arm, f"{own[0]['trained']:,}", *(f"{tried[rate]:.2f}" for rate in rates), f"{chosen:g}", shown])
    header = ["arm", "trained", *(f"validation, rate {rate:g}" for rate in rates), "rate chosen", "test"]
    return f"Scores in percent. Zero-shot test score: {bare:.2f}.\n\n{ledger.markdown(header, lines)}"


def draw(rows: Sequence[Mapping[str, Any]], measure: str) -> Figure:
    """Test scores of all arms: every seed, its mean, and the bare encoder."""
    arms = [arm for arm in dict.fromkeys(row["arm"] for row in rows) if arm != ZERO_SHOT]
    figure = Figure(figsize=(7.5, 0.9 + 0.55 * len(arms)), layout="constrained")
    axes = figure.subplots()
    for place, arm in enumerate(arms):
        scores = scores_of(rows, arm)
        axes.plot(scores, np.full(len(scores), place), "o", color=ledger.COLOURS[place], alpha=0.5)
        axes.plot(scores.mean(), place, "|", color=ledger.COLOURS[place], markersize=26, markeredgewidth=3)
    axes.axvline(scores_of(rows, ZERO_SHOT)[0], color="black", linestyle="--", label="zero-shot")
    axes.set_yticks(range(len(arms)), [f"{arm}\n{_count(rows, arm):,} trained" for arm in arms])
    axes.set_ylim(len(arms) - 0.5, -0.5)
    axes.set_xlabel(f"{measure} (dots: seeds, bars: means)")
    axes.legend(loc="center")
    return figure


def _count(rows: Sequence[Mapping[str, Any]], arm: str) -> int:
    return next(row["trained"] for row in rows if row["arm"] == arm)
