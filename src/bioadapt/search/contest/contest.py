"""The whole of a search: tune the LoRA, search bio adapters over it, confirm the best, test once, report.

One file because the phases hand on what one study records of them.
"""

from __future__ import annotations

import json
import math
import os
import platform
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import optuna
import torch
from optuna.study import Study
from optuna.trial import TrialState
from rich.console import Console
from rich.progress import Progress

from ..._extras import require, versions
from ..._words import suggest
from ...evaluation import Task, load_task
from ...evaluation.tasks import is_name
from ...evaluation.training import adapt, load_adapted, transformer_of
from ...settings import DEFAULT_MODEL, DEFAULT_TASK, check_names
from ..report import write_report
from ..report.wording import count
from ..settings import AUTO, FREE, NO_LORA, SearchSettings, budget, check
from ..space import Configuration, SearchedModel, SearchSpace, load_adapters
from ..study import Child, Job, open_storage, prepare, run_study
from ..study.tickets import count_tickets, count_used, runs_here, this_worker
from .bench import Bench, searchable, without_test
from .bio import Below, BioObjective
from .cost import Pace, cost_in_words, trainings
from .finale import (
    WINNER,
    Confirmation,
    Final,
    best_trials,
    caveats,
    confirm,
    contenders,
    open_test,
    shrinkage,
    summary,
)
from .lora import LoraObjective, SavedLora, first_params, highest_ranks, lora_size, targets_of
from .own import Training, first_trials, in_words, search_with
from .script import winner_script

_TUNING = "tuning the LoRA"
# Seconds between two looks at what another machine has done.
_PATIENCE = 5.0


