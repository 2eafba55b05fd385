"""bioadapt: neuroscience in PEFT. Importing it teaches PEFT the method ``BIO``."""

from .config import BioConfig
from .registry import build_primitive, list_primitives, primitive_info, register_primitive
from .tuner.bridge import register as _register
from .tuner.learning import BioTrainerCallback, auxiliary_loss

__version__ = "0.1.0"

_register()

__all__ = [
    "BioConfig",
    "BioTrainerCallback",
    "auxiliary_loss",
    "build_primitive",
    "list_primitives",
    "primitive_info",
    "register_primitive",
]
