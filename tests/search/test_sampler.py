"""The sampler: better than its rivals where it should be, right about what it names, at home in any study."""

from __future__ import annotations

import importlib
import math
import sys
from itertools import combinations
from types import SimpleNamespace

import numpy as np
import pytest

pytest.importorskip("optuna")
pytest.importorskip("scipy")

import optuna
from optuna.distributions import CategoricalDistribution, FloatDistribution
from optuna.samplers import RandomSampler, TPESampler

from bioadapt.search import ThompsonSampler
from experiments.search.run import regrets, structured

LEVELS = {"a": 3, "b": 3, "c": 3, "d": 3, "e": 2}
BEST = 1.0 + 1.7 + 0.6  # a=2; b=2 with c=1, together alone; e=1


def landscape(params):
    """Two main effects, one that is good only in company, nothing at all from d."""
    together = 2.0 if params["b"] == 2 and params["c"] == 1 else 0.0
    return [0.0, 0.5, 1.0][params["a"]] + [0.0, 0.1, -0.3][params["b"]] + together + 0.6 * params["e"]


def searched(sampler, seed, trials, noise=0.3):
    """The study of a noisy landscape, and what its trials would have scored without noise."""
    generator = np.random.default_rng(1000 + seed)
    truth = []

    def objective(trial):
        truth.append(landscape({name: trial.suggest_categorical(name, range(n)) for name, n in LEVELS.items()}))
        return truth[-1] + noise * generator.normal()

    study = optuna.create_study(direction="maximize", sampler=sampler)
    study.optimize(objective, n_trials=trials)
    return study, np.array(truth)


def trials_until_best(make, seeds=range(10), trials=40):
    found = []
    for seed in seeds:
        reached = np.flatnonzero(searched(make(seed), seed, trials)[1] >= BEST - 1e-9)
        found.append(reached[0] if len(reached) else trials)
    return float(np.mean(found))


def test_finds_the_optimum_in_fewer_trials_than_random_search_and_no_later_than_tpe():
    ours = trials_until_best(lambda seed: ThompsonSampler(seed=seed))
    assert ours < 0.85 * trials_until_best(lambda seed: RandomSampler(seed=seed))
    assert ours < 1.25 * trials_until_best(lambda seed: TPESampler(seed=seed))


def test_finds_better_stacks_than_tpe_and_tpe_better_ones_than_random_search():
    problems = [structured(seed) for seed in range(4)]

    def lost(make):
        return np.mean([regrets(p, make(p, seed), seed, 60)[0][-1] for seed, p in enumerate(problems)])

    ours = lost(lambda problem, seed: ThompsonSampler(seed=seed, features=problem.features))
    tpe = lost(lambda problem, seed: TPESampler(seed=seed))
    assert ours < tpe < lost(lambda problem, seed: RandomSampler(seed=seed))


@pytest.fixture(scope="module")
def explored():
    return searched(RandomSampler(seed=0), 0, 150)[0]


def test_the_interaction_is_found_and_nothing_where_there_is_nothing(explored):
    effects = ThompsonSampler(seed=0).effects(explored)
    pairs = [effect for effect in effects if "×" in effect.name]
    assert pairs[0].name == "b=2 × c=1" and pairs[0].mean > 0.8 and pairs[0].probability_helps > 0.99
    by_name = {effect.name: effect for effect in effects}
    assert by_name["a=2"].mean == pytest.approx(0.75, abs=0.3) and by_name["a=2"].probability_helps > 0.99
    assert by_name["e=1"].mean == pytest.approx(0.6, abs=0.25) and by_name["e=1"].support > 50
    for level in range(3):
        assert abs(by_name[f"d={level}"].mean) < 0.25 and 0.02 < by_name[f"d={level}"].probability_helps < 0.98
    away = [effect for effect in pairs if not {"b", "c"} & {part[0] for part in effect.name.split(" × ")}]
    assert away and not any(effect.probability_helps > 0.995 and effect.mean > 0.5 for effect in away)


