"""Where in a model a slot can be: some of the layers, and one kind of module within them or all."""

from __future__ import annotations

from collections.abc import Sequence

from .model import SearchedModule

ALL, LOWER, UPPER, HOME = "all", "lower", "upper", "home"
Place = tuple[str, str]  # layers and modules


def places_of(sites: Sequence[SearchedModule]) -> dict[Place, tuple[int, ...]]:
    """Indices of the sites at each (layers, modules); of two names for the same sites, the wider one stays."""
    numbers = sorted({site.layer for site in sites})
    half = len(numbers) // 2
    layers = {ALL: set(numbers), LOWER: set(numbers[:half]), UPPER: set(numbers[half:])}
    layers |= {str(number): {number} for number in numbers}
    kinds = list(dict.fromkeys(site.kind for site in sites))
    modules = {ALL: set(kinds)} | {kind: {kind} for kind in kinds}
    if len(kinds) == 1:
        modules.pop(kinds[0])
    distinct = {frozenset(members): name for name, members in reversed(layers.items()) if members}
    kept = [name for name in layers if name in distinct.values()]
    return {
        (layer, module): inside
        for layer in kept
        for module in modules
        if (inside := tuple(i for i, s in enumerate(sites) if s.layer in layers[layer] and s.kind in modules[module]))
    }
