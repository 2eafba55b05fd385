"""A search with a training of one's own, on any model: the best of the trials, and a report; no LoRA, no test."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import nn

from ...settings import check_names
from ..report import write_report
from ..settings import NO_LORA, SearchSettings, budget, check
from ..space import SearchedModel, SearchSpace, SpaceObjective, add_adapters
from ..study import Job, Report, prepare, run_study
from ..study.progress import in_words as time_in_words
from ..thompson import ThompsonSampler
from .script import best_script

# The fields of `SearchSettings` that mean something without a task.
ACCEPTED = frozenset(
    ("trials", "budget_params", "output", "storage", "study", "workers", "seed", "primitives", "slots", "timeout")
)
# A third of the trials at most show one primitive alone, so that main effects are known before pairs are asked about.
WARM_UP = 3

Training = Callable[[nn.Module, float, Report], float]


@dataclass(frozen=True)
class ModelObjective(SpaceObjective):
    """A user's training of a model, which gets the adapters of a trial.

    Attributes:
        space: what is searched.
        model: goes into the process of the trials once; every trial has a copy of it.
        train: ``train(model, learning_rate, report) -> score``, higher being better. The model has its adapters, which
            alone require a gradient; ``report(step, score)`` may end the call.
        seed: of the adapters, and of what the training draws.
    """

    model: nn.Module = field(repr=False)
    train: Training = field(repr=False)
    seed: int = 0

    def run(self, params: Mapping[str, Any], report: Report) -> float:
        configuration = self.space.realise(params)
        configs = self.space.configs(configuration)
        model = copy.deepcopy(self.model)
        for config in configs:
            config.seed = self.seed
        if configs:
            model = add_adapters(model, configs)
        else:
            model.requires_grad_(False)
        # The same dropout and order of rows for all trials, unless the training seeds anew.
        torch.manual_seed(self.seed)
        return self.train(model, configuration.learning_rate, report)


def search_with(
    objective: Training, model: nn.Module, console: Console | None = None, **settings: Any
) -> dict[str, Any]:
    """Search bio adapters for a model by a function that trains and scores it. The same call goes on.

    Args:
        objective: ``objective(model, learning_rate, report) -> score``, higher being better: trains the adapters of the
            model, with everything else frozen, and scores it. It runs in other processes, and may be defined anywhere.
            Calling ``report(step, score)`` on the way lets bad trials be stopped.
        model: an encoder, a causal language model, a vision transformer: any model that PEFT knows default targets for.
        console: where progress is shown; the terminal if None.
        settings: ``trials``, ``budget_params``, ``output``, ``storage``, ``study``, ``workers``, ``seed``,
            ``primitives``, ``slots`` and ``timeout``, as in `SearchSettings`.

    Returns:
        ``number`` of the trial whose configuration is expected to score best, its ``score``, its ``configuration`` and
        ``configs``, its ``learning_rate``, and the file of the ``report``. No fresh data were used: this is the score
        on what the objective scores by, the best of many.

    Raises:
        ValueError: a setting that means nothing here or is out of range, a model whose default targets are not known,
            an objective or a model that cannot be sent to another process.
        RuntimeError: no trial has succeeded, or all workers have died.
    """
    check_names("search", settings, SearchSettings)
    for name in settings.keys() - ACCEPTED:
        raise ValueError(
            f"{name}={settings[name]!r} means nothing with an objective; accepted: {', '.join(sorted(ACCEPTED))}"
        )
    if not callable(objective):
        raise ValueError(f"objective={objective!r}: a function objective(model, learning_rate, report) is needed")
    chosen = replace(SearchSettings(lora=NO_LORA), **settings)
    check(chosen)
    searched = SearchedModel.of(model, chosen.primitives)
    space = SearchSpace(searched, budget=budget(chosen.budget_params, searched.parameters), slots=chosen.slots)
    output = Path(chosen.output)
    output.mkdir(parents=True, exist_ok=True)
    storage = chosen.storage or str(output / "study.journal")
    name = chosen.study or type(model).__name__
    study = prepare(storage, name, 0)
    record = json.loads(json.dumps(space.record()))
    if study.user_attrs.setdefault("space", record) != record:
        raise ValueError(f"study {name!r} was begun with another model or other settings: give another name as study=")
    study.set_user_attr("space", record)
    say = partial((console or Console()).print, highlight=False, markup=False, soft_wrap=True)
    for line in in_words(space):
        say(line)
    most = f", none longer than {time_in_words(chosen.timeout)}" if chosen.timeout else ""
    say(f"Trainings: {chosen.trials}{most}. How long they take together is told once the first one has ended.")
    prepare(storage, name, chosen.trials, first_trials(space, chosen.trials))
    job = Job(storage, name, ModelObjective(space, model, objective, chosen.seed), chosen.seed, chosen.timeout)
    study = run_study(job, chosen.workers, console or Console(), "searching bio adapters")
    try:
        best = ThompsonSampler(features=space.features).recommend(study)
    except ValueError:
        reason = study.trials[-1].user_attrs.get("failure", "pruned")
        raise RuntimeError(f"study {name!r}: no trial has succeeded; the last one: {reason}") from None
    configs, rate = best.user_attrs["configs"], best.user_attrs["configuration"]["learning_rate"]
    script = best_script(configs, rate, chosen.seed, best.value)
    study.set_user_attr("best", {"number": best.number, "script": script})
    return {
        "number": best.number,
        "score": best.value,
        "configuration": best.user_attrs["configuration"],
        "configs": configs,
        "learning_rate": rate,
        "report": str(write_report(name, storage, output / "report.html")),
    }


def in_words(space: SearchSpace) -> list[str]:
    """What is searched, and what is left out: a sentence each."""
    budget = "no budget" if space.budget is None else f"budget {space.budget:,} parameters"
    lines = [
        f"Space: {space.size():,} (about {float(space.size()):.1e}) configurations of {len(space.primitives)} "
        f"primitives, {len(space.places)} places, up to {space.slots} slots; {budget}."
    ]
    for names, why in ((space.host.refused, "this model refuses"), (space.too_large, "larger than the budget")):
        if names:
            lines.append(f"Left out, {why}: {', '.join(names)}.")
    return lines


def first_trials(space: SearchSpace, trials: int, learning_rate: float | None = None) -> list[dict[str, Any]]:
    """Primitives alone, for a third of the trials at most; spread over the alphabet where not all have room.

    Args:
        space: what is searched.
        trials: how many there will be.
        learning_rate: the one next to it is taken; the middle one if None.
    """
    alone = [space.alone(name, learning_rate) for name in space.primitives]
    count = min(len(alone), trials // WARM_UP)
    return [alone[i * len(alone) // count] for i in range(count)]
