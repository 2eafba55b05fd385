"""The experiments' scripts on tiny data: what they count, how they go on after a stop, and that merging is exact."""

from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("sentence_transformers")
pytest.importorskip("matplotlib")

from peft import get_peft_model

from bioadapt.testing.hosts import HOSTS
from experiments import cells
from experiments.ledger import over_seeds
from experiments.task_decoupling import run

NAMES = ("stsb", "qqp", "searchsnippets", "banking77")


def score(method, seed, way, task, value, *, weight=1.0, rate=2e-3, split="test"):
    return run.Score(8, 4, method, rate, seed, way, weight, task, split, 100, value)


def scores_of(method, way, drops, *, weight=1.0):
    """Two tasks; per seed, how far the merged adapter is below (or above) the single ones in the mean."""
    found = []
    for seed, drop in enumerate(drops):
        for task, shift in (("stsb", 1.0), ("qqp", -1.0)):
            found.append(score(method, seed, "single", task, 70.0 + shift))
            found.append(score(method, seed, way, task, 70.0 + drop + 3 * shift, weight=weight))
    return found


# -- rows --


def test_a_known_score_is_not_computed_again_even_by_another_process(tmp_path):
    path = tmp_path / "results.csv"
    place = {"method": "LoRA r=8", "learning_rate": 5e-4, "seed": 1, "way": "cat", "weight": 0.25}
    place |= {"task": "qqp", "split": "test"}
    run.Results(path, 8, 4).add(lambda: 61.25, trained=7, **place)
    again = run.Results(path, 8, 4)
    again.add(lambda: pytest.fail("computed twice"), **place)
    assert again.scores == [run.Score(8, 4, trained=7, score=61.25, **place)]
    again.add(lambda: 50.0, **{**place, "seed": 2})
    assert [found.score for found in run.read_scores(path)] == [61.25, 50.0]


def test_scores_of_other_numbers_of_rows_are_not_mixed(tmp_path):
    run.Results(tmp_path / "r.csv", 8, 4).add(
        lambda: 1.0, method="m", learning_rate=0.0, seed=0, way="single", weight=1.0, task="qqp", split="test"
    )
    with pytest.raises(ValueError, match="other numbers of rows"):
        run.Results(tmp_path / "r.csv", 9, 4)


# -- what is counted --


def test_the_rate_is_the_best_in_the_mean_over_tasks_on_validation_alone():
    values = {(1e-3, "stsb"): 80.0, (1e-3, "qqp"): 60.0, (1e-2, "stsb"): 90.0, (1e-2, "qqp"): 40.0}
    found = [score("m", 0, "single", t, v, rate=r, split="validation") for (r, t), v in values.items()]
    found.append(score("m", 0, "single", "qqp", 99.0, rate=1e-2))
    assert run.choose_rates(found) == {"m": 1e-3}


def test_drops_and_their_paired_differences():
    fly = "FlyLoRA r=32 k=8"
    lines = run.summarise(scores_of("LoRA r=8", "cat", [-4.0, -6.0]) + scores_of(fly, "route", [-1.0, -3.5]))
    found = {(line.what, line.adapters, line.task): line for line in lines}
    assert found["drop", "LoRA r=8", run.MEAN].estimate == pytest.approx(-5.0)
    assert found["drop", "LoRA r=8", "stsb"].estimate == pytest.approx(-3.0)
    assert found["merged", "FlyLoRA route", run.MEAN].estimate == pytest.approx(67.75)
    gap = found[run.DIFFERENCE, "FlyLoRA route - LoRA r=8", run.MEAN]
    paired = over_seeds([3.0, 2.5])
    assert (gap.estimate, gap.low, gap.high, gap.seeds) == pytest.approx((2.75, paired.low, paired.high, 2))
    assert gap.interval.verdict == "undecided"  # two seeds: the t factor is 12.7


def test_adapters_merged_with_different_weights_are_not_compared():
    fly = scores_of("FlyLoRA r=32 k=8", "dense", [-1.0, -2.0], weight=0.25)
    lines = run.summarise(scores_of("LoRA r=8", "cat", [-4.0, -6.0], weight=1.0) + fly)
    assert not [line for line in lines if line.what == run.DIFFERENCE]


