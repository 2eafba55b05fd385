"""The rival: a LoRA that is tuned as long as the bio adapters are searched."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import optuna
from peft import LoraConfig, PeftModel, get_peft_model
from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
from torch import nn
from transformers.pytorch_utils import Conv1D

from ...evaluation import arms
from ...evaluation.training import History, adapt, trainable_parameters, transformer_of
from ...tuner.placement import asked_for
from ...tuner.targets import block_of
from ..study import Report
from .bench import Bench

if TYPE_CHECKING:
    from transformers import PreTrainedModel

HIGHEST_RANK = 32
ALPHAS_PER_RANK = (1, 2, 4)
DROPOUTS = (0.0, 0.05, 0.1)
QUERY_VALUE, QUERY_KEY_VALUE = "query + value", "query + key + value"
ALL_LINEAR, AND_HEAD, HEAD = "all linear", "all linear + head", "head"
LEARNING_RATES = (1e-4, 3e-2)
_LINEAR = nn.Linear | Conv1D

# The settings that most people start from. The tuning starts from them, too, at the model's first choice of targets.
USUAL = {"rank": 8, "alpha_per_rank": 2, "dropout": 0.0, "learning_rate": 1e-3}


def targets_of(model: PreTrainedModel) -> dict[str, list[str]]:
    """The modules of each choice of targets on a model, as ends of their names.

    Where PEFT knows no default targets for the model's type, all linear layers come first. A language model's head is
    offered with them and alone, since bio adapters may be there as well.
    """
    paths = [path for path, module in model.named_modules() if isinstance(module, _LINEAR)]
    usual = TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING.get(model.config.model_type, [])
    if isinstance(usual, str):  # a pattern of whole names, where the ends of names do not tell enough
        usual = [path for path in paths if re.fullmatch(usual, path)]
    keys = [name.replace("query", "key").replace("q_", "k_") if name != "q" else "k" for name in usual]
    blocks = [block_of(path) for path in paths]
    linear = sorted({block[1] for block in blocks if block is not None})
    choices = {QUERY_VALUE: sorted(usual), QUERY_KEY_VALUE: sorted({*usual, *keys}), ALL_LINEAR: linear}
    head = asked_for(model, "get_output_embeddings")
    called = [path for path in paths if model.get_submodule(path) is head]
    if called:
        choices |= {AND_HEAD: [*linear, *called], HEAD: called}
    there = {choice: [end for end in ends if _ends_any(paths, end)] for choice, ends in choices.items()}
    if there[QUERY_KEY_VALUE] == there[QUERY_VALUE]:  # one layer makes all three
        del there[QUERY_KEY_VALUE]
    return {choice: ends for choice, ends in there.items() if ends}


def _ends_any(paths: Sequence[str], end: str) -> bool:
    return any(path == end or path.endswith(f".{end}") for path in paths)


def highest_ranks(model: PreTrainedModel, most: int | None = None) -> dict[str, int]:
    """How high the rank may be at each choice of targets; without the choices where rank one is too much.

    It is empty where no linear layer stands in a block.

    Args:
        model: the plain model.
        most: how many numbers the LoRA may have; as many as the highest rank of the space makes if None.

    Raises:
        ValueError: no LoRA is as small as that.
    """
    paths = {choice: arms.lora_paths(model, ends) for choice, ends in targets_of(model).items()}
    costs = {choice: sum(arms.rank_costs(model, own).values()) for choice, own in paths.items()}
    ranks = dict.fromkeys(costs, HIGHEST_RANK)
    if most is not None:
        ranks = {choice: min(HIGHEST_RANK, most // cost) for choice, cost in costs.items()}
    if ranks and not any(ranks.values()):
        raise ValueError(
            f"lora_params {most:,}: the smallest LoRA of this model has {min(costs.values()):,} numbers; allow as many"
        )
    return {choice: rank for choice, rank in ranks.items() if rank}


def first_params(ranks: Mapping[str, int]) -> dict[str, Any]:
    """What the tuning starts from: what most people take, or the nearest to it that the ranks allow."""
    targets, highest = next(iter(ranks.items()))
    return {**USUAL, "rank": min(USUAL["rank"], highest), "targets": targets}


def lora_config(model: PreTrainedModel, params: Mapping[str, Any]) -> LoraConfig:
    """PEFT's configuration for parameters of the LoRA's space."""
    return LoraConfig(
        r=params["rank"],
        lora_alpha=params["rank"] * params["alpha_per_rank"],
        lora_dropout=params["dropout"],
        target_modules=targets_of(model)[params["targets"]],
    )


def lora_of_size(model: PreTrainedModel, params: Mapping[str, Any], parameters: int) -> LoraConfig:
    """The same LoRA with as nearly ``parameters`` numbers as ranks per module allow; the scale stays as it is.

    Args:
        model: the plain model.
        params: parameters of the LoRA's space; the rank is replaced.
        parameters: how many trainable numbers there should be.
    """
    paths = arms.lora_paths(model, targets_of(model)[params["targets"]])
    config = arms.lora_of_size(model, paths, parameters, alpha_per_rank=params["alpha_per_rank"])
    config.lora_dropout = params["dropout"]
    return config


def lora_size(model: Any, *, trained: bool = False) -> int:
    """How many numbers the LoRAs in a model have; those alone that are trained, if ``trained``."""
    numbers = [p for name, p in model.named_parameters() if "lora_" in name]
    return sum(p.numel() for p in numbers if p.requires_grad or not trained)


@dataclass(frozen=True)
class LoraObjective:
    """Validation score, in points, of a LoRA; the same bench and the same seed as for the bio adapters.

    Attributes:
        bench: what trains.
        ranks: the highest rank at each choice of modules.
        start: validation score of the model as it comes.
        seed: of all trials.
    """

    bench: Bench
    ranks: Mapping[str, int]
    start: float
    seed: int = 0
    features = None

    def suggest(self, trial: optuna.Trial) -> dict[str, Any]:
        targets = trial.suggest_categorical("targets", tuple(self.ranks))
        return {
            "targets": targets,
            "rank": trial.suggest_int("rank", 1, self.ranks[targets], log=True),
            "alpha_per_rank": trial.suggest_categorical("alpha_per_rank", ALPHAS_PER_RANK),
            "dropout": trial.suggest_categorical("dropout", DROPOUTS),
            "learning_rate": trial.suggest_float("learning_rate", *LEARNING_RATES, log=True),
        }

    def describe(self, params: Mapping[str, Any]) -> dict[str, Any]:
        return {"configuration": dict(params)}

    def run(self, params: Mapping[str, Any], report: Report) -> float:
        encoder = self.bench.encoder(self.seed)
        _, history = train_lora(self.bench, encoder, params, self.seed, self.start, report)
        return history.validation[-1][1]


@dataclass(frozen=True)
class SavedLora:
    """Trains a LoRA again and saves it; what runs in the child. Called with its parameters."""

    bench: Bench
    seed: int
    folder: str

    def __call__(self, params: Mapping[str, Any], report: Report) -> tuple[float, int]:
        encoder = self.bench.encoder(self.seed)
        model, history = train_lora(self.bench, encoder, params, self.seed)
        model.save_pretrained(self.folder)
        return history.validation[-1][1], trainable_parameters(model)


def train_lora(
    bench: Bench,
    encoder: Any,
    params: Mapping[str, Any],
    seed: int,
    start: float | None = 0.0,
    report: Report = lambda step, score: None,
    *,
    size: int | None = None,
    rungs: int | None = None,
) -> tuple[PeftModel, History]:
    """Put a LoRA into an encoder and train it.

    Args:
        bench: what trains.
        encoder: changed in place.
        params: parameters of the LoRA's space.
        seed: of the order of the rows and of dropout.
        start: validation score before, for the history.
        report: see `Bench.train`.
        size: how many numbers it should have, in the place of the rank.
        rungs: the bench's if None.
    """
    base = transformer_of(encoder)
    config = lora_config(base, params) if size is None else lora_of_size(base, params, size)
    model = adapt(encoder, lambda base: get_peft_model(base, config))
    history = bench.train(encoder, params["learning_rate"], seed, start=start, report=report, rungs=rungs)
    return model, history