def test_minimising_is_maximising_the_opposite(explored):
    opposite = optuna.create_study(direction="minimize")
    for trial in explored.trials:
        opposite.add_trial(
            optuna.create_trial(params=trial.params, distributions=trial.distributions, value=-trial.value)
        )
    sampler = ThompsonSampler(seed=0)
    up, down = sampler.effects(explored), sampler.effects(opposite)
    assert [(e.name, e.mean, e.probability_helps) for e in up] == [(e.name, -e.mean, e.probability_helps) for e in down]
    fresh = optuna.distributions.IntDistribution(0, 0)
    assert sampler.sample_relative(explored, explored.trials[0], {**explored.trials[0].distributions, "z": fresh}) == (
        sampler.sample_relative(opposite, explored.trials[0], {**explored.trials[0].distributions, "z": fresh})
    )


def test_the_seed_decides():
    def proposals(seed):
        return [trial.params for trial in searched(ThompsonSampler(seed=seed), 0, 16)[0].trials]

    assert proposals(1) == proposals(1) != proposals(2)
    assert proposals(None) != proposals(None)


PARTS = CategoricalDistribution(["none", "bold", "inert", "shy", "plain", "grey", "dull"])
SPACE = dict.fromkeys(["first", "second", "third"], PARTS)


def stacked(params):
    """Features of a stack: one for each part that is in it, one for each pair."""
    present = sorted(set(params.values()) - {"none"})
    return {**dict.fromkeys(present, 1.0), **dict.fromkeys(combinations(present, 2), 1.0)}


def stacks(effect, count=100, seed=0):
    """Random stacks of up to three parts; each feature adds its effect, and the noise has a sd of 0.1."""
    study = optuna.create_study(direction="maximize")
    generator = np.random.default_rng(seed)
    trials = []
    for _ in range(count):
        params = {name: PARTS.choices[generator.integers(7)] for name in SPACE}
        value = sum(effect.get(name, 0.0) * size for name, size in stacked(params).items())
        trials.append(optuna.create_trial(params=params, distributions=SPACE, value=value + 0.1 * generator.normal()))
    study.add_trials(trials)
    return study


# "inert" always hurts, "shy" hurts unless "bold" is there.
HELPS = {"bold": 0.5, "inert": -0.8, "shy": -0.6, ("bold", "shy"): 2.0}


def test_a_feature_that_never_helps_is_dropped_and_one_with_a_good_partner_is_not():
    study = stacks(HELPS)
    sampler = ThompsonSampler(seed=0, features=stacked)
    assert sampler.dropped(study) == ["inert"]
    assert ThompsonSampler(seed=0, features=stacked, drop_below=0).dropped(study) == []
    shy = next(effect for effect in sampler.effects(study) if effect.name == "shy")
    assert shy.probability_helps < 0.01 and not shy.dropped  # alone it hurts
    together = next(effect for effect in sampler.effects(study) if effect.name == "bold × shy")
    assert together.mean == pytest.approx(2.0, abs=0.4)


def test_a_dropped_feature_is_tried_again_now_and_then():
    study = stacks(HELPS)
    study.sampler = ThompsonSampler(seed=0, features=stacked, exploration=0.3)
    proposed = []
    for _ in range(40):
        trial = study.ask(SPACE)
        proposed.append("inert" in trial.params.values())
        study.tell(trial, state=optuna.trial.TrialState.FAIL)
    assert 4 < sum(proposed) < 22
    study.sampler = ThompsonSampler(seed=0, features=stacked, drop_below=0, exploration=0)
    assert "inert" not in study.ask(SPACE).params.values()


def test_dropping_is_not_irrevocable():
    study = stacks(HELPS)
    for trial in stacks({**HELPS, "inert": 3.0}).trials:
        study.add_trial(trial)
    assert ThompsonSampler(seed=0, features=stacked).dropped(study) == []


def test_a_useful_feature_is_hardly_ever_dropped():
    sampler = ThompsonSampler(seed=0, features=stacked)
    assert not any("plain" in sampler.dropped(stacks({**HELPS, "plain": 0.2}, count)) for count in range(40, 100, 6))


