"""The protocol: every arm on every task gets the same rows, steps, trials of learning rates and seeds.

Learning rates are chosen by the validation rows, with a seed that is not reported. Training rows that stand in any test
set are dropped before. The test rows are opened once per arm and seed, by an object that writes it down. One file
because these promises hold together: each step relies on what the one before it has kept away.
"""

from __future__ import annotations

import json
import math
import platform
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from .. import BioConfig
from .._extras import require
from ..settings import DEFAULT_ARMS as DEFAULT_ARMS
from ..settings import DEFAULT_TASK, EvaluationSettings, check_names
from .arms import ARMS, LORA_BIO, ZERO_SHOT, Recipe, arms_named, rivals_of_equal_size
from .cells import Cell, Cells, SealedTest, TakenElsewhere, Trial, at_edges
from .comparison import Comparison, compare
from .models import fits, load_model
from .prefix import cached_prefix
from .report import write_report
from .statistics import Evaluation, better
from .tasks import DIGITS, Overlap, Task, is_name, list_tasks, load_task
from .tasks.cuts import drawn, with_validation
from .tasks.files import read_overlap
from .tasks.task import SENTENCES, TableTask
from .training import Diverged, History, Schedule, fit, load_adapted, transformer_of, without_progress_bars

ALL = "all"
_TUNING_SEED = 0


# Settings that another call on the same folder may change: they add cells, and alter none that is there.
_FREE = frozenset({"task", "arms", "seeds", "output", "device"})
# Seconds between two looks at a cell that another process works on.
_PATIENCE = 2.0


@dataclass
class PreparedTask:
    """A task ready for the protocol.

    Attributes:
        task: without its test rows.
        test: those, sealed.
        notes: what was done to it, for the reader.
    """

    task: Task
    test: SealedTest
    notes: list[str] = field(default_factory=list)


