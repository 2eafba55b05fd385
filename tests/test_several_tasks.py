"""Several tasks in sequence and merged: what is done in which order, on which rows, and what is counted."""

from types import SimpleNamespace

import pytest

pytest.importorskip("sentence_transformers")
pytest.importorskip("matplotlib")

import torch

from bioadapt import NeuroLoraConfig
from bioadapt.evaluation import ClassificationTask
from bioadapt.evaluation.training import adapt
from bioadapt.methods.neuro_lora import likeness
from experiments.several_tasks import run

NAMES = ("a", "b", "c")


class Model:
    """In the place of an adapted model: remembers its adapters, the active one, and what each has learned."""

    def __init__(self):
        self.peft_config, self.active = {}, ""

    def add_adapter(self, name, config):
        self.peft_config[name] = []
        self.active = name

    def set_adapter(self, name):
        assert name in self.peft_config
        self.active = name

    def delete_adapter(self, name):
        del self.peft_config[name]

    def parameters(self):
        return [torch.nn.Parameter(torch.zeros(7))]


@pytest.fixture
def log(monkeypatch):
    """Trainings and scores are noted and not done; a score tells how often a task was learned and how long ago."""
    noted = []

    def adapted(encoder, wrap):
        encoder[0].model.add_adapter(wrap.keywords["adapter_name"], None)

    def learn(encoder, task, rate, seed):
        model = encoder[0].model
        model.peft_config[model.active].append(task)
        noted.append(("learned", model.active, task, seed))

    def merge(model, way, weight):
        names = list(model.peft_config)
        model.add_adapter("merged", None)
        model.peft_config["merged"] = [task for name in names for task in model.peft_config[name]]
        noted.append((way, round(weight, 3), *names))
        return "merged"

    def score(encoder, adapter, task, split):
        noted.append((split, adapter, task))
        learned = encoder[0].model.peft_config[adapter]
        return 50.0 + (10.0 - learned[::-1].index(task) if task in learned else 0.0)

    monkeypatch.setattr(run, "fresh_encoder", lambda: [SimpleNamespace(model=Model())])
    monkeypatch.setattr(run, "adapt", adapted)
    monkeypatch.setattr(run, "learn", learn)
    monkeypatch.setattr(run, "merge", merge)
    monkeypatch.setattr(run, "score_of", score)
    return noted


def apply(name, split="test", seed=1):
    return list(run.apply(name, {task: task for task in NAMES}, 2e-3, seed, split))


# -- the order of things --


def test_one_adapter_learns_all_tasks_in_the_order_of_the_seed(log):
    apply("LoRA r=8")
    order = run.order_of(NAMES, 1)
    assert [what[1:3] for what in log if what[0] == "learned"] == [(order[0], task) for task in order]
    assert [what[2] for what in log if what[0] == "test"] == [order[0], order[0], order[1], *order]


def test_orders_depend_on_the_seed_alone():
    orders = {tuple(run.order_of(NAMES, seed)) for seed in range(12)}
    assert len(orders) > 3 and all(sorted(order) == list(NAMES) for order in orders)
    assert run.order_of(NAMES, 3) == run.order_of(NAMES, 3)


def test_single_adapters_are_merged_before_the_first_goes_on_learning(log):
    apply(run.NEURO)
    order = run.order_of(NAMES, 1)
    kinds = [what[0] for what in log]
    assert [what[1:3] for what in log[:3]] == [(task, task) for task in order]
    assert [what for what in log if what[0] == "route"] == [("route", 0.333, *order), ("route", 1.0, *order)]
    later = [what for what in log[kinds.index("route") :] if what[0] == "learned"]
    assert [what[1:3] for what in later] == [(order[0], order[1]), (order[0], order[2])]
    assert len({what[3] for what in log[:3]}) == 3


def test_choosing_a_rate_sees_the_end_of_the_sequence_on_validation_rows(log):
    rows = apply(run.FLY, "validation", seed=0)
    assert {what[0] for what in log} == {"learned", "validation"}
    assert [(row["setting"], row["step"]) for row in rows] == [(run.SEQUENCE, 3)] * 3


def test_all_methods_start_the_same_seed_alike(log):
    orders = {row["order"] for row in run.run_seed(2, {task: task for task in NAMES}, dict.fromkeys(run.METHODS, 1e-3))}
    assert len(orders) == 1
    assert len([what for what in log if what[0] == "learned"]) == 2 * 3 + 3 * 5