def test_a_feature_that_is_useful_in_company_is_dropped_in_fewer_than_two_of_a_hundred_studies():
    # Two noise sds from "shy" where "bold" is; alone it hurts by twice as much.
    useful = {"bold": 0.1, "shy": -0.4, ("bold", "shy"): 0.6, "inert": -0.8}
    dropped = [ThompsonSampler(seed=seed, features=stacked).dropped(stacks(useful, 60, seed)) for seed in range(200)]
    assert sum("shy" in names for names in dropped) < 0.02 * 200
    assert sum("inert" in names for names in dropped) > 0.5 * 200


def test_the_dominant_pair_stands_out_in_a_search_without_noise():
    def objective(trial):
        present = stacked({name: trial.suggest_categorical(name, PARTS.choices) for name in SPACE})
        return 3.0 * (("inert", "shy") in present) + 0.3 * ("bold" in present) - 0.2 * ("shy" in present)

    study = optuna.create_study(direction="maximize", sampler=ThompsonSampler(seed=0, features=stacked))
    study.optimize(objective, n_trials=60)
    pairs = [effect for effect in study.sampler.effects(study) if "×" in effect.name]
    assert len(pairs) > 5 and max(pairs, key=lambda effect: effect.mean).name == "inert × shy"


@pytest.mark.parametrize("features", [None, stacked], ids=["default", "named"])
def test_what_a_sampler_remembers_changes_no_proposal(features):
    trials = stacks(HELPS, 132).trials
    for i in range(5, 132, 6):  # some were pruned
        trials[i] = optuna.create_trial(
            params=trials[i].params,
            distributions=SPACE,
            state=optuna.trial.TrialState.PRUNED,
            intermediate_values={0: trials[i].value / 2},
        )
    study = optuna.create_study(direction="maximize")
    old = ThompsonSampler(seed=1, features=features)
    for number, trial in enumerate(trials):
        study.add_trial(trial)
        if number in (40, 41, 98, 99, 100, 126, 131):
            asked = SimpleNamespace(number=number + 1)
            fresh = ThompsonSampler(seed=1, features=features)
            space = fresh.infer_relative_search_space(study, asked)
            assert fresh.sample_relative(study, asked, space) == old.sample_relative(study, asked, space)
            assert fresh.effects(study) == old.effects(study)
    other = stacks({}, 40, seed=5)
    fresh = ThompsonSampler(seed=1, features=features)
    assert fresh.effects(other) == old.effects(other)


def test_stacks_with_equal_features_count_as_one():
    study = stacks(HELPS, 60)
    study.sampler = ThompsonSampler(seed=0, features=stacked, exploration=0.0, drop_below=0.0)
    seen = {frozenset(stacked(trial.params)) for trial in study.trials}
    for _ in range(42 - len(seen)):  # none, six alone, fifteen pairs, twenty triples
        features = frozenset(stacked(study.ask(SPACE).params))
        assert features not in seen
        seen.add(features)


def test_a_parameter_that_only_some_trials_have_is_modelled_where_it_occurs():
    def objective(trial):
        if trial.suggest_categorical("kind", ["plain", "deep"]) == "plain":
            return 0.5
        return 1 - abs(trial.suggest_float("depth", 0, 1) - 0.8)

    study = optuna.create_study(direction="maximize", sampler=ThompsonSampler(seed=0))
    study.optimize(objective, n_trials=30)
    assert set(study.sampler.infer_relative_search_space(study, study.trials[-1])) == {"kind", "depth"}
    late = [trial.params for trial in study.trials[-10:]]
    assert sum(params["kind"] == "deep" for params in late) >= 8
    assert np.median([params["depth"] for params in late if "depth" in params]) == pytest.approx(0.8, abs=0.15)
    names = {effect.name for effect in study.sampler.effects(study)}
    assert {"kind=deep", "depth"} <= names and "kind=deep × depth" not in names  # never apart: no interaction


def test_a_parameter_whose_range_changed_is_left_to_chance():
    study = optuna.create_study(sampler=ThompsonSampler(seed=0, n_startup_trials=2))
    for high in (1, 2):
        study.optimize(lambda t, h=high: t.suggest_float("x", 0, h) + t.suggest_float("y", 0, 1), n_trials=3)
    assert set(study.sampler.infer_relative_search_space(study, study.trials[-1])) == {"y"}


