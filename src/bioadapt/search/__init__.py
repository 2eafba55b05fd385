"""Searching with Optuna: a Thompson sampler and pruner for any study, and the search for bio adapters itself.

The sampler and the pruner need the extra ``search`` alone. ``bioadapt.search(...)`` runs a whole search; it is the same
as `bioadapt.search.search`, and as the command ``bioadapt search``.
"""

import sys
from importlib import import_module
from types import ModuleType
from typing import Any

try:
    import optuna  # noqa: F401
    import scipy  # noqa: F401
except ImportError as error:
    raise ImportError(f"bioadapt.search needs {error.name}: pip install bioadapt[search]") from error

from .features import Feature, FeatureMap
from .posterior import LinearPosterior, ShrinkagePosterior
from .pruner import ThompsonPruner
from .sampler import Effect, ThompsonSampler

# What needs further packages is imported when it is asked for.
_LATER = {
    "Configuration": "space",
    "FunctionObjective": "objective",
    "Host": "host",
    "Job": "runner",
    "Objective": "runner",
    "Search": "contest",
    "SearchSettings": "settings",
    "SearchSpace": "space",
    "add_adapters": "adapters",
    "learning_rates": "adapters",
    "load_adapters": "adapters",
    "open_storage": "storage",
    "prepare": "runner",
    "run_study": "runner",
    "save_adapters": "adapters",
    "search": "contest",
    "write_report": "report",
}

__all__ = [
    "Effect",
    "Feature",
    "FeatureMap",
    "LinearPosterior",
    "ShrinkagePosterior",
    "ThompsonPruner",
    "ThompsonSampler",
    *_LATER,
]


def __getattr__(name: str) -> Any:
    if name in _LATER:
        return getattr(import_module(f".{_LATER[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


class _Package(ModuleType):
    """A package that can be called, as ``bioadapt.search(...)``."""

    def __call__(self, **settings: Any) -> dict[str, Any]:
        """See `bioadapt.search.search`."""
        return self.search(**settings)


sys.modules[__name__].__class__ = _Package
