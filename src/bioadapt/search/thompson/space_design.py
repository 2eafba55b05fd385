"""Features of any search space: columns for each parameter, and products of pairs of them."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations, pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution

from .ascent import PairwiseScore
from .features import Array, Contrast, Memo, Params, most_supported
from .posterior import INTERACTION, MAIN_EFFECT, WALK
from .ranges import positions

# A walk over a number's range has so many steps, all of the same length; fewer, but not below the fewest, where all
# numbers of a space would together have more than so many: this, too, bounds the cost of a proposal.
STEPS, FEWEST_STEPS, ALL_STEPS = 12, 4, 240


def _code(distribution: BaseDistribution) -> Callable[[Any], float]:
    internal: Callable[[Any], float] = distribution.to_internal_repr
    if not isinstance(distribution, CategoricalDistribution):
        return internal
    try:
        known = {choice: float(i) for i, choice in reversed(list(enumerate(distribution.choices)))}
    except TypeError:  # choices that have no hash
        return internal
    return lambda value: known[value] if value in known else internal(value)


@dataclass(frozen=True)
class _Factor:
    """A parameter as columns. The first ``interacting`` of them also enter the products with other parameters'.

    ``encode`` makes rows of codes; the last ``walking`` columns are the steps of a walk. ``main`` and ``shared`` hold
    the readable contrasts, by label: of all columns, and of the interacting ones.
    """

    encode: Callable[[Array], Array]
    width: int
    walking: int
    interacting: int
    main: dict[str, Array]
    shared: dict[str, Array]
    switches: bool


def _categorical(name: str, distribution: CategoricalDistribution) -> _Factor:
    """Levels about their average: a main effect is then an average over the other parameters, and not confounded.

    A level's contrast is to the average of the other levels. Two levels need one column, for the second.
    """
    count = len(distribution.choices)
    first = 1 if count == 2 else 0
    width = count - first if count > 1 else 0
    # The last row is for a parameter that a trial lacks.
    table = np.vstack([np.eye(count)[:, count - width :] - 1 / count, np.zeros((1, width))])

    def encode(codes: Array) -> Array:
        return table[np.where(np.isnan(codes), count, codes).astype(int)]

    against = np.eye(width) if width < 3 else (np.eye(width) * width - 1) / (width - 1)
    labels = [f"{name}={choice}" for choice in distribution.choices[first:]]
    contrasts = dict(zip(labels, against, strict=False))
    return _Factor(encode, width, 0, width, contrasts, contrasts, True)


def _numeric(name: str, distribution: BaseDistribution, steps: int) -> _Factor:
    """A line, a parabola and a random walk of so many steps over the scaled range; the line alone interacts.

    A walk is level but for its steps, so that what is seen beyond a cliff does not bend the curve on this side of it;
    a polynomial would. From end to end it varies as much as the line does where their weights have the same variance.
    The contrasts: from the lower end of the range to the upper, and from the ends to the middle.
    """
    if distribution.single():
        return _Factor(lambda codes: np.zeros((len(codes), 0)), 0, 0, 0, {}, {}, False)

    def basis(x: Array) -> Array:
        climbed = np.clip((x[:, None] + 1) * steps / 2 - np.arange(steps), 0.0, 1.0)
        return np.column_stack([x, x * x - 1 / 3, (2 * climbed - 1) / math.sqrt(steps)])

    def encode(codes: Array) -> Array:
        there = ~np.isnan(codes)
        rows = np.zeros((len(codes), 2 + steps))
        rows[there] = basis(positions(distribution, codes[there]))
        return rows

    low, middle, high = basis(np.array([-1.0, 0.0, 1.0]))
    rise, bend = high - low, middle - (high + low) / 2
    main = {name: rise, f"{name} (middle)": bend}
    return _Factor(encode, 2 + steps, steps, 1, main, {name: rise[:1]}, False)


def _factor(name: str, distribution: BaseDistribution, steps: int) -> _Factor:
    if isinstance(distribution, CategoricalDistribution):
        return _categorical(name, distribution)
    if isinstance(distribution, FloatDistribution | IntDistribution):
        return _numeric(name, distribution, steps)
    raise TypeError(f"parameter {name!r}: no features for a {type(distribution).__name__}")


class Coding:
    """Configurations of a space as numbers: for each parameter the index of a choice, or the number itself.

    Attributes:
        space: parameters and their distributions.
        factors: their columns.
        blocks: where these columns lie.
        codes: one number for each parameter of a configuration, NaN for one that it lacks.
        rows: the codes of finished trials, each of which is read once.
    """

    def __init__(self, space: Mapping[str, BaseDistribution]) -> None:
        self.space = dict(space)
        numbers = sum(not isinstance(distribution, CategoricalDistribution) for distribution in space.values())
        steps = min(STEPS, max(FEWEST_STEPS, ALL_STEPS // max(numbers, 1)))
        self.factors = {name: _factor(name, distribution, steps) for name, distribution in space.items()}
        edges = np.cumsum([0, *(factor.width for factor in self.factors.values())]).tolist()
        self.blocks = {name: slice(*ends) for name, ends in zip(space, pairwise(edges), strict=True)}
        self.code = {name: _code(distribution) for name, distribution in space.items()}
        self.rows = Memo(self.codes)

    def codes(self, params: Params) -> Array:
        items = self.code.items()
        # Adding zero makes -0.0 and 0.0 one.
        return np.array([code(params[name]) if name in params else math.nan for name, code in items]) + 0.0


def _conditions(space: Mapping[str, BaseDistribution], table: Array) -> dict[int, tuple[int, Array]]:
    """For each parameter that is not always there: another one, and the codes of its choices without it.

    The first parameter whose choices tell the trials with it from those without it, and no choice of which did both.
    """
    there = ~np.isnan(table)
    categorical = [isinstance(distribution, CategoricalDistribution) for distribution in space.values()]
    conditions: dict[int, tuple[int, Array]] = {}
    for child in np.flatnonzero(~there.all(0)):
        for parent in np.flatnonzero(categorical):
            if parent == child or (there[:, child] & ~there[:, parent]).any():
                continue
            having = np.unique(table[there[:, child], parent])
            lacking = np.unique(table[there[:, parent] & ~there[:, child], parent])
            if len(lacking) and len(having) and not np.isin(having, lacking).any():
                conditions[int(child)] = (int(parent), lacking)
                break
    return conditions


class SpaceDesign:
    """Features of any search space: each parameter's columns, and products of pairs from different parameters.

    A parameter that a trial does not have (it was not suggested there) adds nothing to that trial. Where one choice of
    another parameter has always decided whether it is there, a proposal's features follow that choice.

    Args:
        space: parameters and their distributions.
        observed: the configurations that decide which interactions are tested.
        coding: of that space; one that outlives the design spares reading the same trials again.
    """

    def __init__(
        self, space: Mapping[str, BaseDistribution], observed: Sequence[Params], coding: Coding | None = None
    ) -> None:
        self._coding = coding or Coding(space)
        self._factors, self._blocks = self._coding.factors, list(self._coding.blocks.values())
        self._starts = {name: block.start for name, block in self._coding.blocks.items()}
        self._width = self._blocks[-1].stop if self._blocks else 0
        table = self._table(self._coding.rows(observed))
        self._conditions = _conditions(space, table)
        basis = self._basis(table)
        shown = self._shown(table, basis)
        left, right = self._pairs()
        counts = shown.astype(float)
        together = (counts.T @ counts)[left, right].astype(int)
        kept = most_supported(together)
        self._left, self._right = left[kept], right[kept]
        self.kind = np.full(self._width + len(kept), INTERACTION)
        for factor, block in zip(self._factors.values(), self._blocks, strict=True):
            self.kind[block] = MAIN_EFFECT
            self.kind[block.stop - factor.walking : block.stop] = WALK
        self.matrix: Array = self._with_products(basis)
        self._alone = shown.sum(0)
        self._together = dict(
            zip(zip(left[kept].tolist(), right[kept].tolist(), strict=True), together[kept].tolist(), strict=True)
        )
        self.keys = self._keys(table)
        # A trial has no parameters outside of the space where all of its parameters have codes.
        inside = (~np.isnan(table)).sum(1)
        self.repetitions: list[Hashable] = [
            (key, None if len(params) == count else self._outside(params))
            for key, count, params in zip(self.keys, inside, observed, strict=True)
        ]
        self.switches = {
            label: start + number
            for factor, start in zip(self._factors.values(), self._starts.values(), strict=True)
            if factor.switches
            for number, label in enumerate(factor.main)
        }

    def key(self, params: Params) -> Hashable:
        """Equal for configurations that are equal in the space."""
        return self._keys(self._table([self._coding.codes(params)]))[0]

    def encode(self, observed: Sequence[Params]) -> Array:
        """One row of features for each configuration."""
        return self._with_products(self._basis(self._table([self._coding.codes(params) for params in observed])))

    def score(self, choices: Mapping[str, Sequence[Any]], weights: Array, penalty: Array) -> PairwiseScore:
        """A function of configurations that are given as indices into the parameters' alternatives.

        Args:
            choices: the alternatives, in the order of the space.
            weights: one for each feature.
            penalty: what is taken off where a feature is positive; main effects only.
        """
        values = {name: np.array([code(value) for value in choices[name]]) for name, code in self._coding.code.items()}
        names = list(self._factors)
        hidden = {
            child: (parent, np.isin(values[names[parent]], without))
            for child, (parent, without) in self._conditions.items()
        }
        return PairwiseScore(
            [factor.encode(values[name]) for name, factor in self._factors.items()],
            self._blocks,
            hidden,
            (self._left, self._right),
            weights,
            penalty[: self._width],
        )

    def contrasts(self) -> list[Contrast]:
        """Every main effect and tested interaction that a report can name."""
        contrasts = []
        columns = len(self.kind)
        for name, factor in self._factors.items():
            start = self._starts[name]
            for number, (label, weights) in enumerate(factor.main.items()):
                row = np.zeros(columns)
                row[start : start + factor.width] = weights
                switch = start + number if factor.switches else None
                support = self._alone[start + (number if factor.switches else 0)]
                contrasts.append(Contrast((label,), row, int(support), switch))
        place = {pair: self._width + i for i, pair in enumerate(self._together)}
        for (one, a), (two, b) in combinations(self._factors.items(), 2):
            for i, (first, left) in enumerate(a.shared.items()):
                for j, (second, right) in enumerate(b.shared.items()):
                    pair = (self._starts[one] + i, self._starts[two] + j)
                    if pair not in place:
                        continue
                    row = np.zeros(columns)
                    for k, weight in enumerate(left):
                        for m, other in enumerate(right):
                            column = place.get((self._starts[one] + k, self._starts[two] + m))
                            if column is not None:
                                row[column] = weight * other
                    contrasts.append(Contrast((first, second), row, int(self._together[pair])))
        return contrasts

    def _table(self, rows: Sequence[Array]) -> Array:
        return np.array(rows).reshape(len(rows), len(self._factors))

    def _keys(self, table: Array) -> list[bytes]:
        """Equal for rows of codes that differ only in what a condition hides."""
        seen = table.copy()
        for child, (parent, without) in self._conditions.items():
            seen[np.isin(table[:, parent], without), child] = math.nan
        return [row.tobytes() for row in seen]

    def _outside(self, params: Params) -> frozenset[tuple[str, str]]:
        return frozenset((name, repr(value)) for name, value in params.items() if name not in self._factors)

    def _basis(self, table: Array) -> Array:
        blocks = [factor.encode(column) for factor, column in zip(self._factors.values(), table.T, strict=True)]
        return np.hstack([np.zeros((len(table), 0)), *blocks])

    def _shown(self, table: Array, basis: Array) -> NDArray[np.bool_]:
        """Which columns each configuration says something about: the level it has, the numbers it gives."""
        shown = basis > 0
        for factor, block, column in zip(self._factors.values(), self._blocks, table.T, strict=True):
            if not factor.switches:
                shown[:, block] = ~np.isnan(column)[:, None]
        return shown

    def _pairs(self) -> tuple[NDArray[np.int_], NDArray[np.int_]]:
        factors = list(self._factors.values())
        column = np.concatenate(
            [np.arange(b.start, b.start + f.interacting) for f, b in zip(factors, self._blocks, strict=True)]
        )
        owner = np.repeat(np.arange(len(factors)), [factor.interacting for factor in factors])
        left, right = np.triu_indices(len(column), 1)
        apart = owner[left] != owner[right]
        return column[left[apart]], column[right[apart]]

    def _with_products(self, basis: Array) -> Array:
        return np.hstack([basis, basis[:, self._left] * basis[:, self._right]])
