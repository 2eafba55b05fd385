"""bioadapt: neuroscience in PEFT. Importing it teaches PEFT the method ``BIO``.

The import itself is light: PEFT is taught when it is imported, and a public name loads what it needs when it is asked
for. So whoever needs neither torch nor PEFT, such as a study that uses the search's sampler alone, loads neither.
"""

from __future__ import annotations

from importlib import import_module as _import_module

from ._version import __version__ as __version__
from .registration import register as _register
from .registration import register_when_imported as _register_when_imported

TYPE_CHECKING = False  # type checkers take it for True; importing it from typing would cost more than all of this
if TYPE_CHECKING:
    from typing import Any

    from . import catalogue as catalogue
    from .config import BioConfig as BioConfig
    from .ready import FlyLoraConfig as FlyLoraConfig
    from .ready import NeuroAdaConfig as NeuroAdaConfig
    from .ready import NeuroLoraConfig as NeuroLoraConfig
    from .ready import SanConfig as SanConfig
    from .registry import build_primitive as build_primitive
    from .registry import list_primitives as list_primitives
    from .registry import primitive_info as primitive_info
    from .registry import register_primitive as register_primitive
    from .tuner.callback import BioTrainerCallback as BioTrainerCallback
    from .tuner.card import add_scores as add_scores
    from .tuner.compilation import compile_adapters as compile_adapters
    from .tuner.distillation import DistilledLora as DistilledLora
    from .tuner.distillation import conversion_residuals as conversion_residuals
    from .tuner.distillation import distill_to_lora as distill_to_lora
    from .tuner.learning import auxiliary_loss as auxiliary_loss
    from .tuner.selection import select_synapses as select_synapses

_HOMES = {
    "BioConfig": "config",
    "BioTrainerCallback": "tuner.callback",
    "DistilledLora": "tuner.distillation",
    "FlyLoraConfig": "ready",
    "NeuroAdaConfig": "ready",
    "NeuroLoraConfig": "ready",
    "SanConfig": "ready",
    "add_scores": "tuner.card",
    "auxiliary_loss": "tuner.learning",
    "build_primitive": "registry",
    "compile_adapters": "tuner.compilation",
    "conversion_residuals": "tuner.distillation",
    "distill_to_lora": "tuner.distillation",
    "list_primitives": "registry",
    "primitive_info": "registry",
    "register_primitive": "registry",
    "select_synapses": "tuner.selection",
}
__all__ = list(_HOMES)

_register_when_imported()


def __getattr__(name: str) -> Any:
    """A public name from its module, or a module of this package such as ``bioadapt.search``."""
    home = _HOMES.get(name)
    if home is not None:
        if home != "registry":  # which alone does without PEFT
            _register()
        globals()[name] = value = getattr(_import_module(f".{home}", __name__), name)
        return value
    if not name.startswith("_"):
        try:
            return _import_module(f".{name}", __name__)
        except ModuleNotFoundError as error:
            if error.name != f"{__name__}.{name}":
                raise
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
