"""What the long commands are asked for, a class each: their options, defaults and help are made from it.

Nothing is imported for it, so that the command's help and its answers to typing errors come at once.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, TypeVar

from ._words import suggest

DEFAULT_TASK = "api-search"
DEFAULT_MODEL = "all-MiniLM-L6-v2"
# Chosen by the score on the validation library of the API search (networkx), never on the test library: the primitives
# among single ones and groups of them, which hardly differed. To compare others, give them on the command line and read
# "validation" in results.json.
PRIMITIVES = ("lateral_inhibition", "predictive_coding")
DEFAULT_ARMS = ("zero-shot", "lora", "lora-equal", "lora+bio", "lora+placebo")
AUTO, NO_LORA = "auto", "none"
# The most primitives of a configuration.
SLOTS = 6


def _option(default: Any, help: str, **limits: float) -> Any:
    """A field that is an option of the command, with its help and the least value that is read."""
    return field(default=default, metadata={"help": help, **limits})


C = TypeVar("C", bound=type)


def check_names(function: str, given: Mapping[str, Any], settings: type) -> None:
    """Refuse what is no field of a settings' class, with the nearest one, by `TypeError`."""
    known = [spec.name for spec in fields(settings)]
    for name, value in given.items():
        if name not in known:
            raise TypeError(f"{function} has no setting {name!r} (got {value!r}); {suggest(name, known)}")


def _described(settings: C) -> C:
    """Put the help of every field into the docstring, for those who read that."""
    lines = (f"    {spec.name}: {spec.metadata['help']}" for spec in fields(settings))
    settings.__doc__ = "\n".join([f"{settings.__doc__}\n", "Attributes:", *lines])
    return settings


_DEVICE = "cpu, cuda, mps; the fastest there is, if not given."
_LIMIT = "About so many rows per split, for a quick look."
_FOLDER = "Folder of NAME/{train,dev,test}.tsv.gz files; the hub, if not given."
_TASK = "api-search, stsb, a task of --data-dir, or the path of a .csv or .tsv file or of a folder."
_ENCODER = "Sentence encoder: a name on the hub or a path."
_MODEL = (
    "minilm, a name on the hub or a path of what the task is for (a model or its config.json), or small-vit, "
    "small-convnet, small-lm."
)
_ROWS = "Rows per training step."


@_described
@dataclass(frozen=True)
class DemoSettings:
    """What to run; every field is an option of ``bioadapt demo``."""

    task: str = _option(DEFAULT_TASK, _TASK)
    data_dir: str | None = _option(None, _FOLDER)
    model: str = _option(DEFAULT_MODEL, _ENCODER)
    output: str = _option("demo_output", "Where adapters, results and picture go.")
    seed: int = _option(0, "Seed of all random numbers.", min=0)
    epochs: float = _option(1.0, "Epochs that every arm is trained for.")
    learning_rate: float | None = _option(None, "Of the LoRAs; chosen by the validation rows, if not given.")
    bio_learning_rate: float | None = _option(
        None, "Of what is over or beside a LoRA; chosen by the validation rows, if not given."
    )
    batch_size: int = _option(64, _ROWS, min=2)
    primitives: tuple[str, ...] = _option(PRIMITIVES, "Of the bio adapter.")
    limit: int | None = _option(None, _LIMIT)
    device: str | None = _option(None, _DEVICE)


@_described
@dataclass(frozen=True)
class EvaluationSettings:
    """What to evaluate, and how; every field is an option of ``bioadapt evaluate``."""

    task: tuple[str, ...] = _option(
        (DEFAULT_TASK,), "Names of tasks, all of --data-dir, or paths of files and folders."
    )
    data_dir: str | None = _option(None, "Folder of NAME/{train,dev,test}.tsv.gz or .npz files; the hub, if not given.")
    model: str = _option("minilm", _MODEL)
    arms: tuple[str, ...] = _option(DEFAULT_ARMS, "What is compared.")
    seeds: int = _option(5, "Seeds of training on which every arm is tested.")
    primitives: tuple[str, ...] = _option(PRIMITIVES, "Of the bio adapter.")
    bio_rank: int | None = _option(None, "Rank of its population; full width, if not given.")
    bio_config: str | None = _option(None, "Folder or file of an adapter_config.json, in place of --primitives.")
    lora_rank: int = _option(8, "Of the LoRA that is not of equal size.")
    lora_targets: tuple[str, ...] | None = _option(
        None, "Names of the modules that the LoRA sits on; those that PEFT takes, if not given."
    )
    layers: int | None = _option(None, "Adapt so many upper blocks alone; all, if not given.")
    adapters: tuple[str, ...] = _option(
        (), "Folders of saved adapters to load first, the lowest one first; they stay frozen."
    )
    rates: tuple[float, ...] = _option((5e-4, 2e-3, 8e-3), "Learning rates that each arm's is chosen from.")
    epochs: float = _option(1.0, "Passes through the training rows.")
    batch_size: int = _option(32, _ROWS, min=2)
    train_rows: int | None = _option(None, "At most so many training rows.")
    train_on: str | None = _option(None, "A set whose training and validation rows serve tasks that have none.")
    limit: int | None = _option(None, _LIMIT)
    output: str = _option("evaluation_output", "Where cells and results go.")
    device: str | None = _option(None, _DEVICE)


@_described
@dataclass(frozen=True)
class SearchSettings:
    """What to search, and for how long; every field is an option of ``bioadapt search``."""

    task: str = _option(DEFAULT_TASK, _TASK)
    data_dir: str | None = _option(None, _FOLDER)
    model: str = _option(DEFAULT_MODEL, _MODEL)
    lora: str = _option(AUTO, "auto: tuned with as many trials; none; or the folder of a trained one.")
    trials: int = _option(40, "How many configurations are tried; give more to go on.")
    budget_params: str | int = _option("1%", "Most numbers of the bio adapters: 200000, or 1% of the model.")
    lora_params: str | int | None = _option(
        None, "Most numbers of the LoRA that is tuned, in the same way; no bound, if not given."
    )
    output: str = _option("search_output", "Where adapters and report go.")
    storage: str | None = _option(
        None, "PATH.journal, sqlite:///PATH, postgresql://..., grpc://...; a journal in --output, if not given."
    )
    study: str | None = _option(None, "Name of the study; task and model, if not given.")
    workers: int = _option(1, "Processes that train at the same time.")
    seed: int = _option(0, "Seed of the search.", min=0)
    epochs: float = _option(1.0, "Of every training.")
    batch_size: int = _option(64, _ROWS, min=2)
    rungs: int = _option(2, "How often a trial is validated, the end included.")
    limit: int | None = _option(None, _LIMIT)
    primitives: tuple[str, ...] | None = _option(None, "Names to choose from; all, if not given.")
    slots: int = _option(SLOTS, "Most primitives of a configuration.")
    confirm: int = _option(3, "How many of the best are trained again on fresh seeds.")
    confirm_seeds: int = _option(2, "On how many.")
    test_seeds: int = _option(3, "On how many further ones the winner and its rivals are trained and tested.")
    timeout: float | None = _option(3600.0, "Seconds that a trial may take.")
    max_step_time: float | None = _option(None, "Seconds that a training step may take.")
    device: str | None = _option(None, _DEVICE)
