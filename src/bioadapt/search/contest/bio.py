"""Training and validating one configuration of bio adapters over what lies below them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from peft import PeftModel, get_peft_model

from ...evaluation.training import History, adapt, trainable_parameters, transformer_of
from ..space import Configuration, SearchSpace, SpaceObjective
from ..study import Report
from .bench import Bench
from .lora import lora_config, lora_size


@dataclass(frozen=True)
class Below:
    """What lies below the bio adapters of a search: nothing, or a LoRA.

    Attributes:
        folder: of a LoRA that was given. It is frozen.
        params: parameters of a LoRA's space. Such a LoRA is made anew for each training, and trained with the bio
            adapters: trained before them and frozen, it leaves them too little to do in the same number of steps.
    """

    folder: str | None = None
    params: Mapping[str, Any] | None = None

    def encoder(self, bench: Bench, seed: int) -> Any:
        """The model of a bench with what lies below."""
        encoder = bench.encoder(seed, self.folder)
        if self.params is not None:
            config = lora_config(transformer_of(encoder), self.params)
            adapt(encoder, lambda plain: get_peft_model(plain, config))
        return encoder


@dataclass(frozen=True)
class BioObjective(SpaceObjective):
    """Validation score, in points, of bio adapters over what lies below.

    Every trial has the same seed, so that trials are compared on the same order of rows and the same dropout.

    Attributes:
        space: what is searched.
        bench: what trains.
        below: what lies below the bio adapters.
        alone: validation score of what lies below, trained without bio adapters.
        seed: of all trials.
    """

    bench: Bench
    below: Below
    alone: float
    seed: int = 0

    def run(self, params: Mapping[str, Any], report: Report) -> float:
        """Train one configuration from scratch; one without primitives is what lies below."""
        configuration = self.space.realise(params)
        if not configuration.slots:
            return self.alone
        encoder = self.below.encoder(self.bench, self.seed)
        _, history = train_bio(self.bench, encoder, self.space, configuration, self.seed, report)
        return history.validation[-1][1]


def train_bio(
    bench: Bench,
    encoder: Any,
    space: SearchSpace,
    configuration: Configuration,
    seed: int,
    report: Report = lambda step, score: None,
    rungs: int | None = None,
) -> tuple[PeftModel, History]:
    """Put a configuration's adapters into an encoder and train them, with the LoRA below unless that is frozen."""
    configs = space.configs(configuration)
    for config in configs:
        config.seed = seed
    expected = space.parameters(configuration) + lora_size(transformer_of(encoder), trained=True)
    model = bench.bio(encoder, configs)
    size = trainable_parameters(model)
    assert size == expected, (size, expected)
    history = bench.train(encoder, configuration.learning_rate, seed, report=report, rungs=rungs)
    return model, history