def test_each_way_is_judged_by_its_drops_next_to_those_of_each_lora():
    fly, lora = scores_of("FlyLoRA r=32 k=8", "route", [-1.0, -3.5, -2.0]), scores_of("LoRA r=8", "cat", [-4.0] * 3)
    (claim,) = run.claims(lora + fly)
    assert claim.text == "Merged with weight 1 each, FlyLoRA route loses less than LoRA r=8"
    assert claim.values == pytest.approx([3.0, 0.5, 2.0])
    assert (claim.side, claim.bound) == ("above", 0.0)


def test_the_tables_state_trained_and_activated_parameters(tmp_path):
    fly = "FlyLoRA r=32 k=8"
    found = scores_of("LoRA r=8", "cat", [-4.0, -6.0]) + scores_of(fly, "route", [-1.0, -3.0])
    found += [score(name, 0, "single", "qqp", 1.0, split="validation") for name in ("LoRA r=8", fly)]
    found += [score("zero-shot", 0, "zero-shot", task, 60.0, weight=0.0) for task in ("stsb", "qqp")]
    lines = run.summarise(found)
    text = run.tables(found, lines)
    assert "| LoRA r=8 | 100 | 100 | 0.002 | 70.00 | 65.00 | -5.00 [" in text
    assert "| FlyLoRA route | 100 | 25 | 0.002 | 70.00 | 68.00 | -2.00 [" in text
    labels = [[label.get_text() for label in axes.get_yticklabels()] for axes in run.draw(lines).axes]
    assert labels == [["LoRA r=8", "FlyLoRA route"], ["FlyLoRA route - LoRA r=8"]]
    run.write_summary(lines, tmp_path / "summary.csv")
    assert len((tmp_path / "summary.csv").read_text().splitlines()) == len(lines) + 1


def test_a_score_is_published_as_it_was_added(tmp_path):
    place = {"method": "LoRA r=8", "learning_rate": 5e-4, "seed": 1, "way": "cat", "weight": 1.0}
    results = run.Results(tmp_path / "r.csv", 8, 4)
    results.add(lambda: 61.25, trained=7, **place, task="qqp", split="test")
    header, line = (tmp_path / "r.csv").read_text().splitlines()
    assert dict(zip(header.split(","), line.split(","), strict=True)) == run.record(results.scores[0])


# -- merging --


def with_two_adapters(method):
    config = run.METHODS[method].config
    model = get_peft_model(HOSTS["bert"].model(), config(1), "one").eval()
    model.add_adapter("two", config(2))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name or name.endswith(".B"):
                parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return model


def changes(model, adapter, x):
    """What an adapter adds to the outputs of the first layer's query and intermediate projections."""
    layers = [model.base_model.model.encoder.layer[0].attention.self.query]
    layers.append(model.base_model.model.encoder.layer[0].intermediate.dense)
    model.set_adapter(adapter)
    return torch.cat([layer(x) - layer.base_layer(x) for layer in layers], -1)


