"""Thompson sampling over a Bayesian linear model of main effects and pairwise interactions."""

from __future__ import annotations

import math
import warnings
import zlib
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from optuna.distributions import BaseDistribution
from optuna.samplers import BaseSampler
from optuna.study import Study, StudyDirection
from optuna.trial import FrozenTrial, TrialState
from scipy.special import ndtri

from .ascent import best_configuration, configuration
from .features import Contrast, FeatureMap, Memo
from .mapped_design import MappedDesign, Reading, reader
from .posterior import Array, Scales, ShrinkagePosterior
from .pruner import RungRegression
from .ranges import alternatives, random_value
from .space_design import Coding, SpaceDesign

# A trial may state how uncertain its own score is (over its seeds, say) in the user attribute of this name.
STANDARD_ERROR = "standard_error"

# A diverged run says that it is bad, not how bad: scores are held within this many robust sds of the upper quartile on
# the bad side. How wide scores scatter is judged from the better half, since as many as the other may have diverged,
# and from the first trials too: those of a search that has converged hardly scatter.
WORST, FIRST = 5.0, 20
# Where an ascent to the best configuration of a draw starts: the best of a random pool, some others of it, and the
# best observed.
POOL, DRAWN_STARTS, RANDOM_STARTS, BEST_STARTS = 64, 5, 3, 3
# Scales and dropped features are judged afresh with every trial up to so many, then with every so many more.
OFTEN, EVERY = 100, 25
# Dropping a feature: it must have been seen so often, and not even its best partners, so many, may save it.
SEEN, PARTNERS, DRAWS = 5, 3, 256
FORBIDDEN = 1e6


@dataclass(frozen=True)
class Effect:
    """What the posterior says of one feature, or of an interaction of several.

    Attributes:
        name: the feature; an interaction joins its parts' names with a cross.
        mean: how much it adds to the objective, in the objective's units. A choice is compared with the average of
            the parameter's other choices, a number's upper end with its lower end.
        sd: uncertainty of ``mean``.
        probability_helps: probability that it moves the objective in the direction of the study.
        support: the number of trials that have shown it.
        dropped: the sampler proposes it only now and then.
    """

    name: str
    mean: float
    sd: float
    probability_helps: float
    support: int
    dropped: bool


@dataclass(frozen=True)
class _Observations:
    """Scores to be maximised, standardised, with their known error variances.

    ``centre`` plus ``unit`` times a score is in the objective's own units again.
    """

    trials: list[FrozenTrial]
    scores: Array
    errors: Array
    centre: float
    unit: float


@dataclass(frozen=True)
class _Fit:
    """The model of a study: its features, its posterior, and what a further score's own error is taken to be."""

    design: SpaceDesign | MappedDesign
    posterior: ShrinkagePosterior
    observations: _Observations
    noise: float


@dataclass(frozen=True)
class _Judgement:
    """What is judged only now and then, from the trials up to some number: the scales, and what does not help."""

    scales: Sequence[Scales]
    share: Array
    dropped: frozenset[str]


