"""Searching with Optuna, in five rooms. Each imports only from those before it.

- `thompson`: the sampler, the pruner and their model, for any Optuna study; numpy, scipy and optuna alone.
- `study`: storages, tickets, isolated trials, workers; for any objective.
- `space`: what can be searched on a model, and a configuration as adapters.
- `report`: a study as a page.
- `contest`: the whole search: LoRA, bio adapters over it, confirmation, test.

The sampler, the pruner and the study need the extra ``search`` alone. A whole search is the function
`bioadapt.search.search`, or the command ``bioadapt search``.
"""

import sys
from importlib import import_module
from types import ModuleType
from typing import Any

# Everything is imported when it is asked for, so that nobody waits for a room that is not needed.
_ROOMS = {
    "Effect": "thompson",
    "Feature": "thompson",
    "FeatureMap": "thompson",
    "FunctionObjective": "space",
    "Job": "study",
    "LinearPosterior": "thompson",
    "Objective": "study",
    "Search": "contest",
    "SearchSettings": "settings",
    "SearchSpace": "space",
    "SearchedModel": "space",
    "ShrinkagePosterior": "thompson",
    "ThompsonPruner": "thompson",
    "ThompsonSampler": "thompson",
    "add_adapters": "space",
    "as_record": "report",
    "learning_rates": "space",
    "load_adapters": "space",
    "open_storage": "study",
    "prepare": "study",
    "recover": "study",
    "run_study": "study",
    "save_adapters": "space",
    "search": "contest",
    "write_report": "report",
}

__all__ = [*_ROOMS]


def __getattr__(name: str) -> Any:
    if name in _ROOMS:
        try:
            return getattr(import_module(f".{_ROOMS[name]}", __name__), name)
        except ModuleNotFoundError as error:
            raise ImportError(f"bioadapt.search needs {error.name}: pip install bioadapt[search]") from error
    if name == "Host":  # its earlier name
        return __getattr__("SearchedModel")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


class _CallableModule(ModuleType):
    """``bioadapt.search(...)`` is the older way to call `bioadapt.search.search`.

    Whatever is imported from here binds the name ``search`` in ``bioadapt`` to this module, so that only the module
    itself can keep that call.
    """

    def __call__(self, *args: Any, **settings: Any) -> dict[str, Any]:
        return self.search(*args, **settings)


sys.modules[__name__].__class__ = _CallableModule
