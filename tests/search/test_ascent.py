"""The ascent: what it says of a state is the function's value, what it offers first is the best it came by."""

from __future__ import annotations

from itertools import combinations, product

import numpy as np
import pytest

pytest.importorskip("optuna")
pytest.importorskip("scipy")

from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

from bioadapt.search.thompson.ascent import ascent, best_configuration, configuration
from bioadapt.search.thompson.mapped_design import MappedDesign
from bioadapt.search.thompson.posterior import MAIN_EFFECT
from bioadapt.search.thompson.ranges import random_value
from bioadapt.search.thompson.space_design import SpaceDesign

SPACE = {
    "kind": CategoricalDistribution("abc"),
    "on": CategoricalDistribution([0, 1]),
    "n": IntDistribution(1, 9),
    "lr": FloatDistribution(1e-3, 1, log=True),
}
CHOICES = {"kind": list("cab"), "on": [1, 0], "n": [3, 7, 8], "lr": [0.1, 0.5]}
SIZES = [len(values) for values in CHOICES.values()]
STATES = np.array(list(product(*map(range, SIZES))))


def trials(conditional):
    """Random configurations; with a condition, ``n`` is there for two of the three kinds only."""
    generator = np.random.default_rng(0)
    drawn = [{name: random_value(d, generator) for name, d in SPACE.items()} for _ in range(40)]
    hidden = [params for params in drawn if conditional and params["kind"] == "a"]
    for params in hidden:
        del params["n"]
    return drawn


def named(params):
    return {
        "n": params["n"],
        "b": float(params["kind"] == "b"),
        ("b", "on"): float(params["kind"] == "b") * params["on"],
    }


def scored(kind):
    """A design, random weights, a penalty on some features, and the function of states that they make."""
    built = (
        MappedDesign(named, trials(False)) if kind == "mapped" else SpaceDesign(SPACE, trials(kind == "conditional"))
    )
    generator = np.random.default_rng(1)
    weights = generator.normal(size=len(built.kind))
    penalty = np.zeros(len(weights))
    penalty[list(built.switches.values())[:2]] = 3.0
    return built, weights, penalty, built.score(CHOICES, weights, penalty)


def expected(built, weights, penalty, states):
    params = [configuration(CHOICES, state) for state in states.tolist()]
    if built.matrix.shape[1] > 4:  # of the space: what a condition hides is not there
        params = [
            {name: value for name, value in p.items() if name != "n" or p["kind"] != "a" or not built._conditions}
            for p in params
        ]
    features = built.encode(params)
    return features @ weights - (features > 0) @ penalty


@pytest.mark.parametrize("kind", ["plain", "conditional", "mapped"])
def test_a_state_is_worth_what_its_features_are(kind):
    built, weights, penalty, score = scored(kind)
    assert not (kind == "conditional") ^ bool(getattr(built, "_conditions", {}))
    np.testing.assert_allclose(score(STATES), expected(built, weights, penalty, STATES), atol=1e-9)


@pytest.mark.parametrize("kind", ["plain", "conditional", "mapped"])
def test_values_along_a_parameter_stay_right_while_states_move(kind):
    built, weights, penalty, score = scored(kind)
    generator = np.random.default_rng(2)
    score.enter(STATES[generator.integers(len(STATES), size=5)])
    for column in generator.integers(len(SIZES), size=30):
        value = score.along(column)
        for alternative in range(SIZES[column]):
            states = score.states.copy()
            states[:, column] = alternative
            np.testing.assert_allclose(value[:, alternative], expected(built, weights, penalty, states), atol=1e-9)
        score.move(column, generator.integers(SIZES[column], size=5))


@pytest.mark.parametrize("kind", ["plain", "conditional", "mapped"])
def test_what_is_found_is_offered_from_the_best_down_and_once(kind):
    built, weights, penalty, score = scored(kind)
    offered = np.array(list(ascent(score, SIZES, STATES[:4])))
    value = expected(built, weights, penalty, offered)
    assert (np.diff(value) < 1e-9).all() and len(np.unique(offered, axis=0)) == len(offered)
    everything = expected(built, weights, penalty, STATES)
    assert value[0] >= np.quantile(everything, 0.95) - 1e-9


def test_the_best_that_is_not_taken():
    built, weights, penalty, score = scored("plain")
    order = np.argsort(-expected(built, weights, penalty, STATES))
    best = [configuration(CHOICES, STATES[i]) for i in order[:3]]
    taken = {built.key(params) for params in best[:2]}
    assert best_configuration(score, CHOICES, STATES[:1], taken, built.key) == best[2]
    everything = {built.key(configuration(CHOICES, state)) for state in STATES}
    assert best_configuration(score, CHOICES, STATES[:1], everything, built.key) == best[0]


def test_few_calls_of_a_named_map_find_the_best_of_a_large_space():
    calls = 0

    def stacked(params):
        nonlocal calls
        calls += 1
        present = sorted({value for value in params.values() if value})
        return {**dict.fromkeys(map(str, present), 1.0), **{(str(a), str(b)): 1.0 for a, b in combinations(present, 2)}}

    space = {f"slot {i}": CategoricalDistribution(range(61)) for i in range(4)}
    generator = np.random.default_rng(0)
    built = MappedDesign(stacked, [{name: random_value(d, generator) for name, d in space.items()} for _ in range(80)])
    choices = {name: d.choices for name, d in space.items()}
    weights = generator.normal(size=len(built.kind))
    starts = generator.integers(61, size=(6, 4))
    calls = 0
    found = best_configuration(built.score(choices, weights, 0 * weights), choices, starts, set(), built.key)
    assert calls < 600
    worth = built.encode([found])[0] @ weights
    assert worth > np.sort(weights[built.kind == MAIN_EFFECT])[-4:].sum() - 1e-9
