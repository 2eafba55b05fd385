"""Values of a parameter: where they lie in its range, and which of them a proposal chooses among."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from optuna.distributions import BaseDistribution, CategoricalDistribution, IntDistribution


def _steps(distribution: BaseDistribution) -> int | None:
    """How many steps lead from the lower to the upper end; none if the values are continuous (or too many to list)."""
    if isinstance(distribution, IntDistribution):
        return int((distribution.high - distribution.low) // distribution.step)
    if distribution.step is None:
        return 0 if distribution.low == distribution.high else None
    return round((distribution.high - distribution.low) / distribution.step)


def positions(distribution: BaseDistribution, values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Where numbers lie in their range, from -1 to 1; on a logarithmic scale if their distribution is."""
    low, high = float(distribution.low), float(distribution.high)
    if low == high:
        return np.zeros(len(values))
    if distribution.log:
        low, high, values = math.log(low), math.log(high), np.log(values)
    # Halves, so that a range as wide as the floating point numbers does not overflow.
    return (values / 2 - low / 2) / (high / 2 - low / 2) * 2 - 1


def position(distribution: BaseDistribution, value: float) -> float:
    """Where a number lies in its range; see `positions`."""
    return float(positions(distribution, np.array([float(value)]))[0])


def at(distribution: BaseDistribution, place: float) -> float | int:
    """The number nearest to a position between -1 and 1."""
    low, high, share = distribution.low, distribution.high, (place + 1) / 2
    if distribution.log:
        value = math.exp(math.log(low) * (1 - share) + math.log(high) * share)
        if isinstance(distribution, IntDistribution):
            return min(max(round(value), low), high)
        return min(max(value, low), high)
    steps = _steps(distribution)
    if steps is None:
        return float(min(max(low * (1 - share) + high * share, low), high))
    return type(low)(min(low + round(share * steps) * distribution.step, high)) if steps else low


def random_value(distribution: BaseDistribution, generator: np.random.Generator) -> Any:
    """A value drawn uniformly (log-uniformly where the distribution says so)."""
    if isinstance(distribution, CategoricalDistribution):
        return distribution.choices[int(generator.integers(len(distribution.choices)))]
    steps = _steps(distribution)
    if steps is None or distribution.log:
        return at(distribution, generator.uniform(-1, 1))
    return at(distribution, 2 * int(generator.integers(steps + 1)) / steps - 1) if steps else distribution.low


def alternatives(
    distribution: BaseDistribution, anchors: Sequence[Any], generator: np.random.Generator, count: int = 64
) -> list[Any]:
    """What a proposal chooses among: all values where they are few, else a jittered grid and values near anchors."""
    if isinstance(distribution, CategoricalDistribution):
        choices = list(distribution.choices)
        if len(choices) <= count:
            return choices
        anchored = [int(distribution.to_internal_repr(anchor)) for anchor in anchors]
        chosen = generator.choice(len(choices), count, replace=False).tolist()
        return [choices[i] for i in _distinct([*anchored, *chosen])]
    steps = _steps(distribution)
    if steps is not None and steps < count:
        if isinstance(distribution, IntDistribution):
            return [distribution.low + i * distribution.step for i in range(steps + 1)]
        return _distinct([at(distribution, 2 * i / max(steps, 1) - 1) for i in range(steps + 1)])
    places = [*((np.arange(14) + generator.random(14)) / 7 - 1), -1.0, 1.0]
    for anchor in anchors:
        places.extend(position(distribution, anchor) + generator.normal(0, (0.02, 0.1, 0.1)))
    numbers = [at(distribution, float(np.clip(place, -1, 1))) for place in places]
    return _distinct([*anchors, *numbers])


def _distinct(values: Sequence[Any]) -> list[Any]:
    return list(dict.fromkeys(values))
