"""What comes after a search: confirm the best on fresh seeds, then test each contender once for each seed."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from optuna.study import Study
from optuna.trial import FrozenTrial, TrialState

from ... import add_scores
from ...evaluation import Comparison, Evaluation, compare
from ...evaluation.comparison import LOSS, WIN
from ...evaluation.training import History, transformer_of
from ..space import Configuration, SearchSpace, save_adapters
from ..study import Report
from ..thompson import ThompsonSampler
from .bench import Bench
from .bio import Below, train_bio
from .lora import lora_size, train_lora

BASE, LORA, WINNER, SAME_SIZE = "model as it comes", "tuned LoRA", "LoRA + bio", "LoRA, same size"
_FEWEST = 5


@dataclass(frozen=True)
class Confirmation:
    """Trains a configuration on a fresh seed; what runs in the child. Called with (configuration as a record, seed)."""

    space: SearchSpace
    bench: Bench
    below: Below

    def __call__(self, argument: tuple[dict[str, Any], int], report: Report) -> float:
        record, seed = argument
        configuration = Configuration.from_record(record)
        if not configuration.slots:
            return self._alone(seed)
        encoder = self.below.encoder(self.bench, seed)
        _, history = train_bio(self.bench, encoder, self.space, configuration, seed, rungs=1)
        return history.validation[-1][1]

    def _alone(self, seed: int) -> float:
        """What lies below, without bio adapters."""
        encoder = self.bench.encoder(seed, self.below.folder)
        if self.below.params is None:
            return self.bench.validate(encoder)
        _, history = train_lora(self.bench, encoder, self.below.params, seed, rungs=1)
        return history.validation[-1][1]


@dataclass(frozen=True)
class Final:
    """Trains and tests one contender on one seed; what runs in the child. Called with (contender, seed).

    Attributes:
        space: of the search.
        bench: with the test rows.
        winner: the configuration that was chosen.
        lora: parameters of the tuned LoRA's space; None if it was given as a folder, or there is none.
        given: folder of the LoRA that was given.
        folder: where the adapters go, a folder for each seed.
    """

    space: SearchSpace
    bench: Bench
    winner: Configuration
    lora: Mapping[str, Any] | None
    given: str | None
    folder: str

    def __call__(self, argument: tuple[str, int], report: Report) -> dict[str, Any]:
        name, seed = argument
        folder = Path(self.folder, f"seed-{seed}")
        encoder = self._below(name).encoder(self.bench, seed)
        size, trained, history = lora_size(transformer_of(encoder)), 0.0, History()
        if name == WINNER and self.winner.slots:
            model, history = train_bio(self.bench, encoder, self.space, self.winner, seed, rungs=0)
            save_adapters(model, folder / "bio")
            size, trained = size + self.space.parameters(self.winner), self.bench.epochs
        elif name in (LORA, WINNER) and self.lora is not None:  # a winner without slots is the tuned LoRA
            model, history = train_lora(self.bench, encoder, self.lora, seed, rungs=0)
            model.save_pretrained(str(folder / "lora"))
            size, trained = lora_size(model), self.bench.epochs
        elif name == SAME_SIZE:
            assert self.lora is not None
            known = json.loads(_file(self.folder, WINNER, seed).read_text(encoding="utf-8"))
            model, history = train_lora(self.bench, encoder, self.lora, seed, size=known["parameters"], rungs=0)
            model.save_pretrained(str(folder / "lora-same-size"))
            size, trained = lora_size(model), self.bench.epochs
        evaluation = self.bench.test(encoder)
        metric = self.bench.task.metrics[0]
        for card in sorted((folder / "bio").glob("*/README.md")) if name == WINNER else ():
            add_scores(card.parent, self.bench.task.name, evaluation.scores, kind=self.bench.task.family)
        return {
            "name": name,
            "seed": seed,
            "score": evaluation.scores[metric],
            "rows": evaluation.rows[metric].tolist(),
            "gold": evaluation.gold.tolist(),
            "parameters": size,
            "epochs": trained,
            "seconds": history.seconds,
        }

    def _below(self, name: str) -> Below:
        """The LoRA that was given, or one that is trained along under the winner's bio adapters."""
        if name == WINNER and self.winner.slots:
            return Below(self.given, self.lora)
        return Below(folder=self.given if name in (LORA, WINNER) else None)


def contenders(lora: Mapping[str, Any] | None, given: str | None) -> tuple[str, ...]:
    """Who takes part, in the order of training."""
    if lora is not None:
        return (BASE, LORA, WINNER, SAME_SIZE)
    return (BASE, LORA, WINNER) if given is not None else (BASE, WINNER)


def best_trials(study: Study, count: int) -> list[FrozenTrial]:
    """The best completed trials with different configurations, the best first."""
    trials = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
    distinct: dict[str, FrozenTrial] = {}
    for trial in sorted(trials, key=lambda trial: -(trial.value or 0.0)):
        distinct.setdefault(json.dumps(trial.user_attrs["configuration"], sort_keys=True), trial)
    return list(distinct.values())[:count]


