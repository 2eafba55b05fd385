"""Bayesian linear regression that shrinks interactions harder than main effects, its scales integrated over a grid."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray
from scipy.linalg import cho_factor, cho_solve, solve_triangular
from scipy.special import logsumexp, ndtr

Array = NDArray[np.float64]

# The kinds of weights; each has a prior sd of its own.
MAIN_EFFECT, INTERACTION, WALK = range(3)
# The grid over which scales are averaged, in units of standardised scores. MAIN: the prior sd of a main effect. RATIO:
# that of an interaction, as a multiple of MAIN. ROUGH: that of one step of a walk, as a multiple of MAIN, from a number
# that counts smoothly to one with a cliff. RESIDUAL: the residual variance.
MAIN = (0.15, 0.4, 1.0)
RATIO = (0.1, 0.3, 1.0)
ROUGH = (0.2, 0.7, 2.0)
RESIDUAL = (0.003, 0.03, 0.1, 0.3, 1.0)
INTERCEPT_VARIANCE = 4.0
# Points of the grid below this share of the evidence are left out of every average.
NEGLIGIBLE = 0.005


class LinearPosterior:
    """Weights of a linear model after data, in closed form: ``w ~ N(0, prior)``, ``y ~ N(matrix w, noise)``.

    The system that is solved has one row per weight, or one per observation, whichever is smaller.

    Args:
        matrix: one row per observation, one column per weight.
        target: the observed scores.
        noise: variance of each observation.
        prior: prior variance of each weight.
        gram: the products that the system is made of, where they are known: ``matrix.T diag(1 / noise) matrix``, or
            ``matrix diag(prior) matrix.T`` where there are fewer observations than weights.
    """

    def __init__(self, matrix: Array, target: Array, noise: Array, prior: Array, gram: Array | None = None) -> None:
        self.matrix, self.target, self.noise, self.prior = matrix, target, noise, prior
        rows, columns = matrix.shape
        self._primal = columns <= rows
        if gram is None:
            gram = (matrix.T / noise) @ matrix if self._primal else (matrix * prior) @ matrix.T
        self._gram = gram
        system = gram.copy()
        system[np.diag_indices(len(system))] += 1 / prior if self._primal else noise
        self._factor = cho_factor(system, lower=True, overwrite_a=True, check_finite=False)
        self.mean: Array = self._solve(target)

    def _solve(self, target: Array) -> Array:
        """The posterior mean that ``target`` would have given, one column each."""
        if self._primal:
            weighted = self.matrix.T @ (target.T / self.noise).T
            return np.asarray(cho_solve(self._factor, weighted, check_finite=False))
        dual = self.matrix.T @ cho_solve(self._factor, target, check_finite=False)
        return (dual.T * self.prior).T

    @property
    def log_evidence(self) -> float:
        """Log density of the observed scores under the model."""
        determinant = 2 * np.log(np.diag(self._factor[0])).sum()
        if self._primal:
            determinant += np.log(self.noise).sum() + np.log(self.prior).sum()
        misfit = self.target @ ((self.target - self.matrix @ self.mean) / self.noise)
        return float(-0.5 * (misfit + determinant + len(self.target) * np.log(2 * np.pi)))

    def draw(self, generator: np.random.Generator, count: int) -> Array:
        """``count`` exact draws of the weights, one per column.

        With fewer observations than weights: a prior draw, corrected by what it got wrong.
        """
        if self._primal:
            normal = generator.standard_normal((len(self.prior), count))
            return self.mean[:, None] + solve_triangular(self._factor[0], normal, lower=True, trans="T")
        prior = np.sqrt(self.prior)[:, None] * generator.standard_normal((len(self.prior), count))
        error = np.sqrt(self.noise)[:, None] * generator.standard_normal((len(self.noise), count))
        return prior + self._solve(self.target[:, None] - self.matrix @ prior - error)

    def variance(self, contrasts: Array) -> Array:
        """Posterior variance of each row of ``contrasts`` applied to the weights."""
        if self._primal:
            return (solve_triangular(self._factor[0], contrasts.T, lower=True, check_finite=False) ** 2).sum(0)
        scaled = contrasts * self.prior
        explained = (contrasts * self._solve(self.matrix @ scaled.T).T).sum(1)
        return np.maximum((contrasts * scaled).sum(1) - explained, 0.0)

    def believing(self, matrix: Array, noise: Array) -> LinearPosterior:
        """The posterior once further observations have come in just as expected: the same mean, less variance."""
        gram = self._gram + (matrix.T / noise) @ matrix if self._primal else None
        return LinearPosterior(
            np.vstack([self.matrix, matrix]),
            np.concatenate([self.target, matrix @ self.mean]),
            np.concatenate([self.noise, noise]),
            self.prior,
            gram,
        )


@dataclass(frozen=True)
class Scales:
    """One point of the grid: sd of main effects, ratios for other kinds, variance that the linear model leaves."""

    main: float
    ratio: float
    rough: float
    residual: float

    @property
    def relative(self) -> Array:
        """The prior sd of each kind, in units of a main effect's."""
        return np.array([1.0, self.ratio, self.rough])


