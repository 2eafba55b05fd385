"""What a search costs, said before it begins: how many trainings each phase has, and how long they take."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise

from ...evaluation.tasks import thinned
from ...evaluation.training import Schedule, fit
from ..settings import AUTO, SearchSettings
from ..space import SearchSpace
from ..study import Report
from ..study.progress import in_words
from .bench import Bench

TUNING, SEARCHING, CONFIRMING, TESTING = "of the LoRA", "of bio adapters", "to confirm the best", "to test"
_STEPS, _RATE = 6, 1e-4


@dataclass(frozen=True)
class Pace:
    """Measures how fast things go; what runs in the child.

    Called with nothing, it returns the seconds that it takes to load the model, to train a step and to validate.
    """

    bench: Bench
    space: SearchSpace

    def __call__(self, argument: None, report: Report) -> dict[str, float]:
        bench, times = self.bench, [time.perf_counter()]
        encoder = bench.encoder(0)
        times.append(time.perf_counter())
        bench.validate(encoder)
        times.append(time.perf_counter())
        bench.bio(encoder, self.space.configs(self.space.realise(self.space.alone(self.space.primitives[0]))))
        few, steps = thinned(bench.task, _STEPS * bench.batch_size), [time.perf_counter()]
        fit(encoder, few, Schedule(1, _RATE, bench.batch_size), progress=lambda *_: steps.append(time.perf_counter()))
        # The first step warms up; where there is no other, it has to do.
        between = [after - before for before, after in pairwise(steps)]
        return {
            "load": times[1] - times[0],
            "step": statistics.median(between[1:] or between),
            "validation": times[2] - times[1],
        }


def trainings(settings: SearchSettings, tuned: int, tried: int, *, confirmed: bool) -> dict[str, int]:
    """How many trainings each phase still has, at most; a phase without any is left out.

    Args:
        settings: of the search.
        tuned: trials of the LoRA that have ended.
        tried: trials of bio adapters that have ended.
        confirmed: whether the best of these trials have been confirmed and tested.
    """
    trials = max(0, settings.trials - tried)
    done = confirmed and not trials
    # LoRA, LoRA + bio, and the LoRA of their size; where the LoRA is given, or there is none, LoRA + bio alone.
    contenders = 3 if settings.lora == AUTO else 1
    phases = {
        TUNING: max(0, settings.trials - tuned) if settings.lora == AUTO else 0,
        SEARCHING: trials,
        CONFIRMING: 0 if done else settings.confirm * settings.confirm_seeds,
        TESTING: 0 if done else contenders * settings.test_seeds,
    }
    return {phase: count for phase, count in phases.items() if count}


def cost_in_words(
    phases: Mapping[str, int], settings: SearchSettings, rows: Mapping[str, int], pace: Mapping[str, float]
) -> str:
    """The cost in a sentence.

    Args:
        phases: as `trainings` counts them.
        settings: of the search.
        rows: of each split of the task.
        pace: as `Pace` measures it.
    """
    steps = settings.epochs * math.ceil(rows["train"] / settings.batch_size)
    scored = {CONFIRMING: 1.0, TESTING: rows["test"] / rows["validation"]}
    seconds = {}
    for phase, count in phases.items():
        validations = scored.get(phase, settings.rungs)
        one = pace["load"] + steps * pace["step"] + validations * pace["validation"]
        seconds[phase] = count * one
    parts = ", ".join(f"{count} {phase} (about {in_words(seconds[phase])})" for phase, count in phases.items())
    return (
        f"Trainings: {parts}; about {in_words(sum(seconds.values()))} in all by one worker, at the pace of the first "
        "steps. Trials that are stopped early take less."
    )