def confirm(
    study: Study,
    best: Sequence[FrozenTrial],
    seeds: Sequence[int],
    train: Callable[[tuple[dict[str, Any], int]], float],
    follow: Callable[[Sequence[Any]], Iterable[Any]] = iter,
) -> list[dict[str, Any]]:
    """Validation scores of the best trials on fresh seeds; each is kept in the study as soon as it is known.

    Args:
        study: where the scores are kept.
        best: what is trained.
        seeds: on each of these.
        train: scores (configuration as a record, seed).
        follow: goes through what is left to train, and may show how far it is.

    Returns:
        ``number``, ``scores`` and ``mean`` of each, the best mean first.
    """
    known: dict[str, float] = dict(study.user_attrs.get("confirmation_scores", {}))
    pairs = [(trial, seed, f"{trial.number}/{seed}") for trial in best for seed in seeds]
    for trial, seed, key in follow([pair for pair in pairs if pair[-1] not in known]):
        known[key] = train((trial.user_attrs["configuration"], seed))
        study.set_user_attr("confirmation_scores", known)
    confirmed = []
    for trial in best:
        scores = [known[f"{trial.number}/{seed}"] for seed in seeds]
        confirmed.append({"number": trial.number, "scores": scores, "mean": float(np.mean(scores))})
    return sorted(confirmed, key=lambda record: -record["mean"])


def open_test(
    names: Sequence[str],
    seeds: Sequence[int],
    folder: str | Path,
    train: Callable[[tuple[str, int]], dict[str, Any]],
    follow: Callable[[Sequence[Any]], Iterable[Any]] = iter,
) -> list[dict[str, Any]]:
    """Results of every contender on every seed. What has been tested is in a file, and is not tested again.

    Args:
        names: of the contenders, in the order of training.
        seeds: for training; the model as it comes is tested with the first alone.
        folder: where the files are.
        train: the result of (contender, seed).
        follow: goes through what is left to test, and may show how far it is.
    """
    files = {
        (name, seed): _file(folder, name, seed) for seed in seeds for name in names if name != BASE or seed == seeds[0]
    }
    for run in follow([run for run, file in files.items() if not file.is_file()]):
        files[run].parent.mkdir(parents=True, exist_ok=True)
        unfinished = files[run].with_suffix(".part")
        unfinished.write_text(json.dumps(train(run)) + "\n", encoding="utf-8")
        unfinished.replace(files[run])
    return [json.loads(file.read_text(encoding="utf-8")) for file in files.values()]


def _file(folder: str | Path, name: str, seed: int) -> Path:
    return Path(folder, f"seed-{seed}", f"{name.replace(',', '').replace(' ', '-')}.json")


def summary(results: Sequence[Mapping[str, Any]], metric: str) -> dict[str, Any]:
    """Contenders and paired differences of `open_test`'s results, as the study keeps them.

    Args:
        results: of every contender on every seed.
        metric: what their rows are of.
    """
    by_name: dict[str, list[Mapping[str, Any]]] = {}
    for result in results:
        by_name.setdefault(result["name"], []).append(result)
    evaluations = {name: _evaluations(own, metric) for name, own in by_name.items()}
    comparison = compare({"test": evaluations}, {"test": metric}, WINNER)
    differences = [
        {"name": f"{WINNER} - {difference.rival}", **asdict(difference.interval)}
        for rivalry in comparison.rivalries
        for difference in rivalry.differences
    ]
    return {
        "metric": metric,
        "contenders": [
            {
                "name": name,
                "parameters": round(float(np.mean([result["parameters"] for result in own]))),
                "epochs": own[0]["epochs"],
                "seconds": float(np.mean([result["seconds"] for result in own])),
                "scores": [result["score"] for result in own],
            }
            for name, own in by_name.items()
        ],
        "differences": differences,
        "verdict": verdict(comparison),
        "test_accesses": len(results),
    }


def _evaluations(results: Sequence[Mapping[str, Any]], metric: str) -> list[Evaluation]:
    """What a contender reached on each seed, as the engine of comparison reads it."""
    return [
        Evaluation({metric: result["score"]}, {metric: np.array(result["rows"])}, np.array(result["gold"]))
        for result in results
    ]


def shrinkage(study: Study, space: SearchSpace, number: int) -> dict[str, float | None]:
    """What the winner scored in its trial, and what the model of all trials makes of that: its mean and sd.

    The best of many noisy scores is too high on average. The sampler's model, which knows of a configuration what its
    parts did in other trials, expects less of it; too few trials say nothing.
    """
    trials = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
    observed = next(trial.value for trial in trials if trial.number == number)
    expected = ThompsonSampler(features=space.features).expected(study)
    if len(trials) < _FEWEST or number not in expected:
        return {"observed": observed, "posterior": None, "sd": None}
    mean, sd = expected[number]
    return {"observed": observed, "posterior": mean, "sd": sd}


def caveats(winners: int, trials: int, lora_trials: int | None) -> list[str]:
    """What a verdict has to be read with, a sentence each, where trials were added to a search that had ended.

    Args:
        winners: how many configurations the test split has been opened for.
        trials: of the search.
        lora_trials: in which the LoRA was tuned; None if it was not.
    """
    sentences = []
    if winners > 1:
        sentences.append(
            f"The test split has been opened for {winners} winners, one after the other as trials were added: whoever "
            "went on because of a result has chosen by it."
        )
    if lora_trials is not None and lora_trials < trials:
        sentences.append(f"The LoRA was tuned in {lora_trials} trials, while the search had {trials}.")
    return sentences


def verdict(comparison: Comparison) -> str:
    """Whether the winner is better than every rival, worse than one, or neither, and a sentence on each rival.

    One rival alone says little: the LoRA of the same size trains as long as both stages together and may overfit where
    the smaller one does not, and neither need be better than the model as it comes.
    """
    verdicts = {difference.verdict for rivalry in comparison.rivalries for difference in rivalry.differences}
    if LOSS in verdicts:
        opening = "The bio adapter loses here."
    elif verdicts == {WIN}:
        opening = "The bio adapter wins here."
    else:
        opening = "Undecided: the bio adapter is not better than every rival here."
    return f"{opening} {comparison.verdict}"
