"""The main job: a LoRA and a bio adapter over it on a real model and real data, compared fairly and reloaded.

``bioadapt demo`` runs it. Four models are scored: as it comes, with a LoRA, with the bio adapter stacked over that
LoRA, and with one LoRA that has as many parameters as both together and is trained for as many epochs. The saved
adapters are then scored again in a fresh process, which must agree.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from . import BioConfig
from ._extras import require
from .evaluation import Evaluation, Interval, Task, load_task, paired_interval, score_interval
from .evaluation.picture import draw
from .evaluation.tasks import DEFAULT_TASK
from .evaluation.tasks.api_search import VALIDATION_LIBRARIES
from .evaluation.training import (
    DEFAULT_MODEL,
    History,
    Schedule,
    adapt,
    fit,
    load_encoder,
    load_stack,
    rank_of_size,
    trainable_parameters,
)

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

TOLERANCE = 1e-6
ZERO_SHOT, LORA, STACK, SAME_SIZE = "zero-shot", "LoRA", "LoRA + bio", "LoRA, same size"
_FOLDERS = {LORA: ("lora",), STACK: ("lora", "bio"), SAME_SIZE: ("lora-same-size",)}
_RANK = 8
_ALPHA_PER_RANK = 2

# Chosen by the score on the validation library of the API search (networkx), never on the test library: the primitives
# among single ones and groups of them, which hardly differed, the LoRA's learning rate among three. To compare others,
# give them on the command line and read "validation" in results.json.
PRIMITIVES = ("lateral_inhibition", "predictive_coding")
EPOCHS = 1.0
LEARNING_RATE = 1e-3
BIO_LEARNING_RATE = 1e-2


@dataclass(frozen=True)
class DemoSettings:
    """What to run. ``epochs`` holds for the LoRA and for the bio adapter each; the LoRA of the same size gets both."""

    task: str = DEFAULT_TASK
    data_dir: str | None = None
    model: str = DEFAULT_MODEL
    output: str = "demo_output"
    seed: int = 0
    epochs: float = EPOCHS
    learning_rate: float = LEARNING_RATE
    bio_learning_rate: float = BIO_LEARNING_RATE
    batch_size: int = 64
    primitives: tuple[str, ...] = PRIMITIVES
    limit: int | None = None
    device: str | None = None


@dataclass
class Contender:
    """One row of the table. ``curve``: (epoch, validation score); ``seconds``: training time, that below included."""

    name: str
    test: Evaluation
    parameters: int = 0
    file_bytes: int = 0
    seconds: float = 0.0
    steps: int = 0
    curve: list[tuple[float, float]] = field(default_factory=list)


class ReloadError(RuntimeError):
    """The adapters did not score the same in a fresh process."""


class Demo:
    """The job in its steps. Construction checks everything that a user may have got wrong; `run` does the work.

    Raises:
        ValueError: wrong settings, an unknown task or model.
        MissingExtra: a package of the extra ``demo`` is not installed.
        OSError: the output folder cannot be made.
    """

    def __init__(self, settings: DemoSettings, console: Console | None = None) -> None:
        self.settings, self.console = settings, console or Console()
        _check(settings)
        for module in ("sentence_transformers", "datasets", "scipy", "sklearn", "matplotlib"):
            require(module)
        self.task: Task = load_task(settings.task, settings.data_dir, limit=settings.limit)
        if not self.task.trainable:
            raise ValueError(f"task {self.task.name!r} has no rows to train on; take one that has")
        self._rehearse()
        self.output = Path(settings.output)
        self.output.mkdir(parents=True, exist_ok=True)
        self.contenders: list[Contender] = []

    def run(self) -> dict[str, Any]:
        """Everything; returns what stands in ``results.json``.

        Raises:
            ReloadError: the reloaded adapters score differently. Results are written nevertheless.
        """
        started = time.perf_counter()
        with _progress(self.console) as self._bars:
            self._zero_shot()
            lora = self._lora()
            self._stack()
            self._same_size(lora)
            gap = self._rescore()
            with self._bar("comparing", 1) as step:
                differences = self._differences()
                draw(self.contenders, self.task, differences, self.output / "results.png")
                step(1, 1)
        text = json.dumps(self._results(differences, gap, time.perf_counter() - started), indent=1)
        (self.output / "results.json").write_text(text + "\n", encoding="utf-8")
        results = json.loads(text)
        self._print(results, differences)
        if not gap <= TOLERANCE:
            raise ReloadError(f"reloaded in a fresh process, the scores differ by {gap:.2g} (allowed: {TOLERANCE:g})")
        return results

    def bio_config(self) -> BioConfig:
        return BioConfig(primitives=list(self.settings.primitives), seed=self.settings.seed)

    def _rehearse(self) -> None:
        """Build the stack once, so that a model or a primitive that will not do is known before any training."""
        config = self.bio_config()
        encoder = self._encoder()
        adapt(encoder, lambda base: get_peft_model(base, _lora_config(_RANK)))
        adapt(encoder, lambda lora: get_peft_model(lora, config))

    # -- the four contenders ----------------------------------------------------------------------------------------

    def _zero_shot(self) -> None:
        with self._bar("reading the texts and the model", 2) as step:
            _ = self.task.sizes
            step(1, 2)
            self._add(Contender(ZERO_SHOT, self.task.evaluate(self._encoder())))
            step(2, 2)

    def _lora(self) -> PeftModel:
        encoder = self._encoder()
        model = adapt(encoder, lambda base: get_peft_model(base, _lora_config(_RANK)))
        return self._train(LORA, encoder, model, self.settings.epochs, self.settings.learning_rate)

    def _stack(self) -> None:
        # Loaded from disk as a user would load it, the LoRA is frozen: the bio adapter alone is trained.
        encoder = load_stack(self._encoder(), [self._folder(_FOLDERS[LORA][-1])])
        model = adapt(encoder, lambda lora: get_peft_model(lora, self.bio_config()))
        below = self.contenders[-1]
        self._train(STACK, encoder, model, self.settings.epochs, self.settings.bio_learning_rate, below)

    def _same_size(self, lora: PeftModel) -> None:
        config = lora_of_size(lora, self.contenders[-1].parameters)
        encoder = self._encoder()
        model = adapt(encoder, lambda base: get_peft_model(base, config))
        self._train(SAME_SIZE, encoder, model, 2 * self.settings.epochs, self.settings.learning_rate)

    def _train(
        self,
        name: str,
        encoder: SentenceTransformer,
        model: PeftModel,
        epochs: float,
        learning_rate: float,
        below: Contender | None = None,
    ) -> PeftModel:
        parameters = trainable_parameters(model)
        schedule = Schedule(epochs, learning_rate, self.settings.batch_size, self.settings.seed)
        with self._bar(f"training {name}", 1) as step:
            history = fit(
                encoder,
                self.task,
                schedule,
                validations_per_epoch=self._validations(),
                start=self._known_start(below),
                progress=step,
            )
        folder = self._folder(_FOLDERS[name][-1])
        model.save_pretrained(str(folder))
        self._add(_contender(name, self.task.evaluate(encoder), parameters, folder, history, below))
        return model

    def _add(self, contender: Contender) -> None:
        self.contenders.append(contender)
        scores = ", ".join(f"{metric} {score:.2f}" for metric, score in contender.test.scores.items())
        self._say(f"{contender.name}: {scores}")

    def _validations(self) -> int:
        return 2 if self.task.sizes.get("validation") else 0

    def _known_start(self, below: Contender | None) -> float | None:
        """The validation score before training: a fresh adapter changes nothing, so it is that of what lies below."""
        if below is not None:
            return below.curve[-1][1] if below.curve else None
        starts = [contender.curve[0][1] for contender in self.contenders if contender.curve]
        return starts[0] if starts else None

    # -- a fresh process --------------------------------------------------------------------------------------------

    def _rescore(self) -> float:
        """Largest difference of any score and any row between memory and the adapters loaded by another process."""
        job = {
            **{name: value for name, value in asdict(self.settings).items() if name in _RESCORE_SETTINGS},
            "fingerprint": self.task.fingerprint(),
            "stacks": {name: [str(self._folder(folder)) for folder in folders] for name, folders in _FOLDERS.items()},
        }
        (self.output / "rescore.json").write_text(json.dumps(job, indent=1) + "\n", encoding="utf-8")
        with self._bar("reloading in a fresh process", 1) as step:
            command = [sys.executable, "-m", __spec__.name, "--rescore", str(self.output)]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                raise ReloadError(f"the fresh process failed:\n{done.stderr[-2000:]}")
            step(1, 1)
        found = json.loads((self.output / "rescored.json").read_text(encoding="utf-8"))
        memory = {contender.name: contender.test for contender in self.contenders}
        return max(memory[name].difference_from(_evaluation(record)) for name, record in found.items())

    # -- the report -------------------------------------------------------------------------------------------------

    def _differences(self) -> dict[str, dict[str, Interval]]:
        """LoRA + bio minus each of the others, per metric."""
        stack = next(contender for contender in self.contenders if contender.name == STACK)
        return {
            other.name: {metric: paired_interval(stack.test, other.test, metric) for metric in self.task.metrics}
            for other in self.contenders
            if other is not stack
        }

    def _results(self, differences: dict[str, dict[str, Interval]], gap: float, seconds: float) -> dict[str, Any]:
        return {
            "settings": asdict(self.settings),
            "task": self.task.describe(),
            "contenders": [self._record(contender) for contender in self.contenders],
            "differences": {
                f"{STACK} - {name}": {metric: asdict(interval) for metric, interval in intervals.items()}
                for name, intervals in differences.items()
            },
            "verdict": verdict(differences[SAME_SIZE][self.task.metrics[0]], self.task.metrics[0]),
            "reload": {"largest_difference": gap, "tolerance": TOLERANCE},
            "seconds": seconds,
            "machine": {"platform": platform.platform(), "threads": torch.get_num_threads()},
            "versions": {
                name: importlib.metadata.version(name)
                for name in ("torch", "transformers", "peft", "sentence-transformers")
            },
        }

    def _record(self, contender: Contender) -> dict[str, Any]:
        return {
            "name": contender.name,
            "test": contender.test.scores,
            "interval": asdict(score_interval(contender.test, self.task.metrics[0])),
            "validation": contender.curve,
            "parameters": contender.parameters,
            "file_bytes": contender.file_bytes,
            "seconds": contender.seconds,
            "steps": contender.steps,
        }

    def _print(self, results: dict[str, Any], differences: dict[str, dict[str, Interval]]) -> None:
        task, reload = results["task"], results["reload"]["largest_difference"]
        rows = ", ".join(f"{count:,} {split}" for split, count in task["rows"].items())
        self.console.print(_table(self.contenders, differences, self.task.metrics))
        self._say(f"Task {task['name']}: {rows}.")
        self._say(results["verdict"], style="bold")
        self._say(
            f"Brackets: 95 % paired bootstrap over the {task['rows']['test']:,} test rows, of {self.task.metrics[0]}. "
            "They cover the choice of rows, not the seed of training, of which this is one."
        )
        self._say(_how_chosen(self.settings))
        self._say(
            f"Reloaded in a fresh process: largest difference {reload:.1g}. Adapters, results.json and results.png are "
            f"in {self.output}. {results['seconds']:.0f} s in all."
        )

    # -- small things -----------------------------------------------------------------------------------------------

    def _say(self, text: str, style: str | None = None) -> None:
        self.console.print(text, style=style, highlight=False, markup=False, soft_wrap=True)

    def _encoder(self) -> SentenceTransformer:
        torch.manual_seed(self.settings.seed)
        return load_encoder(self.settings.model, self.settings.device)

    def _folder(self, name: str) -> Path:
        return self.output / name

    @contextmanager
    def _bar(self, description: str, total: int) -> Iterator[Callable[[int, int], None]]:
        bar = self._bars.add_task(description, total=total)
        yield lambda done, total: self._bars.update(bar, completed=done, total=total)


def lora_of_size(lora: PeftModel, parameters: int) -> LoraConfig:
    """A LoRA on the same modules as ``lora`` with as nearly ``parameters`` numbers as ranks per module allow.

    The rank differs by at most one between modules, and so does no scale: alpha follows the rank.
    """
    costs = {
        name: module.in_features + module.out_features
        for name, module in lora.get_base_model().named_modules()
        if hasattr(module, "lora_A")
    }
    rank, raised = rank_of_size(costs, parameters)
    config = _lora_config(rank)
    config.rank_pattern = dict.fromkeys(raised, rank + 1)
    config.alpha_pattern = dict.fromkeys(raised, _ALPHA_PER_RANK * (rank + 1))
    return config


def verdict(interval: Interval, metric: str) -> str:
    """One plain sentence on the bio adapter against the LoRA of the same size."""
    size = f"{abs(interval.estimate):.2f} points of {metric} [{interval.low:+.2f}, {interval.high:+.2f}]"
    if interval.verdict == "higher":
        return f"The bio adapter wins here: LoRA + bio is better than the LoRA of the same size by {size}."
    if interval.verdict == "lower":
        return f"The bio adapter loses here: LoRA + bio is worse than the LoRA of the same size by {size}."
    side = "above" if interval.estimate > 0 else "below" if interval.estimate < 0 else "from"
    return f"Undecided: LoRA + bio is {size} {side} the LoRA of the same size, and the interval includes zero."


_RESCORE_SETTINGS = ("task", "data_dir", "model", "limit", "device")


def rescore(output: Path) -> None:
    """What the fresh process does: load the adapters named in ``rescore.json``, score them, write ``rescored.json``.

    Raises:
        RuntimeError: this process reads other test rows than the one that trained.
    """
    job = json.loads((output / "rescore.json").read_text(encoding="utf-8"))
    task = load_task(job["task"], job["data_dir"], limit=job["limit"])
    if task.fingerprint() != job["fingerprint"]:
        raise RuntimeError("the test rows are not those that were scored after training")
    found = {}
    for name, folders in job["stacks"].items():
        test = task.evaluate(load_stack(load_encoder(job["model"], job["device"]), folders))
        found[name] = {
            "scores": test.scores,
            "rows": {metric: rows.tolist() for metric, rows in test.rows.items()},
            "gold": test.gold.tolist(),
        }
    (output / "rescored.json").write_text(json.dumps(found) + "\n", encoding="utf-8")


def _check(settings: DemoSettings) -> None:
    for name in ("epochs", "learning_rate", "bio_learning_rate", "batch_size"):
        value = getattr(settings, name)
        if not value > 0:
            raise ValueError(f"--{name.replace('_', '-')} {value}: a number above zero is needed")


def _lora_config(rank: int) -> LoraConfig:
    return LoraConfig(r=rank, lora_alpha=_ALPHA_PER_RANK * rank)  # PEFT's default modules: query and value


def _contender(
    name: str, test: Evaluation, parameters: int, folder: Path, history: History, below: Contender | None
) -> Contender:
    """Counts and times of the adapter itself plus those of the one that it is stacked over."""
    under = below or Contender("", test)
    last = under.curve[-1][0] if under.curve else 0.0
    return Contender(
        name,
        test,
        parameters=parameters + under.parameters,
        file_bytes=(folder / "adapter_model.safetensors").stat().st_size + under.file_bytes,
        seconds=history.seconds + under.seconds,
        steps=history.steps + under.steps,
        curve=[(epoch + last, score) for epoch, score in history.validation],
    )


def _evaluation(record: dict[str, Any]) -> Evaluation:
    rows = {metric: np.array(values) for metric, values in record["rows"].items()}
    return Evaluation(record["scores"], rows, np.array(record["gold"]))


def _table(contenders: list[Contender], differences: dict[str, dict[str, Interval]], metrics: tuple[str, ...]) -> Table:
    table = Table(title=None)
    table.add_column("model")
    for name in (*metrics, "parameters", "file", "training", f"{STACK} minus it ({metrics[0]})"):
        table.add_column(name, justify="right")
    for contender in contenders:
        difference = differences.get(contender.name, {}).get(metrics[0])
        table.add_row(
            contender.name,
            *(f"{contender.test.scores[metric]:.2f}" for metric in metrics),
            f"{contender.parameters:,}" if contender.parameters else "-",
            f"{contender.file_bytes / 1000:.0f} kB" if contender.file_bytes else "-",
            f"{contender.seconds:.0f} s, {contender.steps} steps" if contender.steps else "-",
            str(difference) if difference else "-",
        )
    return table


def _how_chosen(settings: DemoSettings) -> str:
    own = [
        f"--{name.replace('_', '-')}"
        for name, default in (
            ("primitives", PRIMITIVES),
            ("epochs", EPOCHS),
            ("learning_rate", LEARNING_RATE),
            ("bio_learning_rate", BIO_LEARNING_RATE),
        )
        if getattr(settings, name) != default
    ]
    names = ", ".join(settings.primitives)
    if own:
        return f"Primitives: {names}. Given on the command line: {', '.join(own)}."
    untuned = [name for name in ("task", "model") if getattr(settings, name) != getattr(DemoSettings(), name)]
    other = f"; nothing was tuned on this {' or this '.join(untuned)}" if untuned else ""
    return (
        f"Primitives: {names}. They, the learning rates and the epochs were chosen on the validation library of the "
        f"API search ({', '.join(VALIDATION_LIBRARIES)}), never on a test split{other}. The LoRA of the same size "
        "takes over the learning rate of the small one."
    )


def _progress(console: Console) -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.completed}/{task.total}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=console,
    )


def main(arguments: list[str] | None = None) -> None:
    """Entry point of the fresh process."""
    parser = argparse.ArgumentParser(prog="python -m bioadapt.demo", description="Used by `bioadapt demo`.")
    parser.add_argument("--rescore", type=Path, required=True, metavar="FOLDER", help="output folder of a demo run")
    rescore(parser.parse_args(arguments).rescore)


if __name__ == "__main__":
    main()