class ThompsonSampler(BaseSampler):
    """Propose the best configuration of a random draw from what the scores so far allow.

    Each proposal draws one linear function from the posterior and takes the configuration that maximises it. What the
    data leave open varies between draws, so that exploring needs no rule of its own and parallel workers differ.

    The function has main effects and pairwise interactions, interactions under heavier shrinkage. By default these are
    the levels of every categorical parameter, a curve over every number, and products of pairs; any search space will
    do. The curve is a parabola plus a random walk of up to 12 steps: how rough it is, the scores decide, and a cliff,
    such as the rate from which a training diverges, stays where it is seen and bends nothing else. An interaction
    enters when at least 3 trials have shown it; of more than 500 such, the 500 with the most trials. Parameters that
    only some trials have are modelled where they occur. A parameter whose distribution changes within a study is drawn
    at random.

    Scores: a configuration that occurs in several trials (the same parameters under another seed) tells how noisy one
    score is, and counts as their mean. A trial can state its own standard error in the user attribute
    ``standard_error``. A pruned trial counts as the final score that its last report predicts, with the variance of
    that prediction. A score far below the better half is bad, however far. Failed trials are ignored. Running trials
    are taken to score as expected, and what was evaluated or is running is not proposed again as long as anything else
    is found.

    A feature is dropped when, with probability above ``1 - drop_below``, it does not help even together with its three
    best partners. A share ``exploration`` of the proposals still tries a dropped feature (one of them at random), or,
    when there is none, a random configuration. This happens here and not in a pruner because it is about what to
    propose. Dropping changes no distribution of the study.

    How strongly effects are shrunk, and what is dropped, is judged from the first 100, 125, 150, … finished trials (up
    to 100: from all there are); the weights themselves are always drawn given all of them.

    The sampler holds no state: a proposal depends on the stored trials, the seed and the trial's number alone, and a
    study that is resumed goes on as if it had never stopped. What it keeps between proposals only spares it reading
    the same trials again, and judging again by the same ones.

    Reference: Thompson (1933), "On the likelihood that one unknown probability exceeds another in view of the evidence
    of two samples", Biometrika; Russo, Van Roy, Kazerouni, Osband & Wen (2018), "A tutorial on Thompson sampling",
    Foundations and Trends in Machine Learning. Searching stacks of biological adapters by Thompson sampling with
    interactions and Bayesian pruning is the idea of GENbAIs; no code of it was published, and the model is ours.

    Args:
        seed: makes a study reproducible; without one, every sampler has its own.
        features: maps a trial's parameters to a dictionary of features; see ``FeatureMap``. A string names a main
            effect, a tuple of strings an interaction. What is not named is zero; no products are added. Configurations
            with equal features count as equal.
        n_startup_trials: so many trials must have finished before the model proposes; until then, random ones.
        drop_below: probability of helping below which a feature is dropped; 0 drops none.
        exploration: share of the proposals that are no Thompson draws.
    """

    def __init__(
        self,
        seed: int | None = None,
        *,
        features: FeatureMap | None = None,
        n_startup_trials: int = 10,
        drop_below: float = 0.01,
        exploration: float = 0.05,
    ) -> None:
        if seed is not None and seed < 0:
            raise ValueError(f"seed must not be negative, but is {seed}")
        for name, share in (("drop_below", drop_below), ("exploration", exploration)):
            if not 0 <= share < 1:
                raise ValueError(f"{name} must be at least 0 and below 1, not {share}")
        if drop_below and not exploration:
            raise ValueError("a dropped feature must be tried again now and then: exploration must be above 0")
        self._seed: int = np.random.SeedSequence().generate_state(1).item() if seed is None else int(seed)
        self._features = features
        self._n_startup_trials = max(n_startup_trials, 1)
        self._drop_below = drop_below
        self._exploration = exploration
        self._spaces = _Spaces()
        self._read_features: Memo[Reading] | None = None if features is None else Memo(reader(features))
        self._coding = Coding({})
        self._judged: tuple[tuple[Any, ...], _Judgement] | None = None

    def infer_relative_search_space(self, study: Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        _check_single(study)
        return self._spaces.shared(study)

    def sample_relative(
        self, study: Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        _check_single(study)
        if not search_space:
            return {}
        generator = np.random.default_rng([self._seed, trial.number])
        observations = _observe(_finished(study), study.direction)
        complete = sum(other.state == TrialState.COMPLETE for other in observations.trials)
        if complete < self._n_startup_trials:
            return _random_configuration(search_space, generator)
        return self._propose(study, trial, search_space, observations, generator)

    def sample_independent(
        self, study: Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> Any:
        _check_single(study)
        key = zlib.crc32(param_name.encode())
        return random_value(param_distribution, np.random.default_rng([self._seed, trial.number, key]))

    def effects(self, study: Study) -> list[Effect]:
        """Main effects and tested interactions, the surest first. An interaction that is not listed is untested."""
        _check_single(study)
        space, observations = self._spaces.shared(study), _observe(_finished(study), study.direction)
        if not space or len(observations.trials) == 0:
            return []
        judgement = self._judge(study, space)
        fit = self._fit(space, observations, judgement)
        contrasts = fit.design.contrasts()
        mean, sd, helps = fit.posterior.summary(_rows(contrasts, fit))
        unit = observations.unit
        effects = [
            Effect(
                " × ".join(c.labels),
                float(m * unit),
                float(s * abs(unit)),
                float(p),
                c.support,
                c.column is not None and c.labels[0] in judgement.dropped,
            )
            for c, m, s, p in zip(contrasts, mean, sd, helps, strict=True)
        ]
        return sorted(effects, key=lambda effect: -abs(effect.mean) / max(effect.sd, 1e-12))

    def expected(self, study: Study) -> dict[int, tuple[float, float]]:
        """What the model expects the configuration of each finished trial to score: mean and sd, by trial number.

        In the objective's units, without the noise of one trial. The best of many noisy scores is better than its
        configuration; what the parts of that configuration did in other trials says how much of it was luck. Empty
        where all scores are equal, which says nothing of their noise.
        """
        _check_single(study)
        space, observations = self._spaces.shared(study), _observe(_finished(study), study.direction)
        if not space or not observations.scores.any():
            return {}
        fit = self._fit(space, observations, self._judge(study, space))
        mean, sd, _ = fit.posterior.summary(fit.design.matrix, constant=1.0)
        means, sds = observations.centre + observations.unit * mean, abs(observations.unit) * sd
        numbers = [trial.number for trial in observations.trials]
        return dict(zip(numbers, zip(means.tolist(), sds.tolist(), strict=True), strict=True))

    def recommend(self, study: Study) -> FrozenTrial:
        """The completed trial whose configuration is expected to score best; ``study.best_trial`` is the luckiest, too.

        Raises:
            ValueError: no trial is complete.
        """
        complete = study.get_trials(states=(TrialState.COMPLETE,))
        if not complete:
            raise ValueError("no trial is complete yet")
        expected = self.expected(study)
        sign = 1.0 if study.direction == StudyDirection.MAXIMIZE else -1.0
        return max(complete, key=lambda trial: sign * expected.get(trial.number, (trial.value,))[0])

    def dropped(self, study: Study) -> list[str]:
        """Names of the features that the sampler proposes only now and then, because they do not help."""
        return sorted(effect.name for effect in self.effects(study) if effect.dropped)

    def _judge(self, study: Study, space: Mapping[str, BaseDistribution]) -> _Judgement:
        """Scales and dropped features, from the trials that decide on them."""
        trials = _finished(study)
        count = len(trials)
        trials = trials[: count if count < OFTEN else count - count % EVERY]
        asked = (trials, study.direction, space)
        judged = self._judged
        # Comparing the same trials costs nothing where a storage hands out the same objects.
        if judged is None or judged[0] != asked:
            judged = self._judged = asked, self._judgement(space, _observe(trials, study.direction))
        return judged[1]

    def _judgement(self, space: Mapping[str, BaseDistribution], observations: _Observations) -> _Judgement:
        fit = self._fit(space, observations)
        return _Judgement(fit.posterior.scales, fit.posterior.share, self._dropped(fit))

    def _fit(
        self,
        space: Mapping[str, BaseDistribution],
        observations: _Observations,
        judgement: _Judgement | None = None,
        possible: Sequence[Mapping[str, Any]] = (),
    ) -> _Fit:
        """The model of these trials; without a judgement it also weighs the scales."""
        design = self._design(space, [trial.params for trial in observations.trials], possible)
        # All of a trial's parameters make it a repetition of another, those outside of the space included.
        first, scores, errors, noise = _pool_repetitions(design.repetitions, observations.scores, observations.errors)
        data = design.matrix[first], scores, errors, design.kind
        if judgement is None:
            posterior = ShrinkagePosterior.fit(*data)
        else:
            posterior = ShrinkagePosterior(*data, judgement.scales, judgement.share)
        return _Fit(design, posterior, observations, noise)

    def _design(
        self,
        space: Mapping[str, BaseDistribution],
        observed: Sequence[Mapping[str, Any]],
        possible: Sequence[Mapping[str, Any]],
    ) -> SpaceDesign | MappedDesign:
        if self._features is not None:
            return MappedDesign(self._features, observed, possible, self._read_features)
        coding = self._coding
        if coding.space != space:
            coding = self._coding = Coding(space)
        return SpaceDesign(space, observed, coding)

    def _dropped(self, fit: _Fit) -> frozenset[str]:
        """The features that do not help, whatever they are combined with."""
        contrasts = fit.design.contrasts()
        single = [c for c in contrasts if c.column is not None and c.support >= SEEN]
        if not self._drop_below or not single:
            return frozenset()
        helps = fit.posterior.summary(_rows(single, fit))[2]
        doubtful = [c for c, probability in zip(single, helps, strict=True) if probability < self._drop_below]
        draws = fit.posterior.draw(np.random.default_rng(self._seed), DRAWS)
        partners: dict[str, list[Array]] = {}
        for contrast in contrasts:
            for label in contrast.labels if len(contrast.labels) > 1 else ():
                partners.setdefault(label, []).append(contrast.row)
        dropped = set()
        for contrast in doubtful:
            (label,) = contrast.labels
            together = partners.get(label)
            gains = np.zeros((1, DRAWS)) if together is None else np.maximum(np.array(together) @ draws, 0)
            most = contrast.row @ draws + np.sort(gains, axis=0)[-PARTNERS:].sum(0)
            if (most > 0).mean() < self._drop_below:
                dropped.add(label)
        return frozenset(dropped)

    def _propose(
        self,
        study: Study,
        trial: FrozenTrial,
        space: dict[str, BaseDistribution],
        observations: _Observations,
        generator: np.random.Generator,
    ) -> dict[str, Any]:
        order = np.argsort(-observations.scores, kind="stable")
        best = [observations.trials[i].params for i in order[:BEST_STARTS]]
        choices = {
            name: alternatives(distribution, [params[name] for params in best if name in params], generator)
            for name, distribution in space.items()
        }
        sizes = [len(values) for values in choices.values()]
        pool = generator.integers(sizes, size=(POOL, len(sizes)))
        possible = () if self._features is None else [configuration(choices, state) for state in pool.tolist()]
        judgement = self._judge(study, space)
        fit = self._fit(space, observations, judgement, possible)
        running = [
            other.params
            for other in study.get_trials(deepcopy=False, states=(TrialState.RUNNING,))
            if other.number != trial.number and other.params
        ]
        posterior = fit.posterior
        if running:
            posterior = posterior.believing(fit.design.encode(running), np.full(len(running), fit.noise))
        weights = posterior.draw(generator)[:, 0]
        dropped = sorted(fit.design.switches[name] for name in judgement.dropped if name in fit.design.switches)
        penalty = np.zeros(len(weights))
        penalty[dropped] = FORBIDDEN
        if generator.random() < self._exploration:
            if not dropped:
                return _random_configuration(space, generator)
            penalty[dropped[int(generator.integers(len(dropped)))]] = -FORBIDDEN
        score = fit.design.score(choices, weights, penalty)
        observed = [
            [
                values.index(params[name]) if name in params else fallback
                for (name, values), fallback in zip(choices.items(), state, strict=True)
            ]
            for params, state in zip(best, pool.tolist(), strict=False)
        ]
        promising = pool[np.argsort(-score(pool), kind="stable")[:DRAWN_STARTS]]
        starts = np.vstack([promising, pool[-RANDOM_STARTS:], np.array(observed)])
        taken = {*fit.design.keys, *(fit.design.key(params) for params in running)}
        return best_configuration(score, choices, starts, taken, fit.design.key)


def _check_single(study: Study) -> None:
    if len(study.directions) > 1:
        raise ValueError(f"ThompsonSampler is for one objective; this study has {len(study.directions)}")


def _rows(contrasts: Sequence[Contrast], fit: _Fit) -> Array:
    return np.array([contrast.row for contrast in contrasts]).reshape(len(contrasts), len(fit.design.kind))


def _random_configuration(space: Mapping[str, BaseDistribution], generator: np.random.Generator) -> dict[str, Any]:
    return {name: random_value(distribution, generator) for name, distribution in space.items()}


def _finished(study: Study) -> list[FrozenTrial]:
    return list(study.get_trials(deepcopy=False, states=(TrialState.COMPLETE, TrialState.PRUNED)))


class _Spaces:
    """Reads what parameters the finished trials of a study had, each trial once."""

    def __init__(self) -> None:
        self._read: tuple[dict[int, FrozenTrial], dict[str, BaseDistribution], frozenset[str]] = ({}, {}, frozenset())

    def shared(self, study: Study) -> dict[str, BaseDistribution]:
        """Every parameter that finished trials had, unless its distribution has changed or leaves no choice.

        A parameter need not occur in all of them: a proposal may hold more than the trial then asks for.
        """
        trials = {id(trial): trial for trial in _finished(study)}
        read, space, changed = self._read
        if not read.keys() <= trials.keys():  # of another study
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


def _observe(finished: Sequence[FrozenTrial], direction: StudyDirection) -> _Observations:
    """Finished trials in the order of their numbers, pruned ones at their predicted final score."""
    complete = [trial for trial in finished if trial.state == TrialState.COMPLETE]
    regressions: dict[int, RungRegression | None] = {}
    trials, values, errors = [], [], []
    for trial in finished:
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
    scores, centre, unit = _standardised(sign * np.array(values))
    return _Observations(trials, scores, (np.array(errors) / unit) ** 2, sign * centre, sign * unit)


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


def _standardised(scores: Array) -> tuple[Array, float, float]:
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


def _pool_repetitions(
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