class Evaluate:
    """The evaluation in its steps. Construction checks everything that a user may have got wrong; `run` does the work.

    Raises:
        ValueError: wrong settings, an unknown task, model, arm or primitive, or a folder with cells of other settings.
        MissingExtra: a package of the extra ``demo`` is not installed.
        OSError: the output folder cannot be made.
    """

    def __init__(
        self,
        settings: EvaluationSettings,
        console: Console | None = None,
        *,
        tasks: Sequence[Any] = (),
        bio: BioConfig | None = None,
    ) -> None:
        self.settings, self.console = settings, console or Console()
        _check(settings)
        for module in ("sentence_transformers", "datasets", "scipy", "sklearn", "matplotlib"):
            require(module)
        self.arms = arms_named(settings.arms)
        if settings.adapters and set(self.arms) - {ZERO_SHOT, "bio", "placebo", "linear"}:
            raise ValueError(
                f"arms: {', '.join(self.arms)}: over --adapters there can be zero-shot, bio, placebo and linear alone, "
                "since PEFT does not stack a LoRA over another adapter"
            )
        self.bio = bio or _bio_config(settings)
        # What cannot be read is said before any work.
        given = [*tasks] or [*self._task_names()]
        loaded = [load_task(one, settings.data_dir, limit=settings.limit) for one in given]
        self.names = tuple(task.name for task in loaded)
        if len(set(self.names)) < len(self.names):
            raise ValueError(f"task: {', '.join(self.names)}: of several with one name nobody could tell the cells")
        self._own = {
            task.name: task for one, task in zip(given, loaded, strict=True) if not is_name(one, settings.data_dir)
        }
        self.cells = Cells(settings.output)
        self._check_folder()

    def run(self) -> dict[str, Any]:
        """Everything that is not done yet; returns the results of all that is.

        Raises:
            RuntimeError: no cell could be done.
        """
        for name in self.names:
            self._run_task(name)
        return self.results()

    # -- what is there --

    def _task_names(self) -> tuple[str, ...]:
        settings, names = self.settings, self.settings.task
        if ALL not in names:
            return names
        if settings.data_dir is None:
            raise ValueError("task 'all' needs --data-dir: it means every set of that folder")
        return tuple(name for name in list_tasks(settings.data_dir) if name not in (DEFAULT_TASK, DIGITS))

    @cached_property
    def _overlap(self) -> Overlap:
        """Of all sets of the data folder with each other."""
        overlap = Overlap()
        if self.settings.data_dir is not None:
            for name in list_tasks(self.settings.data_dir):
                if name not in (DEFAULT_TASK, DIGITS):
                    overlap.add(load_task(name, self.settings.data_dir))
        return overlap

    def prepare(self, name: str) -> PreparedTask:
        """A task by name, cut for the protocol: without leaks, with validation rows, and with its test rows sealed.

        Raises:
            ValueError: see `load_task`; or no test rows.
        """
        settings, notes = self.settings, []
        task = self._own.get(name) or load_task(name, settings.data_dir, limit=settings.limit)
        if not task.sizes.get("test"):
            raise ValueError(f"task {name!r} has no test rows")
        whole = task
        self._overlap.add(task)
        listed = (
            {} if settings.data_dir is None or settings.limit else read_overlap(task.source, Path(settings.data_dir))
        )
        clean = self._overlap.clean(task, listed)
        if not task.trainable and settings.train_on:
            other = load_task(settings.train_on, settings.data_dir, limit=settings.limit)
            if other.family != task.family:
                raise ValueError(
                    f"train_on={settings.train_on!r} is of family {other.family}, {name!r} of {task.family}"
                )
            task, whole = _trained_on(task, other), _trained_on(task, other)
            notes.append(f"training and validation rows of {settings.train_on}")
        if task.trainable:
            task, lost = self._overlap.without_leaks(task)
            whole, _ = Overlap.of([whole]).without_leaks(whole)
            notes += [f"{count} {split} rows dropped that stand in a test set" for split, count in lost.items()]
        if settings.train_rows and task.sizes.get("train", 0) > settings.train_rows:
            task = drawn(task, "train", settings.train_rows)
            # A probe may not read labels of more rows than the adapters: few rows are few for everybody.
            whole = drawn(whole, "train", settings.train_rows)
        if task.trainable and not task.sizes.get("validation"):
            task = with_validation(task)
            notes.append(f"{task.sizes['validation']} training rows serve as validation rows")
        return PreparedTask(task.without_test(), SealedTest(whole, clean, self.cells), notes)

    def recipe(self, task: Task) -> Recipe:
        """What the arms are made of on a task."""
        settings = self.settings
        fresh = partial(
            _fresh, settings.model, task, settings.device, settings.adapters, str(self.cells.folder / "models")
        )
        layers = None
        if settings.layers is not None:
            count = _blocks(transformer_of(fresh()))
            if settings.layers > count:
                raise ValueError(f"layers={settings.layers}: the model has {count}")
            layers = tuple(range(count - settings.layers, count))
        return Recipe(fresh, self.bio, settings.lora_rank, layers, settings.lora_targets)

    # -- one task --

    def _run_task(self, name: str) -> None:
        wanted = [(arm, seed) for arm in self.arms for seed in self._seeds(arm)]
        done = {(cell.arm, cell.seed) for cell in self.cells.done() if cell.task == name}
        left = [pair for pair in wanted if pair not in done]
        if not left:
            return
        prepared = self.prepare(name)
        if not fits(self.settings.model, prepared.test._task):
            self._say(f"{name}: left out, it is for {prepared.task.reads}.")
            return
        for note in prepared.notes:
            self._say(f"{name}: {note}.")
        if not prepared.task.trainable and any(arm != ZERO_SHOT for arm, _ in left):
            self._say(f"{name}: no rows to train on, so {ZERO_SHOT} alone; --train-on NAME takes another set's.")
            left = [(arm, seed) for arm, seed in left if arm == ZERO_SHOT]
        recipe = self.recipe(prepared.test._task)
        for arm, seed in left:
            try:
                with self.cells.claimed(name, arm, seed):
                    if all((cell.task, cell.arm, cell.seed) != (name, arm, seed) for cell in self.cells.done()):
                        self._run_cell(prepared, recipe, arm, seed)
            except TakenElsewhere:
                self._say(f"{name}: {arm}, seed {seed}: another process is at it.")
            except Diverged as error:
                self._say(f"{name}: {arm}, seed {seed}: no cell, {error}.")

    def _seeds(self, arm: str) -> range:
        """Nothing is drawn for what is not trained. Seed 0 has chosen the rates, so that reports start with 1."""
        return range(1) if arm == ZERO_SHOT else range(_TUNING_SEED + 1, _TUNING_SEED + 1 + self.settings.seeds)

    def _run_cell(self, prepared: PreparedTask, recipe: Recipe, arm: str, seed: int) -> None:
        started = time.perf_counter()
        rate = 0.0 if arm == ZERO_SHOT else self._rate(prepared, recipe, arm)
        started = started if arm == ZERO_SHOT else time.perf_counter()
        encoder, params, history, dev = self._trained(prepared.task, recipe, arm, rate, seed)
        with self._lower_blocks_once(encoder, prepared.test._task):
            opened = prepared.test.open(encoder, arm, seed)
        metric, clean = prepared.task.metrics[0], prepared.test.clean
        others = {name: round(score, 4) for name, score in opened.scores.items() if name != metric}
        cell = Cell(
            prepared.task.name, arm, seed, params, dev, opened.scores[metric], opened.of_rows(clean).scores[metric],
            time.perf_counter() - started, metric, rate, history.steps, prepared.task.sizes.get("train", 0),
            prepared.test.size, len(clean), json.dumps(others),
        )  # fmt: skip
        self.cells.keep_rows(cell, opened, clean)
        self.cells.add(cell)
        self._say(
            f"{cell.task}: {arm}, seed {seed}: {metric} {cell.test:.2f}, clean {cell.test_clean:.2f}, dev {dev:.2f}; "
            f"{params:,} numbers, rate {rate:g}, {cell.seconds:.0f} s"
        )

    def _trained(self, task: Task, recipe: Recipe, arm: str, rate: float, seed: int) -> tuple[Any, int, History, float]:
        """A model with a trained arm, its size, the course of its training, and its score on the validation rows."""
        encoder, params = recipe.build(arm, seed)
        history, dev = History(), math.nan
        with self._lower_blocks_once(encoder, task):
            if arm != ZERO_SHOT:
                schedule = Schedule(self.settings.epochs, rate, self.settings.batch_size, seed)
                with without_progress_bars():
                    history = fit(encoder, task, schedule)
            if task.sizes.get("validation"):
                dev = task.evaluate(encoder, "validation").scores[task.metrics[0]]
        return encoder, params, history, dev

    def _lower_blocks_once(self, encoder: Any, task: Task) -> AbstractContextManager[None]:
        """Within, blocks below the ``layers`` that are adapted compute each text once for all arms."""
        if self.settings.layers is None or task.reads != SENTENCES:
            return nullcontext()
        return cached_prefix(encoder, task, self.cells.folder / "prefix")

    def _rate(self, prepared: PreparedTask, recipe: Recipe, arm: str) -> float:
        """The learning rate with the best score on the validation rows; of equals the lower one."""
        rates, task = sorted(self.settings.rates), prepared.task
        if len(rates) == 1:
            return rates[0]
        for rate in rates:
            while rate not in self._tried(task, arm):
                try:
                    with self.cells.claimed(task.name, arm, f"rate {rate:g}"):
                        if rate not in self._tried(task, arm):
                            self._try(task, recipe, arm, rate)
                except TakenElsewhere:
                    time.sleep(_PATIENCE)
        known = self._tried(task, arm)
        return max(rates, key=lambda rate: better(task.metrics[0]) * known[rate])

    def _tried(self, task: Task, arm: str) -> dict[float, float]:
        """Scores on the validation rows by learning rate."""
        return {trial.rate: trial.dev for trial in self.cells.trials() if (trial.task, trial.arm) == (task.name, arm)}

    def _try(self, task: Task, recipe: Recipe, arm: str, rate: float) -> None:
        started, params = time.perf_counter(), 0
        try:
            _, params, _, dev = self._trained(task, recipe, arm, rate, _TUNING_SEED)
        except Diverged:
            dev = -better(task.metrics[0]) * math.inf
        self.cells.add(Trial(task.name, arm, rate, params, dev, time.perf_counter() - started))
        self._say(f"{task.name}: {arm}, rate {rate:g}: dev {dev:.2f}")

    # -- what came out --

    def results(self, *, clean: bool = True) -> dict[str, Any]:
        """Cells, and the comparison of ``lora+bio`` (or ``bio``) with every rival, on clean rows or on all.

        It is written to ``results.json`` and printed.

        Raises:
            RuntimeError: no cell has been done.
        """
        cells = [cell for cell in self.cells.done() if cell.task in self.names and cell.arm in self.arms]
        if not cells:
            raise RuntimeError("no cell could be done")
        self.console.print(_table(cells))
        record: dict[str, Any] = {
            "settings": asdict(self.settings),
            "bio": self.bio.to_dict(),
            "cells": [asdict(cell) for cell in cells],
            "machine": {"platform": platform.platform(), "threads": torch.get_num_threads()},
        }
        edges = at_edges(cells, self.settings.rates)
        record["best rates at an edge"] = {f"{rate:g}": places for rate, places in edges.items()}
        for rate, places in edges.items():
            which = "lowest" if rate == min(self.settings.rates) else "highest"
            self._say(
                f"The {which} rate, {rate:g}, was the best of those tried for {', '.join(places)}. One beyond it may "
                "be better still: give more --rates and another --output.",
                style="yellow",
            )
        for part in ("clean", "all"):
            comparison = self.comparison(clean=part == "clean")
            if comparison is None:
                continue
            record[part] = {"verdict": comparison.verdict, "differences": comparison.records()}
            self._say(f"On {part if part == 'all' else 'clean test'} rows: {comparison.verdict}", style="bold")
            if part == "clean" or "clean" not in record:
                opened = {"test rows": part, "times opened": self.cells.opened()}
                arms = {f"arm {name}": ARMS[name].meaning for name in self.arms}
                facts = {**record["settings"], **arms, **record["machine"], **opened}
                write_report(self.cells.folder / "report.html", comparison, record["cells"], facts)
        path = self.cells.folder / "results.json"
        text = json.dumps(record, indent=1)
        path.write_text(text + "\n", encoding="utf-8")
        self._say(f"Cells, tuning, test log, results.json and report.html are in {self.cells.folder}.")
        return json.loads(text)

    def comparison(
        self, *, clean: bool = True, candidate: str | None = None, resamples: int = 1000
    ) -> Comparison | None:
        """The candidate against its rivals on all tasks where both have all their seeds; None if there are none.

        Args:
            clean: on the test rows that stand in no other set, which a claim has to rest on; else on all.
            candidate: an arm; ``lora+bio`` or else ``bio`` if None.
            resamples: draws of the bootstrap.
        """
        candidate = candidate or next((arm for arm in (LORA_BIO, "bio") if arm in self.arms), None)
        rivals = [arm for arm in self.arms if arm != candidate]
        if candidate is None or not rivals:
            return None
        results: dict[str, dict[str, list[Evaluation]]] = {}
        metrics: dict[str, str] = {}
        by_key = {(cell.task, cell.arm, cell.seed): cell for cell in self.cells.done()}
        for task in self.names:
            for arm in (candidate, *rivals):
                seeds = self._seeds(arm)
                own = [by_key[task, arm, seed] for seed in seeds if (task, arm, seed) in by_key]
                if len(own) < len(seeds) or (clean and not own[0].clean_rows):
                    continue
                metrics[task] = own[0].metric
                results.setdefault(task, {})[arm] = [self.cells.rows(cell, clean=clean) for cell in own]
        try:
            return compare(results, metrics, candidate, rivals_of_equal_size(rivals), resamples=resamples)
        except ValueError:
            if any(candidate in arms and len(arms) > 1 for arms in results.values()):
                raise
            return None

    # -- small things --

    def _check_folder(self) -> None:
        """A folder belongs to one way of evaluating: cells of two cannot be compared."""
        path = self.cells.folder / "settings.json"
        settings = {name: value for name, value in asdict(self.settings).items() if name not in _FREE}
        bio = {name: value for name, value in self.bio.to_dict().items() if value is not None}
        fixed = json.loads(json.dumps({**settings, "bio": bio}, default=str))
        fixed |= {f"rows of {name}": task.fingerprints() for name, task in self._own.items()}
        known = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        for name, value in fixed.items():
            # Tasks may be added; all else has been there from the first.
            if known.get(name) != value and known and (name in known or not name.startswith("rows of ")):
                raise ValueError(
                    f"{self.cells.folder} holds cells of {name}={known.get(name)!r}, not {value!r}: go on with "
                    "that, or give another folder with --output"
                )
        path.write_text(json.dumps(known | fixed, indent=1) + "\n", encoding="utf-8")

    def _say(self, text: str, style: str | None = None) -> None:
        self.console.print(text, style=style, highlight=False, markup=False, soft_wrap=True)


