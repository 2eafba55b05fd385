"""What makes the mechanisms of the stage memory what they are."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from bioadapt import build_primitive
from bioadapt.primitives.base import Context
from bioadapt.primitives.frames import token_scale, unit

SEEDS = range(4)
D = 32


def awake(name: str, seed: int, **settings):
    torch.manual_seed(seed)
    module = build_primitive(name, D, D, **settings)
    with torch.no_grad():
        module.gate.fill_(1.0)
    return module


def past(z: Tensor, tau: float | Tensor) -> Tensor:
    """E_tau(z)_{t-1}, token by token."""
    decay = torch.exp(-1 / torch.as_tensor(tau))
    h, found = torch.zeros_like(z[:, 0]), []
    for t in range(z.shape[1]):
        found.append(h)
        h = decay * h + (1 - decay) * z[:, t]
    return torch.stack(found, 1)


@pytest.mark.parametrize("seed", SEEDS)
class TestPredictiveCoding:
    @pytest.fixture
    def module(self, seed):
        return awake("predictive_coding", seed)

    def predicted(self, module, x: Tensor) -> Tensor:
        return past(unit(x) @ module.causes.T, module.log_tau.exp()) @ module.predictor.T

    @torch.no_grad()
    def test_feeding_the_prediction_leaves_nothing(self, module):
        x = (torch.randn(8) + 0.3 * torch.randn(1, 30, 8)) @ module.causes
        # The prediction lives in the scale-free frame, so only one of unit scale can be fed back exactly.
        module.predictor /= token_scale(self.predicted(module, x)[0, -1])
        x[:, -1] = self.predicted(module, x)[:, -1]
        assert module(x)[0, -1].abs().max() < 1e-5
        assert module(x)[0, -2].abs().max() > 0.1

    @torch.no_grad()
    def test_a_constant_in_the_span_is_explained_away(self, module):
        cause = unit(torch.randn(8) @ module.causes)
        x = 5 * cause.expand(1, 200, D)
        assert module(x)[0, -1].abs().max() < 1e-3 * x.abs().max()
        assert torch.equal(module(x)[0, 0], x[0, 0])

    @torch.no_grad()
    def test_a_surprise_on_top_passes_unchanged(self, module):
        cause = unit(torch.randn(8) @ module.causes)
        x = cause.expand(1, 300, D).clone()
        surprise = torch.randn(D)
        surprise -= surprise @ module.causes.T @ module.causes
        # On the unit sphere: what is added to the expected part takes away from its size.
        share = 0.6
        x[0, -1] = (1 - share**2) ** 0.5 * cause + share * unit(surprise)
        novel = module(x)[0, -1]
        novel -= novel @ module.causes.T @ module.causes
        torch.testing.assert_close(novel, share * unit(surprise), rtol=0, atol=1e-4)

    @torch.no_grad()
    def test_is_the_equation(self, module):
        module.wake()
        x = torch.randn(2, 20, D)
        expected = module.gate * (x - token_scale(x) * self.predicted(module, x))
        torch.testing.assert_close(module(x), expected, rtol=1e-4, atol=1e-5)

    def test_rows_are_orthonormal_and_taus_spread(self, module):
        torch.testing.assert_close(module.causes @ module.causes.T, torch.eye(8), rtol=0, atol=1e-5)
        assert torch.equal(module.predictor, module.causes.T)
        torch.testing.assert_close(module.log_tau.exp()[[0, -1]], torch.tensor([2.0, 16.0]))


@pytest.mark.parametrize("seed", SEEDS)
class TestPrecisionWeightedError:
    def response(self, module, noise: float, error: Tensor) -> Tensor:
        """What becomes of one error after 400 tokens of noise."""
        x = noise * torch.randn(1, 401, D)
        x[:, -1] = past(x, 8.0)[:, -1] + error
        return module(x)[0, -1]

    @torch.no_grad()
    @pytest.mark.parametrize("groups", [2, 3])  # solved by products, by scan
    def test_weighted_by_inverse_past_variance(self, seed, groups):
        module = awake("precision_weighted_error", seed, groups=groups)
        error = 0.3 * torch.randn(D)
        decay, sigma = math.exp(-1 / 8), 0.1
        spread = 1 + (1 - decay) / (1 + decay)  # variance of white noise minus its own trace
        loud, faint = (self.response(module, noise, error) for noise in (1.0, 0.2))
        ratio = (faint / loud).mean()
        assert ratio > 3
        assert ratio == pytest.approx((spread + sigma) / (0.04 * spread + sigma), rel=0.3)

    @torch.no_grad()
    @pytest.mark.parametrize("bidirectional", [False, True])
    @pytest.mark.parametrize("groups", [4, 5])
    def test_is_the_equation(self, seed, groups, bidirectional):
        module = awake("precision_weighted_error", seed, groups=groups)
        module.wake()
        level, sigma = module.log_level.exp(), torch.nn.functional.softplus(module.sigma)
        index = torch.arange(D) * groups // D

        def read(x: Tensor) -> Tensor:
            error = (x - past(x, module.log_tau.exp()[index])) / level
            members = torch.nn.functional.one_hot(index).float()
            power = error.square() @ members / members.sum(0)
            variance = 1 + past(power - 1, module.log_tau_variance.exp())
            return level * error * ((1 + sigma) / (variance + sigma))[..., index]

        x = torch.randn(2, 70, D)
        expected = 0.5 * (read(x) + read(x.flip(1)).flip(1)) if bidirectional else read(x)
        found = module(x, Context(bidirectional=bidirectional))
        torch.testing.assert_close(found, module.gate * expected, rtol=1e-4, atol=1e-4)

    @pytest.mark.parametrize("bidirectional", [False, True])
    def test_products_and_scan_agree_in_value_and_gradient(self, seed, bidirectional):
        module = awake("precision_weighted_error", seed, groups=4)
        module.wake()
        mask = torch.rand(3, 70) > 0.3
        x = torch.where(mask[..., None], torch.randn(3, 70, D), 100.0).requires_grad_()
        results = []
        for products in (True, False):
            module.products = products
            y = module(x, Context(mask=mask, bidirectional=bidirectional))[mask]
            results.append((y, *torch.autograd.grad(y.square().sum(), (x, *module.parameters()))))
        assert build_primitive("precision_weighted_error", D, D, groups=4).products
        for one, other in zip(*results, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-3)

    @torch.no_grad()
    def test_gain_is_bounded(self, seed):
        module = awake("precision_weighted_error", seed)
        x = torch.zeros(1, 500, D)
        x[:, -1] = 1.0
        found = module(x)[0, -1]
        assert (found > 10).all() and (found <= 11).all()


@pytest.mark.parametrize("name", ["predictive_coding", "dopamine_rpe"])
@pytest.mark.parametrize("bidirectional", [False, True])
class TestAuxiliaryLoss:
    def test_is_the_weighted_mean_over_real_tokens(self, name, bidirectional):
        torch.manual_seed(0)
        x = torch.randn(1, 9, D)
        mask = torch.arange(9)[None] < 6
        junk = torch.where(mask[..., None], x, 1e4)
        terms = {}
        for weight in (0.5, 2.0):
            torch.manual_seed(1)
            module = build_primitive(name, D, D, auxiliary=weight)
            terms[weight], alone = [], []
            module(junk, Context(mask=mask, losses=terms[weight], bidirectional=bidirectional))
            module(x[:, :6], Context(losses=alone, bidirectional=bidirectional))
            assert len(terms[weight]) == 1
            torch.testing.assert_close(terms[weight], alone)
            terms[weight][0].backward()
            assert module.gate.grad is None
            assert any(parameter.grad is not None and parameter.grad.any() for parameter in module.parameters())
        torch.testing.assert_close(4 * terms[0.5][0], terms[2.0][0])

    def test_is_the_squared_error(self, name, bidirectional):
        torch.manual_seed(0)
        module, losses, x = build_primitive(name, D, D, auxiliary=1.0), [], torch.randn(2, 9, D)
        with torch.no_grad():
            module.gate.fill_(1.0)
        delta = module(x, Context(losses=losses, bidirectional=bidirectional))
        if name == "predictive_coding":
            expected = (delta / token_scale(x)).square().mean()
        else:
            value, reward = (unit(x) @ module.critic.T).unbind(-1)
            value = value + module.bias

            def errors(value: Tensor, reward: Tensor) -> Tensor:
                found = reward + 0.9 * value - torch.cat([value[:, :1], value[:, :-1]], 1)
                return torch.cat([torch.zeros_like(found[:, :1]), found[:, 1:]], 1).square()

            expected = errors(value, reward).mean()
            if bidirectional:
                expected = 0.5 * (expected + errors(value.flip(1), reward.flip(1)).mean())
        torch.testing.assert_close(losses[0], expected)

    def test_is_silent_unless_asked_for(self, name, bidirectional):
        losses: list[Tensor] = []
        build_primitive(name, D, D)(torch.randn(1, 4, D), Context(losses=losses, bidirectional=bidirectional))
        build_primitive(name, D, D, auxiliary=1.0)(torch.randn(1, 4, D), Context(bidirectional=bidirectional))
        assert losses == []
