"""The cerebellar network: wiring, winners, gates; an agent's network made of it; and the experiment about it."""

from __future__ import annotations

import math
import sys

import numpy as np
import pytest
import torch

from bioadapt import build_primitive
from bioadapt.circuits.cerebellar import CerebellarNetwork, cerebellar_policy
from bioadapt.circuits.granule_layer import CerebellarExpansion, branch_gates, weighted_drive, winning_rates
from bioadapt.evaluation import MissingExtra
from bioadapt.primitives.base import Host

SEEDS = range(4)
SIZES = {"inputs": 12, "units": 64, "fan_in": 3, "branches": 8}


def expansion(seed: int, **changes) -> CerebellarExpansion:
    """With trained claws, random weights and biases unless told otherwise."""
    torch.manual_seed(seed)
    layer = CerebellarExpansion(**{**SIZES, "train_input": True, "seed": seed, **changes})
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.normal_()
    return layer


def dense(layer: CerebellarExpansion, weight: torch.Tensor) -> torch.Tensor:
    """W as a matrix, claw by claw."""
    matrix = torch.zeros(layer.units, layer.inputs)
    for unit, claws in enumerate(layer.wiring.tolist()):
        for claw, place in enumerate(claws):
            matrix[unit, place] = weight[unit, claw]
    return matrix


