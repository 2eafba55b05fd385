"""Counting arrangements of primitives at places without listing them."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from itertools import combinations


def heaps(disjoint: Sequence[int]) -> list[int]:
    """Heaps of 0, 1, ... labelled pieces, from the numbers of ordered tuples of disjoint places."""
    heaps = [1]
    for n in range(1, len(disjoint)):
        terms = ((-1) ** (j + 1) * math.comb(n, j) * disjoint[j] * heaps[n - j] for j in range(1, n + 1))
        heaps.append(sum(terms))
    return heaps


def disjoint_tuples(
    places: Mapping[tuple[str, str], tuple[int, ...]], most: int, wide_names: Collection[str]
) -> list[int]:
    """How many ordered tuples of 0, 1, ..., ``most`` places there are that share no site.

    Places of several layers are few and tried out; the rest of the layers then do not see each other.
    """
    wide = {place: sites for place, sites in places.items() if place[0] in wide_names}
    narrow: dict[str, list[tuple[int, ...]]] = {}
    for (layer, _), sites in places.items():
        if layer not in wide_names:
            narrow.setdefault(layer, []).append(sites)
    total = [0] * (most + 1)
    for count, taken in _disjoint(list(wide.values()), most):
        sets = [0] * count + [1] + [0] * (most - count)
        for options in narrow.values():
            free = [sites for sites in options if not taken & set(sites)]
            own = Counter(number for number, _ in _disjoint(free, most))
            sets = [sum(own[j] * sets[n - j] for j in range(n + 1)) for n in range(most + 1)]
        total = [a + b for a, b in zip(total, sets, strict=True)]
    return [math.factorial(n) * number for n, number in enumerate(total)]


def _disjoint(places: Sequence[tuple[int, ...]], most: int) -> Iterator[tuple[int, frozenset[int]]]:
    """Size and union of every set of at most ``most`` places that share nothing."""
    for size in range(most + 1):
        any_chosen = False
        for chosen in combinations(places, size):
            union = frozenset(site for sites in chosen for site in sites)
            if len(union) == sum(map(len, chosen)):
                any_chosen = True
                yield size, union
        if not any_chosen:
            return
