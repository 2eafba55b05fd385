"""What makes the mechanisms of the stage sensory_gain what they are."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from bioadapt import build_primitive
from bioadapt.primitives.sensory_gain.divisive_normalization import normalized

SEEDS = range(4)
D = 24


def plain(x: Tensor, level: Tensor, sigma: Tensor, weights: Tensor, alpha: float, p: float) -> Tensor:
    """The equation of divisive normalization, term by term."""
    c = x / level
    drive = c.abs() ** p
    pool = (weights * drive).mean(-1, keepdim=True)
    return level * (1 + sigma**p) * c.sign() * drive / (sigma**p + (1 - alpha) * pool + alpha * drive)


@pytest.mark.parametrize("seed", SEEDS)
class TestDivisiveNormalization:
    @pytest.fixture
    def response(self, seed):
        torch.manual_seed(seed)
        module = build_primitive("divisive_normalization", D, D)
        module.wake()
        with torch.no_grad():
            module.gate.fill_(1.0)
            module.log_level.fill_(0.3)
        return lambda x: x + module(x)

    def test_invariant_at_high_contrast_and_expansive_at_low(self, response):
        x = torch.randn(2, 5, D)
        torch.testing.assert_close(response(1e3 * x), response(1e4 * x), rtol=1e-3, atol=1e-3)
        faint = 1e-3 * x.sign()  # a contrast of one in a thousand
        torch.testing.assert_close(response(2 * faint) / response(faint), torch.full_like(x, 4.0), rtol=1e-2, atol=0)

    def test_one_unit_lowers_every_other(self, response):
        x = torch.randn(2, 5, D)
        more = x.clone()
        more[..., 7] *= 3
        change = response(more).abs() - response(x).abs()
        others = torch.arange(D) != 7
        assert (change[..., others] < 0).all()
        assert (change[..., 7] > 0).all()

    def test_self_term_bounds_the_response(self, response):
        x = 0.1 * torch.randn(2, 5, D)
        x[..., 3] = 400.0
        level, sigma = 1.35, 1.6  # above what `wake` makes of them
        assert response(x).abs().max() < level * (1 + sigma**2) / 0.25

    @pytest.mark.parametrize("p", [1.0, 1.5, 2.0, 3.0])
    def test_response_and_gradient_follow_the_equation(self, seed, p):
        torch.manual_seed(seed)
        x = torch.randn(2, 3, 5, dtype=torch.float64)
        level, sigma, weights = (torch.rand(n, dtype=torch.float64) + 0.5 for n in (1, 5, 5))
        inputs = [tensor.requires_grad_() for tensor in (x, level, sigma, weights)]
        torch.testing.assert_close(normalized(*inputs, 0.25, p), plain(*inputs, 0.25, p))
        assert torch.autograd.gradcheck(lambda *args: normalized(*args, 0.25, p), inputs)

    @pytest.mark.parametrize("exponent", [1.5, 2.0])
    def test_gated_change_and_gradients_follow_the_equation(self, seed, exponent):
        torch.manual_seed(seed)
        module = build_primitive("divisive_normalization", D, D, exponent=exponent)
        module.wake()
        x, weight = torch.randn(2, 5, D, requires_grad=True), torch.randn(2, 5, D)

        def by_equation(x: Tensor) -> Tensor:
            sigma, weights = nn.functional.softplus(module.sigma), nn.functional.softplus(module.weights)
            return module.gate * (plain(x, module.log_level.exp(), sigma, weights, 0.25, exponent) - x)

        results = []
        for function in (module, by_equation):
            y = function(x)
            results.append((y, *torch.autograd.grad((y * weight).sum(), (x, *module.parameters()))))
        for found, expected in zip(*results, strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)

    @pytest.mark.parametrize("exponent", [1.0, 1.5, 2.0, 3.0])
    def test_gradient_is_finite_at_zero(self, seed, exponent):
        module = build_primitive("divisive_normalization", D, D, exponent=exponent)
        module.wake()
        x = torch.zeros(1, 2, D, requires_grad=True)
        module(x).sum().backward()
        for tensor in (x, *module.parameters()):
            assert torch.isfinite(tensor.grad).all()

    def test_settings_reach_the_equation(self, seed):
        torch.manual_seed(seed)
        x = torch.randn(1, 3, D)
        module = build_primitive("divisive_normalization", D, D, exponent=3.0, self_weight=0.5)
        with torch.no_grad():
            module.gate.fill_(1.0)
            level, sigma, weights = module.log_level.exp(), *map(nn.functional.softplus, (module.sigma, module.weights))
            torch.testing.assert_close(x + module(x), plain(x, level, sigma, weights, 0.5, 3.0))
