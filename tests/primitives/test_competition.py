"""What makes the mechanisms of the stage competition what they are."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import softplus

from bioadapt import build_primitive

SEEDS = range(4)
D = 24


def awake(name: str, seed: int, **settings):
    torch.manual_seed(seed)
    module = build_primitive(name, D, D, **settings)
    module.wake()
    with torch.no_grad():
        module.gate.fill_(1.0)
    return module


@pytest.mark.parametrize("seed", SEEDS)
class TestLateralInhibition:
    def test_raising_one_unit_raises_it_one_for_one_and_lowers_all_others(self, seed):
        module = awake("lateral_inhibition", seed)
        x = (1.5 + torch.rand(2, 5, D)) * torch.randn(2, 5, D).sign()
        more = x.clone()
        more[..., 7] += 0.5 * more[..., 7].sign()
        change = (more + module(more)).abs() - (x + module(x)).abs()
        others = torch.arange(D) != 7
        assert (change[..., others] < 0).all()
        torch.testing.assert_close(change[..., 7], torch.full((2, 5), 0.5), rtol=0, atol=1e-5)

    def test_silences_but_never_reverses(self, seed):
        module = awake("lateral_inhibition", seed)
        x = torch.randn(2, 5, D)
        f = x + module(x)
        assert (f * x >= 0).all()
        assert (f.abs() <= x.abs()).all()
        assert (f.abs() < 1e-6).any()

    def test_value_and_gradients_follow_the_equation(self, seed):
        module, x = awake("lateral_inhibition", seed), torch.randn(2, 5, D, requires_grad=True)
        weight = torch.randn(2, 5, D)

        def plain(x):
            pools, sources = softplus(module.pools), softplus(module.sources) / D
            pairs = (pools @ sources) * (1 - torch.eye(D))
            return module.gate * (x.sign() * torch.relu(x.abs() - x.abs() @ pairs.T) - x)

        results = []
        for function in (module, plain):
            y = function(x)
            results.append((y, *torch.autograd.grad((y * weight).sum(), (x, *module.parameters()))))
        for found, expected in zip(*results, strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)

    def test_a_unit_alone_is_not_inhibited(self, seed):
        x = torch.zeros(1, 1, D)
        x[..., 3] = -2.0
        torch.testing.assert_close(awake("lateral_inhibition", seed)(x), torch.zeros_like(x), rtol=0, atol=1e-6)


@pytest.mark.parametrize("seed", SEEDS)
class TestKWinnersTakeAll:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    @pytest.mark.parametrize("fraction", [0.05, 0.25, 0.3, 0.9])
    def test_exactly_k_survive_unchanged(self, seed, dtype, fraction):
        module = awake("k_winners_take_all", seed, fraction=fraction)
        k = {0.05: 2, 0.25: 6, 0.3: 8, 0.9: 22}[fraction]
        x = torch.randn(2, 5, D).to(dtype)
        x[0, 0] = 1.5  # a tie of all
        x[0, 1, ::2] = -x[0, 1, 1::2]  # ties in pairs
        y = x + module(x)
        assert (torch.count_nonzero(y, -1) == k).all()
        assert torch.equal(y[y != 0], x[y != 0])

    def test_survivors_are_the_strongest(self, seed):
        module = awake("k_winners_take_all", seed)
        x = torch.randn(2, 5, D)
        won = x + module(x) != 0
        weakest_winner = x.abs().masked_fill(~won, torch.inf).amin(-1)
        assert (x.abs().masked_fill(won, 0.0).amax(-1) <= weakest_winner).all()

    def test_only_losers_carry_a_gradient(self, seed):
        module = awake("k_winners_take_all", seed)
        x = torch.randn(1, 3, D, requires_grad=True)
        delta = module(x)
        delta.sum().backward()
        assert torch.equal(x.grad, torch.where(delta == 0, 0.0, -1.0))


def test_k_is_not_moved_by_rounding():
    assert build_primitive("k_winners_take_all", 100, 100, fraction=0.07).winners == 7
