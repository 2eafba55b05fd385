"""What a study has shown: its finished trials as standardised scores with their errors, and the space they share."""

from __future__ import annotations

import math
import warnings
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from optuna.distributions import BaseDistribution
from optuna.study import Study, StudyDirection
from optuna.trial import FrozenTrial, TrialState
from scipy.special import ndtri

from .posterior import Array
from .pruner import RungRegression

# A trial may state how uncertain its own score is (over its seeds, say) in the user attribute of this name.
STANDARD_ERROR = "standard_error"

# A diverged run says that it is bad, not how bad: scores are held within this many robust sds of the upper quartile on
# the bad side. How wide scores scatter is judged from the better half, since as many as the other may have diverged,
# and from the first trials too: those of a search that has converged hardly scatter.
WORST, FIRST = 5.0, 20


@dataclass(frozen=True)
class Observations:
    """Scores to be maximised, standardised, with their known error variances.

    ``centre`` plus ``unit`` times a score is in the objective's own units again.
    """

    trials: list[FrozenTrial]
    scores: Array
    errors: Array
    centre: float
    unit: float


def finished(study: Study) -> list[FrozenTrial]:
    return list(study.get_trials(deepcopy=False, states=(TrialState.COMPLETE, TrialState.PRUNED)))


class Spaces:
    """Reads what parameters the finished trials of a study had, each trial once."""

    def __init__(self) -> None:
        self._read: tuple[dict[int, FrozenTrial], dict[str, BaseDistribution], frozenset[str]] = ({}, {}, frozenset())

    def shared(self, study: Study) -> dict[str, BaseDistribution]:
        """Every parameter that finished trials had, unless its distribution has changed or leaves no choice.

        A parameter need not occur in all of them: a proposal may hold more than the trial then asks for.
        """
        trials = {id(trial): trial for trial in finished(study)}
        read, space, changed = self._read
        if not read.keys() <= trials.keys():  # they were read of another study
            read, space, changed = {}, {}, frozenset()
        space, differing = dict(space), set(changed)
        for key, trial in trials.items():
            if key not in read:
                for name, distribution in trial.distributions.items():
                    known = space.setdefault(name, distribution)
                    # Optuna compares choices one by one, which is slow.
                    if vars(known) != vars(distribution) and known != distribution:
                        differing.add(name)
        self._read = trials, space, frozenset(differing)
        return {name: space[name] for name in sorted(space) if name not in differing and not space[name].single()}


def observe(ended: Sequence[FrozenTrial], direction: StudyDirection) -> Observations:
    """Finished trials in the order of their numbers, pruned ones at their predicted final score."""
    complete = [trial for trial in ended if trial.state == TrialState.COMPLETE]
    regressions: dict[int, RungRegression | None] = {}
    trials, values, errors = [], [], []
    for trial in ended:
        if trial.state == TrialState.COMPLETE:
            trials.append(trial)
            values.append(float(trial.value))
            errors.append(_stated_error(trial))
            continue
        step = trial.last_step
        if step is None or not math.isfinite(trial.intermediate_values[step]):
            continue
        if step not in regressions:
            regressions[step] = RungRegression.at(complete, step)
        regression = regressions[step]
        if regression is not None:
            prediction = regression.predict(trial.intermediate_values[step])
            trials.append(trial)
            values.append(prediction.mean)
            errors.append(math.sqrt(prediction.variance))
    sign = 1.0 if direction == StudyDirection.MAXIMIZE else -1.0
    scores, centre, unit = standardised(sign * np.array(values))
    return Observations(trials, scores, (np.array(errors) / unit) ** 2, sign * centre, sign * unit)


def _stated_error(trial: FrozenTrial) -> float:
    stated = trial.user_attrs.get(STANDARD_ERROR)
    if stated is None:
        return math.nan
    if isinstance(stated, bool) or not isinstance(stated, (int, float)) or not 0 <= stated < math.inf:
        warnings.warn(
            f"trial {trial.number}: its user attribute {STANDARD_ERROR}={stated!r} is no finite number of at least "
            "zero, and is ignored",
            stacklevel=2,
        )
        return math.nan
    return float(stated)


def standardised(scores: Array) -> tuple[Array, float, float]:
    """Mean 0, sd 1; and those that it had. Infinite and diverged scores are pulled to the edge of the others."""
    finite = scores[np.isfinite(scores)]
    if len(finite) == 0:
        return np.zeros(len(scores)), 0.0, 1.0
    # Scores may be as large as floats get: divided by 32, no difference of two of them overflows.
    scores = np.clip(scores, finite.min(), finite.max()) / 32
    middle = np.median(scores)
    better = [np.quantile(part, (0.5, 0.75)) for part in (scores, scores[:FIRST])]
    spread, upper = max((high - low, high) for low, high in better)
    if spread > 0:
        scores = np.maximum(scores, upper - WORST * spread / ndtri(0.75))
    # Divided by the largest deviation, no square of a deviation overflows either.
    largest = np.abs(scores - middle).max()
    if largest == 0:
        return np.zeros(len(scores)), float(middle * 32), 1.0
    scores = (scores - middle) / largest
    mean, sd = scores.mean(), scores.std()
    unit = np.clip(sd * largest, np.finfo(float).tiny, np.finfo(float).max / 32) * 32
    centre = np.clip(middle + mean * largest, -np.finfo(float).max / 32, np.finfo(float).max / 32) * 32
    return (scores - mean) / sd, float(centre), float(unit)


def pool_repetitions(
    keys: Sequence[Hashable], scores: Array, errors: Array
) -> tuple[NDArray[np.int_], Array, Array, float]:
    """One observation for each configuration: its first trial, its mean score and that mean's error variance.

    Also the variance of one score about its configuration's mean, from the trials that state none: zero (all is left
    to the residual variance) where nothing was repeated.
    """
    numbers: dict[Hashable, int] = {}
    group = np.array([numbers.setdefault(key, len(numbers)) for key in keys])
    unstated = np.isnan(errors)
    own, values = group[unstated], scores[unstated]
    size = np.bincount(own, minlength=len(numbers))
    mean = np.bincount(own, values, len(numbers)) / np.maximum(size, 1)
    freedom = (size[size > 0] - 1).sum()
    noise = float(((values - mean[own]) ** 2).sum() / freedom) if freedom else 0.0
    # A variance is never exactly zero, since a mean weighs its trials by the inverse.
    precision = 1 / np.maximum(np.where(unstated, noise, errors), 1e-8)
    first = np.unique(group, return_index=True)[1]
    total = np.bincount(group, precision)
    return first, np.bincount(group, precision * scores) / total, 1 / total, noise