# -- what is counted --


def test_forgetting_and_drops(log):
    found = {name: value for name, (value,) in run.measures(apply(run.FLY))[run.FLY].items()}
    # The last task scores 60, the one before 59, the first 58; right after they were learned, all score 60.
    expected = {"end": 59.0, "forgetting": 1.5, "alone": 60.0, "drop averaged": -1.0, "drop summed": -1.0}
    assert found == pytest.approx(expected)


def rows_of(log, changes):
    """Test rows of two seeds; ``changes`` moves scores: (method, setting, step, place of the task) -> points."""
    rows = []
    for seed in (1, 2):
        for row in run.run_seed(seed, {task: task for task in NAMES}, dict.fromkeys(run.METHODS, 1e-3)):
            place = row["method"], row["setting"], row["step"], row["order"].split().index(row["task"])
            rows.append({**row, "score": row["score"] + seed * changes.get(place, 0.0)})
    zero = {"method": run.ZERO_SHOT, "setting": run.ZERO_SHOT, "split": "test", "trained": 0, "learning_rate": 0.0}
    return rows + [{**zero, "task": task, "score": 40.0} for task in NAMES]


def test_claims_are_paired_by_seed_and_point_the_right_way(log):
    changes = {(run.NEURO, run.SEQUENCE, 3, 0): 3.0, (run.FLY, run.SUMMED, 1, 0): -6.0}
    found = {claim.text: (claim.side, claim.values) for claim in run.claims(rows_of(log, changes))}
    assert found["In sequence, NeuroLoRA forgets less than FlyLoRA"] == ("below", pytest.approx([-1.5, -3.0]))
    assert found["In sequence, FlyLoRA forgets less than LoRA r=32"] == ("below", pytest.approx([0.0, 0.0]))
    better = "After a sequence, NeuroLoRA is better than FlyLoRA in the mean over tasks"
    assert found[better] == ("above", pytest.approx([1.0, 2.0]))
    drops = {text: values for text, (_, values) in found.items() if "loses less" in text}
    assert drops.pop("Adapters of single tasks, summed: NeuroLoRA loses less than FlyLoRA") == pytest.approx([2.0, 4.0])
    assert all(values == pytest.approx([0.0, 0.0]) for values in drops.values()) and len(drops) == 3


def test_a_table_row_and_a_place_in_the_picture_for_every_method(log):
    rows = rows_of(log, {})
    text = run.tables(rows)
    assert "mean 40.00" in text
    assert "| LoRA r=8 | 7 | 0.001 | 59.00 [59.00, 59.00] | 1.50 [1.50, 1.50] | - | - | - |" in text
    panels = [[label.get_text() for label in axes.get_yticklabels()] for axes in run.draw(rows).axes]
    assert panels == [list(run.METHODS)] * 2 + [[run.FLY, run.NEURO, run.PLAIN]] * 2


def test_the_rate_is_the_best_at_the_end_on_validation_and_shared_by_the_ablation():
    def row(rate, score, split="validation", method=run.NEURO):
        return {"method": method, "learning_rate": rate, "split": split, "score": score}

    rows = [row(1e-3, 70.0), row(1e-3, 60.0), row(1e-2, 80.0), row(1e-2, 40.0), row(1e-2, 99.0, "test")]
    assert run.choose_rates(rows) == {run.NEURO: 1e-3, run.PLAIN: 1e-3}


# -- learning --


def test_terms_of_the_adapter_take_part_in_learning():
    words = ["red green blue", "one two three", "blue red", "two one", "green", "three", "red blue green", "three one"]
    rows = {"text": words * 6, "label": ["colour", "number"] * 24}
    task = ClassificationTask("toy", {"train": rows})

    def overlap(weight):
        torch.manual_seed(0)
        encoder = run.fresh_encoder()
        config = NeuroLoraConfig(r=4, k=2, target_modules=r".*layer\.5.*query", orthogonality=weight, seed=0)
        model = adapt(encoder, lambda bare: run.get_peft_model(bare, config))
        run.learn(encoder, task, 5e-2, seed=0)
        (writers,) = [value for name, value in model.named_parameters() if name.endswith("neuro_lora.B")]
        assert not encoder.training
        return float(likeness(writers.detach().T[None]))

    assert overlap(10.0) < 0.5 * overlap(0.0)