def evaluate(
    task: Any = DEFAULT_TASK,
    *,
    bio: BioConfig | None = None,
    console: Console | None = None,
    **settings: Any,
) -> dict[str, Any]:
    """Compare arms on tasks: the model as it comes, LoRAs, bio adapters, placebos, all under the same protocol.

    Args:
        task: a task as `load_task` takes it, or a list of them: names, `Task` objects, or rows of one's own as a
            DataFrame, a `datasets.Dataset` or ``DatasetDict``, a dict, a file or a folder.
        bio: configuration of the bio adapter, in place of ``primitives``.
        console: where progress is shown; the terminal if None.
        settings: the fields of `EvaluationSettings`, such as ``data_dir="data", arms=("lora", "lora+bio"), seeds=5``.

    Returns:
        What stands in ``results.json``: cells, and on clean and on all test rows the verdict and every difference.

    Raises:
        TypeError: no such setting.
        ValueError: see `Evaluate`.
    """
    given = list(task) if isinstance(task, (list, tuple)) else [task]
    check_names("evaluate", settings, EvaluationSettings)
    tasks = [one if is_name(one, settings.get("data_dir")) else load_task(one) for one in given]
    names = tuple(one if isinstance(one, str) else one.name for one in tasks)
    chosen: dict[str, Any] = {
        name: tuple(value) if isinstance(value, list) else value for name, value in settings.items()
    }
    return Evaluate(EvaluationSettings(task=names, **chosen), console, tasks=tasks, bio=bio).run()


