"""What makes the mechanisms of the stage dynamics what they are."""

from __future__ import annotations

import math

import pytest
import torch

from bioadapt import build_primitive
from bioadapt.primitives.base import Context

SEEDS = range(4)
D = 24


@pytest.mark.parametrize("seed", SEEDS)
class TestShortTermDepression:
    @pytest.fixture
    def transmitted(self, seed):
        """What is left of pulses of size 2 at the given tokens."""
        torch.manual_seed(seed)
        module = build_primitive("short_term_depression", D, D, groups=4)
        with torch.no_grad():
            module.gate.fill_(1.0)
        pulse = 2 * torch.randn(D).sign()

        def transmit(*tokens: int):
            x = torch.zeros(1, max(tokens) + 1, D)
            x[0, list(tokens)] = pulse
            return ((x + module(x)) / pulse)[0, list(tokens)].detach()

        return transmit

    def test_first_pulse_is_unchanged_and_the_second_depressed(self, transmitted):
        first, second = transmitted(0, 1)
        torch.testing.assert_close(first, torch.ones(D), rtol=0, atol=1e-6)
        assert (second < 0.8).all()

    def test_recovers_monotonically_with_the_gap(self, transmitted):
        seconds = torch.stack([transmitted(0, gap)[1] for gap in (1, 2, 4, 8, 16, 32, 64)])
        assert (seconds.diff(dim=0) > 0).all()
        assert (seconds[-1] > 0.98).all()

    def test_a_train_of_pulses_depresses_further_and_settles(self, transmitted):
        train = transmitted(*range(60))
        assert (train[:10].diff(dim=0) < 0).all()
        assert (train > 0).all()
        torch.testing.assert_close(train[-1], train[-2], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("seed", SEEDS)
class TestOscillatoryGating:
    @pytest.fixture
    def module(self, seed):
        torch.manual_seed(seed)
        module = build_primitive("oscillatory_gating", D, D)
        with torch.no_grad():
            module.gate.fill_(1.0)
        return module

    def clock(self, module, positions: torch.Tensor) -> torch.Tensor:
        """The gain at each position, (T, d)."""
        x = torch.randn(1, len(positions), D)
        return (module(x, Context(positions=positions[None])) / x)[0].detach()

    def test_has_the_period_and_no_mean(self, module):
        clock = self.clock(module, torch.arange(96))
        torch.testing.assert_close(clock[:64], clock[32:], rtol=0, atol=1e-5)
        torch.testing.assert_close(clock[:32].mean(0), torch.zeros(D), rtol=0, atol=1e-5)
        for shorter in (1, 2, 4, 8, 16):
            assert (clock[:64] - clock[shorter : 64 + shorter]).abs().amax(0).min() > 0.1

    def test_is_the_equation(self, module):
        t, m = torch.arange(40, dtype=torch.float64)[:, None], 0.5
        theta, gamma = module.theta_phase.detach().double(), module.gamma_phase.detach().double()
        angle = math.tau * t / 32
        expected = torch.cos(angle + theta) + m * 0.5 * (1 + torch.cos(angle + theta)) * torch.cos(7 * angle + gamma)
        torch.testing.assert_close(self.clock(module, torch.arange(40)).double(), expected, rtol=0, atol=1e-5)

    def test_keeps_time_in_the_millions(self, module):
        x = torch.randn(1, 1, D)
        early, late = (module(x, Context(positions=torch.tensor([[t]]))) for t in (5, 3_200_005))
        assert torch.equal(early, late)

    def test_gamma_rides_on_the_crest_of_theta(self, module):
        angle = math.tau * torch.arange(32)[:, None] / 32
        theta = torch.cos(angle + module.theta_phase.detach())
        gamma = (self.clock(module, torch.arange(32)) - theta).abs()
        crest = gamma.masked_fill(theta < 0.9, 0.0).amax(0)
        trough = gamma.masked_fill(theta > -0.9, 0.0).amax(0)
        assert (crest > 5 * trough).all()

    def test_counts_real_tokens_where_no_positions_are_given(self, module):
        x = torch.randn(2, 6, D)
        counted = module(x)
        torch.testing.assert_close(counted, module(x, Context(positions=torch.arange(6).expand(2, 6))))
        mask = torch.tensor([[False, False, True, True, False, True], [True] * 6])
        padded = module(x, Context(mask=mask))
        torch.testing.assert_close(padded[0, mask[0]], module(x[:1, mask[0]])[0])
        torch.testing.assert_close(padded[1], counted[1])
        packed = module(x, Context(resets=torch.tensor([[True, False, False, True, False, False]] * 2)))
        torch.testing.assert_close(packed[:, 3:], module(x[:, 3:]))

    def test_the_gain_is_independent_of_the_content(self, module):
        x, y = torch.randn(2, 1, 6, D)
        torch.testing.assert_close(module(x + 3 * y), module(x) + 3 * module(y), rtol=1e-4, atol=1e-5)
