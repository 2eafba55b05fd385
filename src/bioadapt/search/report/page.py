"""A study as one HTML page that needs nothing else: what was compared, what came out, what to copy.

The page is made from what the storage holds, also while the study runs, and for studies of anything else; what is not
there yet is said in a sentence.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import optuna
from optuna.storages import BaseStorage
from optuna.study import Study

from ..._extras import require
from ..._words import suggest
from ..study import open_storage
from ..study.address import hidden
from .contents import Contents, in_brackets
from .recorded import of_study, of_trial
from .wording import count, number, short

LISTED = 60  # trials in a table


def write_report(study_name: str, storage_url: str, output: str | Path) -> Path:
    """Write the report of a study.

    Args:
        study_name: its name in the storage.
        storage_url: as for `open_storage`.
        output: the HTML file; its folder is made.

    Returns:
        The file.

    Raises:
        ValueError: no study of that name, or one with several objectives.
        ImportError: jinja2 or matplotlib is missing.
        OSError: the storage does not answer, or the file cannot be written.
    """
    study, lora = _opened(study_name, storage_url)
    path = Path(output)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(render(study, lora), encoding="utf-8")
    return path


def as_record(study_name: str, storage_url: str) -> dict[str, Any]:
    """A study as plain data: its name and direction, what a search recorded of itself, and all trials.

    Raises:
        ValueError: no study of that name, or one with several objectives.
        OSError: the storage does not answer.
    """
    study, _ = _opened(study_name, storage_url)
    trials = [
        {"number": trial.number, "state": trial.state.name, "value": trial.value, "params": trial.params}
        | of_trial(trial)
        for trial in study.trials
    ]
    return {"study": study_name, "direction": study.direction.name, **of_study(study), "trials": trials}


def _opened(study_name: str, storage_url: str) -> tuple[Study, Study | None]:
    """A study, and the one in which the LoRA was tuned that it is compared with."""
    storage = open_storage(storage_url, create=False)
    names = optuna.get_all_study_names(storage)
    if study_name not in names:
        raise ValueError(f"study {study_name!r} is not in {hidden(storage_url)}: {suggest(study_name, names)}")
    study = optuna.load_study(study_name=study_name, storage=storage)
    if len(study.directions) > 1:
        raise ValueError(f"study {study_name!r} has {len(study.directions)} objectives; a report is about one")
    return study, _companion(study, storage, names)


def render(study: Study, lora: Study | None = None) -> str:
    """The report of a study as HTML.

    Args:
        study: the search.
        lora: the study in which the LoRA was tuned that it is compared with.
    """
    jinja = require("jinja2", "search")
    source = resources.files(__package__).joinpath("report.html.j2").read_text(encoding="utf-8")
    environment = jinja.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    environment.filters.update(number=number, short=short, interval=in_brackets, count=count)
    template = environment.from_string(source)
    return template.render(r=Contents(study, lora), listed=LISTED, figure=require("markupsafe", "search").Markup)


def _companion(study: Study, storage: BaseStorage, names: Sequence[str]) -> Study | None:
    name = of_study(study).get("lora", {}).get("study")
    return optuna.load_study(study_name=name, storage=storage) if name in names else None
