"""A configuration as adapters on a model: put in, saved and loaded."""

from __future__ import annotations

import re
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from peft import PeftModel, get_peft_model
from torch import nn

from ... import BioConfig
from ...checkpoint import ALONG
from .configuration import Slot

_NAME = "bio"


def add_adapters(model: Any, configs: Sequence[BioConfig]) -> PeftModel:
    """Put adapters into a model, all of them active and trainable: ``bio``, ``bio_2``, ...

    Args:
        model: a plain model, or a `PeftModel` to stack over.
        configs: one for each set of modules, as `SearchSpace.configs` gives them; at least one.
    """
    first, *others = configs
    adapted = get_peft_model(model, first, adapter_name=_NAME)
    names = [_NAME]
    for number, config in enumerate(others, start=2):
        names.append(f"{_NAME}_{number}")
        adapted.add_adapter(names[-1], config)
    adapted.base_model.set_adapter(names)
    return adapted


def save_adapters(model: PeftModel, folder: str | Path) -> None:
    """Write every adapter into a subfolder of its name, and a LoRA that trains along beside it."""
    model.save_pretrained(str(folder))


def load_adapters(model: Any, folder: str | Path) -> PeftModel:
    """Load what `save_adapters` wrote, all of them active and frozen, over the LoRA that trained along, if one did.

    Plain PEFT does the same::

        model = PeftModel.from_pretrained(model, "folder/bio", adapter_name="bio")
        model.load_adapter("folder/bio_2", adapter_name="bio_2")
        model.base_model.set_adapter(["bio", "bio_2"], inference_mode=True)

    Raises:
        ValueError: no adapter in the folder.
    """
    numbered = {1: _NAME} | {
        int(matched[1]): path.name
        for path in Path(folder).glob(f"{_NAME}_*")
        if (matched := re.fullmatch(rf"{_NAME}_(\d+)", path.name))
    }
    names = [name for _, name in sorted(numbered.items())]
    if not (Path(folder) / _NAME).is_dir():
        raise ValueError(f"{folder}: no adapter {_NAME!r} is in this folder")
    plain = not isinstance(model, PeftModel)
    for config in sorted(Path(folder, _NAME, ALONG).glob("*/adapter_config.json")) if plain else ():
        model = PeftModel.from_pretrained(model, str(config.parent), adapter_name=config.parent.name)
    adapted = PeftModel.from_pretrained(model, str(Path(folder) / _NAME), adapter_name=_NAME)
    for name in names[1:]:
        adapted.load_adapter(str(Path(folder) / name), adapter_name=name)
    adapted.base_model.set_adapter(names, inference_mode=True)
    return adapted


def learning_rates(model: nn.Module, slots: Sequence[Slot], learning_rate: float) -> dict[str, float]:
    """No rates beside the common one: strengths are settings of the adapters (``zero_scale``), as `configs` has them.

    Earlier it gave the rates that stood for that setting.
    """
    warnings.warn(
        "learning_rates gives none: a slot's strength is now in the configs, as the primitive's setting zero_scale",
        DeprecationWarning,
        stacklevel=2,
    )
    return {}
