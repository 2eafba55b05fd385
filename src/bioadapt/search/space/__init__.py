"""What can be searched on a model, and a configuration as adapters."""

from .adapters import add_adapters, learning_rates, load_adapters, save_adapters
from .configuration import Configuration, Slot
from .model import SearchedModel, SearchedModule
from .objective import FunctionObjective, SpaceObjective, describe
from .space import SearchSpace

__all__ = [
    "Configuration",
    "FunctionObjective",
    "SearchSpace",
    "SearchedModel",
    "SearchedModule",
    "Slot",
    "SpaceObjective",
    "add_adapters",
    "describe",
    "learning_rates",
    "load_adapters",
    "save_adapters",
]
