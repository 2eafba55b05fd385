"""What all trainings of a search have in common: model, task, epochs, and how the scores on the way are told."""

from __future__ import annotations

import statistics
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel

from ... import BioConfig
from ...evaluation import Evaluation, Task
from ...evaluation.models import load_model
from ...evaluation.prefix import cached_prefix
from ...evaluation.statistics import in_points
from ...evaluation.tasks.cuts import with_validation
from ...evaluation.tasks.task import SENTENCES
from ...evaluation.training import History, Schedule, adapt, fit, load_adapted
from ..space import add_adapters
from ..study import Report

with suppress(ImportError):
    import sentence_transformers  # noqa: F401 - all processes are copied from one that has imported this module

_FIRST_STEPS = 6


class TooSlow(RuntimeError):
    """A training step takes longer than allowed."""


def without_test(task: Task) -> Task:
    """The same task without its test rows: what a search is given cannot look at them."""
    return task.without_test()


def searchable(task: Task) -> Task:
    """The task with all that a search needs; where it has no validation rows, some of the training rows serve.

    Raises:
        ValueError: there is nothing to train or to test on.
    """
    task = with_validation(task)
    for split in ("train", "validation", "test"):
        if not task.sizes.get(split):
            raise ValueError(f"task {task.name!r} has no {split} rows, which a search needs; take one that has")
    return task


@dataclass(frozen=True)
class Bench:
    """What all trainings of a search have in common.

    Attributes:
        model: a name or path, as for `load_model`.
        task: to train, validate and, where it has its test rows, test on. It says which kind of model it is.
        epochs: of each training.
        batch_size: rows per training step.
        rungs: how often the validation split is scored on the way, the end included.
        device: where to train; the fastest there is if None.
        max_step_time: seconds that a training step may take, by the median of the first ones; no limit if None.
        prefix: folder in which trials share what frozen lower blocks compute, see `cached_prefix`; none if None.
        models: folder of small models that are made for the task.
    """

    model: str
    task: Task
    epochs: float = 1.0
    batch_size: int = 64
    rungs: int = 2
    device: str | None = None
    max_step_time: float | None = None
    prefix: str | None = None
    models: str | None = None

    def encoder(self, seed: int, below: str | Path | None = None) -> Any:
        """The model as it comes, over a saved LoRA if ``below`` names one, which is frozen then."""
        torch.manual_seed(seed)
        encoder = load_model(self.model, self.task, self.device, self.models)
        return encoder if below is None else load_adapted(encoder, [below])

    def validate(self, encoder: Any) -> float:
        """Score on the validation split, in points."""
        metric = self.task.metrics[0]
        return float(in_points(metric, self.task.evaluate(encoder, "validation").scores[metric]))

    def test(self, encoder: Any) -> Evaluation:
        """Scores on the test split, and the rows that they are made of."""
        return self.task.evaluate(encoder, "test")

    def train(
        self,
        encoder: Any,
        learning_rate: float,
        seed: int,
        *,
        start: float | None = 0.0,
        report: Report = lambda step, score: None,
        rungs: int | None = None,
    ) -> History:
        """Train what requires a gradient. The score at the last rung is not reported: it is in the history.

        Args:
            encoder: changed in place.
            learning_rate: of all that is trained.
            seed: of the order of the rows and of dropout.
            start: the validation score before training, for the history.
            report: called with (step, score) at each rung.
            rungs: the bench's if None; 0 for no validation.

        Raises:
            TooSlow: a step takes longer than ``max_step_time``.
            Diverged: the loss is not finite.
        """
        rungs = self.rungs if rungs is None else rungs
        with cached_prefix(encoder, self.task, self.prefix if self.task.reads == SENTENCES else None):
            return fit(
                encoder,
                self.task,
                Schedule(self.epochs, learning_rate, self.batch_size, seed),
                validations_per_epoch=rungs / self.epochs,
                start=start,
                progress=_StepClock(self.max_step_time) if self.max_step_time else lambda step, steps: None,
                report=_all_but_last(report, rungs),
            )

    def bio(self, encoder: Any, configs: list[BioConfig]) -> PeftModel:
        """Put adapters over what the encoder has."""
        return adapt(encoder, lambda below: add_adapters(below, configs))


def _all_but_last(report: Report, rungs: int) -> Report:
    """The last rung is the trial's value: nothing is gained by stopping there."""
    seen = []

    def forward(step: int, score: float) -> None:
        seen.append(step)
        if len(seen) < rungs:
            report(len(seen), score)

    return forward


class _StepClock:
    """Ends a training whose first steps are too slow. The very first one is not counted: it warms up."""

    def __init__(self, most: float) -> None:
        self._most = most
        self._times = [time.perf_counter()]

    def __call__(self, step: int, steps: int) -> None:
        self._times.append(time.perf_counter())
        if step == _FIRST_STEPS:
            between = [after - before for before, after in zip(self._times[1:], self._times[2:], strict=False)]
            middle = statistics.median(between)
            if middle > self._most:
                raise TooSlow(f"a training step takes {middle:.2f} s, allowed are {self._most:g} s")
