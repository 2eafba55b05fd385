"""The model card of a saved adapter: its primitives with their references, what it was trained over, how to load it,
and what it scores, if that is known.

It takes the place of PEFT's empty form. Its last line holds a hash of the rest, so that a card which somebody has
written or changed is told from one that was left as it is, and stays.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData
from torch import nn

from .._version import __version__
from ..config import BioConfig
from ..registry import primitive_info

CARD = "README.md"
_SCORES = "## Scores"
_MARK = re.compile(r"\n<!-- bioadapt: ([0-9a-f]{16}) -->\s*\Z")


def is_somebodys(card: Path) -> bool:
    """Whether a card is there that this module has not written, or that was changed since."""
    if not card.is_file():
        return False
    text = ModelCard.load(card, ignore_metadata_errors=True).text
    mark = _MARK.search(text)
    return mark is None or mark[1] != _hash(text[: mark.start()])


def write_card(card: Path, configs: Mapping[str, BioConfig], plain: nn.Module, record: Mapping[str, Any]) -> None:
    """Write the text of the card, and its tags: of the one that PEFT has just made, or of a new one.

    Args:
        card: the file.
        configs: the saved adapters by name.
        plain: the model beneath all adapters.
        record: what they were trained over, as `provenance.record` gives it, with where in the folder that is.
    """
    if not card.is_file():
        fields = ModelCardData(library_name="peft", base_model=record["base"])
        card.write_text(f"---\n{fields.to_yaml()}\n---\n", encoding="utf-8")
    made = ModelCard.load(card, ignore_metadata_errors=True)
    names = dict.fromkeys(entry["name"] for config in configs.values() for entry in config.primitives)
    made.data.tags = sorted({*(made.data.tags or ()), "bioadapt", *names})
    if Path(record["base"] or ".").exists():  # a path means nothing on another machine, and the hub refuses it
        made.data.base_model = None
    _write(made, "\n".join(_text(configs, list(names), plain, record)), card)


def add_scores(folder: str | Path, task: str, scores: Mapping[str, float], *, kind: str = "") -> None:
    """Write what a saved adapter has reached on a task onto its model card, where the hub reads it, too.

    Scores of another task are kept, those of the same task replaced. Saving the adapter anew makes a card without any.

    Args:
        folder: of the adapter.
        task: what it was scored on.
        scores: by the name of the metric.
        kind: of task, such as ``sts``.

    Raises:
        ValueError: there is no card of bioadapt's in the folder, or one that was changed.
    """
    card = Path(folder, CARD)
    if not card.is_file() or is_somebodys(card):
        raise ValueError(
            f"{card} is not a card that bioadapt has written: save the adapter first, or write the scores by hand"
        )
    made = ModelCard.load(card, ignore_metadata_errors=True)
    kept = [result for result in made.data.eval_results or () if result.dataset_name != task]
    made.data.model_name = made.data.model_name or Path(folder).absolute().name
    made.data.eval_results = kept + [
        EvalResult(kind or "other", task, task, metric, round(float(score), 4)) for metric, score in scores.items()
    ]
    text = _MARK.sub("", made.text).partition(_SCORES)[0]
    rows = [f"| {one.dataset_name} | {one.metric_type} | {one.metric_value:g} |" for one in made.data.eval_results]
    _write(made, "\n".join([text.strip(), "", _SCORES, "", "| task | metric | score |", "|---|---|---|", *rows]), card)


def add_tags(card: Path, tags: Iterable[str]) -> None:
    """Put further tags among those that the hub reads."""
    made = ModelCard.load(card, ignore_metadata_errors=True)
    made.data.tags = sorted({*(made.data.tags or ()), *tags})
    made.save(card)


def _write(made: ModelCard, text: str, card: Path) -> None:
    text = text.strip()
    made.text = f"{text}\n<!-- bioadapt: {_hash(text)} -->\n"
    made.save(card)


def _hash(text: str) -> str:
    return hashlib.sha256(text.strip().encode()).hexdigest()[:16]


def _text(
    configs: Mapping[str, BioConfig], names: Sequence[str], plain: nn.Module, record: Mapping[str, Any]
) -> list[str]:
    base = "" if Path(record["base"] or ".").exists() else record["base"]
    lines = [
        f"# A bio adapter{f' for {base}' if base else ''}",
        "",
        "Made with bioadapt: mechanisms from neuroscience as PEFT adapters.",
        "",
        "## Primitives",
        "",
    ]
    for name in names:
        info = primitive_info(name)
        lines.append(f"- `{name}`: {info.summary} {' '.join(info.reference.split())}")
    lines += ["", "## Configuration", "", "```python"]
    lines += [f"{name} = {config!r}" for name, config in configs.items()]
    lines += ["```", "", "## Trained over", "", f"- {type(plain).__name__}{f' `{base}`' if base else ''}"]
    for below in record["adapters"]:
        place = f", which is in the folder `{below['saved_in']}`" if "saved_in" in below else ""
        lines.append(f"- the adapter `{below['name']}` of the type {below['peft_type']}{place}")
    return [*lines, "", "## Use", "", *_use(configs, base, plain, record), "", f"Written by bioadapt {__version__}."]


def _use(configs: Mapping[str, BioConfig], base: str, plain: nn.Module, record: Mapping[str, Any]) -> list[str]:
    """How to install and to load it. FOLDER is wherever the files are."""
    known = type(plain).__module__.startswith("transformers.")
    kind = type(plain).__name__
    lines = ["```", "pip install bioadapt", "```", "", "```python"]
    lines += ["import bioadapt  # teaches PEFT the method", "from peft import PeftModel"]
    lines += [f"from transformers import {kind}"] if known else []
    lines += [
        "",
        f'model = {kind}.from_pretrained("{base or "the base model"}")' if known else f"model = ...  # {kind}",
    ]
    for below in record["adapters"]:
        place = f"FOLDER/{below['saved_in']}" if "saved_in" in below else f"the {below['peft_type']} {below['name']}"
        lines.append(f'model = PeftModel.from_pretrained(model, "{place}")')
    first, *others = ("FOLDER" if name == "default" else f"FOLDER/{name}" for name in configs)
    lines.append(f'model = PeftModel.from_pretrained(model, "{first}")')
    lines += [f'model.load_adapter("{place}", "{Path(place).name}")' for place in others]
    return [*lines, "```"]
