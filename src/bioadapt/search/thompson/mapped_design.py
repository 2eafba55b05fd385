"""Features that the user names, by a function of a trial's parameters."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Hashable, Mapping, Sequence
from itertools import chain
from typing import Any

import numpy as np

from .ascent import MappedScore
from .features import Array, Contrast, Feature, FeatureMap, Memo, Params, most_supported
from .posterior import INTERACTION, MAIN_EFFECT

Reading = tuple[dict[Feature, float], Hashable]


def reader(features: FeatureMap) -> Callable[[Params], Reading]:
    """A configuration's features that are not zero, and a key that is equal where these are.

    Raises:
        ValueError: a feature is not finite; from the function that is returned.
    """

    def read(params: Params) -> Reading:
        values = {name: float(value) for name, value in features(params).items() if value}
        bad = [name for name, value in values.items() if not math.isfinite(value)]
        if bad:
            raise ValueError(f"features that are not finite: {bad} for {dict(params)}")
        return values, frozenset(values.items())

    return read


class MappedDesign:
    """Features that the user names: a string is a main effect, a tuple of strings the interaction of what it lists.

    Args:
        features: maps parameters to the features that are not zero. A larger value makes a weaker prior.
        observed: the configurations that decide which interactions are tested.
        possible: further configurations; main effects that only they have are drawn from their prior.
        read: the readings of configurations; a memo that outlives the design spares reading them again.
    """

    def __init__(
        self,
        features: FeatureMap,
        observed: Sequence[Params],
        possible: Sequence[Params] = (),
        read: Memo[Reading] | None = None,
    ) -> None:
        self._features, self._read = features, reader(features)
        readings = (read or Memo(self._read))(observed)
        seen = [values for values, _ in readings]
        self.keys = self.repetitions = [key for _, key in readings]
        support = dict(Counter(chain.from_iterable(seen)))
        for params in possible:
            for name in self._read(params)[0]:
                support.setdefault(name, 0)
        single = [name for name in support if isinstance(name, str)]
        several = [name for name in support if not isinstance(name, str)]
        kept = most_supported(np.array([support[name] for name in several], dtype=int))
        self._names: list[Feature] = [*single, *(several[i] for i in kept)]
        self._place = {name: i for i, name in enumerate(self._names)}
        self._support = support
        self.kind = np.where(np.arange(len(self._names)) < len(single), MAIN_EFFECT, INTERACTION)
        self.matrix: Array = self._rows(seen)
        binary = ((self.matrix == 0) | (self.matrix == 1))[:, : len(single)].all(0)
        self.switches = {name: i for i, name in enumerate(single) if binary[i]}

    def key(self, params: Params) -> Hashable:
        """Equal for configurations with equal features."""
        return self._read(params)[1]

    def encode(self, observed: Sequence[Params]) -> Array:
        """One row of features for each configuration."""
        return self._rows([self._read(params)[0] for params in observed])

    def score(self, choices: Mapping[str, Sequence[Any]], weights: Array, penalty: Array) -> MappedScore:
        """A function of configurations that are given as indices into the parameters' alternatives.

        Args:
            choices: the alternatives.
            weights: one for each feature.
            penalty: what is taken off where a feature is present; for features that are 0 or 1.
        """
        worth = dict(zip(self._names, (weights - penalty).tolist(), strict=True))
        return MappedScore(choices, self._features, self._read, worth)

    def contrasts(self) -> list[Contrast]:
        """Every feature and tested interaction that a report can name."""
        rows = np.eye(len(self._names))
        return [
            Contrast(
                (name,) if isinstance(name, str) else name,
                rows[i],
                self._support[name],
                self.switches.get(name) if isinstance(name, str) else None,
            )
            for i, name in enumerate(self._names)
            if self._support[name]
        ]

    def _rows(self, seen: Sequence[Mapping[Feature, float]]) -> Array:
        # Features that the model does not have go into a last column, which is dropped.
        matrix = np.zeros((len(seen), len(self._names) + 1))
        rows = np.repeat(np.arange(len(seen)), [len(values) for values in seen])
        columns = [self._place.get(name, -1) for name in chain.from_iterable(seen)]
        matrix[rows, columns] = list(chain.from_iterable(values.values() for values in seen))
        return matrix[:, :-1]
