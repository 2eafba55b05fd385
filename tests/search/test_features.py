"""Features of any space: values stay in range, contrasts read back what was put in, untested pairs stay out."""

from __future__ import annotations

import numpy as np
import pytest

pytest.importorskip("optuna")
pytest.importorskip("scipy")

from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

from bioadapt.search.thompson.features import Memo
from bioadapt.search.thompson.mapped_design import MappedDesign
from bioadapt.search.thompson.posterior import MAIN_EFFECT, WALK
from bioadapt.search.thompson.ranges import alternatives, at, position, random_value
from bioadapt.search.thompson.space_design import SpaceDesign

NUMBERS = [
    FloatDistribution(-1e308, 1e308),
    FloatDistribution(1e-12, 1e12, log=True),
    FloatDistribution(-10.2, 10.2, step=0.1),
    FloatDistribution(2.0, 2.0),
    IntDistribution(-7, 8, step=5),
    IntDistribution(1, 10**12, log=True),
    IntDistribution(0, 2**60),
    IntDistribution(3, 3, log=True),
]


@pytest.mark.parametrize("distribution", NUMBERS, ids=str)
def test_numbers_stay_in_their_range_and_return_from_their_place(distribution):
    generator = np.random.default_rng(0)
    drawn = [random_value(distribution, generator) for _ in range(20)]
    for value in [*drawn, *alternatives(distribution, drawn[:2], generator)]:
        assert type(value) is type(distribution.low)
        assert distribution._contains(distribution.to_internal_repr(value))
        place = position(distribution, value)
        assert -1 <= place <= 1
        assert at(distribution, place) == pytest.approx(value, rel=1e-9)
    assert len(set(drawn)) > 3 or distribution.single() or distribution.step == 5


def test_few_values_are_all_alternatives_and_many_choices_keep_the_best_known():
    generator = np.random.default_rng(0)
    assert alternatives(IntDistribution(0, 6, step=2), [], generator) == [0, 2, 4, 6]
    assert alternatives(CategoricalDistribution([None, 1, "x"]), [], generator) == [None, 1, "x"]
    many = alternatives(CategoricalDistribution(range(1000)), [999], generator)
    assert many[0] == 999 and 64 <= len(set(many)) <= 65


def design(space, count=200, seed=0):
    generator = np.random.default_rng(seed)
    trials = [{name: random_value(d, generator) for name, d in space.items()} for _ in range(count)]
    return SpaceDesign(space, trials), trials


def readings(built, scores):
    weights = np.linalg.lstsq(np.column_stack([np.ones(len(scores)), built.matrix]), scores, rcond=None)[0][1:]
    return {contrast.labels: contrast.row @ weights for contrast in built.contrasts()}


def test_contrasts_read_back_a_known_function():
    space = {
        "kind": CategoricalDistribution(["a", "b", "c"]),
        "on": CategoricalDistribution([False, True]),
        "lr": FloatDistribution(1e-4, 1.0, log=True),
    }
    built, trials = design(space)

    def score(p):
        x = np.log10(p["lr"]) / 2 + 1
        return {"a": 0, "b": 3, "c": 0}[p["kind"]] + 2 * p["on"] + x - 4 * x * x + p["on"] * x

    found = readings(built, np.array([score(p) for p in trials]))
    assert found["kind=b",] == pytest.approx(3) and found["kind=a",] == pytest.approx(-1.5)
    assert found["on=True",] == pytest.approx(2)
    assert found["lr",] == pytest.approx(3)  # from x = -1 to 1, half of the trials with a slope of 2
    assert found["lr (middle)",] == pytest.approx(4)
    assert found["on=True", "lr"] == pytest.approx(2) or found["lr", "on=True"] == pytest.approx(2)
    assert found["kind=b", "on=True"] == pytest.approx(0, abs=1e-9)


def test_the_columns_of_numbers_hold_a_cliff_and_nothing_beside_it():
    place = np.linspace(-1, 1, 201)
    built = SpaceDesign({"x": FloatDistribution(-1, 1)}, [{"x": x} for x in place.tolist()])
    walk = built.matrix[:, built.kind == WALK]
    assert (built.kind[: -walk.shape[1]] == MAIN_EFFECT).all()
    edges = np.linspace(-1, 1, walk.shape[1] + 1)
    for column, low, high in zip(walk.T, edges, edges[1:], strict=False):
        assert np.ptp(column[place <= low]) < 1e-9 and np.ptp(column[place >= high]) < 1e-9
    rise = built.matrix[-1] - built.matrix[0]
    assert (rise[built.kind == WALK] ** 2).sum() == pytest.approx(rise[0] ** 2)  # from end to end as much as the line
    cliff = -np.clip((place - edges[-4]) / (edges[-3] - edges[-4]), 0, 1)
    found = readings(built, cliff)
    assert found["x",] == pytest.approx(-1) and found["x (middle)",] == pytest.approx(0.5)