class Search:
    """The job in its steps. Construction checks everything that a user may have got wrong; `run` does the work.

    Every phase is recorded in the study, so that the same call goes on where another one was ended.

    Raises:
        ValueError: wrong settings, an unknown task, model, primitive or storage, or a study of other settings.
        ImportError: a package of an extra is not installed.
        OSError: the output folder cannot be made, or nothing answers at the storage's address.
    """

    def __init__(self, settings: SearchSettings, console: Console | None = None, *, task: Task | None = None) -> None:
        self.settings, self.console = settings, console or Console()
        check(settings)
        for extra, modules in (
            ("search", ("jinja2", "scipy", "matplotlib")),
            ("demo", ("sentence_transformers", "datasets", "sklearn")),
        ):
            for module in modules:
                require(module, extra)
        given = settings.task if task is None else task
        self.task: Task = searchable(load_task(given, settings.data_dir, limit=settings.limit))
        # The rows of a name are known by it.
        self._rows = {} if is_name(given, settings.data_dir) else {"rows": self.task.fingerprints()}
        self._in_memory = task is not None
        self.output = Path(settings.output)
        self._bench = Bench(
            settings.model,
            without_test(self.task),
            settings.epochs,
            settings.batch_size,
            settings.rungs,
            settings.device,
            settings.max_step_time,
            str(self.output / "prefix"),
            str(self.output / "models"),
        )
        encoder = self._bench.encoder(settings.seed)
        plain = transformer_of(encoder)
        self._lora_targets = targets_of(plain)
        host = SearchedModel.of(plain, settings.primitives)
        bound = settings.lora_params
        self._lora_ranks = highest_ranks(plain, None if bound is None else budget(bound, host.parameters))
        self.space = SearchSpace(host, budget=budget(settings.budget_params, host.parameters), slots=settings.slots)
        if settings.lora == AUTO and not self._lora_ranks:
            raise ValueError(
                f"lora {AUTO!r}: no linear layer of this model stands in a block, where the tuning puts a LoRA; "
                f"accepted: {NO_LORA}, or the folder of a trained one"
            )
        if settings.lora not in (AUTO, NO_LORA):
            _load_given(encoder, settings.lora)
        self.output.mkdir(parents=True, exist_ok=True)
        self.storage = settings.storage or str(self.output / "study.journal")
        self.name = settings.study or f"{self.task.name} {Path(settings.model).name}"
        open_storage(self.storage)

    def join(self) -> None:
        """Take trials of a search that `run` has begun, on this or another machine, until none is left.

        Raises:
            ValueError: there is no such study, or it was begun with other settings.
        """
        study = self._begun()
        self._say("Joined: this process takes trials, and waits between the phases for the one that began the search.")
        lora = f"{self.name}-lora"
        while self.settings.lora != NO_LORA and "lora" not in study.user_attrs:
            if self.settings.lora == AUTO and self._has_tickets(lora):
                job = self._job(lora, self._lora_objective(self._start(study)))
                run_study(job, self.settings.workers, self.console, _TUNING)
            time.sleep(_PATIENCE)
        while not self._has_tickets(self.name):
            time.sleep(_PATIENCE)
        job = self._job(self.name, self._objective(study, study.user_attrs.get("lora")))
        run_study(job, self.settings.workers, self.console, "searching bio adapters")

    def _has_tickets(self, name: str) -> bool:
        storage = open_storage(self.storage)
        if name not in optuna.get_all_study_names(storage):
            return False
        return "tickets" in optuna.load_study(study_name=name, storage=storage).user_attrs

    def run(self) -> dict[str, Any]:
        """Everything; returns what the study records as ``final``.

        Raises:
            KeyboardInterrupt: Ctrl-C. The same call goes on.
            ValueError: the study was made with other settings, or another process of this machine is running it.
            RuntimeError: all workers have died, or no trial has succeeded.
        """
        study = self._begin()
        with self._leading(study):
            return self._lead(study)

    def _lead(self, study: Study) -> dict[str, Any]:
        self._announce(study)
        start = self._start(study)
        lora = self._lora(study, start)
        self._search(study, lora)
        self._confirm(study, lora)
        shutil.rmtree(self.output / "prefix", ignore_errors=True)
        final = self._final(study, lora)
        report = write_report(self.name, self.storage, self.output / "report.html")
        self._say(final["verdict"])
        self._say(f"Report: {report}")
        return final

    def winner(self, final: Mapping[str, Any]) -> Any:
        """The model with the LoRA and the bio adapter that were tested on the first seed, loaded from disk, frozen.

        Args:
            final: what `run` has returned.
        """
        folder = self._tested(final["winner"]["number"]) / f"seed-{self._test_seeds[0]}"
        given = None if self.settings.lora in (AUTO, NO_LORA) else self.settings.lora
        bio = (folder / "bio").is_dir()  # a LoRA that was trained along is loaded with them
        alone = str(folder / "lora") if self.settings.lora == AUTO and not bio else given
        encoder = self._bench.encoder(self.settings.seed, alone)
        if bio:
            adapt(encoder, lambda lora: load_adapters(lora, folder / "bio"))
        return encoder

    # -- phases --

    def _begun(self) -> Study:
        """The study that is there, made with the same settings."""
        names = optuna.get_all_study_names(open_storage(self.storage))
        if self.name not in names:
            raise ValueError(f"study {self.name!r} is not in the storage: {suggest(self.name, names)}")
        study = optuna.load_study(study_name=self.name, storage=open_storage(self.storage))
        known, settings = study.user_attrs.get("settings", {}), self._fixed()
        for name, value in settings.items():
            if known.get(name) != value:
                raise ValueError(
                    f"study {self.name!r} was begun with {name}={known.get(name)!r}, not {value!r}: go on with that, "
                    "or give another name with --study"
                )
        if study.user_attrs["space"] != json.loads(json.dumps(self.space.record())):
            self.space = SearchSpace.from_record(study.user_attrs["space"])  # as it was when the search began
        return study

    @contextmanager
    def _leading(self, study: Study) -> Iterator[None]:
        """Two processes that run the same search would tune, confirm and test twice, and write the same files.

        Of a process on another machine nobody can tell whether it is still there.
        """
        leader = study.user_attrs.get("leader")
        if leader is not None and leader["pid"] != os.getpid() and runs_here(leader):
            raise ValueError(
                f"study {self.name!r} is being run by process {leader['pid']} of this machine: "
                "--join takes trials of it, --study begins another one"
            )
        study.set_user_attr("leader", this_worker())
        try:
            yield
        finally:
            study.set_user_attr("leader", None)

    def _fixed(self) -> dict[str, Any]:
        settings = {name: value for name, value in asdict(self.settings).items() if name not in FREE}
        # Earlier a tuned LoRA was trained before the bio adapters, and frozen: such trials cannot be gone on with.
        trained = {"lora_trained": "with the bio adapters"} if self.settings.lora == AUTO else {}
        return json.loads(json.dumps(settings | self._rows | trained))

    def _begin(self) -> Study:
        if self.name in optuna.get_all_study_names(open_storage(self.storage)):
            return self._begun()
        study = prepare(self.storage, self.name, 0)
        facts = {"versions": versions("sentence-transformers", "optuna"), "machine": _machine()}
        study.set_user_attr("settings", {**self._fixed(), "trials": self.settings.trials, **facts})
        study.set_user_attr("task", self.task.describe())
        study.set_user_attr("space", self.space.record())
        return study

    def _announce(self, study: Study) -> None:
        for line in in_words(self.space):
            self._say(line)
        rows = ", ".join(f"{count:,} {split}" for split, count in self.task.sizes.items())
        self._say(f"Rows of {self.task.name}: {rows}.")
        tuned = self.settings.trials if "lora" in study.user_attrs else self._used(f"{self.name}-lora")
        phases = trainings(self.settings, tuned, self._used(self.name), confirmed="final" in study.user_attrs)
        if not phases:
            return
        if "pace" not in study.user_attrs:
            with Child(Pace(self._bench, self.space)) as child:
                study.set_user_attr("pace", child.call(None))
        self._say(cost_in_words(phases, self.settings, self.task.sizes, study.user_attrs["pace"]))

    def _used(self, name: str) -> int:
        """How many trials of a study have ended."""
        if not self._has_tickets(name):
            return 0
        return count_used(optuna.load_study(study_name=name, storage=open_storage(self.storage)))

    def _start(self, study: Study) -> float:
        """Validation score of the model as it comes."""
        if "start" not in study.user_attrs:
            study.set_user_attr("start", self._bench.validate(self._bench.encoder(self.settings.seed)))
        return study.user_attrs["start"]

    def _lora(self, study: Study, start: float) -> dict[str, Any] | None:
        settings = self.settings
        if settings.lora == NO_LORA:
            return None
        if "lora" in study.user_attrs:
            return study.user_attrs["lora"]
        if settings.lora == AUTO:
            name = f"{self.name}-lora"
            prepare(self.storage, name, settings.trials, [first_params(self._lora_ranks)])
            tuned = run_study(self._job(name, self._lora_objective(start)), settings.workers, self.console, _TUNING)
            best = _best(tuned)
            folder = str((self.output / "lora").absolute())
            with Child(SavedLora(self._bench, settings.seed, folder)) as child:
                validation, size = child.call(best.params)
            record = {"study": name, "trials": count_tickets(tuned), "params": best.params, "folder": folder}
        else:
            encoder = self._bench.encoder(settings.seed, settings.lora)
            validation = self._bench.validate(encoder)
            size = lora_size(transformer_of(encoder))
            record = {"study": None, "trials": 0, "params": None, "folder": settings.lora}
        study.set_user_attr("lora", {**record, "validation": validation, "parameters": size})
        return study.user_attrs["lora"]

    def _lora_objective(self, start: float) -> LoraObjective:
        return LoraObjective(self._bench, self._lora_ranks, start, self.settings.seed)

    def _search(self, study: Study, lora: Mapping[str, Any] | None) -> None:
        settings = self.settings
        prepare(self.storage, self.name, settings.trials, self._first_trials(lora))
        recorded = study.user_attrs["settings"]
        study.set_user_attr("settings", {**recorded, "trials": count_tickets(study)})
        job = self._job(self.name, self._objective(study, lora))
        run_study(job, settings.workers, self.console, "searching bio adapters")

    def _first_trials(self, lora: Mapping[str, Any] | None) -> list[dict[str, Any]]:
        along = _below(lora).params
        return first_trials(self.space, self.settings.trials, along["learning_rate"] if along else None)

    def _objective(self, study: Study, lora: Mapping[str, Any] | None) -> BioObjective:
        alone = lora["validation"] if lora else self._start(study)
        return BioObjective(self.space, self._bench, _below(lora), alone, self.settings.seed)

    def _confirm(self, study: Study, lora: Mapping[str, Any] | None) -> None:
        """Of all trials that there are: more of them than the last time may have brought other ones to the top."""
        settings = self.settings
        _best(study)
        seeds = [settings.seed + 1 + i for i in range(settings.confirm_seeds)]
        if "confirmation" not in study.user_attrs:
            self._say(f"Confirming the best {settings.confirm} on {count(settings.confirm_seeds, 'fresh seed')} each.")
        with (
            Child(Confirmation(self.space, self._bench, _below(lora))) as child,
            self._bar() as bar,
        ):
            follow = partial(bar.track, description="confirming")
            confirmation = confirm(study, best_trials(study, settings.confirm), seeds, child.call, follow)
        study.set_user_attr("confirmation", confirmation)

    def _final(self, study: Study, lora: Mapping[str, Any] | None) -> dict[str, Any]:
        number = study.user_attrs["confirmation"][0]["number"]
        tried = len(study.get_trials(deepcopy=False, states=(TrialState.COMPLETE, TrialState.PRUNED)))
        earlier = study.user_attrs.get("final")
        if earlier is not None and earlier["winner"]["number"] == number and earlier["configurations_tried"] == tried:
            return earlier
        trial = next(trial for trial in study.get_trials(deepcopy=False) if trial.number == number)
        winner = Configuration.from_record(trial.user_attrs["configuration"])
        params = lora["params"] if lora else None
        given = lora["folder"] if lora and params is None else None
        folder = self._tested(number)
        final = Final(self.space, replace(self._bench, task=self.task, prefix=None), winner, params, given, str(folder))
        self._say(f"Testing the winner and its rivals on {count(len(self._test_seeds), 'seed')} each.")
        with Child(final) as child, self._bar() as bar:
            follow = partial(bar.track, description="testing")
            results = open_test(contenders(params, given), self._test_seeds, folder, child.call, follow)
        # What an earlier winner had been tested with, before there were more trials, has been seen as well.
        tested = dict(study.user_attrs.get("tested", {}))
        if earlier is not None:
            tested.setdefault(str(earlier["winner"]["number"]), earlier["test_accesses"])
        tested[str(number)] = len(results)
        study.set_user_attr("tested", tested)
        record = summary(results, self.task.metrics[0])
        notes = caveats(len(tested), count_tickets(study), lora["trials"] if lora and params is not None else None)
        record |= {
            "winner": {"number": number, "configs": trial.user_attrs["configs"], "learning_rate": winner.learning_rate},
            "shrinkage": shrinkage(study, self.space, number),
            "configurations_tried": tried,
            "test_accesses": sum(tested.values()),
            "verdict": " ".join([record["verdict"], *notes]),
            "script": winner_script(
                self.settings,
                in_memory=self._in_memory,
                lora=lora,
                lora_targets=self._lora_targets,
                configs=trial.user_attrs["configs"],
                learning_rate=winner.learning_rate,
                reported={result["seed"]: result["score"] for result in results if result["name"] == WINNER},
                metric=record["metric"],
            ),
        }
        (self.output / "winner.py").write_text(record["script"], encoding="utf-8")
        study.set_user_attr("final", record)
        return record

    # -- small things --

    def _tested(self, number: int) -> Path:
        """Where results and adapters of the test go, if this trial has won."""
        return self.output / f"test of trial {number}"

    @property
    def _test_seeds(self) -> list[int]:
        """Neither the search nor the confirmation has seen them."""
        first = self.settings.seed + 1 + self.settings.confirm_seeds
        return [first + i for i in range(self.settings.test_seeds)]

    def _job(self, name: str, objective: Any) -> Job:
        return Job(self.storage, name, objective, self.settings.seed, self.settings.timeout)

    def _bar(self) -> Progress:
        """How many are done and how long the rest will take; a training may last longer than Rich looks back."""
        return Progress(console=self.console, disable=self.console.quiet, speed_estimate_period=math.inf)

    def _say(self, text: str) -> None:
        self.console.print(text, highlight=False, markup=False, soft_wrap=True)