def by_hand(layer: CerebellarExpansion, x: torch.Tensor) -> torch.Tensor:
    """The code of single inputs (N, inputs), unit by unit."""
    frozen = torch.full((layer.units, layer.fan_in), layer.fan_in**-0.5)
    weight, bias = (layer.weight, layer.bias) if layer.train_input else (frozen, torch.zeros(layer.units))
    codes = []
    for z in x @ dense(layer, weight.detach()).T + bias.detach():
        order = sorted(range(layer.units), key=lambda unit: -z[unit])[: layer.winners]
        h = [max(float(z[unit]), 0.0) if unit in order else 0.0 for unit in range(layer.units)]
        size = layer.units // layer.branches
        means = [sum(h[start : start + size]) / size for start in range(0, layer.units, size)]
        average = sum(means) / len(means)
        gates = [2 / (1 + math.exp(-layer.kappa * (mean / average - 1))) for mean in means]
        codes.append([rate * gates[unit // size] for unit, rate in enumerate(h)])
    return torch.tensor(codes)


@pytest.mark.parametrize("seed", SEEDS)
class TestExpansion:
    @pytest.mark.parametrize("train_input", [False, True])
    def test_is_the_equation(self, seed, train_input):
        layer = expansion(seed, train_input=train_input, inputs=40, fan_in=6)  # no two units with the same claws
        x = torch.randn(5, 40)
        torch.testing.assert_close(layer(x).detach(), by_hand(layer, x), rtol=1e-4, atol=1e-5)

    def test_has_the_claws_of_the_primitive(self, seed):
        primitive = build_primitive("cerebellar_granule", 12, 12, cells=64, claws=3, host=Host(seed=seed))
        assert torch.equal(expansion(seed).wiring, primitive.wiring)
        assert not torch.equal(expansion(seed + 1).wiring, primitive.wiring)

    def test_every_unit_reads_exactly_its_claws(self, seed):
        layer = expansion(seed)
        assert (layer.wiring.sort(1).values.diff(dim=1) > 0).all()
        x = torch.randn(12)
        slopes = torch.autograd.functional.jacobian(lambda v: weighted_drive(v[None], layer.wiring, layer.weight)[0], x)
        assert torch.equal(slopes, dense(layer, layer.weight.detach()))
        assert ((slopes != 0).sum(1) == 3).all()

    def test_gradients_off_the_support_are_none_and_on_it_those_of_the_matrix(self, seed):
        layer, x = expansion(seed, active=1.0, kappa=0.0), torch.randn(7, 12)
        weights = torch.randn(7, 64)
        (layer(x) * weights).sum().backward()
        matrix = dense(layer, layer.weight.detach()).requires_grad_()
        (torch.relu(x @ matrix.T + layer.bias.detach()) * weights).sum().backward()
        torch.testing.assert_close(layer.weight.grad, matrix.grad.gather(1, layer.wiring))
        assert layer.weight.grad.shape == (64, 3)

    def test_training_starts_where_the_frozen_layer_is(self, seed):
        trained = CerebellarExpansion(**SIZES, train_input=True, seed=seed)
        frozen = CerebellarExpansion(**SIZES, seed=seed)
        x = torch.randn(9, 12, generator=torch.Generator().manual_seed(seed))
        torch.testing.assert_close(trained(x), frozen(x))
        assert not list(frozen.parameters())

    @pytest.mark.parametrize("active", [0.05, 0.29, 1.0])
    def test_no_more_units_fire_than_may(self, seed, active):
        layer = expansion(seed, units=100, branches=10, active=active)
        firing = (layer(torch.randn(50, 12)) > 0).sum(1)
        assert layer.winners == round(active * 100)
        assert 0 < firing.max() <= layer.winners

    def test_errors_reach_winners_alone(self, seed):
        drive = torch.randn(20, 64, generator=torch.Generator().manual_seed(seed)).requires_grad_()
        rates = winning_rates(drive, 6)
        rates.sum().backward()
        assert torch.equal(drive.grad, (rates > 0).float())
        assert (drive.grad.sum(1) == 6).all()

    def test_without_kappa_the_gates_are_away(self, seed):
        layer, x = expansion(seed, kappa=0.0), torch.randn(20, 12)
        assert torch.equal(layer(x), layer.rates(x))
        assert torch.equal(branch_gates(layer.rates(x), 8, 0.0), torch.ones(20, 8))
        assert not torch.equal(expansion(seed, kappa=2.0)(x), layer.rates(x))

    def test_gates_lie_between_nought_and_two_and_know_no_scale(self, seed):
        layer, x = expansion(seed), torch.randn(50, 12)
        with torch.no_grad():
            layer.bias.zero_()
        gates = branch_gates(layer.rates(x), 8, 2.0)
        assert gates.shape == (50, 8) and gates.min() > 0 and gates.max() < 2 and gates.std() > 0.1
        torch.testing.assert_close(branch_gates(layer.rates(37 * x), 8, 2.0), gates)

    def test_gates_have_no_parameters_and_pass_no_error(self, seed):
        gated, plain = expansion(seed), expansion(seed, kappa=0.0)
        assert [name for name, _ in gated.named_parameters()] == [name for name, _ in plain.named_parameters()]
        rates = torch.rand(3, 64, requires_grad=True)
        assert not branch_gates(rates, 8, 2.0).requires_grad

    def test_shapes_and_half_precision(self, seed):
        layer, x = expansion(seed), torch.randn(2, 3, 12)
        code = layer(x)
        assert code.shape == (2, 3, 64)
        torch.testing.assert_close(layer(x[1, 2]), code[1, 2])
        found = layer(x.to(torch.bfloat16))
        assert found.dtype == torch.float32
        assert torch.equal(found, layer(x.to(torch.bfloat16).float()))


def test_gates_of_known_activities():
    rates = torch.tensor([[1.0, 1.0, 2.0, 0.0], [3.0, 1.0, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0]])
    high, low = (2 / (1 + math.exp(-2 * contrast)) for contrast in (1.0, -1.0))
    expected = torch.tensor([[1.0, 1.0], [high, low], [1.0, 1.0]])
    torch.testing.assert_close(branch_gates(rates, 2, 2.0), expected)


@pytest.mark.parametrize(("train_input", "parameters"), [(False, 0), (True, 64 * 3 + 64)])
def test_a_network_counts_support_biases_and_read_out(train_input, parameters):
    network = CerebellarNetwork(12, 5, 64, fan_in=3, branches=8, train_input=train_input)
    assert sum(parameter.numel() for parameter in network.parameters()) == parameters + 5 * 64 + 5
    x = torch.randn(4, 12)
    torch.testing.assert_close(network(x), network.granule(x) @ network.purkinje.weight.T + network.purkinje.bias)


def test_a_loaded_network_has_the_wiring_it_was_trained_with():
    first, second = (CerebellarNetwork(12, 5, 64, fan_in=3, branches=8, seed=seed) for seed in (1, 2))
    x = torch.randn(4, 12)
    assert not torch.equal(first(x), second(x))
    second.load_state_dict(first.state_dict())
    assert torch.equal(first(x), second(x))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"fan_in": 12}, "'fan_in' must be an integer from 1 to 11, got 12"),
        ({"fan_in": 0}, "'fan_in' must be an integer from 1 to 11, got 0"),
        ({"units": 2.5}, "'units' must be an integer"),
        ({"active": 0.01}, "'active' must be a number from 0.015625 to 1.0, got 0.01"),
        ({"kappa": -1.0}, "'kappa' must be a number from 0.0"),
        ({"train_input": 1}, "'train_input' must be True or False, got 1"),
        ({"branches": 7}, "units must be a multiple of branches=7, got 64"),
        ({"fan_in": 1}, "fan_in=1 makes 12 different sets of 12 inputs, fewer than units=64"),
        ({"inputs": 1}, "'inputs' must be an integer from 2"),
    ],
)
def test_bad_numbers_are_named(changes, message):
    with pytest.raises(ValueError, match=message):
        CerebellarExpansion(**{**SIZES, **changes})


