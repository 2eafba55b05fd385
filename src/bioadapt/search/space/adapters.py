"""A configuration as adapters on a model: put in, given its learning rates, saved and loaded."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from peft import PeftModel, get_peft_model
from torch import nn

from ... import BioConfig, primitive_info
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
    """Write every adapter into a subfolder of its name."""
    model.save_pretrained(str(folder))


def load_adapters(model: Any, folder: str | Path) -> PeftModel:
    """Load what `save_adapters` wrote, all of them active and frozen.

    Plain PEFT does the same::

        model = PeftModel.from_pretrained(model, "folder/bio", adapter_name="bio")
        model.load_adapter("folder/bio_2", adapter_name="bio_2")
        model.base_model.set_adapter(["bio", "bio_2"], inference_mode=True)

    Raises:
        ValueError: no adapter in the folder.
    """
    numbered = {1: _NAME} | {
        int(found[1]): path.name
        for path in Path(folder).glob(f"{_NAME}_*")
        if (found := re.fullmatch(rf"{_NAME}_(\d+)", path.name))
    }
    names = [name for _, name in sorted(numbered.items())]
    if not (Path(folder) / _NAME).is_dir():
        raise ValueError(f"{folder}: no adapter {_NAME!r} is in this folder")
    adapted = PeftModel.from_pretrained(model, str(Path(folder) / _NAME), adapter_name=_NAME)
    for name in names[1:]:
        adapted.load_adapter(str(Path(folder) / name), adapter_name=name)
    adapted.base_model.set_adapter(names, inference_mode=True)
    return adapted


def learning_rates(model: nn.Module, slots: Sequence[Slot], learning_rate: float) -> dict[str, float]:
    """Learning rates other than the common one, by regular expressions for names of parameters.

    A change ``s * gate * f(x)`` whose gate starts at zero and is trained by Adam with rate r is the same as ``gate *
    f(x)`` with the rate s * r, since Adam's steps do not depend on the size of a gradient. So a strength is a factor
    on the rate of the tensor that starts at zero, and a saved adapter needs no field for it: of the gate, or where
    the zero is a readout (`PrimitiveInfo.zero_at`), of that matrix; of all tensors where the change of a weight is
    what is trained.
    """
    strengths = {slot.primitive: slot.strength for slot in slots if slot.strength != 1}
    rates: dict[str, float] = {}
    for name, strength in strengths.items():
        zero_at = primitive_info(name).zero_at
        own = {
            path: parameter
            for path, parameter in model.named_parameters()
            if parameter.requires_grad and name in path.split(".")
        }
        if zero_at in ("gate", "scalar_gate"):
            chosen = [path for path in own if path.endswith(f".{name}.gate")]
        elif zero_at == "readout":
            chosen = _readouts({path: p for path, p in own.items() if not p.detach().count_nonzero()})
        else:
            chosen = list(own)
        tensors = sorted({path.rpartition(f".{name}.")[2] for path in chosen})
        rates[rf"\.{name}\.({'|'.join(map(re.escape, tensors))})$"] = strength * learning_rate
    return rates


def _readouts(zeros: Mapping[str, Any]) -> list[str]:
    """Biases may start at zero as well: where a matrix does, it is the readout."""
    matrices = [path for path, parameter in zeros.items() if parameter.dim() > 1]
    return matrices or list(zeros)
