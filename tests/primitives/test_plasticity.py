"""What makes the mechanisms of the stage plasticity what they are."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from bioadapt import build_primitive
from bioadapt.primitives.base import Context, Host
from bioadapt.primitives.frames import unit

SEEDS = range(4)
N, D = 29, 37


@pytest.mark.parametrize("seed", SEEDS)
class TestDopamineRpe:
    VALUE, REWARD = 0.8, 0.8  # what the cue promises and what the outcome brings

    @pytest.fixture
    def module(self, seed):
        torch.manual_seed(seed)
        module = build_primitive("dopamine_rpe", 4, 4)
        with torch.no_grad():
            module.gate.fill_(1.0)
            module.critic.copy_(torch.eye(4)[:2])  # channel 0 is value, channel 1 reward
        return module

    def errors(self, module, *events: str) -> list[float]:
        """tanh of the error at each token, read as the gain of a channel that is never zero."""
        tokens = []
        for event in events:
            value, reward = self.VALUE * (event == "cue"), self.REWARD * (event == "reward")
            tokens.append([value, reward, 1.0, math.sqrt(4 - value**2 - reward**2 - 1)])  # unit scale
        x = torch.tensor([tokens])
        return (module(x) / x)[0, :, 2].tolist()

    def test_predicted_unexpected_and_omitted_reward(self, module):
        predicted = self.errors(module, "rest", "cue", "reward", "rest")
        assert predicted[2] == pytest.approx(0, abs=1e-4)
        assert self.errors(module, "rest", "rest", "reward")[2] == pytest.approx(math.tanh(self.REWARD), abs=1e-4)
        assert self.errors(module, "rest", "cue", "rest")[2] == pytest.approx(-math.tanh(self.VALUE), abs=1e-4)

    def test_the_answer_moves_from_the_reward_to_the_cue(self, module):
        assert self.errors(module, "rest", "cue", "reward")[1] == pytest.approx(math.tanh(0.9 * self.VALUE), abs=1e-4)

    def test_the_first_token_of_a_document_has_no_error(self, module):
        assert self.errors(module, "reward", "cue")[0] == 0
        x = torch.randn(1, 6, 4)
        packed = Context(resets=torch.tensor([[True, False, False, True, False, False]]))
        assert torch.count_nonzero(module(x, packed)[0, [0, 3]]) == 0
        padded = Context(mask=torch.tensor([[False, False, True, True, True, True]]))
        assert torch.count_nonzero(module(x, padded)[0, 2]) == 0
        assert (module(x, padded)[0, 3:] != 0).all()


@pytest.mark.parametrize("seed", SEEDS)
class TestHebbianTrace:
    @pytest.fixture
    def module(self, seed):
        torch.manual_seed(seed)
        return build_primitive("hebbian_trace", N, D, rank=4, host=Host(seed=seed)).train()

    def test_converges_to_the_correlation(self, module):
        v, y = torch.randn(3, 20, N), torch.randn(3, 20, D)
        mask = torch.rand(3, 20) > 0.3
        context = Context(x_in=torch.where(mask[..., None], v, 1e3), mask=mask)
        assert torch.equal(module.trace, 0.1 * torch.eye(4))
        for _ in range(500):
            module(torch.where(mask[..., None], y, 1e3), context)
            module.commit()
        post, pre = unit(y)[mask] @ module.post.T, unit(v)[mask] @ module.reader.T
        torch.testing.assert_close(module.trace, (post.T @ pre / len(post)).detach(), rtol=1e-3, atol=1e-4)

    def test_decays_if_the_postsynaptic_side_is_silent(self, module):
        for step in range(1, 4):
            module(torch.zeros(2, 5, D), Context(x_in=torch.randn(2, 5, N)))
            module.commit()
            torch.testing.assert_close(module.trace, 0.1 * 0.98**step * torch.eye(4))

    def test_learns_in_training_alone_and_once_per_commit(self, module):
        context = Context(x_in=torch.randn(2, 5, N))
        before = module.trace.clone()
        module.eval()(torch.randn(2, 5, D), context)
        module.train()(torch.randn(2, 5, D), context.replace(observing=False))
        module.commit()
        assert torch.equal(module.trace, before)
        module(torch.randn(2, 5, D), context)
        assert torch.equal(module.trace, before)
        module.commit()
        once = module.trace.clone()
        assert not torch.equal(once, before)
        module.commit()
        assert torch.equal(module.trace, once)

    def test_is_the_equation(self, module):
        module.wake()
        v = torch.randn(2, 5, N)
        with torch.no_grad():
            expected = v @ module.reader.T @ (module.plasticity * module.trace).T @ module.writer.T
        torch.testing.assert_close(module(torch.randn(2, 5, D), Context(x_in=v)), module.gate * expected)


@pytest.mark.parametrize("seed", SEEDS)
class TestHomeostaticScaling:
    @pytest.fixture
    def module(self, seed):
        torch.manual_seed(seed)
        return build_primitive("homeostatic_scaling", D, D).train()

    def test_rates_become_equal(self, module):
        x = torch.randn(4, 30, D) * torch.linspace(0.6, 1.5, D)
        mask = torch.rand(4, 30) > 0.3
        for _ in range(600):
            module(torch.where(mask[..., None], x, 1e3 * torch.arange(D)), Context(mask=mask))
            module.commit()
        rates = module.scale * unit(x)[mask].abs().mean(0)
        assert (rates.max() - rates.min()) / rates.mean() < 0.05

    def test_the_scale_stays_in_its_range(self, module):
        x = torch.zeros(1, 4, D)
        x[..., 0] = 1.0
        for _ in range(100):
            module(x)
            module.commit()
        assert module.scale[0] == 0.25
        assert (module.scale[1:] == 4.0).all()

    def test_the_change_is_proportional_to_the_features(self, module):
        module.wake()
        x, y = (torch.rand(2, 5, D) + 0.5 for _ in range(2))
        torch.testing.assert_close(module(x) / x, module(y) / y)
        torch.testing.assert_close((module(x) / x)[0, 0], module.gate * (module.scale - 1))

    def test_starts_by_itself(self, module):
        x = torch.randn(2, 5, D) * torch.linspace(0.5, 2, D)
        module(x).sum().backward()
        assert torch.count_nonzero(module.gate.grad) == 0
        module.commit()
        module(x).sum().backward()
        assert torch.count_nonzero(module.gate.grad) > D // 2

    def test_waking_leaves_the_identity_within_the_range(self, module):
        module.wake()
        assert (module.scale != 1).all()
        assert module.scale.min() >= 0.25 and module.scale.max() <= 4


@pytest.mark.parametrize("seed", SEEDS)
class TestHeterosynapticScaling:
    @pytest.mark.parametrize("size", [0.01, 1.0, 100.0])
    def test_row_norms_are_conserved_for_any_change(self, seed, size):
        torch.manual_seed(seed)
        weight = torch.randn(D, N)
        module = build_primitive("heterosynaptic_scaling", N, D, host=Host(weight, seed=seed))
        with torch.no_grad():
            module.change.normal_().mul_(size)
        change, _ = module.weight_delta(weight, None)
        assert change.norm() > 1e-3 * size
        torch.testing.assert_close((weight + change).norm(dim=1), weight.norm(dim=1), rtol=1e-4, atol=1e-4)

    def test_what_one_synapse_gains_the_others_lose(self, seed):
        torch.manual_seed(seed)
        weight = torch.rand(D, N) + 0.1
        module = build_primitive("heterosynaptic_scaling", N, D, host=Host(weight), rank=1)
        plane = torch.zeros(1, N)
        plane[0, 5] = 1.0
        with torch.no_grad():
            module.plane.copy_(plane)
            module.overlap.copy_(weight @ plane.T)
            module.change.fill_(0.5)
        change, _ = module.weight_delta(weight, None)
        assert (change[:, 5] > 0).all()
        assert (change[:, torch.arange(N) != 5] < 0).all()

    def test_survives_a_silent_neuron(self, seed):
        torch.manual_seed(seed)
        module = build_primitive("heterosynaptic_scaling", N, D, host=Host(torch.zeros(D, N)))
        x, context = torch.randn(1, 3, D, requires_grad=True), Context(x_in=torch.randn(1, 3, N))
        assert torch.count_nonzero(module(x, context)) == 0
        module.wake()
        delta: Tensor = module(x, context)
        delta.sum().backward()
        assert torch.isfinite(delta).all()
        assert all(torch.isfinite(parameter.grad).all() for parameter in module.parameters())

    def test_rows_of_the_plane_are_orthonormal(self, seed):
        plane = build_primitive("heterosynaptic_scaling", N, D, host=Host(seed=seed)).plane
        torch.testing.assert_close(plane @ plane.T, torch.eye(8), rtol=0, atol=1e-5)


@pytest.mark.parametrize("seed", SEEDS)
class TestLogogen:
    @pytest.fixture
    def module(self, seed):
        torch.manual_seed(seed)
        return build_primitive("logogen", D, D).train()

    def test_is_the_logarithm_of_how_often_a_unit_was_to_fire_over_how_much_it_did(self, module):
        heard, fired = torch.zeros(D), torch.zeros(D)
        for _ in range(3):
            x, targets = torch.randn(2, 9, D), torch.randint(-1, D, (2, 9))
            module(x, Context(targets=targets))
            module.commit()
            heard += torch.bincount(targets[targets >= 0], minlength=D)
            fired += x.softmax(-1)[targets >= 0].sum(0)
        with torch.no_grad():
            module.gate.fill_(0.5)
        expected = 0.5 * module.zero_scale * torch.log((heard + 0.1) / (fired + 0.1))
        torch.testing.assert_close(module(torch.randn(2, 3, D)), expected.expand(2, 3, D), rtol=1e-4, atol=1e-4)

    def test_units_come_to_fire_as_often_as_they_are_to(self, module):
        """With the strength one that is what the excitability is for, however wrong the rates were before."""
        drive = torch.randn(D)
        wanted = torch.randn(D).softmax(0)
        targets = torch.multinomial(wanted, 40_000, replacement=True)[None]
        module(drive.expand(1, 40_000, D), Context(targets=targets))
        module.commit()
        with torch.no_grad():
            module.gate.fill_(1 / module.zero_scale)
        rates = (drive + module(drive[None, None])[0, 0]).softmax(0)
        counted = torch.bincount(targets[0], minlength=D) / 40_000
        torch.testing.assert_close(rates, counted, rtol=1e-2, atol=1e-4)

    def test_a_unit_that_fires_as_it_should_stays_as_it_is(self, module):
        x = torch.zeros(1, D, D)  # all units fire alike, and each is to fire once
        module(x, Context(targets=torch.arange(D)[None]))
        module.commit()
        torch.testing.assert_close(module.excitability(), torch.zeros(D), rtol=0, atol=1e-5)

    def test_what_nobody_tells_counts_nothing(self, module):
        module(torch.randn(2, 5, D), Context(targets=torch.full((2, 5), -1)))
        module.commit()
        assert module.tokens == 0 and not module.heard.any() and not module.fired.any()

    def test_off_the_head_the_strongest_unit_is_the_one_that_was_to_fire(self, module):
        x, mask = torch.randn(2, 5, D), torch.ones(2, 5, dtype=torch.bool)
        mask[1, 3:] = False
        module(x, Context(mask=mask))
        module.commit()
        expected = torch.bincount(x.argmax(-1)[mask], minlength=D) / 8
        assert module.tokens == 8
        torch.testing.assert_close(module.heard, expected)

    def test_it_changes_what_is_fired_only_if_what_was_counted_helps_with_what_was_not(self, seed):
        """Words of a field of their own, and words as the units expect them anyhow, in which chance is all there is."""
        for helps in (True, False):
            torch.manual_seed(seed)
            module = build_primitive("logogen", D, D, zero_scale=8.0).train()
            often = torch.randn(D).mul(2 if helps else 0).softmax(0)
            optimiser = torch.optim.Adam(module.parameters(), lr=0.01)
            for _ in range(60):
                targets = torch.multinomial(often, 64, replacement=True)[None]
                logits = module(torch.zeros(1, 64, D), Context(targets=targets), with_x=True)
                torch.nn.functional.cross_entropy(logits[0], targets[0]).backward()
                optimiser.step()
                optimiser.zero_grad()
                module.commit()
            rates = module(torch.zeros(1, 1, D))[0, 0].softmax(0)
            surprise = torch.nn.functional.kl_div(rates.log(), often, reduction="sum")
            assert surprise < 0.05
            assert torch.log(rates * D).abs().mean() > 1 if helps else torch.log(rates * D).abs().mean() < 0.1