# -- agents --


def test_without_stable_baselines_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "stable_baselines3", None)
    with pytest.raises(MissingExtra, match=r"pip install bioadapt\[rl\]"):
        cerebellar_policy()


@pytest.fixture(scope="module")
def sb3():
    pytest.importorskip("gymnasium")
    return pytest.importorskip("stable_baselines3")


@pytest.fixture(scope="module")
def trained(sb3):
    """A DQN after a handful of updates, and its parameters and wiring before them."""
    policy = cerebellar_policy(fibres=8, units=32, branches=4, seed=5)
    agent = sb3.DQN("MlpPolicy", "CartPole-v1", policy_kwargs=policy, learning_starts=20, seed=0, device="cpu")
    before = {name: tensor.clone() for name, tensor in agent.q_net.state_dict().items()}
    agent.learn(60)
    return agent, before


WIRING = "features_extractor.granule.wiring"


def test_an_agent_trains_everything_but_the_wiring(trained):
    agent, before = trained
    after = agent.q_net.state_dict()
    assert {name for name in before if torch.equal(before[name], after[name])} == {WIRING}
    assert set(dict(agent.q_net.named_parameters())) == set(before) - {WIRING}
    assert torch.equal(agent.q_net_target.state_dict()[WIRING], after[WIRING])


def test_a_saved_agent_keeps_every_bit(trained, sb3, tmp_path):
    agent, _ = trained
    agent.save(tmp_path / "agent.zip")
    loaded = sb3.DQN.load(tmp_path / "agent.zip", device="cpu")
    own, found = agent.q_net.state_dict(), loaded.q_net.state_dict()
    assert own.keys() == found.keys() and WIRING in own
    assert all(torch.equal(own[name], found[name]) for name in own)
    x = torch.randn(6, 4)
    assert torch.equal(agent.q_net(x), loaded.q_net(x))


def test_dendrites_and_seeds_reach_the_agent(sb3):
    def wiring_and_kappa(**options):
        policy = cerebellar_policy(fibres=8, units=32, branches=4, **options)
        granule = sb3.DQN(
            "MlpPolicy", "CartPole-v1", policy_kwargs=policy, device="cpu"
        ).q_net.features_extractor.granule
        return granule.wiring, granule.kappa

    first, second = wiring_and_kappa(seed=1, kappa=0.0), wiring_and_kappa(seed=2)
    assert not torch.equal(first[0], second[0])
    assert (first[1], second[1]) == (0.0, 2.0)


def test_an_actor_critic_takes_it_too(sb3):
    policy = cerebellar_policy(fibres=8, units=32, branches=4)
    agent = sb3.A2C("MlpPolicy", "CartPole-v1", policy_kwargs=policy, device="cpu")
    before = agent.policy.features_extractor.granule.weight.clone()
    agent.learn(10)
    assert not torch.equal(agent.policy.features_extractor.granule.weight, before)


# -- the experiment --


@pytest.fixture(scope="module")
def digits():
    pytest.importorskip("sklearn")
    from experiments.cerebellum import digits

    return digits


