"""The best configuration of a drawn function: all of them where they are few, else coordinate ascent."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from operator import mul
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
States = NDArray[np.int_]
Choices = Mapping[str, Sequence[Any]]

EXHAUSTIVE = 1024
SWEEPS = 4
# These bound an ascent in which a configuration's features have to be asked for one by one: the number of starts;
# and of a parameter with more than FEW alternatives how many are tried: those that were best for the first start.
CLIMBERS, FEW, SHORTLIST = 3, 32, 12


def configuration(choices: Choices, state: Sequence[int]) -> dict[str, Any]:
    """The parameters that a state of indices into their alternatives stands for."""
    return {name: values[i] for (name, values), i in zip(choices.items(), state, strict=True)}


class Score(Protocol):
    """A function of states, and the states from which an ascent climbs it."""

    states: States

    @property
    def climbers(self) -> int | None:
        """How many starts an ascent can afford; None: all."""

    def __call__(self, states: States) -> Array:
        """The value of each state."""

    def enter(self, states: States) -> None:
        """Climb from these."""

    def along(self, column: int) -> Array:
        """For each of `states` (rows) its value with each alternative of a parameter; -inf where nobody looked."""

    def move(self, column: int, alternatives: NDArray[np.int_]) -> None:
        """Give a parameter of each of `states` another alternative."""


class PairwiseScore:
    """A linear function of parameters' columns and of products of columns of two different parameters.

    Along one parameter, while the others stay, it is linear in that parameter's columns: no product is formed.

    Args:
        tables: for each parameter the columns of its alternatives, one per row.
        blocks: where these columns lie.
        hidden: for a parameter that is not always there the one that decides on it, and for each alternative of that
            one whether it is absent.
        pairs: the columns of each product.
        weights: of all columns, then of the products.
        penalty: what is taken off where a column is positive.
    """

    climbers: int | None = None

    def __init__(
        self,
        tables: Sequence[Array],
        blocks: Sequence[slice],
        hidden: Mapping[int, tuple[int, NDArray[np.bool_]]],
        pairs: tuple[NDArray[np.int_], NDArray[np.int_]],
        weights: Array,
        penalty: Array,
    ) -> None:
        width = len(penalty)
        self._tables, self._blocks, self._hidden, self._penalty = tables, blocks, hidden, penalty
        self._parents = {parent for parent, _ in hidden.values()}
        self._linear = weights[:width]
        self._products = np.zeros((width, width))
        self._products[pairs] = weights[width:]
        self._products += self._products.T.copy()
        self._fines = [(table > 0) @ penalty[block] for table, block in zip(tables, blocks, strict=True)]

    def __call__(self, states: States) -> Array:
        return self._value(self._basis(states))

    def enter(self, states: States) -> None:
        self.states = states.copy()
        self._at = self._basis(self.states)
        self._height = self._value(self._at)

    def along(self, column: int) -> Array:
        size = len(self._tables[column])
        if column in self._parents:
            candidates = np.repeat(self.states, size, axis=0)
            candidates[:, column] = np.tile(np.arange(size), len(self.states))
            self._heights = self(candidates).reshape(-1, size)
            return self._heights
        block = self._blocks[column]
        slope = self._linear[block] + self._at @ self._products[:, block]
        gain = slope @ self._tables[column].T - self._fines[column]
        if column in self._hidden:
            parent, without = self._hidden[column]
            gain[without[self.states[:, parent]]] = 0.0
        now = gain[np.arange(len(gain)), self.states[:, column]]
        self._heights = gain + (self._height - now)[:, None]
        return self._heights

    def move(self, column: int, alternatives: NDArray[np.int_]) -> None:
        changed = np.flatnonzero(alternatives != self.states[:, column])
        if len(changed) == 0:
            return
        chosen = alternatives[changed]
        self.states[changed, column] = chosen
        self._height[changed] = self._heights[changed, chosen]
        if column in self._parents or column in self._hidden:
            self._at[changed] = self._basis(self.states[changed])
        else:
            self._at[changed, self._blocks[column]] = self._tables[column][chosen]

    def _basis(self, states: States) -> Array:
        basis = np.zeros((len(states), len(self._linear)))
        for block, table, indices in zip(self._blocks, self._tables, states.T, strict=True):
            basis[:, block] = table[indices]
        for child, (parent, without) in self._hidden.items():
            basis[without[states[:, parent]], self._blocks[child]] = 0.0
        return basis

    def _value(self, basis: Array) -> Array:
        products = ((basis @ self._products) * basis).sum(1) / 2
        return basis @ self._linear + products - (basis > 0) @ self._penalty


class MappedScore:
    """A linear function of features that a user's function names; each state that is looked at costs a call of it.

    Args:
        choices: the alternatives of each parameter.
        features: maps parameters to features.
        check: raises an error for parameters whose features are not finite.
        worth: the weight of each feature; those that it lacks have none.
    """

    climbers: int | None = CLIMBERS

    def __init__(
        self,
        choices: Choices,
        features: Callable[[Mapping[str, Any]], Mapping[Any, float]],
        check: Callable[[Mapping[str, Any]], object],
        worth: Mapping[Any, float],
    ) -> None:
        self._choices, self._features, self._check = choices, features, check
        self._worth = defaultdict(float, worth)
        self._names = list(choices)
        self._known: dict[tuple[int, ...], float] = {}

    def __call__(self, states: States) -> Array:
        return np.array([self._value(tuple(state), configuration(self._choices, state)) for state in states.tolist()])

    def enter(self, states: States) -> None:
        self.states = states.copy()
        self._params = [configuration(self._choices, state) for state in states.tolist()]
        self._height = self(states)
        self._listed: dict[int, list[int]] = {}

    def along(self, column: int) -> Array:
        name = self._names[column]
        values = self._choices[name]
        heights = np.full((len(self.states), len(values)), -math.inf)
        for row, height, state, params in zip(heights, self._height, self.states.tolist(), self._params, strict=True):
            everything = len(values) <= FEW or column not in self._listed
            before, after = tuple(state[:column]), tuple(state[column + 1 :])
            for i in range(len(values)) if everything else self._listed[column]:
                if i != state[column]:
                    row[i] = self._value((*before, i, *after), {**params, name: values[i]})
            row[state[column]] = height
            if everything:
                self._listed[column] = np.argsort(-row, kind="stable")[:SHORTLIST].tolist()
        self._heights = heights
        return heights

    def move(self, column: int, alternatives: NDArray[np.int_]) -> None:
        self.states[:, column] = alternatives
        self._height = self._heights[np.arange(len(alternatives)), alternatives]
        name = self._names[column]
        for params, alternative in zip(self._params, alternatives.tolist(), strict=True):
            params[name] = self._choices[name][alternative]

    def _value(self, state: tuple[int, ...], params: Mapping[str, Any]) -> float:
        known = self._known.get(state)
        if known is None:
            seen = self._features(params)
            known = sum(map(mul, map(self._worth.__getitem__, seen), seen.values()))
            if not math.isfinite(known):
                self._check(params)
            self._known[state] = known
        return known


def best_configuration(
    score: Score,
    choices: Choices,
    starts: States,
    taken: set[Hashable],
    key: Callable[[Mapping[str, Any]], Hashable],
) -> dict[str, Any]:
    """The best that is not taken; of everything where that is little, else of all that an ascent comes by.

    Args:
        score: what is to be high.
        choices: the alternatives of each parameter.
        starts: states from which an ascent begins.
        taken: keys of configurations that are not wanted, unless there is nothing else.
        key: the key of a configuration.
    """
    sizes = [len(values) for values in choices.values()]
    total = math.prod(sizes)
    if total <= EXHAUSTIVE:
        everything = np.array(np.unravel_index(np.arange(total), sizes)).T
        ranked: Iterator[States] = (everything[i] for i in np.argsort(-score(everything), kind="stable"))
    else:
        ranked = ascent(score, sizes, starts)
    best: dict[str, Any] | None = None
    for state in ranked:
        candidate = configuration(choices, state.tolist())
        if key(candidate) not in taken:
            return candidate
        best = best or candidate
    assert best is not None
    return best


def ascent(score: Score, sizes: Sequence[int], starts: States) -> Iterator[States]:
    """All that coordinate ascent tries, the best first, each once.

    One parameter at a time takes its best alternative, for all starts at once, until none of them changes.
    """
    score.enter(starts[np.argsort(-score(starts), kind="stable")][: score.climbers])
    steps: list[tuple[States, int]] = []
    values: list[Array] = []
    for _ in range(SWEEPS):
        before = score.states.copy()
        for column in range(len(sizes)):
            value = score.along(column)
            steps.append((score.states.copy(), column))
            values.append(value.ravel())
            score.move(column, value.argmax(1))
        if (score.states == before).all():
            break
    ends = np.cumsum([len(value) for value in values])
    passed: set[tuple[int, ...]] = set()
    for place in np.argsort(-np.concatenate(values), kind="stable").tolist():
        step = int(np.searchsorted(ends, place, side="right"))
        states, column = steps[step]
        row, alternative = divmod(place - (int(ends[step]) - len(values[step])), sizes[column])
        state = states[row].copy()
        state[column] = alternative
        if tuple(state.tolist()) not in passed:
            passed.add(tuple(state.tolist()))
            yield state
