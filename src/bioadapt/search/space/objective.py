"""What every objective over a space of bio adapters has in common, and the one whose training the user writes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import optuna

from ... import BioConfig
from ..study import Report
from ..thompson import Feature
from .configuration import Configuration
from .space import SearchSpace

# What a trial keeps of each `BioConfig`.
_RECORDED = ("primitives", "target_modules", "rank", "composition")


@dataclass(frozen=True)
class SpaceObjective:
    """What every objective over a `SearchSpace` has in common; a subclass says how to train."""

    space: SearchSpace

    def features(self, params: Mapping[str, Any]) -> Mapping[Feature, float]:
        return self.space.features(params)

    def suggest(self, trial: optuna.Trial) -> dict[str, Any]:
        return self.space.suggest(trial)

    def describe(self, params: Mapping[str, Any]) -> dict[str, Any]:
        return describe(self.space, params)


def describe(space: SearchSpace, params: Mapping[str, Any]) -> dict[str, Any]:
    """What a trial records of its configuration."""
    configuration = space.realise(params)
    return {
        "configuration": configuration.record(),
        "configs": [_recorded(config) for config in space.configs(configuration)],
        "parameters": space.parameters(configuration),
    }


def _recorded(config: BioConfig) -> dict[str, Any]:
    content = config.to_dict()
    return {name: content[name] for name in _RECORDED}


@dataclass(frozen=True)
class FunctionObjective(SpaceObjective):
    """A user's own training loop in the place of the sentence encoder's.

    Attributes:
        space: what is searched.
        train: ``train(configs, configuration, report) -> score``, higher being better; it runs in
            other processes. `add_adapters` puts the configs into a model, ``configuration.learning_rate`` is the rate,
            and ``report(step, score)`` may end the call.
    """

    train: Callable[[list[BioConfig], Configuration, Report], float] = field(repr=False)

    def run(self, params: Mapping[str, Any], report: Report) -> float:
        configuration = self.space.realise(params)
        return self.train(self.space.configs(configuration), configuration, report)