@pytest.mark.parametrize(("method", "way"), [("LoRA r=8", "cat"), ("LoRA r=32", "cat"), ("FlyLoRA r=32 k=8", "route")])
@pytest.mark.parametrize("weight", [0.25, 1.0])
def test_merged_adapters_add_the_weighted_sum_of_what_each_adds(method, way, weight):
    model = with_two_adapters(method)
    x = torch.randn(3, 5, 32, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = weight * (changes(model, "one", x) + changes(model, "two", x))
        found = changes(model, run.merge(model, way, weight), x)
    assert expected.abs().max() > 0.1
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_the_dense_merge_lets_every_unit_write():
    model = with_two_adapters("FlyLoRA r=32 k=8")
    layer = model.base_model.model.encoder.layer[0].attention.self.query
    x = torch.randn(3, 5, 32, generator=torch.Generator().manual_seed(1))
    parts = [layer.circuits[name]["fly_lora"] for name in ("one", "two")]
    with torch.no_grad():
        expected = sum(0.25 * part.scale * x @ part.A.T @ part.B.T for part in parts)
        found = changes(model, run.merge(model, "dense", 0.25), x)[..., :32]
        model.delete_adapter("dense_0_25")  # or it would be merged as well
        routed = changes(model, run.merge(model, "route", 0.25), x)[..., :32]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert (found - routed).abs().max() > 0.01


def test_adapters_of_two_tasks_read_through_different_projections():
    model = with_two_adapters("FlyLoRA r=32 k=8")
    one, two = (
        model.base_model.model.encoder.layer[0].attention.self.query.circuits[name]["fly_lora"].A
        for name in ("one", "two")
    )
    assert not torch.equal(one, two)


# -- the order of things --


class Tuned:
    """In the place of an adapted model: remembers which adapter is active."""

    def __init__(self, log):
        self.log, self.active = log, ""

    def set_adapter(self, name):
        self.active = name

    def delete_adapter(self, name):
        self.log.append(("deleted", name))

    def parameters(self):
        return [torch.nn.Parameter(torch.zeros(3))]


class OneTask:
    """Scores by the rate it was trained with, best at the middle one."""

    metrics = ("accuracy",)

    def evaluate(self, encoder, split):
        encoder.log.append((split, encoder[0].model.active))
        return SimpleNamespace(scores={"accuracy": 50.0 - abs(encoder.rate - 2e-3)})


def fake_encoder(log, rate=0.0):
    class Encoder(list):
        pass

    encoder = Encoder([SimpleNamespace(model=Tuned(log))])
    encoder.log, encoder.rate = log, rate
    return encoder


@pytest.fixture
def staged(monkeypatch, tmp_path):
    """An experiment whose trainings are noted and not done."""
    trained, log = [], []

    def train(method, rate, seed, tasks, folder):
        trained.append((method.ways, rate, seed))
        return fake_encoder(log, rate)

    monkeypatch.setattr(run, "trained", train)
    monkeypatch.setattr(run, "fresh_encoder", lambda: fake_encoder(log))
    monkeypatch.setattr(run, "merge", lambda model, way, weight: f"{way} {weight:g}")
    tasks = {name: OneTask() for name in NAMES}

    def experiment():
        results = run.Results(tmp_path / "results.csv", 8, 4)
        return run.Experiment(tasks, results, tmp_path, run.RATES)

    return experiment, trained, log


def test_test_rows_are_touched_after_the_rates_are_chosen_and_with_the_chosen_one(staged):
    experiment, trained, log = staged
    experiment().run(seeds=2)
    splits = [what for what, _ in log if what != "deleted"]
    assert splits == ["validation"] * splits.count("validation") + ["test"] * splits.count("test")
    assert splits.count("validation") == 3 * 3 * 4
    assert splits.count("test") == 4 + 2 * 4 * (3 + 2 * 4)  # zero-shot; single, and 4 ways at two weights
    assert trained[9:] == [(method.ways, 2e-3, seed) for seed in range(2) for method in run.METHODS.values()]
    adapters = {adapter for what, adapter in log if what == "test"}
    assert adapters == {"", *NAMES, "cat 0.25", "cat 1", "route 0.25", "route 1", "dense 0.25", "dense 1"}


def test_a_finished_run_trains_nothing_again_and_more_seeds_add_to_it(staged):
    experiment, trained, log = staged
    experiment().run(seeds=1)
    trained.clear()
    log.clear()
    experiment().run(seeds=1)
    assert (trained, log) == ([], [])
    experiment().run(seeds=2)
    assert [seed for _, _, seed in trained] == [1, 1, 1]


@dataclass(frozen=True)
class Training:
    task: str
    rate: float


@dataclass(frozen=True)
class Trained(Training):
    params: int = 0


def test_cells_are_found_again_by_what_was_trained(tmp_path):
    path = tmp_path / "cells.csv"
    assert not list(cells.read(path, Trained))
    for result in (Trained("stsb", 1e-3, 8), Trained("a, b", 2e-3, 9)):
        cells.append(path, result)
    assert list(cells.read(path, Trained)) == [Trained("stsb", 1e-3, 8), Trained("a, b", 2e-3, 9)]
    assert {cells.identity(one, Training) for one in cells.read(path, Trained)} == {
        Training("stsb", 1e-3), Training("a, b", 2e-3)
    }  # fmt: skip
