"""bioadapt: neuroscience in PEFT. Importing it teaches PEFT the method ``BIO``."""

from importlib import import_module as _import_module
from typing import Any as _Any

from .config import BioConfig
from .ready import FlyLoraConfig, NeuroAdaConfig, NeuroLoraConfig, SanConfig
from .registry import build_primitive, list_primitives, primitive_info, register_primitive
from .tuner.bridge import register as _register
from .tuner.distillation import DistilledLora, conversion_residuals, distill_to_lora
from .tuner.learning import BioTrainerCallback, auxiliary_loss
from .tuner.selection import select_synapses

__version__ = "0.1.0"

_register()


def __getattr__(name: str) -> _Any:
    """``bioadapt.search``, which needs an extra, is imported when it is asked for."""
    if name == "search":
        return _import_module(".search", __name__)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


__all__ = [
    "BioConfig",
    "BioTrainerCallback",
    "DistilledLora",
    "FlyLoraConfig",
    "NeuroAdaConfig",
    "NeuroLoraConfig",
    "SanConfig",
    "auxiliary_loss",
    "build_primitive",
    "conversion_residuals",
    "distill_to_lora",
    "list_primitives",
    "primitive_info",
    "register_primitive",
    "select_synapses",
]