def test_an_interaction_of_levels_is_read_back():
    space = {name: CategoricalDistribution(["a", "b", "c"]) for name in "xy"}
    built, trials = design(space, 60)
    found = readings(built, np.array([5.0 * (p["x"] == "b" and p["y"] == "c") for p in trials]))
    assert found["x=b", "y=c"] == pytest.approx(5)
    assert found["x=b", "y=a"] == pytest.approx(-2.5) and found["x=a", "y=a"] == pytest.approx(1.25)


def test_untested_interactions_stay_out():
    space = {name: CategoricalDistribution(["a", "b", "c"]) for name in "xy"}
    trials = [{"x": "a", "y": "a"}] * 3 + [{"x": "b", "y": "b"}] * 2 + [{"x": "c"}] * 5
    built = SpaceDesign(space, trials)
    pairs = {contrast.labels: contrast.support for contrast in built.contrasts() if len(contrast.labels) > 1}
    assert pairs == {("x=a", "y=a"): 3}
    assert not built.matrix[-1, 3:].any()  # a parameter that the trial does not have


def test_only_the_most_supported_interactions_are_kept(monkeypatch):
    monkeypatch.setattr("bioadapt.search.thompson.features.INTERACTIONS", 4)
    built, _ = design({name: CategoricalDistribution(["a", "b", "c"]) for name in "xyz"}, 40)
    everything = built._together
    monkeypatch.setattr("bioadapt.search.thompson.features.INTERACTIONS", 100)
    full, _ = design({name: CategoricalDistribution(["a", "b", "c"]) for name in "xyz"}, 40)
    assert len(everything) == 4 and sorted(everything.values()) == sorted(full._together.values())[-4:]


def test_equal_configurations_have_equal_keys():
    space = {"kind": CategoricalDistribution(["a", "b", float("nan")]), "n": FloatDistribution(-1, 9)}
    trials = [{"kind": "a", "n": 0.0}, {"kind": "a", "n": -0.0, "other": 1}, {"kind": float("nan"), "n": 0.0}]
    built = SpaceDesign(space, trials)
    assert built.keys == [built.key(params) for params in trials]
    assert built.keys[0] == built.keys[1] != built.keys[2] == built.key({"kind": float("nan"), "n": 0})
    assert len(set(built.repetitions)) == 3  # what is outside of the space tells them apart
    mapped = MappedDesign(lambda p: {"n": p["n"], ("kind", p["kind"]): 1}, [{"kind": "a", "n": 1, "on": 0}])
    assert mapped.key({"kind": "a", "n": 1, "on": 1}) == mapped.keys[0] == mapped.repetitions[0]


def test_a_choice_without_a_hash_is_encoded_too():
    space = {"kind": CategoricalDistribution([["a"], ["b"], ["c"]])}
    built = SpaceDesign(space, [{"kind": ["b"]}, {"kind": ["c"]}])
    np.testing.assert_allclose(built.matrix, [[-1 / 3, 2 / 3, -1 / 3], [-1 / 3, -1 / 3, 2 / 3]])


def test_what_is_remembered_is_what_was_asked_for_last():
    asked = []
    memo = Memo(lambda params: asked.append(params) or len(params))
    first, second = {"a": 1}, {"a": 1, "b": 2}
    assert memo([first, second]) == [1, 2] and memo([second]) == [2] and len(asked) == 2
    assert memo([first, {"a": 1}]) == [1, 1] and len(asked) == 4  # forgotten, and another object


def test_named_features():
    def features(p):
        return {"deep": p["depth"] > 2, "depth": p["depth"], ("deep", "wide"): p["depth"] > 2 and p["wide"]}

    trials = [{"depth": depth, "wide": wide} for depth in (1, 2, 3, 4) for wide in (0, 1)]
    built = MappedDesign(features, [*trials, trials[-1]])
    by_name = {contrast.labels: contrast for contrast in built.contrasts()}
    assert by_name["deep", "wide"].support == 3 and by_name["deep",].support == 5
    assert by_name["deep",].column is not None and by_name["depth",].column is None  # a number is never dropped
    untested = MappedDesign(features, trials)
    assert ("deep", "wide") not in {contrast.labels for contrast in untested.contrasts()}
    with pytest.raises(ValueError, match="deep"):
        MappedDesign(lambda p: {"deep": float("nan")}, trials)


def test_many_numbers_walk_in_fewer_steps():
    widths = []
    for count in (1, 20, 30, 200):
        space = {f"x{i}": FloatDistribution(0.0, 1.0) for i in range(count)}
        widths.append(SpaceDesign(space, []).matrix.shape[1] // count)
    assert widths == [14, 14, 10, 6]
