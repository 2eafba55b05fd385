"""What a report shows of a study, each part computed when the page's template asks for it.

One file because the template reads all of it from one object.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import combinations
from statistics import fmean
from typing import Any

from optuna.study import Study, StudyDirection
from optuna.trial import FrozenTrial, TrialState

from ...evaluation.statistics import LOWER_IS_BETTER, unit_of
from ..space import SearchSpace
from ..study.tickets import DIED
from ..thompson import Effect, FeatureMap, ThompsonSampler
from . import figures
from .figures import BAD, GOOD, OTHER, Bar, ReportedScores
from .recorded import of_study, of_trial
from .wording import as_code, as_lines, count, in_words, number, short, signed

LEADERS = 20
# Mechanisms in the figure and in the map, all of which are in a table; other effects in theirs.
SHOWN, MAPPED = 24, 10
# Two standard deviations about: the half width of a 95 % interval of a normal distribution.
REACH = 1.96
_FAILED_WITHOUT_REASON = "no reason given"


@dataclass(frozen=True)
class _Row:
    """A trial as the tables show it."""

    number: int
    score: float | None
    words: str
    parameters: int | None
    seconds: float | None
    reason: str
    expected: str = ""


@dataclass(frozen=True)
class _Known(Effect):
    """What the posterior says of a feature where it is present."""

    @property
    def low(self) -> float:
        return self.mean - REACH * self.sd

    @property
    def high(self) -> float:
        return self.mean + REACH * self.sd


@dataclass(frozen=True)
class _Cell:
    """A pair in the map of interactions; ``share`` of the strongest colour, ``helps`` its sign."""

    text: str
    title: str
    helps: bool
    share: float


class Contents:
    """What the template shows, read from the study once and computed when it is asked for."""

    def __init__(self, study: Study, lora: Study | None) -> None:
        self.study, self.lora_study = study, lora
        self.name = study.study_name
        recorded = of_study(study)
        self.trials = study.get_trials(deepcopy=False)
        self.higher = study.direction == StudyDirection.MAXIMIZE
        self.settings: Mapping[str, Any] = recorded.get("settings", {})
        self.space: Mapping[str, Any] = recorded.get("space", {})
        self.task: Mapping[str, Any] = recorded.get("task", {})
        self.lora: Mapping[str, Any] = recorded.get("lora", {})
        self.confirmation: Sequence[Mapping[str, Any]] = recorded.get("confirmation", [])
        self.final: Mapping[str, Any] = recorded.get("final", {})
        self.best: Mapping[str, Any] = recorded.get("best", {})
        self.is_search = bool(self.space)

    # -- how far it is --

    @cached_property
    def complete(self) -> list[FrozenTrial]:
        """The best first."""
        done = [trial for trial in self.trials if trial.state == TrialState.COMPLETE]
        return sorted(done, key=lambda trial: -trial.value if self.higher else trial.value)

    @cached_property
    def repeated(self) -> dict[int, int]:
        """Trials whose worker died, and the trial that took their place."""
        return {
            trial.system_attrs["retry_history"][-1]: trial.number
            for trial in self.trials
            if trial.system_attrs.get("retry_history")
        }

    @cached_property
    def counts(self) -> dict[str, int]:
        """How many trials are in which state; those that were repeated are counted apart."""
        counts = {"tickets": len(self.trials) - len(self.repeated), "repeated": len(self.repeated)}
        for state in TrialState:
            own = [t for t in self.trials if t.state == state and t.number not in self.repeated]
            counts[state.name.lower()] = len(own)
        return counts

    @property
    def unfinished(self) -> int:
        return self.counts["running"] + self.counts["waiting"]

    @property
    def spent(self) -> float:
        """Seconds of all trials together."""
        times = [trial.duration.total_seconds() for trial in self.trials if trial.duration is not None]
        return float(sum(times))

    @property
    def dates(self) -> str:
        starts = [trial.datetime_start for trial in self.trials if trial.datetime_start is not None]
        ends = [trial.datetime_complete for trial in self.trials if trial.datetime_complete is not None]
        if not starts or not ends:
            return ""
        return f"{min(starts):%Y-%m-%d %H:%M} to {max(ends):%Y-%m-%d %H:%M}"

    @property
    def metric(self) -> str:
        """By what the trials are scored."""
        metrics = self.task.get("metrics") or [self.final.get("metric")]
        return metrics[0] or ""

    @property
    def score(self) -> str:
        """What the scores of trials are, with their unit."""
        if not self.is_search or not self.metric:
            return "value"
        return f"validation {self.metric}, {unit_of(self.metric) if self.metric in LOWER_IS_BETTER else 'percent'}"

    @property
    def unit(self) -> str:
        """What differences of scores are."""
        return unit_of(self.metric) if self.metric else "value"

    @property
    def verdict(self) -> str:
        if self.final.get("verdict"):
            return self.final["verdict"]
        if not self.trials:
            return "This study has no trials yet."
        if not self.complete:
            return "No trial of this study has ended with a score yet."
        best = self.complete[0]
        ended = count(len(self.complete), "complete trial")
        so_far = f"So far the best of {ended} is trial {best.number} with {number(best.value)}"
        if not self.is_search:
            return f"{so_far}. This study has no final comparison, so nothing here was tested on fresh data."
        return f"{so_far} on validation. Nothing has been tested yet: what wins on validation need not win on test."

    # -- the comparison --

    @property
    def differences(self) -> list[Mapping[str, Any]]:
        return list(self.final.get("differences", []))

    def forest(self) -> str:
        bars = [
            Bar(
                d["name"], d["estimate"], d["low"], d["high"], GOOD if d["low"] > 0 else BAD if d["high"] < 0 else OTHER
            )
            for d in self.differences
        ]
        return figures.forest(bars, f"difference on test, {self.unit}", "final")

    def forest_in_words(self) -> str:
        lines = "; ".join(f"{d['name']}: {in_brackets(d)}" for d in self.differences)
        return f"Differences on test with their intervals. {lines}."

    def contenders(self) -> list[dict[str, Any]]:
        """The rows of the final comparison, with the mean over seeds."""
        unknown = {"epochs": None, "seconds": None, "parameters": None}
        return [{**unknown, **c, "mean": _mean(c["scores"])} for c in self.final.get("contenders", [])]

    @property
    def level(self) -> float:
        levels = {d.get("level", 0.95) for d in self.differences}
        return 100 * min(levels, default=0.95)

    # -- the trials --

    def row(self, trial: FrozenTrial) -> _Row:
        recorded = of_trial(trial)
        return _Row(
            trial.number,
            trial.value if trial.values else None,
            in_words(trial),
            recorded.get("parameters"),
            recorded.get("seconds", trial.duration.total_seconds() if trial.duration else None),
            self._reason(trial),
        )

    @cached_property
    def leaders(self) -> list[_Row]:
        """The best, each with what the model of all trials expects of it, where the study is one of ours."""
        rows = [self.row(trial) for trial in self.complete[:LEADERS]]
        space = self._known_space
        if space is None:
            return rows
        expected = ThompsonSampler(features=space.features).expected(self.study)
        return [
            replace(row, expected=f"{number(expected[row.number][0])} ± {short(expected[row.number][1])}")
            if row.number in expected
            else row
            for row in rows
        ]

    def failed(self) -> list[_Row]:
        return [self.row(trial) for trial in self.trials if trial.state == TrialState.FAIL]

    def pruned(self) -> list[_Row]:
        return [self.row(trial) for trial in self.trials if trial.state == TrialState.PRUNED]

    def _reason(self, trial: FrozenTrial) -> str:
        if trial.state == TrialState.PRUNED:
            step = trial.last_step
            return "" if step is None else f"at step {step} with {number(trial.intermediate_values[step])}"
        reason = of_trial(trial).get("failure")
        if trial.number in self.repeated:
            return f"{reason or DIED}; repeated as trial {self.repeated[trial.number]}"
        return reason or _FAILED_WITHOUT_REASON

    def has_curves(self) -> bool:
        return any(len(trial.intermediate_values) > 1 for trial in self.trials)

    def curves(self) -> str:
        best = self.complete[0].number if self.complete else None
        kinds = {TrialState.COMPLETE: "complete", TrialState.PRUNED: "pruned", TrialState.FAIL: "failed"}
        lines = []
        for trial in self.trials:
            if trial.state in kinds and trial.intermediate_values:
                steps = sorted(trial.intermediate_values)
                kind = "best" if trial.number == best else kinds[trial.state]
                lines.append(ReportedScores(steps, [trial.intermediate_values[step] for step in steps], kind))
        return figures.curves(lines, self.score if self.is_search else "reported value", "curves")

    def progress(self) -> str:
        shown = {"search": self.study}
        if self.lora_study is not None:
            shown["LoRA"] = self.lora_study
        return figures.progress(
            {title: (*_scores(study), self.higher) for title, study in shown.items() if _scores(study)[0]},
            self.score,
            "progress",
        )

    def lora_best(self) -> _Row | None:
        done = [] if self.lora_study is None else self.lora_study.get_trials(states=(TrialState.COMPLETE,))
        return self.row(max(done, key=lambda trial: trial.value)) if done else None

    # -- what helps --

    @cached_property
    def _known_space(self) -> SearchSpace | None:
        """The study's space, where it is one of ours and all of its primitives are registered here."""
        if "host" not in self.space:
            return None
        try:
            return SearchSpace.from_record(self.space)
        except (ValueError, KeyError, TypeError):
            return None

    @cached_property
    def effects(self) -> list[_Known]:
        """The posterior's effects where they are present, the surest first."""
        features = self._known_space.features if self._known_space else None
        effects = ThompsonSampler(seed=0, features=features).effects(self.study)
        sizes = self._sizes(features)
        sized = ((effect, sizes.get(effect.name, 1.0)) for effect in effects)
        return [_Known(**{**vars(e), "mean": e.mean * size, "sd": e.sd * size}) for e, size in sized]

    def _sizes(self, features: FeatureMap | None) -> dict[str, float]:
        """How large features are where they are present: an effect is a weight, what it adds is their product."""
        sizes: dict[str, float] = {}
        for trial in self.trials if features else []:
            if trial.state in (TrialState.COMPLETE, TrialState.PRUNED):
                for name, value in features(trial.params).items() if features else ():
                    label = name if isinstance(name, str) else " × ".join(name)
                    sizes[label] = max(sizes.get(label, 0.0), abs(value))
        return sizes

    @cached_property
    def _pairs(self) -> dict[frozenset[str], _Known]:
        return {frozenset(effect.name.split(" × ")): effect for effect in self.effects if " × " in effect.name}

    @cached_property
    def mechanisms(self) -> list[_Known]:
        """Main effects of primitives; of all parameters in a study of something else. The surest first."""
        single = [effect for effect in self.effects if " × " not in effect.name]
        if self._known_space is None:
            return single
        return [effect for effect in single if effect.name in self._known_space.primitives]

    @cached_property
    def others(self) -> list[_Known]:
        """Places, strengths, orders and settings."""
        shown = {effect.name for effect in self.mechanisms}
        return [effect for effect in self.effects if " × " not in effect.name and effect.name not in shown]

    def effects_figure(self) -> str:
        shown = sorted(self.mechanisms[:SHOWN], key=lambda effect: -effect.mean if self.higher else effect.mean)
        bars = [Bar(f"{e.name} ({e.support})", e.mean, e.low, e.high, self._colour(e)) for e in shown]
        return figures.forest(bars, f"what it adds, {self.unit}" if self.is_search else "effect", "effects")

    def effects_in_words(self) -> str:
        helping = [e.name for e in self.mechanisms[:SHOWN] if self._colour(e) == GOOD]
        harming = [e.name for e in self.mechanisms[:SHOWN] if self._colour(e) == BAD]
        return (
            f"Posterior means with 95 % intervals. Surely helping: {', '.join(helping) or 'none'}. "
            f"Surely harming: {', '.join(harming) or 'none'}."
        )

    def _colour(self, effect: _Known) -> str:
        if effect.low <= 0 <= effect.high:
            return OTHER
        return GOOD if (effect.mean > 0) == self.higher else BAD

    @cached_property
    def mapped(self) -> list[str]:
        """The names in the map: mechanisms in most of the tested pairs, then the surest."""
        rank = {effect.name: i for i, effect in enumerate(self.mechanisms)}
        tested = {name: sum(name in pair for pair in self._pairs) for name in rank}
        chosen = sorted(rank, key=lambda name: (-tested[name], rank[name]))[:MAPPED]
        return sorted((name for name in chosen if tested[name]), key=rank.__getitem__)

    def pair(self, first: str, second: str) -> _Cell | None:
        """None where too few trials have shown the two together: untested, which is not the same as no effect."""
        effect = self._pairs.get(frozenset((first, second)))
        if effect is None:
            return None
        largest = max((abs(e.mean) for e in self._pairs.values()), default=0.0) or 1.0
        title = f"{first} with {second}: {in_brackets(effect)}, {count(effect.support, 'trial')}"
        return _Cell(
            f"{effect.mean:+.2g}", title, (effect.mean > 0) == self.higher, round(abs(effect.mean) / largest, 2)
        )

    def untested(self) -> int:
        return sum(frozenset(pair) not in self._pairs for pair in combinations(self.mapped, 2))

    # -- the winner --

    @property
    def winner(self) -> Mapping[str, Any]:
        """The confirmed winner, or what a search without a test recommends, or the best so far."""
        if self.final.get("winner"):
            return self.final["winner"]
        recommended = [trial for trial in self.complete if trial.number == self.best.get("number")]
        for trial in (recommended or self.complete)[:1]:
            recorded = of_trial(trial)
            return {
                "number": trial.number,
                "configs": recorded.get("configs", []),
                "learning_rate": recorded.get("configuration", {}).get("learning_rate"),
            }
        return {}

    def code(self) -> str:
        """The script that the search has written, or else what puts the adapters into a model."""
        script = self.final.get("script") or self.best.get("script")
        return script or as_code(self.winner.get("configs", []), self.winner.get("learning_rate"), self._strengths())

    def _strengths(self) -> dict[str, float]:
        """Primitives of the winner that learn at another rate than the rest, where their settings do not say so."""
        if any("zero_scale" in entry for config in self.winner.get("configs", []) for entry in config["primitives"]):
            return {}
        chosen = [trial for trial in self.trials if trial.number == self.winner.get("number")]
        slots = of_trial(chosen[0]).get("configuration", {}).get("slots", []) if chosen else []
        return {slot["primitive"]: slot["strength"] for slot in slots if slot.get("strength", 1) != 1}

    def as_json(self) -> str:
        return json.dumps(self.winner, indent=1)

    # -- how it was done --

    def facts(self, of: Mapping[str, Any]) -> list[tuple[str, str]]:
        """Settings as they stand, one line for each."""
        return [line for key, value in of.items() for line in as_lines(key, value)]

    @property
    def power(self) -> tuple[str, int] | None:
        """The size of the space as a number below ten and a power of ten, where it is long."""
        digits = str(self.space.get("size", ""))
        return (f"{digits[0]}.{digits[1]}", len(digits) - 1) if len(digits) > 7 else None


def _mean(scores: Sequence[float]) -> float | None:
    return fmean(scores) if scores else None


def _scores(study: Study) -> tuple[list[int], list[float]]:
    done = [t for t in study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,)) if math.isfinite(t.value)]
    return [trial.number for trial in done], [trial.value for trial in done]


def in_brackets(effect: Any) -> str:
    """Estimate and bounds, of an effect or of a record of a difference."""
    if isinstance(effect, _Known):
        return f"{signed(effect.mean)} [{signed(effect.low)}, {signed(effect.high)}]"
    return f"{signed(effect['estimate'])} [{signed(effect['low'])}, {signed(effect['high'])}]"
