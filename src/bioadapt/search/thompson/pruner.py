"""Stops a trial when its score at a rung makes it improbable that it will beat the best one."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from optuna.pruners import BasePruner
from optuna.study import Study, StudyDirection
from optuna.trial import FrozenTrial, TrialState
from scipy.special import stdtr

# With fewer finished trials the residual variance of a line is a guess.
FEWEST = 5


@dataclass(frozen=True)
class Prediction:
    """A final score before it is known: Student's t around ``mean``."""

    mean: float
    scale: float
    freedom: int

    @property
    def variance(self) -> float:
        return self.scale**2 * self.freedom / (self.freedom - 2)

    def above(self, score: float) -> float:
        """Probability that the final score is higher than ``score``."""
        if self.scale == 0:
            return float(self.mean > score)
        return float(stdtr(self.freedom, (self.mean - score) / self.scale))


@dataclass(frozen=True)
class RungRegression:
    """What the score at a rung says about the final one: ``final = a + b rung + noise``, from finished trials.

    Under the reference prior ``p(a, b, log variance) = constant`` the prediction for a further trial is Student's t
    with n - 2 degrees of freedom (Gelman et al., 2013, Bayesian Data Analysis, chapter 14).
    """

    rung: np.ndarray
    final: np.ndarray

    @classmethod
    def at(cls, finished: Sequence[FrozenTrial], step: int) -> RungRegression | None:
        """The relation at ``step``; none where too few finished trials have distinct scores there."""
        pairs = [
            (trial.intermediate_values[step], trial.value) for trial in finished if step in trial.intermediate_values
        ]
        scores = np.array([pair for pair in pairs if np.isfinite(pair).all()], dtype=float).reshape(-1, 2)
        # A trial that diverged is left out, since it alone would decide where a least-squares line runs.
        middle = np.median(scores, axis=0) if len(scores) else np.zeros(2)
        spread = np.median(np.abs(scores - middle), axis=0) if len(scores) else np.zeros(2)
        usual = ((np.abs(scores - middle) <= 20 * spread) | (spread == 0)).all(1)
        rung, final = scores[usual].T
        if len(rung) < FEWEST or np.ptp(rung) == 0:
            return None
        return cls(rung, final)

    def predict(self, score: float) -> Prediction:
        """The final score of a trial that has ``score`` at the rung."""
        count = len(self.rung)
        unit, low = np.ptp(self.rung), self.rung.mean()
        x, y = (self.rung - low) / unit, self.final - self.final.mean()
        slope = (x @ y) / (x @ x)
        here = (score - low) / unit
        residual = y - slope * x
        spread = math.sqrt((residual @ residual) / (count - 2))
        scale = spread * math.sqrt(1 + 1 / count + here**2 / (x @ x))
        return Prediction(float(self.final.mean() + slope * here), float(scale), count - 2)


class ThompsonPruner(BasePruner):
    """Prune a trial that has less than ``probability`` of beating the best finished one, given its latest score.

    Any reported step is a rung. The finished trials that reported there teach what a score at that rung says about the
    final score; a rung that says little prunes little. The best score so far counts as it was observed, noise included,
    and the probability holds at each rung: where scores are noisy or rungs many, ask for a smaller one. A score that is
    not a number is pruned. Trials that were pruned teach nothing here; ``ThompsonSampler`` does use them.

    The matching half, dropping features that do not help, belongs to ``ThompsonSampler``: it decides what is proposed
    and holds the posterior that says so, while a pruner sees running trials alone.

    Reference: for the idea of stopping by the probability of beating the best, Domhan, Springenberg & Hutter (2015),
    "Speeding up automatic hyperparameter optimization of deep neural networks by extrapolation of learning curves",
    IJCAI; here one line per rung takes the place of their parametric curves.

    Args:
        probability: trials less likely than this to beat the best one are stopped.
        n_startup_trials: none of the first trials is stopped, nor any before so many trials have finished that
            reported at the rung.
        n_warmup_steps: steps below this are no rungs.
    """

    def __init__(self, probability: float = 0.05, *, n_startup_trials: int = 10, n_warmup_steps: int = 0) -> None:
        if not 0 <= probability < 1:
            raise ValueError(f"probability must be at least 0 and below 1, not {probability}")
        if n_startup_trials < FEWEST:
            raise ValueError(f"n_startup_trials must be at least {FEWEST}, not {n_startup_trials}")
        self._probability = probability
        self._n_startup_trials = n_startup_trials
        self._n_warmup_steps = n_warmup_steps

    def prune(self, study: Study, trial: FrozenTrial) -> bool:
        step = trial.last_step
        if step is None or step < self._n_warmup_steps or trial.number < self._n_startup_trials:
            return False
        finished = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
        at_rung = [other for other in finished if step in other.intermediate_values]
        if len(at_rung) < self._n_startup_trials:
            return False
        sign = 1.0 if study.direction == StudyDirection.MAXIMIZE else -1.0
        score = trial.intermediate_values[step]
        if not math.isfinite(score):
            return math.isnan(score) or sign * score < 0
        regression = RungRegression.at(at_rung, step)
        best = max((sign * other.value for other in finished if math.isfinite(other.value)), default=-math.inf)
        if regression is None or not math.isfinite(best):
            return False
        prediction = regression.predict(score)
        above = prediction.above(sign * best)
        return (above if sign > 0 else 1 - above) < self._probability
