"""What runs a study: every ticket is used once, whatever happens to trials and to workers."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections import Counter

import numpy as np
import pytest

pytest.importorskip("optuna")
pytest.importorskip("scipy")
pytest.importorskip("psutil")

import optuna
from helpers.fake_objective import (
    FakeObjective,
    Holding,
    Nowhere,
    Unimportable,
    Unusable,
    echo,
    tidy_up_later,
    value_of,
    work_or_end,
)
from helpers.processes import until
from optuna.trial import TrialState

from bioadapt.evaluation.comparison import Comparison, Difference, Rivalry
from bioadapt.evaluation.statistics import Evaluation, Interval, paired_interval
from bioadapt.search.contest import finale
from bioadapt.search.settings import budget
from bioadapt.search.study import Child, Failed, Job, NotFound, Stopped, prepare, run_study, runner
from bioadapt.search.study.isolation import processes
from bioadapt.search.study.progress import progress
from bioadapt.search.study.tickets import DIED, count_tickets


@pytest.fixture(scope="module")
def child():
    with Child(echo) as running:
        yield running


@pytest.mark.parametrize(
    ("argument", "said", "survives"),
    [
        ("raise", "^ValueError: no such thing$", True),
        ("memory", "^out of memory$", False),
        ("kill", r"^killed \(signal 9\), which is what happens where memory runs out$", False),
        ("exit", "^the process ended with exit code 3: the last words$", False),
        ("hang", r"^timeout: not done after 0.2 s$", False),
    ],
)
def test_whatever_happens_in_the_child_is_a_reason_in_words(child, argument, said, survives):
    before = child.call("pid")
    with pytest.raises(Failed, match=said):
        child.call(argument, timeout=0.2 if argument == "hang" else 60)
    assert (child.call("pid") == before) == survives


def test_an_idle_child_tidies_up(tmp_path):
    with Child(tidy_up_later) as running:
        running.call(tmp_path / "tidy")
    assert (tmp_path / "tidy").exists()


def test_what_keeps_a_child_from_starting_is_a_reason_in_words():
    with (
        Child(Unimportable()) as running,
        pytest.raises(NotFound, match="does not load.*ModuleNotFoundError.*nowhere"),
    ):
        running.call("x")


def test_a_report_can_end_the_call(child):
    heard = []

    def judge(step, score):
        heard.append((step, score))
        return step == 2

    with pytest.raises(Stopped):
        child.call("report", judge)
    assert heard == [(0, 0.0), (1, 0.5), (2, 1.0)]
    assert child.call("pid") != os.getpid()


def job(tmp_path, objective=None, **settings):
    return Job(str(tmp_path / "study.journal"), "fake", objective or FakeObjective(), **settings)


def test_failures_cost_a_ticket_each_and_nothing_else(tmp_path):
    faults = {0: "raise", 1: "nan", 2: "kill"}
    first = [{"a": a, "b": 2, "c": 1} for a in (3, 0, 1, 2)]
    prepare(str(tmp_path / "study.journal"), "fake", 6, first)
    study = run_study(job(tmp_path, FakeObjective(faults=faults)))
    assert count_tickets(study) == len(study.trials) == 6
    assert [trial.params["a"] for trial in study.trials[:4]] == [3, 0, 1, 2]
    for trial in study.trials:
        fault = faults.get(trial.params["a"])
        assert trial.state == (TrialState.FAIL if fault else TrialState.COMPLETE)
        if fault:
            reason = {"raise": "ValueError: no such thing", "nan": "the score is nan", "kill": "killed (signal 9)"}
            assert trial.user_attrs["failure"].startswith(reason[fault])
        else:
            assert trial.value == value_of(trial.params)
            assert trial.intermediate_values == {1: trial.value / 2}
        assert trial.user_attrs["parameters"] == 10 * trial.params["a"]
        assert trial.user_attrs["seconds"] >= 0
        assert trial.user_attrs["worker"]["pid"] == os.getpid()


WRONG = {
    "text": "the objective returned 'very good' (str), and not a number",
    "number as text": "the objective returned '0.5' (str), and not a number",
    "nothing": "the objective returned 'None' (NoneType), and not a number",
    "lock": "what was returned cannot be sent back: cannot pickle '_thread.lock' object",
    "suggest": "KeyError: 'no such parameter'",
    "describe": "TypeError: Object of type lock is not JSON serializable",
    "prunes itself": None,
}


@pytest.mark.parametrize("fault", WRONG)
def test_what_an_objective_gets_wrong_fails_its_trial_and_not_the_worker(tmp_path, fault):
    first = [{"a": a, "b": 2, "c": 1} for a in (0, 3)]
    prepare(str(tmp_path / "study.journal"), "fake", 2, first)
    study = run_study(job(tmp_path, FakeObjective(faults={0: fault})))
    wrong, right = study.trials
    assert right.state == TrialState.COMPLETE and right.value == value_of(right.params)
    assert wrong.state == (TrialState.FAIL if WRONG[fault] else TrialState.PRUNED)
    assert wrong.user_attrs.get("failure") == WRONG[fault]


def test_a_worker_that_dies_is_replaced(tmp_path):
    log = tmp_path / "log"
    log.mkdir()
    prepare(str(tmp_path / "study.journal"), "fake", 3, [{"a": 0, "b": 2, "c": 1}])
    study = run_study(job(tmp_path, FakeObjective(faults={0: "worker"}, log=str(log)), timeout=600), 2)
    states = Counter(trial.state for trial in study.trials)
    assert states[TrialState.FAIL] == 1 and count_tickets(study) == 3
    assert study.trials[0].user_attrs["failure"] == DIED
    (again,) = [trial for trial in study.trials if trial.system_attrs.get("retry_history")]
    assert again.state == TrialState.COMPLETE and again.params == {"a": 0, "b": 2, "c": 1}


def test_workers_that_all_die_are_not_replaced_for_ever(tmp_path, monkeypatch):
    monkeypatch.setattr(runner, "_PAUSE", 0.01)
    monkeypatch.setattr(runner, "DEATHS", 1)
    study = prepare(str(tmp_path / "study.journal"), "fake", 2)
    said = "all workers have died, 2 trials are left; the last one: LookupError: no features; the same call goes on"
    with pytest.raises(RuntimeError, match=said):
        run_study(job(tmp_path, Unusable()), 2)
    assert [trial.state for trial in study.trials] == [TrialState.WAITING] * 2


# As in a cell of a notebook: the class is in a module that no other process can import.
IN_A_NOTEBOOK = """
import sys
from bioadapt.search.study import Job, prepare, run_study

