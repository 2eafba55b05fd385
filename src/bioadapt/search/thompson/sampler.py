"""Thompson sampling over a Bayesian linear model of main effects and pairwise interactions."""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from optuna.distributions import BaseDistribution
from optuna.samplers import BaseSampler
from optuna.study import Study, StudyDirection
from optuna.trial import FrozenTrial, TrialState

from .ascent import best_configuration, configuration
from .features import Contrast, FeatureMap, Memo
from .mapped_design import MappedDesign, Reading, reader
from .observations import Observations, Spaces, finished, observe, pool_repetitions
from .posterior import Array, Scales, ShrinkagePosterior
from .ranges import alternatives, random_value
from .space_design import Coding, SpaceDesign

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
class _Fit:
    """The model of a study: its features, its posterior, and what a further score's own error is taken to be."""

    design: SpaceDesign | MappedDesign
    posterior: ShrinkagePosterior
    observations: Observations
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
        self._spaces = Spaces()
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
        observations = observe(finished(study), study.direction)
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
        space, observations = self._spaces.shared(study), observe(finished(study), study.direction)
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
        space, observations = self._spaces.shared(study), observe(finished(study), study.direction)
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
        trials = finished(study)
        count = len(trials)
        trials = trials[: count if count < OFTEN else count - count % EVERY]
        asked = (trials, study.direction, space)
        judged = self._judged
        # Comparing the same trials costs nothing where a storage hands out the same objects.
        if judged is None or judged[0] != asked:
            judged = self._judged = asked, self._judgement(space, observe(trials, study.direction))
        return judged[1]

    def _judgement(self, space: Mapping[str, BaseDistribution], observations: Observations) -> _Judgement:
        fit = self._fit(space, observations)
        return _Judgement(fit.posterior.scales, fit.posterior.share, self._dropped(fit))

    def _fit(
        self,
        space: Mapping[str, BaseDistribution],
        observations: Observations,
        judgement: _Judgement | None = None,
        possible: Sequence[Mapping[str, Any]] = (),
    ) -> _Fit:
        """The model of these trials; without a judgement it also weighs the scales."""
        design = self._design(space, [trial.params for trial in observations.trials], possible)
        # All of a trial's parameters make it a repetition of another, those outside of the space included.
        first, scores, errors, noise = pool_repetitions(design.repetitions, observations.scores, observations.errors)
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
        observations: Observations,
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