def search(
    task: Any = DEFAULT_TASK,
    *,
    objective: Training | None = None,
    model: Any = None,
    console: Console | None = None,
    **settings: Any,
) -> dict[str, Any]:
    """Search a bio adapter for a model and a task, over a LoRA that is tuned as long, and test the winner once.

    With an ``objective`` it is searched for any model, by a training and a score of one's own; see `search_with`.

    Args:
        task: as `load_task` takes it: a name, or rows of one's own as a `Task`, a DataFrame, a `datasets.Dataset` or
            ``DatasetDict``, a dict, a file or a folder.
        objective: ``objective(model, learning_rate, report) -> score`` in the place of a task.
        model: name or path of the model that the task is for, all-MiniLM-L6-v2 if None; with an objective, the torch
            module.
        console: where progress is shown; the terminal if None.
        settings: the fields of `SearchSettings`, such as ``data_dir="data", trials=40``.

    Returns:
        What the study records as ``final``: contenders, differences with intervals, the winner's configuration; with an
        objective, what `search_with` does.

    Raises:
        TypeError: no such setting.
        ValueError: see `Search` and `search_with`.
    """
    if objective is not None:
        if not isinstance(model, torch.nn.Module):
            raise ValueError(f"model={model!r}: an objective needs the model that it trains, a torch module")
        given = {} if isinstance(task, str) and task == DEFAULT_TASK else {"task": task}
        return search_with(objective, model, console, **given, **settings)
    if not isinstance(model, (str, Path, type(None))):
        raise ValueError(
            f"model is a {type(model).__name__}: for a task the name or the path of a model is needed; "
            "a module is searched by a function of your own, given as objective="
        )
    check_names("search", settings, SearchSettings)
    own = None if isinstance(task, (str, Path)) else load_task(task)
    chosen = SearchSettings(task=str(task) if own is None else own.name, model=str(model or DEFAULT_MODEL), **settings)
    return Search(chosen, console, task=own).run()


def _below(lora: Mapping[str, Any] | None) -> Below:
    """What the study records of the LoRA, as what lies below: trained along if it was tuned, frozen if it was given."""
    if lora is None:
        return Below()
    return Below(folder=lora["folder"]) if lora["params"] is None else Below(params=lora["params"])


def _load_given(encoder: Any, folder: str) -> None:
    try:
        load_adapted(encoder, [folder])
    except (ValueError, RuntimeError, OSError, KeyError) as error:
        raise ValueError(f"lora {folder!r} could not be loaded: {str(error).splitlines()[0]}") from error


def _best(study: Study) -> Any:
    if not study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,)):
        reasons = [trial.user_attrs.get("failure", "pruned") for trial in study.get_trials(deepcopy=False)]
        raise RuntimeError(f"study {study.study_name!r}: no trial has succeeded; the last one: {reasons[-1]}")
    return study.best_trial


def _machine() -> dict[str, Any]:
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or platform.machine()
    return {"platform": platform.platform(), "cores": os.cpu_count(), "device": device}