class ShrinkagePosterior:
    """A mixture of closed-form posteriors over a grid of scales, each weighted by its evidence.

    Main effects share one prior variance, interactions a smaller one and the steps of walks a third one (hierarchical
    normal shrinkage: Lindley & Smith, 1972, "Bayes estimates for the linear model", Journal of the Royal Statistical
    Society B; weighting the scales by the evidence: MacKay, 1992, "Bayesian interpolation", Neural Computation). A
    point mass at zero for each effect (George & McCulloch, 1993, "Variable selection via Gibbs sampling", Journal of
    the American Statistical Association) would need a Markov chain for every proposal; here every draw is exact.

    Args:
        matrix: observations by features, without the constant.
        target: standardised scores.
        error: known variance of each observation, beside the residual variance of the scales.
        kind: of each feature: ``MAIN_EFFECT``, ``INTERACTION`` or ``WALK``.
        scales: the points of the grid.
        share: the posterior probability of each.
        pending: observations (rows of features, variances) that are taken to come in as expected.
    """

    def __init__(
        self,
        matrix: Array,
        target: Array,
        error: Array,
        kind: NDArray[np.int_],
        scales: Sequence[Scales],
        share: Array,
        pending: tuple[Array, Array] | None = None,
    ) -> None:
        self._matrix = _with_constant(matrix)
        self._target, self._error, self._kind = target, error, kind
        self.scales, self.share, self._pending = scales, share, pending
        self._grams: dict[float, Array] = {}

    @classmethod
    def fit(cls, matrix: Array, target: Array, error: Array, kind: NDArray[np.int_]) -> ShrinkagePosterior:
        """Weigh the points of the grid, and leave out those that the data speak against.

        From the middle of the grid it is explored towards the most probable points, until all that lie next to one
        that counts are known: the evidence has one summit.
        """
        ratio = RATIO if (kind == INTERACTION).any() else RATIO[:1]
        rough = ROUGH if (kind == WALK).any() else ROUGH[:1]
        axes = (MAIN, ratio, rough, RESIDUAL)
        unweighed = cls(matrix, target, error, kind, [], np.zeros(0))
        evidence: dict[tuple[int, ...], float] = {}
        ahead = {tuple(len(axis) // 2 for axis in axes)}
        while ahead:
            for place in ahead - evidence.keys():
                evidence[place] = unweighed._at(_point(axes, place)).log_evidence
            place = max(ahead, key=lambda place: (evidence[place], place))
            if evidence[place] < max(evidence.values()) + np.log(NEGLIGIBLE):
                break
            ahead.remove(place)
            ahead |= {beside for beside in _neighbours(axes, place) if beside not in evidence}
        places = sorted(evidence)
        share = np.exp([evidence[place] for place in places] - logsumexp(list(evidence.values())))
        kept = share > NEGLIGIBLE
        scales = [_point(axes, place) for place, keep in zip(places, kept, strict=True) if keep]
        return cls(matrix, target, error, kind, scales, share[kept] / share[kept].sum())

    def _at(self, scales: Scales) -> LinearPosterior:
        sd = scales.main * scales.relative[self._kind]
        prior = np.concatenate([[INTERCEPT_VARIANCE], sd**2])
        noise = self._error + scales.residual
        posterior = LinearPosterior(self._matrix, self._target, noise, prior, self._gram(scales))
        if self._pending is None:
            return posterior
        rows, error = self._pending
        return posterior.believing(_with_constant(rows), error + scales.residual)

    def _gram(self, scales: Scales) -> Array:
        """The products of `LinearPosterior`, of which points of the grid share the dear part."""
        rows, columns = self._matrix.shape
        if columns > rows:
            return INTERCEPT_VARIANCE + scales.main**2 * sum(
                share**2 * kernel for share, kernel in zip(scales.relative, self._kernels, strict=True)
            )
        if np.ptp(self._error) == 0:
            return self._square / (self._error[0] + scales.residual)
        if scales.residual not in self._grams:
            weighted = self._matrix / np.sqrt(self._error + scales.residual)[:, None]
            self._grams[scales.residual] = weighted.T @ weighted
        return self._grams[scales.residual]

    @cached_property
    def _square(self) -> Array:
        return self._matrix.T @ self._matrix

    @cached_property
    def _kernels(self) -> list[Array]:
        parts = (self._matrix[:, 1:][:, self._kind == kind] for kind in (MAIN_EFFECT, INTERACTION, WALK))
        return [part @ part.T for part in parts]

    def draw(self, generator: np.random.Generator, count: int = 1) -> Array:
        """Draws of the features' weights, one per column; each has its own scales."""
        counts = generator.multinomial(count, self.share)
        used = zip(self.scales, counts, strict=True)
        return np.hstack([self._at(scales).draw(generator, n)[1:] for scales, n in used if n])

    def believing(self, matrix: Array, error: Array) -> ShrinkagePosterior:
        """The posterior once pending observations have come in just as expected: surer of them, no better or worse.

        The lie of Ginsbourger, Le Riche & Carraro (2010, "Kriging is well-suited to parallelize optimization",
        Computational Intelligence in Expensive Optimization Problems), to every point of the grid what it expects. The
        shares of the points stay as they are: a lie is no evidence.
        """
        return ShrinkagePosterior(
            self._matrix[:, 1:],
            self._target,
            self._error,
            self._kind,
            self.scales,
            self.share,
            (matrix, error),
        )

    def summary(self, contrasts: Array, constant: float = 0.0) -> tuple[Array, Array, Array]:
        """Mean, sd and probability of being positive of each row of ``contrasts`` applied to the features' weights.

        ``constant``: how much of the constant goes in as well; with 1, rows of features give what they score.
        """
        rows = np.column_stack([np.full(len(contrasts), constant), contrasts])
        means, variances = [], []
        for scales in self.scales:
            posterior = self._at(scales)
            means.append(rows @ posterior.mean)
            variances.append(posterior.variance(rows))
        mean, variance = np.array(means), np.array(variances)
        centre = self.share @ mean
        sd = np.sqrt(self.share @ (variance + (mean - centre) ** 2))
        positive = self.share @ ndtr(mean / np.sqrt(np.maximum(variance, 1e-24)))
        return centre, sd, positive


def _point(axes: Sequence[Sequence[float]], place: tuple[int, ...]) -> Scales:
    return Scales(*(axis[i] for axis, i in zip(axes, place, strict=True)))


def _neighbours(axes: Sequence[Sequence[float]], place: tuple[int, ...]) -> list[tuple[int, ...]]:
    """The places one step further along one axis."""
    steps = [(k, place[k] + step) for k in range(len(axes)) for step in (-1, 1)]
    return [(*place[:k], i, *place[k + 1 :]) for k, i in steps if 0 <= i < len(axes[k])]


def _with_constant(matrix: Array) -> Array:
    return np.column_stack([np.ones(len(matrix)), matrix])