def line(values, state=optuna.trial.TrialState.COMPLETE, **others):
    x = FloatDistribution(0, 1)
    return [
        optuna.create_trial(params={"x": place}, distributions={"x": x}, value=value, state=state, **others)
        for place, value in values
    ]


def test_a_rate_is_tuned_on_its_plateau_and_neither_beyond_the_cliff_nor_at_an_end():
    # Best at 10 ** -3; from 10 ** -2.4 on a training diverges, the further the worse.
    def score(rate, generator):
        fall = 5 + 10 * (rate + 2.4) if rate > -2.4 else 0.0
        return 0.1 * generator.normal() - 0.3 * (rate + 3) ** 2 - fall

    for seed in range(3):
        generator = np.random.default_rng(seed)
        study = optuna.create_study(direction="maximize", sampler=ThompsonSampler(seed=seed))
        study.optimize(lambda t: score(math.log10(t.suggest_float("rate", 1e-5, 1e-1, log=True)), generator), 40)  # noqa: B023
        proposed = np.log10([trial.params["rate"] for trial in study.trials[10:]])
        assert (np.abs(proposed + 3) < 0.6).mean() > 0.6
        assert (proposed > -2.4).mean() < 0.15 and (proposed < -4.9).mean() < 0.15
        assert abs(math.log10(study.sampler.recommend(study).params["rate"]) + 3) < 0.6


def test_failed_trials_are_ignored_and_extreme_scores_do_no_harm():
    sampler = ThompsonSampler(seed=0, n_startup_trials=3, exploration=0.0, drop_below=0.0)
    good = line([(i / 20, i / 20) for i in range(20)])
    study = optuna.create_study(direction="maximize")
    study.add_trials(good)
    before = sampler.effects(study)
    study.add_trials(line([(0.9, None)], state=optuna.trial.TrialState.FAIL))
    assert sampler.effects(study) == before
    assert before[0].name == "x" and before[0].probability_helps > 0.999
    study.add_trials(line([(0.02, -math.inf), (0.04, -1e300)]))
    after = sampler.effects(study)
    assert after[0].name == "x" and after[0].probability_helps > 0.99 and 0.5 < after[0].mean < 3
    study.sampler = sampler
    assert study.ask({"x": FloatDistribution(0, 1)}).params["x"] > 0.8


@pytest.mark.parametrize("value", [0.0, -1e308, math.inf])
def test_a_constant_objective_is_searched_all_the_same(value):
    study = optuna.create_study(sampler=ThompsonSampler(seed=0, n_startup_trials=1))
    study.add_trials(line([(0.1, value), (0.2, value), (0.3, value)]))
    proposed = {study.ask({"x": FloatDistribution(0, 1)}).params["x"] for _ in range(5)}
    assert len(proposed) == 5


def test_pruned_trials_count_at_their_predicted_score():
    study = optuna.create_study(direction="maximize")
    for trial in line([(i / 20, 2 * i / 20) for i in range(10)]):
        study.add_trial(
            optuna.create_trial(
                params=trial.params,
                distributions=trial.distributions,
                value=trial.value,
                intermediate_values={3: trial.value / 2 + 0.01 * math.sin(9 * trial.value)},
            )
        )
    sampler = ThompsonSampler(seed=0)
    before = {effect.name: effect for effect in sampler.effects(study)}
    pruned = optuna.trial.TrialState.PRUNED
    study.add_trials(line([(0.9, None)] * 3, state=pruned))  # nothing reported: nothing known
    study.add_trials(line([(0.9, None)] * 3, state=pruned, intermediate_values={5: 0.0}))  # no relation there
    assert {effect.name: effect for effect in sampler.effects(study)} == before
    study.add_trials(line([(0.9 + i / 100, None) for i in range(3)], state=pruned, intermediate_values={3: -0.5}))
    after = {effect.name: effect for effect in sampler.effects(study)}
    assert after["x"].support == before["x"].support + 3 and after["x"].mean < 0.5 * before["x"].mean


