"""Optuna's own suite for samplers; and what it does not cover: storages that outlive a process, several workers."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest

pytest.importorskip("optuna")
pytest.importorskip("scipy")

import optuna
from optuna.storages import InMemoryStorage, JournalStorage, RDBStorage
from optuna.storages.journal import JournalFileBackend
from optuna.testing.pytest_samplers import BasicSamplerTestCase, RelativeSamplerTestCase, SingleOnlySamplerTestCase

from bioadapt.search import ThompsonPruner, ThompsonSampler


class TestThompsonSampler(BasicSamplerTestCase, RelativeSamplerTestCase, SingleOnlySamplerTestCase):
    # "modelled": from the first finished trial on, the model proposes.
    @pytest.fixture(params=[1, 10], ids=["modelled", "startup"])
    def sampler(self, request):
        return lambda: ThompsonSampler(seed=0, n_startup_trials=request.param)


def objective(trial):
    lr = trial.suggest_float("lr", 1e-4, 1.0, log=True)
    kind = trial.suggest_categorical("kind", ["a", "b", None])
    score = (kind == "a") - abs(lr - 0.1)
    for step in range(3):
        trial.report(score - 1 / (step + 1), step)
        if trial.should_prune():
            raise optuna.TrialPruned
    return score


def storage(kind, folder):
    if kind == "memory":
        return InMemoryStorage()
    if kind == "journal":
        return JournalStorage(JournalFileBackend(str(folder / "journal.log")))
    return RDBStorage(f"sqlite:///{folder / 'study.db'}")


def studied(kind, folder, *counts):
    """The parameters of a study that is taken up again, by a new process as it were, after each of ``counts``."""
    held = storage(kind, folder)
    for count in counts:
        held = held if kind == "memory" else storage(kind, folder)
        study = optuna.create_study(
            storage=held,
            study_name="study",
            direction="maximize",
            load_if_exists=True,
            sampler=ThompsonSampler(seed=3, n_startup_trials=5),
            pruner=ThompsonPruner(n_startup_trials=5),
        )
        study.optimize(objective, n_trials=count)
    return [(trial.params, trial.state) for trial in study.trials]


@pytest.mark.parametrize("kind", ["memory", "journal", "sqlite"])
def test_a_resumed_study_is_the_uninterrupted_one(kind, tmp_path):
    resumed = studied(kind, tmp_path, 4, 5, 9)
    assert resumed == studied("memory", tmp_path, 18)
    assert any(state == optuna.trial.TrialState.PRUNED for _, state in resumed)


def test_threads_of_one_study():
    sampler = ThompsonSampler(seed=0, n_startup_trials=4)
    study = optuna.create_study(direction="maximize", sampler=sampler)
    study.optimize(objective, n_trials=20, n_jobs=2)
    assert [trial.number for trial in study.trials] == list(range(20))
    # Two threads may propose at the same moment, before either's proposal is stored; that is rare.
    assert len({str(trial.params) for trial in study.trials}) >= 16


def test_workers_that_share_only_a_file(tmp_path):
    studied("journal", tmp_path, 6)

    def work(_):
        study = optuna.load_study(
            study_name="study",
            storage=storage("journal", tmp_path),
            sampler=ThompsonSampler(seed=3, n_startup_trials=5),
            pruner=optuna.pruners.NopPruner(),
        )
        study.optimize(objective, n_trials=6)

    with ThreadPoolExecutor(2) as workers:
        list(workers.map(work, range(2)))
    trials = optuna.load_study(study_name="study", storage=storage("journal", tmp_path)).trials
    assert len(trials) == 18 and all(trial.state.is_finished() for trial in trials)
    # Each may propose before the other's proposal is stored.
    assert len({str(trial.params) for trial in trials}) >= 15


def test_running_trials_are_not_proposed_again():
    space = {name: optuna.distributions.CategoricalDistribution([0, 1, 2]) for name in "ab"}
    study = optuna.create_study(direction="maximize", sampler=ThompsonSampler(seed=0, n_startup_trials=1))
    study.add_trial(optuna.create_trial(params={"a": 0, "b": 0}, distributions=space, value=1.0))
    running = [study.ask(space).params for _ in range(8)]
    assert len({str(params) for params in [{"a": 0, "b": 0}, *running]}) == 9  # each of the nine that there are
    assert study.ask(space).params in [{"a": 0, "b": 0}, *running]  # nothing else is left