@pytest.fixture(scope="module")
def run(sb3):
    for needed in ("sklearn", "matplotlib", "scipy"):
        pytest.importorskip(needed)
    from experiments.cerebellum import run

    return run


class TestDigits:
    def test_rows_are_split_by_digit_and_never_shared(self, digits):
        rows = digits.split(5, 0)
        assert [len(rows[name].digits) for name in ("train", "validation")] == [50, 200]
        assert (rows["train"].digits.bincount() == 5).all() and (rows["validation"].digits.bincount() == 20).all()
        assert sum(len(rows[name].digits) for name in ("train", "validation", "test")) == 1797
        whole = torch.cat([rows[name].inputs for name in ("train", "validation", "test")])
        assert len(whole.unique(dim=0)) == len(np.unique(digits.images()[0], axis=0))
        assert abs(rows["train"].inputs.mean()) < 1e-5
        noise = (rows["noise"].inputs - rows["test"].inputs).std()
        full_range = (whole.amax(0) - whole.amin(0)).max()
        assert (noise / full_range).item() == pytest.approx(0.5, rel=0.02)

    def test_arms_have_the_trained_parameters_they_claim(self, digits):
        counts = {
            arm: sum(parameter.numel() for parameter in digits.network(arm, 0)[1].parameters()) for arm in digits.ARMS
        }
        assert counts.pop(digits.MLP) == 10_285
        assert counts.pop(digits.LINEAR) == 650
        assert counts.pop(digits.SMALL) == 2_570
        assert set(counts.values()) == {10_250}

    def test_large_expansions_beat_small_ones(self, digits):
        arms = (digits.GRANULE_4, digits.SMALL)
        rows = [
            row
            for seed in range(100, 104)  # the published run has others
            for row in digits.run_seed(seed, arms=arms, labels=(20,), steps=(50,))
            if row["measure"] == "test accuracy"
        ]
        mean = {arm: np.mean([row["value"] for row in rows if row["arm"] == arm]) for arm in arms}
        assert mean[digits.GRANULE_4] > mean[digits.SMALL] + 0.01

    def test_the_rate_is_chosen_on_validation_rows(self, digits, monkeypatch):
        found = {1e-3: (0.5, 0.9), 3e-3: (0.8, 0.1), 1e-2: (0.7, 0.6), 3e-2: (0.1, 0.99)}

        def accuracies(trained, rows, seed, rate, steps):
            validation, test = found[rate]
            return {step: {"validation": validation, "test": test, "noise": test / 2} for step in steps}

        monkeypatch.setattr(digits, "accuracies", accuracies)
        rows = digits.run_seed(0, arms=(digits.MLP,), labels=(5,), steps=(50,))
        assert [(row["rate"], row["value"]) for row in rows] == [(3e-3, 0.1), (3e-3, 0.05)]


class TestCartPole:
    def test_the_curve_is_the_mean_of_the_last_ten_episodes_that_have_ended(self, run):
        curve = run.cartpole.learning_curve([float(n) for n in range(1, 13)], [100] * 12, 1250)
        assert curve == {250: 1.5, 500: 3.0, 750: 4.0, 1000: 5.5, 1250: 7.5}
        assert run.cartpole.learning_curve([300.0], [300], 500) == {250: 0.0, 500: 300.0}

    def test_arms_are_of_one_size(self, run):
        env = run.cartpole.gym.make(run.cartpole.TASK)
        sizes = [
            sum(parameter.numel() for parameter in run.cartpole.agent(arm, 1e-3, 0, env).q_net.parameters())
            for arm in run.cartpole.ARMS
        ]
        assert sizes == [1922, 1874, 1874]

    def test_rates_are_chosen_by_their_mean_on_tuning_seeds_alone(self, run):
        def row(use, rate, value):
            return {"use": use, "arm": "a", "rate": rate, "value": value}

        rows = [row("tuning", 1.0, 10), row("tuning", 1.0, 0), row("tuning", 2.0, 6), row("tuning", 2.0, 6)]
        assert run.cartpole.best_rates([*rows, row("test", 1.0, 100)]) == {"a": 2.0}

    def test_noise_is_a_share_of_what_random_actions_spread(self, run):
        spread = run.cartpole.spread()
        clean = run.cartpole.gym.make(run.cartpole.TASK)
        noisy = run.cartpole.NoisyEyes(clean, 0.5, 0)
        seen = np.stack([noisy.observation(np.ones(4)) for _ in range(2000)])
        np.testing.assert_allclose(seen.std(0), 0.5 * spread, rtol=0.1)
        silent = run.cartpole.NoisyEyes(clean, 0.0, 0)
        assert np.array_equal(silent.observation(np.ones(4)), np.ones(4, dtype=np.float32))


