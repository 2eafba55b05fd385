"""Whole systems built from the catalogue's primitives. Each is imported when it is asked for: some need an extra."""

from importlib import import_module
from typing import Any

_WHERE = {
    "CerebellarExpansion": "granule_layer",
    "CerebellarNetwork": "cerebellar",
    "FlyCLClassifier": "fly_cl",
    "FlyCircuit": "fly_circuit",
    "FlyModelClassifier": "fly_model",
    "SpikingClassifier": "spiking_network",
    "SpikingLayer": "spiking_network",
    "SpineSchedule": "spine_pruning",
    "Student": "recipe",
    "add_spines": "spine_pruning",
    "attach_continual_head": "fly_cl",
    "cerebellar_policy": "cerebellar",
    "finalize": "spine_pruning",
    "genbais": "recipe",
    "prune_synapses": "spine_pruning",
    "sparsity": "spine_pruning",
}

__all__ = list(_WHERE)


def __getattr__(name: str) -> Any:
    if name in _WHERE:
        return getattr(import_module(f".{_WHERE[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