scale = 10.0

def score(x):
    return scale * x

class Objective:
    features = None
    def suggest(self, trial): return {"x": trial.suggest_float("x", 0, 1)}
    def describe(self, params): return {}
    def run(self, params, report): return score(params["x"])

for workers in (1, 2):
    prepare(sys.argv[1], f"by {workers}", 3)
    study = run_study(Job(sys.argv[1], f"by {workers}", Objective()), workers)
    print([trial.state.name for trial in study.trials], all(t.value == 10 * t.params["x"] for t in study.trials))
"""


def test_what_a_notebook_defines_travels_by_value(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", IN_A_NOTEBOOK, str(tmp_path / "s.journal")], capture_output=True, text=True
    )
    assert done.stdout.splitlines() == ["['COMPLETE', 'COMPLETE', 'COMPLETE'] True"] * 2, done.stderr


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize(
    ("objective", "error", "said"),
    [
        (Holding, ValueError, "cannot be sent to another process: cannot pickle '_thread.lock'.*has to make itself"),
        (Nowhere, RuntimeError, "does not load in another process: ModuleNotFoundError: .*nowhere"),
    ],
    ids=["cannot be sent", "does not load"],
)
def test_an_objective_that_cannot_travel_is_refused_before_any_trial(tmp_path, workers, objective, error, said):
    study = prepare(str(tmp_path / "study.journal"), "fake", 2)
    with pytest.raises(error, match=said):
        run_study(job(tmp_path, objective()), workers)
    assert [trial.state for trial in study.trials] == [TrialState.WAITING] * 2


def test_a_full_disk_ends_a_study_in_a_line(tmp_path, monkeypatch):
    prepare(str(tmp_path / "study.journal"), "fake", 1)

    def full(self, logs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("bioadapt.search.study.journal.Journal.append_logs", full)
    with pytest.raises(RuntimeError, match="study 'fake': OSError: .*No space left on device; the same call goes on"):
        run_study(job(tmp_path))


def test_the_same_call_goes_on_and_more_trials_are_added_to_what_is_there(tmp_path):
    storage = str(tmp_path / "study.journal")
    prepare(storage, "fake", 3)
    first = [trial.params for trial in run_study(job(tmp_path)).trials]
    prepare(storage, "fake", 3)
    assert [trial.params for trial in run_study(job(tmp_path)).trials] == first
    prepare(storage, "fake", 5)
    study = run_study(job(tmp_path))
    assert [trial.params for trial in study.trials[:3]] == first
    assert len(study.trials) == count_tickets(study) == 5
    # An interrupted study proposes what one in a single piece does.
    prepare(storage, "whole", 5)
    whole = run_study(Job(storage, "whole", FakeObjective()))
    assert [trial.params for trial in whole.trials] == [trial.params for trial in study.trials]


def running(study):
    return [
        trial
        for trial in study.get_trials(deepcopy=False, states=(TrialState.RUNNING,))
        if "worker" in trial.user_attrs and trial.intermediate_values
    ]


@pytest.mark.parametrize("sign", [signal.SIGKILL, signal.SIGTERM])
def test_a_worker_that_dies_in_mid_trial_loses_that_trial_alone(tmp_path, sign):
    storage, log = str(tmp_path / "study.journal"), tmp_path / "log"
    log.mkdir()
    study = prepare(storage, "fake", 4, [{"a": 3, "b": 2, "c": 1}])
    worker = processes().Process(target=work_or_end, args=(job(tmp_path, FakeObjective(seconds=600, log=str(log))),))
    worker.start()
    until(lambda: list(log.iterdir()))
    (child,) = (int(path.name.partition("-")[0]) for path in log.iterdir())
    os.kill(worker.pid, sign)
    worker.join(30)
    until(lambda: not alive(child))  # what trained does not stay behind
    study = run_study(job(tmp_path))
    states = Counter(trial.state for trial in study.trials)
    assert states == {TrialState.COMPLETE: 4, TrialState.FAIL: 1}
    assert count_tickets(study) == 4
    failed = study.trials[0]
    assert failed.user_attrs["failure"] == ("worker died" if sign == signal.SIGKILL else "interrupted")
    (again,) = [trial for trial in study.trials if trial.system_attrs.get("retry_history")]
    assert again.params == failed.params == {"a": 3, "b": 2, "c": 1}


def alive(pid):
    import psutil

    return psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE


def test_two_workers_share_the_tickets_and_the_console_tells(tmp_path):
    from rich.console import Console

    prepare(str(tmp_path / "study.journal"), "fake", 8)
    with (tmp_path / "log.txt").open("w") as file:
        study = run_study(
            job(tmp_path, FakeObjective(seconds=0.4)), 2, Console(file=file, width=100), "searching [fakes]"
        )
    assert Counter(trial.state for trial in study.trials) == {TrialState.COMPLETE: 8}
    pids = {trial.user_attrs["worker"]["pid"] for trial in study.trials}
    assert len(pids) == 2 and os.getpid() not in pids
    last = (tmp_path / "log.txt").read_text().splitlines()[-1]
    assert last.startswith(f"searching [fakes]: 8/8, best {study.best_value:.2f} (trial {study.best_trial.number})")


def test_all_workers_dead_is_said(tmp_path, monkeypatch):
    prepare(str(tmp_path / "study.journal"), "fake", 2)
    monkeypatch.setattr("bioadapt.search.study.runner.work", lambda wanted: None)
    with pytest.raises(RuntimeError, match="all workers have ended, 2 trials left; the same call goes on"):
        run_study(job(tmp_path))


def test_progress_counts_tickets_and_estimates_the_rest():
    study = optuna.create_study(direction="maximize")
    for value in (1.0, 3.0):
        study.add_trial(optuna.trial.create_trial(value=value))
    study.add_trial(optuna.trial.create_trial(state=TrialState.FAIL))
    for _ in range(3):
        study.enqueue_trial({})
    assert progress(study, "trials", 30.0) == "trials: 3/6, best 3.00 (trial 1), 1 failed, about 30 s left"
    assert progress(study, "trials", 300.0, 2).endswith("about 15 min left, 2 kept from before")
    assert progress(study, "trials", 36000.0, 2).endswith("about 30 h left, 2 kept from before")
    # A trial that was lost with its worker, and is run again, is no failure, and what it took is no pace.
    study.add_trial(optuna.trial.create_trial(state=TrialState.WAITING, system_attrs={"retry_history": [2]}))
    assert progress(study, "trials", 30.0) == "trials: 2/6, best 3.00 (trial 1), about 60 s left"


# -- after the search --


def study_of(values):
    study = optuna.create_study(direction="maximize")
    for i, value in enumerate(values):
        attrs = {"configuration": {"slots": [i // 2]}}
        study.add_trial(optuna.trial.create_trial(value=value, user_attrs=attrs))
    return study


def test_the_best_with_different_configurations_are_confirmed_on_fresh_seeds_and_nothing_is_trained_twice():
    study = study_of([5.0, 6.0, 3.0, 1.0, 7.0, 2.0])
    best = finale.best_trials(study, 2)
    assert [trial.number for trial in best] == [4, 1]
    calls = []

    def train(argument):
        calls.append(argument)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return {2: 10.0, 0: 12.0}[argument[0]["slots"][0]] + argument[1]

    with pytest.raises(KeyboardInterrupt):
        finale.confirm(study, best, (1, 2), train)
    followed = []
    found = finale.confirm(study, best, (1, 2), train, lambda left: followed.extend(left) or left)
    assert len(followed) == 2  # what is left
    assert found == [
        {"number": 1, "scores": [13.0, 14.0], "mean": 13.5},
        {"number": 4, "scores": [11.0, 12.0], "mean": 11.5},
    ]
    assert len(calls) == 5  # the one that was interrupted began anew


def result(name, seed, rows, **others):
    return {
        "name": name, "seed": seed, "rows": list(rows), "gold": [0] * len(rows), "score": 100 * float(np.mean(rows)),
        "parameters": 5, "epochs": 1.0, "seconds": 2.0, **others,
    }  # fmt: skip


def test_every_contender_is_tested_once_on_each_seed_also_across_interruptions(tmp_path):
    calls = []

    def train(argument):
        calls.append(argument)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return result(argument[0], argument[1], [1.0, 0.0])

    names = finale.contenders({"rank": 8}, None)
    with pytest.raises(KeyboardInterrupt):
        finale.open_test(names, (7, 8), tmp_path, train)
    followed = []
    found = finale.open_test(names, (7, 8), tmp_path, train, lambda left: followed.extend(left) or left)
    assert len(followed) == 4
    assert [(r["name"], r["seed"]) for r in found] == [
        (finale.BASE, 7), *((name, seed) for seed in (7, 8) for name in names if name != finale.BASE)
    ]  # fmt: skip
    assert len(calls) == len(found) + 1 and len(set(calls)) == len(found)
    assert finale.summary(found, "accuracy")["test_accesses"] == 7


def test_the_interval_covers_rows_and_seeds():
    generator = np.random.default_rng(0)
    rows = generator.random((2, 200)) < 0.5

    def of(shift):
        return [result("x", seed, np.clip(rows[0] + shift[seed], 0, 1)) for seed in range(3)]

    def difference(first, second):
        records = [{**r, "name": finale.WINNER} for r in first] + [{**r, "name": "rival"} for r in second]
        (found,) = finale.summary(records, "accuracy")["differences"]
        return found["estimate"], found["low"], found["high"]

    estimate, *bounds = difference(of([0, 0, 0])[:1], [result("y", 0, rows[1])])
    a, b = (Evaluation({"accuracy": 100 * r.mean()}, {"accuracy": r.astype(float)}, np.zeros(200, int)) for r in rows)
    plain = paired_interval(a, b, "accuracy")
    assert estimate == pytest.approx(plain.estimate)
    assert bounds == pytest.approx([plain.low, plain.high], abs=1.0)
    # Seeds that differ much make it wider, rows that are the same do not.
    same, noisy = of([0, 0, 0]), of([0, 0.3, -0.3])
    assert difference(same, same) == (0, 0, 0)
    estimate, low, high = difference(noisy, same)
    assert high - low > 5 and low <= estimate <= high


@pytest.mark.parametrize(
    ("against", "said"),
    [
        (((0.1, 0.9), (0.2, 0.8), (0.3, 2.0)), "wins here"),
        (((0.24, 2.41), (-0.02, 0.02), (-1.13, 0.5)), "Undecided"),  # the same-size LoRA alone is worse: no win
        (((0.1, 0.9), (0.2, 0.8), (-0.1, 2.0)), "Undecided"),
        (((0.1, 0.9), (-0.8, -0.2), (0.3, 2.0)), "loses here"),
        (((-0.9, 0.9),), "Undecided"),
    ],
)
def test_the_bio_adapter_wins_only_against_every_rival(against, said):
    rivals = (finale.SAME_SIZE, finale.LORA, finale.BASE) if len(against) > 1 else (finale.BASE,)
    rivalries = []
    for rival, (low, high) in zip(rivals, against, strict=True):
        interval, p = Interval((low + high) / 2, low, high, 0.95), 0.5 if low < 0 < high else 0.01
        difference = Difference("test", rival, "spearman", interval, p, 1.0, seeds=3, rows=100)
        rivalries.append(Rivalry(rival, (difference,), interval, p))
    text = finale.verdict(Comparison(finale.WINNER, tuple(rivalries)))
    assert said in text and "model as it comes" in text and "spearman" in text
    assert all(f"[{low:+.2f}, {high:+.2f}]" in text for low, high in against)
    assert (finale.SAME_SIZE in text) == (len(against) > 1)


def test_the_winner_of_noise_is_shrunk_to_the_mean():
    from bioadapt.search.space.model import SearchedModel, SearchedModule
    from bioadapt.search.space.space import SearchSpace

    names = ("lateral_inhibition", "leaky_integrator", "predictive_coding", "gain_field")
    space = SearchSpace(SearchedModel((SearchedModule("layer.0.x", 0, "x", 8, 8),), 1000, names), slots=2)
    generator = np.random.default_rng(0)
    study = optuna.create_study(direction="maximize")
    for _ in range(40):
        params = {name: generator.choice(np.array(d.choices, dtype=object)) for name, d in space.distributions.items()}
        value = 50 + generator.normal()
        study.add_trial(optuna.trial.create_trial(value=value, params=params, distributions=space.distributions))
    found = finale.shrinkage(study, space, study.best_trial.number)
    assert found["observed"] == study.best_value > 51.5
    assert 49.5 < found["posterior"] < study.best_value - 0.5 and found["sd"] > 0
    few = optuna.create_study(direction="maximize")
    few.add_trial(study.trials[0])
    assert finale.shrinkage(few, space, 0) == {"observed": study.trials[0].value, "posterior": None, "sd": None}


@pytest.mark.parametrize(("wanted", "count"), [("1%", 227_132), ("0.5 %", 113_566), (1000, 1000), ("20_000", 20_000)])
def test_a_budget_is_a_number_or_a_share(wanted, count):
    assert budget(wanted, 22_713_216) == count


@pytest.mark.parametrize("wanted", ["", "x", "0", "-5", "0%", "nan%", "1.5", "inf%"])
def test_a_budget_that_is_none_is_refused(wanted):
    with pytest.raises(ValueError, match="budget of parameters .*a whole number or a share such as 1%"):
        budget(wanted, 1000)