@pytest.fixture(scope="module")
def rows(run):
    """Two seeds; arm number n scores n everywhere, and a tenth more in the second."""
    rows = []
    parts = {
        "digits": (
            run.digits.ARMS,
            [(f"{n} labels, {s} steps", m) for n in (5, 20) for s in (50, 500) for m in (run.CLEAN, run.NOISY)],
        ),
        "cartpole": (
            run.cartpole.ARMS,
            [("no noise", run.cartpole.AREA), ("step 250", run.cartpole.CURVE), ("step 500", run.cartpole.CURVE)]
            + [(run.cartpole.noise_name(share), run.cartpole.RETURN) for share in run.cartpole.NOISES],
        ),
    }
    for part, (arms, columns) in parts.items():
        for number, arm in enumerate(arms):
            common = {"part": part, "arm": arm, "trained": 1000, "rate": 1e-3}
            if part == "cartpole":
                place = {"seed": 1000, "condition": "no noise", "measure": run.cartpole.AREA}
                rows.append({**common, **place, "use": "tuning", "value": 99.0})
            for seed in (0, 1):
                for condition, measure in columns:
                    place = {"seed": seed, "condition": condition, "measure": measure}
                    rows.append({**common, **place, "use": "test", "value": number + 0.1 * seed * number})
    return rows


class TestReport:
    def test_claims_are_paired_differences_of_test_values(self, run, rows):
        found = {claim.text: claim for claim in run.claims(rows)}
        full = found["The full circuit learns from fewer trials"]
        assert full.values == pytest.approx([2.0, 2.2])
        assert found["Dendrites add to it"].values == pytest.approx([1.0, 1.1])
        assert found["A larger expansion helps"].values == pytest.approx([-3.0, -3.3])
        assert found["The full circuit wins more points of Pong"].verdict == "not testable here"
        assert all(len(claim.values) == 2 for claim in found.values() if "Pong" not in claim.text)

    def test_tables_hold_every_arm_once(self, run, rows):
        text = run.tables(rows)
        for arm in [*run.digits.ARMS, *run.cartpole.ARMS]:
            assert text.count(f"| {arm} |") == 1
        assert "| granule, dendrites | 1,000 | 0.001 | 2.1 ± 1.3 |" in text

    def test_the_picture_shows_every_arm(self, run, rows):
        few, many, curves, noises = run.draw(rows).axes
        for axes in (few, many):
            assert [label.get_text() for label in axes.get_yticklabels()] == list(run.digits.ARMS)
        assert [line.get_label() for line in curves.get_lines()] == list(run.cartpole.ARMS)
        assert len(noises.containers) == len(run.cartpole.ARMS)


def test_an_agent_learns_and_is_measured_through_the_whole_run(run, monkeypatch):
    monkeypatch.setattr(run.cartpole, "steps_of", lambda quick: 1100)
    monkeypatch.setattr(run.cartpole, "EPISODES", 2)
    monkeypatch.setattr(run.cartpole, "COPIES", 2)
    rows = run.cartpole.run_seed(0, True, {run.cartpole.GATED: 1e-3})
    measures = [row["measure"] for row in rows]
    assert measures.count(run.cartpole.CURVE) == 4
    assert measures.count(run.cartpole.RETURN) == len(run.cartpole.NOISES)
    curve = [row["value"] for row in rows if row["measure"] == run.cartpole.CURVE]
    assert rows[0]["value"] == pytest.approx(np.mean(curve)) and min(curve) > 8
