"""Several adapters of one kind, each trained for a task, as one."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from peft.utils import merge_utils
from torch import Tensor

from .._words import suggest
from ..config import BioConfig
from ..primitives.base import OnWeight
from .layer import BioLayer

_SIGNED = ("ties", "dare_ties")
_PRUNED = (*_SIGNED, "dare_linear", "magnitude_prune")


@dataclass(frozen=True)
class Combination:
    """How adapters become one: the way, a weight for each, and what PEFT's value-wise ways want to know.

    Raises:
        ValueError: a density outside 0 to 1, or one that is missing or not wanted.
    """

    way: str
    weights: tuple[float, ...]
    density: float | None = None
    majority_sign_method: str = "total"

    def __post_init__(self) -> None:
        if self.way in _PRUNED and not (self.density is not None and 0 < self.density <= 1):
            raise ValueError(f"density={self.density!r}: {self.way!r} needs a number above 0 and at most 1")
        if self.way not in _PRUNED and self.density is not None:
            raise ValueError(
                f"density={self.density!r} means nothing for {self.way!r}; it goes with {', '.join(_PRUNED)}"
            )
        if self.majority_sign_method not in ("total", "frequency"):
            raise ValueError(
                f"majority_sign_method={self.majority_sign_method!r}; "
                f"{suggest(self.majority_sign_method, ('total', 'frequency'))}"
            )

    def blend(self, tensors: Sequence[Tensor]) -> Tensor:
        """One tensor of several equally shaped ones, value by value."""
        weights = torch.tensor(self.weights, dtype=tensors[0].dtype, device=tensors[0].device)
        if self.way not in _PRUNED:
            return merge_utils.task_arithmetic(list(tensors), weights)
        merge = getattr(merge_utils, self.way)
        if self.way in _SIGNED:
            return merge(list(tensors), weights, self.density, majority_sign_method=self.majority_sign_method)
        return merge(list(tensors), weights, self.density)


def combined(
    layers: Sequence[BioLayer], configs: Mapping[str, BioConfig], way: Combination
) -> tuple[BioConfig, dict[str, dict[str, Tensor]]]:
    """The configuration of the combined adapter and its state at each layer, by path.

    Raises:
        ValueError: as for `BioModel.add_weighted_adapter`.
    """
    names = list(configs)
    _check(layers, configs, way)
    first = configs[names[0]]
    settings: dict[str, dict] = {}
    states: dict[str, dict[str, Tensor]] = {}
    for layer in (layer for layer in layers if names[0] in layer.circuits):
        states[layer.path] = {}
        for entry in first.primitives:
            parts = [layer.circuits[name][entry["name"]] for name in names]
            try:
                found, tensors = type(parts[0]).combine(parts, way.weights, way.way, way.blend)
            except ValueError as error:
                raise ValueError(f"{entry['name']} at {layer.path}: {error}") from None
            settings[entry["name"]] = found
            states[layer.path].update({f"{entry['name']}.{key}": tensor for key, tensor in tensors.items()})
    primitives = [{"name": name, **found} for name, found in settings.items()]
    fresh = {"trained_over": None, "init_weights": True, "inference_mode": True}
    return dataclasses.replace(first, primitives=primitives, **fresh), states


def _check(layers: Sequence[BioLayer], configs: Mapping[str, BioConfig], way: Combination) -> None:
    if not configs or len(configs) != len(way.weights):
        raise ValueError(f"{len(configs)} different adapters and {len(way.weights)} weights: one weight for each")
    (first, one), *others = configs.items()
    for name, other in others:
        kinds = [[entry["name"] for entry in config.primitives] for config in (one, other)]
        if kinds[0] != kinds[1] or (one.rank, one.composition) != (other.rank, other.composition):
            raise ValueError(
                f"adapters {first!r} ({', '.join(kinds[0])}) and {name!r} ({', '.join(kinds[1])}) are not of one kind"
            )
    for layer in layers:
        held = [name for name in configs if name in layer.circuits]
        if held and len(held) < len(configs):
            raise ValueError(f"{layer.path} has {', '.join(held)} only: the adapters must sit on the same layers")
    for circuit in (layer.circuits[first] for layer in layers if first in layer.circuits):
        for name, primitive in circuit.items():
            ways = primitive.combinations if isinstance(primitive, OnWeight) else ()
            if way.way not in ways:
                accepted = ", ".join(ways) or "none"
                raise ValueError(f"combination_type={way.way!r} means nothing for {name}; accepted: {accepted}")
