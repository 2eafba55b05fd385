"""The main job: a LoRA and a bio adapter over it on a real model and real data, compared fairly and reloaded.

``bioadapt demo`` runs it. The contenders are those of `bioadapt.evaluation.arms`: the model as it comes, a LoRA, the
LoRA with a bio adapter over it, two LoRAs that have as many parameters as both together, and a placebo in the place of
the bio adapter. All are trained for as many steps, each at the best of the same learning rates. The saved adapters are
then scored again in a fresh process, which must agree.
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from . import BioConfig
from ._extras import require, versions
from .evaluation import Evaluation, Interval, Task, compare, load_task, paired_interval, score_interval
from .evaluation.arms import ARMS, LORA_BIO, ZERO_SHOT, Recipe, arms_named, rivals_of_equal_size
from .evaluation.picture import draw
from .evaluation.protocol import DEFAULT_ARMS
from .evaluation.tasks import Overlap
from .evaluation.tasks.api_search import VALIDATION_LIBRARIES
from .evaluation.training import History, Schedule, fit, load_adapted, load_encoder, transformer_of
from .settings import DEFAULT_TASK, PRIMITIVES, DemoSettings

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

TOLERANCE = 1e-6
CONTENDERS = arms_named(DEFAULT_ARMS)
# What is saved, in the order of loading; a placebo is no adapter to be used.
_FOLDERS = {
    name: (f"{name}/lora", f"{name}/bio") if ARMS[name].over else (f"{name}/lora",)
    for name in CONTENDERS
    if ARMS[name].lora or ARMS[name].sized_as
    if ARMS[name].over in ("", "bio")
}
# What the library is for is shown first, then all that it is compared with.
_IN_TURN = (ZERO_SHOT, LORA_BIO, *(name for name in CONTENDERS if name not in (ZERO_SHOT, LORA_BIO)))

LEARNING_RATES = (1e-3, 3e-3)


@dataclass
class Contender:
    """One row of the table. ``curve``: (epoch, validation score); ``rates``: rate -> validation score at the end;
    ``seconds``: of the training at the chosen rate alone."""

    name: str
    test: Evaluation
    parameters: int = 0
    file_bytes: int = 0
    seconds: float = 0.0
    steps: int = 0
    rate: float = 0.0
    rates: dict[float, float] = field(default_factory=dict)
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
        task: Task = load_task(settings.task, settings.data_dir, limit=settings.limit)
        if not task.trainable:
            raise ValueError(f"task {task.name!r} has no rows to train on; take one that has")
        self.task, _ = (task, {}) if task.name == DEFAULT_TASK else Overlap.of([task]).without_leaks(task)
        fresh = partial(load_encoder, settings.model, settings.device)
        self.recipe = Recipe(fresh, BioConfig(primitives=list(settings.primitives)))
        # A model or a primitive that will not do is known before any training.
        self.recipe.build(LORA_BIO, settings.seed)
        self.output = Path(settings.output)
        self.output.mkdir(parents=True, exist_ok=True)
        self.contenders: list[Contender] = []
        self._start: float | None = None

    def run(self) -> dict[str, Any]:
        """Everything; returns what stands in ``results.json``.

        Raises:
            ReloadError: the reloaded adapters score differently. Results are written nevertheless.
        """
        started = time.perf_counter()
        with _progress(self.console) as self._bars:
            for name in _IN_TURN:
                self._add(self._contender(name))
            self.contenders.sort(key=lambda contender: CONTENDERS.index(contender.name))
            gap = self._rescore()
            with self._bar("comparing", 1) as step:
                differences = self._differences()
                draw(self.contenders, self.task, LORA_BIO, differences, self.output / "results.png")
                step(1, 1)
        text = json.dumps(self._results(differences, gap, time.perf_counter() - started), indent=1)
        (self.output / "results.json").write_text(text + "\n", encoding="utf-8")
        results = json.loads(text)
        self._print(results, differences)
        if not gap <= TOLERANCE:
            raise ReloadError(f"reloaded in a fresh process, the scores differ by {gap:.2g} (allowed: {TOLERANCE:g})")
        return results

    # -- the contenders ---------------------------------------------------------------------------------------------

    def _contender(self, name: str) -> Contender:
        """One arm, trained at each of its rates; the test rows see the best of them alone."""
        if name == ZERO_SHOT:
            encoder, _ = self.recipe.build(name, self.settings.seed)
            if self.task.sizes.get("validation"):  # the start of all: a fresh adapter changes nothing
                self._start = self.task.evaluate(encoder, "validation").scores[self.task.metrics[0]]
            return Contender(name, self.task.evaluate(encoder))
        rates, scores = self._rates(name), {}
        best: tuple[float, Any, int, History] | None = None
        for rate in rates:
            encoder, count, history = self._trained(name, rate)
            score = history.validation[-1][1] if history.validation else 0.0
            scores[rate] = score
            if best is None or score > scores[best[0]]:
                best = rate, encoder, count, history
        assert best is not None
        rate, encoder, count, history = best
        test = self.task.evaluate(encoder)
        size = self._save(name, encoder) if name in _FOLDERS else 0
        return Contender(name, test, count, size, history.seconds, history.steps, rate, scores, history.validation)

    def _rates(self, name: str) -> tuple[float, ...]:
        given = self.settings.bio_learning_rate if ARMS[name].over else self.settings.learning_rate
        rates = LEARNING_RATES if given is None else (given,)
        return rates if self.task.sizes.get("validation") else rates[:1]

    def _trained(self, name: str, rate: float) -> tuple[SentenceTransformer, int, History]:
        encoder, count = self.recipe.build(name, self.settings.seed)
        schedule = Schedule(self.settings.epochs, rate, self.settings.batch_size, self.settings.seed)
        per_epoch = 2 if self.task.sizes.get("validation") else 0
        with self._bar(f"training {name} at {rate:g}", 1) as step:
            history = fit(
                encoder,
                self.task,
                schedule,
                validations_per_epoch=per_epoch,
                start=self._start,
                progress=step,
                report=lambda steps, score: self._say(
                    f"{name} at rate {rate:g}, {steps} steps, validation: {self.task.metrics[0]} {self._start:.2f} -> "
                    f"{score:.2f}"
                ),
            )
        return encoder, count, history

    def _save(self, name: str, encoder: SentenceTransformer) -> int:
        """Write an arm's adapters, each into its folder; bytes of their weights."""
        model, total = transformer_of(encoder), 0
        model.requires_grad_(False)  # else the LoRA below would be saved a second time, as what trains along
        for folder in reversed(_FOLDERS[name]):
            model.save_pretrained(str(self.output / folder))
            total += (self.output / folder / "adapter_model.safetensors").stat().st_size
            model = model.unload()  # of LoRA and bio adapter: the LoRA below
        return total

    def _add(self, contender: Contender) -> None:
        self.contenders.append(contender)
        scores = ", ".join(f"{metric} {score:.2f}" for metric, score in contender.test.scores.items())
        self._say(f"{contender.name}, test: {scores}")

    # -- a fresh process --------------------------------------------------------------------------------------------

    def _rescore(self) -> float:
        """Largest difference of any score and any row between memory and the adapters loaded by another process."""
        job = {
            **{name: value for name, value in asdict(self.settings).items() if name in _RESCORE_SETTINGS},
            "fingerprint": self.task.fingerprint(),
            "adapters": {name: [str(self.output / folder) for folder in own] for name, own in _FOLDERS.items()},
        }
        (self.output / "rescore.json").write_text(json.dumps(job, indent=1) + "\n", encoding="utf-8")
        with self._bar("reloading in a fresh process", 1) as step:
            command = [sys.executable, "-m", __spec__.name, "--rescore", str(self.output)]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                raise ReloadError(f"the fresh process failed:\n{done.stderr[-2000:]}")
            step(1, 1)
        reloaded = json.loads((self.output / "rescored.json").read_text(encoding="utf-8"))
        memory = {contender.name: contender.test for contender in self.contenders}
        return max(memory[name].difference_from(_evaluation(record)) for name, record in reloaded.items())

    # -- the report -------------------------------------------------------------------------------------------------

    def _differences(self) -> dict[str, dict[str, Interval]]:
        """LoRA + bio minus each of the others, per metric."""
        candidate = next(contender for contender in self.contenders if contender.name == LORA_BIO)
        return {
            other.name: {metric: paired_interval(candidate.test, other.test, metric) for metric in self.task.metrics}
            for other in self.contenders
            if other is not candidate
        }

    def _verdict(self) -> str:
        tests = {contender.name: [contender.test] for contender in self.contenders}
        rivals = rivals_of_equal_size([name for name in CONTENDERS if name != LORA_BIO])
        metric = self.task.metrics[0]
        return compare({self.task.name: tests}, {self.task.name: metric}, LORA_BIO, rivals).verdict

    def _results(self, differences: dict[str, dict[str, Interval]], gap: float, seconds: float) -> dict[str, Any]:
        return {
            "settings": asdict(self.settings),
            "task": self.task.describe(),
            "contenders": [self._record(contender) for contender in self.contenders],
            "differences": {
                f"{LORA_BIO} - {name}": {metric: asdict(interval) for metric, interval in intervals.items()}
                for name, intervals in differences.items()
            },
            "verdict": self._verdict(),
            "reload": {"largest_difference": gap, "tolerance": TOLERANCE},
            "seconds": seconds,
            "machine": {"platform": platform.platform(), "threads": torch.get_num_threads()},
            "versions": versions("sentence-transformers"),
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
            "learning_rate": contender.rate,
            "learning_rates": {f"{rate:g}": score for rate, score in contender.rates.items()},
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

    @contextmanager
    def _bar(self, description: str, total: int) -> Iterator[Callable[[int, int], None]]:
        bar = self._bars.add_task(description, total=total)
        yield lambda done, total: self._bars.update(bar, completed=done, total=total)


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
    scored = {}
    for name, folders in job["adapters"].items():
        test = task.evaluate(load_adapted(load_encoder(job["model"], job["device"]), folders))
        scored[name] = {
            "scores": test.scores,
            "rows": {metric: rows.tolist() for metric, rows in test.rows.items()},
            "gold": test.gold.tolist(),
        }
    (output / "rescored.json").write_text(json.dumps(scored) + "\n", encoding="utf-8")


def _check(settings: DemoSettings) -> None:
    for name in ("epochs", "learning_rate", "bio_learning_rate", "batch_size"):
        value = getattr(settings, name)
        if value is not None and not value > 0:
            raise ValueError(f"--{name.replace('_', '-')} {value}: a number above zero is needed")


def _evaluation(record: dict[str, Any]) -> Evaluation:
    rows = {metric: np.array(values) for metric, values in record["rows"].items()}
    return Evaluation(record["scores"], rows, np.array(record["gold"]))


def _table(contenders: list[Contender], differences: dict[str, dict[str, Interval]], metrics: tuple[str, ...]) -> Table:
    table = Table(title=None)
    table.add_column("model")
    for name in (*metrics, "parameters", "rate", "file", "training", f"{LORA_BIO} minus it ({metrics[0]})"):
        table.add_column(name, justify="right")
    for contender in contenders:
        difference = differences.get(contender.name, {}).get(metrics[0])
        table.add_row(
            contender.name,
            *(f"{contender.test.scores[metric]:.2f}" for metric in metrics),
            f"{contender.parameters:,}" if contender.parameters else "-",
            f"{contender.rate:g}" if contender.rate else "-",
            f"{contender.file_bytes / 1000:.0f} kB" if contender.file_bytes else "-",
            f"{contender.seconds:.0f} s, {contender.steps} steps" if contender.steps else "-",
            str(difference) if difference else "-",
        )
    return table


def _how_chosen(settings: DemoSettings) -> str:
    fixed = ("primitives", "epochs", "learning_rate", "bio_learning_rate")
    own = [f"--{name.replace('_', '-')}" for name in fixed if getattr(settings, name) != getattr(DemoSettings(), name)]
    names = ", ".join(settings.primitives)
    given = f" Given on the command line: {', '.join(own)}." if own else ""
    rates = ", ".join(f"{rate:g}" for rate in LEARNING_RATES)
    text = f"Primitives: {names}.{given} Each arm's learning rate is the best of {rates} on the validation rows."
    if settings.primitives == PRIMITIVES and settings.task == DEFAULT_TASK:
        text += f" The primitives were chosen on the validation library ({', '.join(VALIDATION_LIBRARIES)})."
    return text


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
