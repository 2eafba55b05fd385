"""The pruner: hopeless trials stop, the eventual best never, and nothing before there is something to learn from."""

from __future__ import annotations

import math

import numpy as np
import pytest

pytest.importorskip("optuna")
pytest.importorskip("scipy")

import optuna
from optuna.trial import TrialState
from scipy import stats

from bioadapt.search import ThompsonPruner
from bioadapt.search.thompson.pruner import RungRegression


def finished(pairs, step=0):
    return [optuna.create_trial(value=final, intermediate_values={step: rung}) for rung, final in pairs]


def study_of(pairs, direction="maximize", pruner=None):
    study = optuna.create_study(direction=direction, pruner=pruner or ThompsonPruner(n_startup_trials=10))
    study.add_trials(finished(pairs))
    return study


def pruned_at(study, score, step=0):
    trial = study.ask()
    trial.report(score, step)
    return trial.should_prune()


PAIRS = [(0.1 * i, 0.2 * i + 0.02 * (-1) ** i) for i in range(12)]  # best: 2.22 - 0.04


@pytest.mark.parametrize(("direction", "sign"), [("maximize", 1), ("minimize", -1)])
def test_a_hopeless_trial_stops_and_a_promising_one_goes_on(direction, sign):
    study = study_of([(sign * rung, sign * final) for rung, final in PAIRS], direction)
    assert pruned_at(study, sign * 0.5)
    assert not pruned_at(study, sign * 1.1)
    assert not pruned_at(study, sign * 1.5)


def test_the_prediction_is_the_textbook_interval():
    generator = np.random.default_rng(0)
    rung = generator.normal(size=9)
    final = 2 + 3 * rung + generator.normal(size=9)
    prediction = RungRegression.at(finished(zip(rung, final, strict=True)), 0).predict(0.7)
    line = stats.linregress(rung, final)
    residual = final - line.intercept - line.slope * rung
    spread = math.sqrt((residual @ residual) / 7)
    scale = spread * math.sqrt(1 + 1 / 9 + (0.7 - rung.mean()) ** 2 / ((rung - rung.mean()) ** 2).sum())
    assert prediction.mean == pytest.approx(line.intercept + 0.7 * line.slope)
    assert prediction.above(5.0) == pytest.approx(stats.t(7, prediction.mean, scale).sf(5.0))


def test_a_rung_that_says_nothing_stops_nobody():
    generator = np.random.default_rng(1)
    study = study_of([(rung, final) for rung, final in generator.normal(size=(200, 2))])
    best = np.sort([trial.value for trial in study.trials])[-1]
    lenient = study_of([(t.intermediate_values[0], min(t.value, 1.0)) for t in study.trials])
    assert best > 2 and not pruned_at(lenient, -1.0)
    assert not pruned_at(study_of([(0.5, 0.1 * i) for i in range(20)]), 0.5)  # all the same: no relation


def test_one_diverged_trial_does_not_hide_the_relation():
    for diverged in [(-1e9, -1e20), (1e9, -1e20), (1.0, -1e300)]:
        study = study_of([*PAIRS, diverged])
        assert pruned_at(study, 0.5) and not pruned_at(study, 1.1)


def test_never_the_first_trials_nor_before_enough_have_finished():
    assert not pruned_at(study_of(PAIRS[:9]), 0.0)
    study = study_of(PAIRS)
    trial = study.ask()
    assert not trial.should_prune()  # nothing reported
    assert not pruned_at(study, 0.0, step=7)  # nobody has been there
    late = ThompsonPruner(n_startup_trials=10, n_warmup_steps=1)
    assert not pruned_at(study_of(PAIRS, pruner=late), 0.0)


@pytest.mark.parametrize(("score", "stops"), [(math.nan, True), (-math.inf, True), (math.inf, False)])
def test_scores_that_are_not_finite(score, stops):
    assert pruned_at(study_of(PAIRS), score) is stops


def simulate(seed, pruner):
    generator = np.random.default_rng(seed)
    noise = generator.normal(size=(60, 4)) * [0.4, 0.2, 0.1, 0.05]

    def objective(trial):
        quality = trial.suggest_float("quality", 0, 1)
        curve = 3 * quality - 1 / np.arange(1, 5) + noise[trial.number]
        for step, score in enumerate(curve[:-1]):
            trial.report(score, step)
            if trial.should_prune():
                raise optuna.TrialPruned
        return curve[-1]

    study = optuna.create_study(direction="maximize", pruner=pruner, sampler=optuna.samplers.RandomSampler(seed))
    study.optimize(objective, n_trials=60)
    return study


def test_the_eventual_best_is_never_stopped_and_half_of_the_work_is_saved():
    stopped = 0
    for seed in range(10):
        study = simulate(seed, ThompsonPruner(0.01))
        full = simulate(seed, optuna.pruners.NopPruner())
        assert study.best_trial.number == full.best_trial.number
        stopped += sum(trial.state == TrialState.PRUNED for trial in study.trials)
    assert stopped > 0.5 * 10 * 50


@pytest.mark.parametrize("settings", [{"probability": 1.0}, {"probability": -0.1}, {"n_startup_trials": 2}])
def test_settings_out_of_range_are_refused(settings):
    with pytest.raises(ValueError, match=next(iter(settings))):
        ThompsonPruner(**settings)
