"""What the sampler's linear model sees of a configuration: main effects and interactions, by name."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
Params = Mapping[str, Any]
# A main effect is a string, an interaction the tuple of the names that it joins.
Feature = str | tuple[str, ...]
# From a trial's parameters to its features that are not zero.
FeatureMap = Callable[[Params], Mapping[Feature, float]]

# An interaction that fewer trials have shown is untested: it stays out of the model, and out of every report.
SUPPORT = 3
# Of the tested interactions, those that the most trials have shown: this bounds the cost of a proposal.
INTERACTIONS = 500
T = TypeVar("T")


class Memo(Generic[T]):
    """What a function says of configurations, computed once for each object that holds one.

    For configurations that no longer change. What the last call did not ask for is forgotten.
    """

    def __init__(self, function: Callable[[Params], T]) -> None:
        self._function = function
        self._known: dict[int, tuple[Params, T]] = {}

    def __call__(self, observed: Sequence[Params]) -> list[T]:
        # As long as the object is held here, no other object gets its id.
        known = self._known
        now = {id(params): known.get(id(params)) or (params, self._function(params)) for params in observed}
        self._known = now
        return [now[id(params)][1] for params in observed]


@dataclass(frozen=True)
class Contrast:
    """A readable combination of weights: what a feature, or several together, add to the score.

    Attributes:
        labels: one name for a main effect, several for an interaction.
        row: how much of each weight it takes.
        support: how many trials have shown it.
        column: where the feature can be switched on or off, the column that is positive when it is on.
    """

    labels: tuple[str, ...]
    row: Array
    support: int
    column: int | None = None


def most_supported(support: NDArray[np.int_]) -> NDArray[np.int_]:
    """Indices of the interactions that the model takes in, in their own order."""
    tested = np.flatnonzero(support >= SUPPORT)
    return np.sort(tested[np.argsort(-support[tested], kind="stable")][:INTERACTIONS])