def _fresh(model: str, task: Task, device: str | None, adapters: Sequence[str], folder: str) -> Any:
    encoder = load_model(model, task, device, folder)
    return load_adapted(encoder, adapters) if adapters else encoder


def _bio_config(settings: EvaluationSettings) -> BioConfig:
    if settings.bio_config is None:
        return BioConfig(primitives=list(settings.primitives), rank=settings.bio_rank)
    path = Path(settings.bio_config)
    return BioConfig.from_pretrained(str(path.parent if path.suffix == ".json" else path))


def _check(settings: EvaluationSettings) -> None:
    for name in ("seeds", "lora_rank", "epochs", "batch_size", "layers", "train_rows"):
        value = getattr(settings, name)
        if value is not None and not value > 0:
            raise ValueError(f"--{name.replace('_', '-')} {value}: a number above zero is needed")
    if not settings.rates or not all(rate > 0 for rate in settings.rates):
        raise ValueError(f"--rates {settings.rates}: numbers above zero are needed, at least one")
    if not settings.task:
        raise ValueError("--task: at least one task is needed")


def _blocks(model: torch.nn.Module) -> int:
    """How many numbered blocks a model has."""
    numbers = [next((int(part) for part in name.split(".") if part.isdigit()), -1) for name, _ in model.named_modules()]
    return max(numbers, default=-1) + 1


def _trained_on(task: Task, other: Task) -> Task:
    if not isinstance(task, TableTask) or not isinstance(other, TableTask):
        raise ValueError(f"train_on={other.name!r}: its rows cannot train for {task.name!r}, since both must be tables")
    splits = {
        **{split: other.rows(split) for split, n in other.sizes.items() if n and split != "test"},
        "test": task.rows("test"),
    }
    return type(task)(task.name, splits)


def _table(cells: Sequence[Cell]) -> Table:
    table = Table(title=None)
    table.add_column("task")
    table.add_column("arm")
    for name in ("numbers", "rate", "seeds", "dev", "test", "test, clean", "seconds"):
        table.add_column(name, justify="right")
    groups: dict[tuple[str, str], list[Cell]] = {}
    for cell in cells:
        groups.setdefault((cell.task, cell.arm), []).append(cell)
    for (task, arm), own in groups.items():
        means = [sum(getattr(c, name) for c in own) / len(own) for name in ("dev", "test", "test_clean", "seconds")]
        table.add_row(
            task, arm, f"{own[0].params:,}", f"{own[0].rate:g}", str(len(own)), *(f"{value:.2f}" for value in means)
        )
    return table