def test_a_stated_standard_error_weakens_a_score():
    def rise(error):
        study = optuna.create_study(direction="maximize")
        study.add_trials(line([(i / 9, 0.1 * (i % 2)) for i in range(10)]))
        study.add_trials(line([(0.95, 1.0), (0.97, 1.0)], user_attrs={"standard_error": error}))
        return next(effect for effect in ThompsonSampler(seed=0).effects(study) if effect.name == "x").mean

    assert rise(0.01) > 3 * abs(rise(5.0))


def test_an_empty_study_has_no_effects():
    assert ThompsonSampler(seed=0).effects(optuna.create_study()) == []


def test_several_objectives_are_refused_by_name():
    study = optuna.create_study(directions=["minimize", "maximize"])
    with pytest.raises(ValueError, match="ThompsonSampler"):
        ThompsonSampler(seed=0).effects(study)


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"seed": -1}, "seed"),
        ({"drop_below": 1.0}, "drop_below"),
        ({"exploration": -0.1}, "exploration"),
        ({"exploration": 0.0}, "exploration"),
    ],
)
def test_settings_out_of_range_are_refused(settings, named):
    with pytest.raises(ValueError, match=named):
        ThompsonSampler(**settings)


def test_a_missing_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "scipy", None)
    for name in [name for name in sys.modules if name.startswith("bioadapt.search.thompson")]:
        monkeypatch.delitem(sys.modules, name)
    with pytest.raises(ImportError, match=r"scipy: pip install bioadapt\[search\]"):
        importlib.import_module("bioadapt.search").ThompsonSampler  # noqa: B018


# -- what to believe of a score --


def noisy_study(seed, trials=120, noise=1.0):
    generator = np.random.default_rng(seed)

    def objective(trial):
        value = 0.5 * trial.suggest_int("a", 0, 4) - 0.5 * trial.suggest_int("b", 0, 4)
        return value + 0.7 * trial.suggest_categorical("c", ["x", "y", "z"]).count("z") + noise * generator.normal()

    study = optuna.create_study(direction="maximize", sampler=optuna.samplers.RandomSampler(seed=seed))
    study.optimize(objective, n_trials=trials)
    return study


def true_value(trial):
    return 0.5 * trial.params["a"] - 0.5 * trial.params["b"] + 0.7 * (trial.params["c"] == "z")


def test_expected_scores_are_nearer_to_the_truth_than_observed_ones():
    for seed in range(3):
        study = noisy_study(seed)
        expected = ThompsonSampler(seed=0).expected(study)
        assert expected.keys() == {trial.number for trial in study.trials}
        truth = np.array([true_value(trial) for trial in study.trials])
        observed = np.array([trial.value for trial in study.trials])
        means, sds = np.array([expected[trial.number] for trial in study.trials]).T
        assert np.abs(means - truth).mean() < 0.5 * np.abs(observed - truth).mean()
        assert (np.abs(means - truth) < 3 * sds).mean() > 0.9


def test_the_best_score_was_lucky_and_is_expected_to_be_lower():
    study = noisy_study(0)
    mean, _ = ThompsonSampler(seed=0).expected(study)[study.best_trial.number]
    assert true_value(study.best_trial) - 0.7 < mean < study.best_value - 0.5


def test_what_is_recommended_is_better_than_the_luckiest_trial_on_average():
    gains = []
    for seed in range(6):
        study = noisy_study(seed)
        gains.append(true_value(ThompsonSampler(seed=0).recommend(study)) - true_value(study.best_trial))
    assert np.mean(gains) > 0 and min(gains) > -0.5


def test_a_study_that_minimises_is_recommended_its_lowest():
    study = optuna.create_study(direction="minimize", sampler=optuna.samplers.RandomSampler(seed=0))
    study.optimize(lambda trial: trial.suggest_int("a", 0, 9), n_trials=40)
    sampler = ThompsonSampler(seed=0)
    assert sampler.recommend(study).params == {"a": 0}
    assert sampler.expected(study)[study.best_trial.number][0] == pytest.approx(0, abs=0.3)


def test_without_a_complete_trial_nothing_is_recommended():
    study = optuna.create_study()
    assert ThompsonSampler(seed=0).expected(study) == {}
    with pytest.raises(ValueError, match="no trial is complete"):
        ThompsonSampler(seed=0).recommend(study)
