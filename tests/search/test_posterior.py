"""The posterior against textbook formulas, and what its hierarchy of scales promises."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest

pytest.importorskip("optuna")
pytest.importorskip("scipy")

from scipy import linalg, stats
from scipy.special import logsumexp

from bioadapt.search.thompson.observations import pool_repetitions, standardised
from bioadapt.search.thompson.posterior import (
    INTERACTION,
    MAIN,
    MAIN_EFFECT,
    RATIO,
    RESIDUAL,
    ROUGH,
    WALK,
    LinearPosterior,
    Scales,
    ShrinkagePosterior,
)


def problem(rows, columns, seed=0):
    generator = np.random.default_rng(seed)
    matrix = generator.normal(size=(rows, columns))
    return matrix, generator.normal(size=rows), generator.uniform(0.1, 1, rows), generator.uniform(0.2, 2, columns)


def closed_form(matrix, target, noise, prior):
    covariance = np.linalg.inv(np.diag(1 / prior) + matrix.T @ np.diag(1 / noise) @ matrix)
    return covariance @ matrix.T @ (target / noise), covariance


@pytest.mark.parametrize("shape", [(9, 4), (4, 9), (5, 5)])
def test_mean_variance_and_evidence_in_closed_form(shape):
    matrix, target, noise, prior = problem(*shape)
    posterior = LinearPosterior(matrix, target, noise, prior)
    mean, covariance = closed_form(matrix, target, noise, prior)
    np.testing.assert_allclose(posterior.mean, mean, atol=1e-10)
    contrasts = np.random.default_rng(1).normal(size=(3, shape[1]))
    np.testing.assert_allclose(posterior.variance(contrasts), np.diag(contrasts @ covariance @ contrasts.T), atol=1e-10)
    marginal = stats.multivariate_normal(cov=matrix @ np.diag(prior) @ matrix.T + np.diag(noise))
    assert posterior.log_evidence == pytest.approx(marginal.logpdf(target))


@pytest.mark.parametrize("shape", [(8, 3), (2, 3)])
def test_draws_have_the_posterior_moments(shape):
    matrix, target, noise, prior = problem(*shape)
    mean, covariance = closed_form(matrix, target, noise, prior)
    draws = LinearPosterior(matrix, target, noise, prior).draw(np.random.default_rng(0), 40_000)
    np.testing.assert_allclose(draws.mean(1), mean, atol=0.03)
    np.testing.assert_allclose(np.cov(draws), covariance, atol=0.04)


def planted(kinds, weights, rows=60, noise=0.3):
    generator = np.random.default_rng(4)
    matrix = generator.choice([-0.5, 0.5], size=(rows, len(kinds)))
    target = matrix @ weights + noise * generator.normal(size=rows)
    target, _, unit = standardised(target)
    return ShrinkagePosterior.fit(matrix, target, np.zeros(rows), kinds), unit


def test_the_same_data_move_an_interaction_less_than_a_main_effect():
    walsh = linalg.hadamard(32)[:, 1:] / 2
    kinds = np.repeat([MAIN_EFFECT, INTERACTION], [15, 16])
    noise = np.random.default_rng(0).normal(size=31) * 0.5
    noise[[0, 15]] = 1.0  # what least squares would find: the same
    mean, _, helps = ShrinkagePosterior.fit(walsh, walsh @ noise, np.zeros(32), kinds).summary(np.eye(31))
    assert 0 < mean[15] < 0.9 * mean[0] < mean[0] < 1
    assert helps[0] > 0.9


@pytest.mark.parametrize(("rows", "repeated"), [(16, False), (60, False), (60, True)])
def test_the_points_that_count_are_all_found(rows, repeated):
    generator = np.random.default_rng(rows)
    matrix = generator.choice([-0.5, 0.5], size=(rows, 24))
    kinds = np.repeat([MAIN_EFFECT, INTERACTION, WALK], [8, 12, 4])
    for size in (0.0, 0.5, 3.0):
        weights = size * generator.normal(size=24) * np.array([1.0, 0.3, 0.3])[kinds]
        target = standardised(matrix @ weights + generator.normal(size=rows))[0]
        error = generator.uniform(0, 0.2, rows) if repeated else np.zeros(rows)
        found = ShrinkagePosterior.fit(matrix, target, error, kinds)
        grid = [Scales(*point) for point in product(MAIN, RATIO, ROUGH, RESIDUAL)]
        every = ShrinkagePosterior(matrix, target, error, kinds, grid, np.full(len(grid), 1 / len(grid)))
        evidence = np.array([every._at(point).log_evidence for point in grid])
        share = dict(zip(grid, np.exp(evidence - logsumexp(evidence)), strict=True))
        missed = set(share) - set(found.scales)
        assert sum(share[point] for point in missed) < 0.1 and all(share[point] < 0.006 for point in missed)
        expected = np.array([share[point] for point in found.scales])
        np.testing.assert_allclose(found.share, expected / expected.sum(), rtol=1e-6)


def test_the_mixture_is_the_average_of_its_parts():
    weights = np.concatenate([[2.0, -1.0], np.zeros(6)])
    posterior, _ = planted(np.repeat([MAIN_EFFECT, INTERACTION], 4), weights, rows=16)
    assert len(posterior.scales) > 1 and posterior.share.sum() == pytest.approx(1)
    mean, sd, helps = posterior.summary(np.eye(8))
    draws = posterior.draw(np.random.default_rng(0), 20_000)
    np.testing.assert_allclose(draws.mean(1), mean, atol=0.03)
    np.testing.assert_allclose(draws.std(1), sd, atol=0.03)
    np.testing.assert_allclose((draws > 0).mean(1), helps, atol=0.02)


def test_believing_in_pending_trials_makes_surer_and_no_better():
    posterior, _ = planted(np.full(4, MAIN_EFFECT), np.array([1.0, 0.5, 0.0, 0.0]), rows=12)
    posterior.scales, posterior.share = [Scales(main=1.0, ratio=0.3, rough=0.7, residual=0.1)], np.ones(1)
    pending = np.array([[0.5, -0.5, 0.5, 0.5]])
    believer = posterior.believing(pending, np.zeros(1))
    before, after = posterior.summary(pending), believer.summary(pending)
    assert after[0] == pytest.approx(before[0]) and after[1] < 0.9 * before[1]


@pytest.mark.parametrize("shape", [(9, 4), (3, 4), (2, 9)])
def test_believing_is_the_posterior_with_more_observations(shape):
    matrix, target, noise, prior = problem(*shape)
    posterior = LinearPosterior(matrix, target, noise, prior)
    rows, error = np.random.default_rng(2).normal(size=(2, shape[1])), np.array([0.3, 0.7])
    lie = np.concatenate([target, rows @ posterior.mean])
    mean, covariance = closed_form(np.vstack([matrix, rows]), lie, np.concatenate([noise, error]), prior)
    believer = posterior.believing(rows, error)
    np.testing.assert_allclose(believer.mean, mean, atol=1e-9)
    np.testing.assert_allclose(mean, posterior.mean, atol=1e-9)
    np.testing.assert_allclose(believer.variance(np.eye(shape[1])), np.diag(covariance), atol=1e-9)


def test_noise_is_learned_from_repetitions():
    generator = np.random.default_rng(0)
    keys = [i // 4 for i in range(400)]
    scores = np.repeat(generator.normal(size=100), 4) + 0.5 * generator.normal(size=400)
    first, means, errors, noise = pool_repetitions(keys, scores, np.full(400, np.nan))
    assert noise == pytest.approx(0.25, rel=0.15)
    np.testing.assert_allclose(errors, noise / 4)
    np.testing.assert_array_equal(first, np.arange(0, 400, 4))
    np.testing.assert_allclose(means, scores.reshape(100, 4).mean(1))


def test_a_stated_error_weighs_a_repetition():
    _, means, errors, noise = pool_repetitions(["a", "a", "b"], np.array([0.0, 3.0, 1.0]), np.array([1.0, 0.5, np.nan]))
    np.testing.assert_allclose(means, [2.0, 1.0])
    np.testing.assert_allclose(errors, [1 / 3, 1e-8])
    assert noise == 0


@pytest.mark.parametrize("bad", [-1e30, -1.7e308, -np.inf])
def test_a_diverged_score_leaves_the_others_apart(bad):
    scores, _, unit = standardised(np.array([*np.linspace(0, 1, 19), bad]))
    assert scores.argmin() in (0, 19) and np.ptp(scores[:19]) > 1
    assert np.isfinite(scores).all() and 0 < unit < 2


def test_though_nearly_half_diverged_the_others_are_apart():
    good, bad = np.linspace(0, 1, 11), -np.geomspace(10, 1e6, 9)
    scores, _, unit = standardised(np.concatenate([good, bad]))
    assert np.ptp(scores[:11]) > 0.25 * np.ptp(scores) and unit < 2
    np.testing.assert_allclose(scores[11:], scores.min())


@pytest.mark.parametrize("scores", [[1.0], [2.0, 2.0], [np.inf, np.nan], [1.7e308, -1.7e308, 1.0], [1e-320, 2e-320]])
def test_scores_of_any_size_are_standardised(scores):
    result, centre, unit = standardised(np.array(scores))
    assert np.isfinite(centre) and np.isfinite(result).all() and np.abs(result).max() < 5 and unit > 0
