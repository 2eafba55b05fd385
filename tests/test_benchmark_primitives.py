"""The benchmark of the primitives: times are taken in relation, the reference's counts are known, and it runs."""

import itertools
from dataclasses import astuple, replace

import pytest
import torch
from helpers.scripts import loaded, run

from bioadapt import list_primitives


@pytest.fixture(scope="module")
def bench():
    with loaded("primitives") as module:
        yield module


class Machine:
    """A clock, and steps that take a given time on a machine whose speed changes from turn to turn."""

    def __init__(self, bench, speeds=(1.0,)):
        self.bench, self.speeds, self.now, self.order = bench, itertools.cycle(speeds), 0.0, []

    def step(self, name, forward, backward):
        def start():
            self.order.append(name)
            self.speed = next(self.speeds)
            self.now += forward * self.speed
            return torch.zeros(())

        def end(_):
            self.now += backward * self.speed

        return self.bench.Step(torch.nn.Identity(), start, end)

    def ratios(self, steps, rounds, warmup=0):
        found = self.bench.relative_times(steps, "lora_r8", rounds, warmup, lambda: self.now)
        return {name: astuple(ratios) for name, ratios in found.items()}


def test_times_are_in_relation_to_the_references(bench):
    machine = Machine(bench)
    steps = {"lora_r8": machine.step("lora_r8", 1, 2), "other": machine.step("other", 3, 3)}
    found = machine.ratios(steps, rounds=5)
    assert found == {"lora_r8": (1, 1, 1, 1), "other": (3, 2, 2, 2)}


def test_a_lucky_turn_of_the_reference_moves_nothing(bench):
    lucky = [1.0] * 28 + [0.1]  # whoever has the turn
    machine = Machine(bench, lucky)
    names = [f"method {i}" for i in range(12)]
    steps = {name: machine.step(name, 1, 1) for name in ("lora_r8", *names)}
    found = machine.ratios(steps, rounds=9)
    assert all(ratios == pytest.approx((1, 1, 1, 1)) for ratios in found.values())


def test_every_round_visits_all_and_the_reference_again_and_again(bench):
    machine = Machine(bench)
    names = [f"method {i}" for i in range(9)]
    machine.ratios({name: machine.step(name, 1, 1) for name in ("lora_r8", *names)}, rounds=2, warmup=1)
    assert machine.order[::2] == machine.order[1::2]  # once to warm up, once for the time
    order = machine.order[::2]
    rounds = [order[i : i + 12] for i in range(0, 36, 12)]
    assert all(sorted(order) == sorted([*names, *["lora_r8"] * 3]) for order in rounds)
    assert all(order[0] == order[9] == order[11] == "lora_r8" for order in rounds)
    assert len(set(map(tuple, rounds))) == 3  # neighbours change


def test_the_first_step_of_a_turn_is_not_timed(bench):
    machine = Machine(bench, [7.0, 1.0, 3.0, 1.0])
    steps = {"lora_r8": machine.step("lora_r8", 1, 1), "other": machine.step("other", 1, 1)}
    assert machine.ratios(steps, rounds=3)["other"] == (1, 1, 1, 1)


def test_the_optimisers_part_is_timed(bench):
    machine = Machine(bench)

    class Optimiser:
        def step(self):
            machine.now += 2

    steps = {"lora_r8": machine.step("lora_r8", 1, 1), "other": machine.step("other", 1, 1)}
    steps["other"] = replace(steps["other"], optimiser=Optimiser())
    assert machine.ratios(steps, rounds=1)["other"] == (1, 2, 2, 2)


def test_one_round_is_its_own_median(bench):
    machine = Machine(bench)
    steps = {"lora_r8": machine.step("lora_r8", 1, 1), "other": machine.step("other", 1, 2)}
    assert machine.ratios(steps, rounds=1)["other"] == (1, 1.5, 1.5, 1.5)


def test_every_registered_primitive_is_measured(bench):
    named = {method.name: method.family for method in bench.methods(["lateral_inhibition+kv_lif"])}
    assert {name for name, family in named.items() if family == "primitive"} == set(list_primitives())
    assert named["lora_r8"] == named["c3a"] == "peft" and named["lateral_inhibition+kv_lif"] == "set"


def test_the_command_measures_and_tells_where_the_bars_are(bench, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(bench, "RESULTS", tmp_path)
    words = ("--only", "homeostatic_scaling", "--rounds", "1", "--warmup", "0")
    assert run(bench, monkeypatch, *words) == 0
    printed = capsys.readouterr().out
    assert "LoRA r=8 comes to the known numbers." in printed
    assert "Median of 1 primitives: " in printed and "(bar 1.1)" in printed
    assert not list(tmp_path.iterdir()) and "no CSV is written" in printed


def test_what_is_far_above_the_bar_is_named(bench):
    numbers = dict.fromkeys(bench.Row.__dataclass_fields__, 1.0)
    rows = [
        bench.Row(**{**numbers, "method": name, "family": family, "step_ratio": ratio})
        for name, family, ratio in [
            ("a", "primitive", 1.0),
            ("b", "primitive", 1.2),
            ("c", "primitive", 1.6),
            ("d", "peft", 9),
        ]
    ]
    assert "1.200 x the step's time" in bench.bar_report(rows) and bench.bar_report(rows).endswith("in time: c (1.6).")


def test_an_unknown_name_is_refused_with_those_that_are_known(bench, monkeypatch, capsys):
    with pytest.raises(SystemExit):
        run(bench, monkeypatch, "--only", "lateral_inhibitor")
    assert "lateral_inhibition" in capsys.readouterr().err
