"""What makes the mechanisms of the stage dendritic what they are; neuro_ada has a file of its own."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import softplus

from bioadapt import build_primitive
from bioadapt.primitives.base import Context, Host
from bioadapt.primitives.frames import unit

SEEDS = range(4)


@pytest.mark.parametrize("seed", SEEDS)
class TestNmdaBranches:
    N, D, M = 32, 12, 4

    @pytest.fixture
    def module(self, seed):
        torch.manual_seed(seed)
        module = build_primitive("nmda_branches", self.N, self.D, host=Host(seed=seed), branches=self.M)
        with torch.no_grad():
            module.soma.normal_()
        return module

    def response(self, module, *synapses: int, drive: float = 0.7):
        """The change that equal inputs at the given synapses make, each worth ``drive`` on its branch."""
        silent = module.branch.argmax()  # takes up what keeps the input at unit scale
        with torch.no_grad():
            module.synapses.fill_(1.0)
            module.synapses[silent] = 0.0
        v = torch.zeros(self.N)
        v[list(synapses)] = drive
        v[silent] = (self.N - v.square().sum()).sqrt()
        x = torch.linspace(-1, 1, self.D)
        return module(x[None, None], Context(x_in=v[None, None]))[0, 0]

    def test_supralinear_on_one_branch_linear_across_two(self, module):
        (a, b, *_), (c, *_) = ((module.branch == branch).nonzero()[:, 0].tolist() for branch in (0, 1))
        alone = [self.response(module, synapse) for synapse in (a, b, c)]
        together = self.response(module, a, b)
        assert together.norm() > 1.5 * (alone[0] + alone[1]).norm()
        apart = self.response(module, a, c)
        torch.testing.assert_close(apart, alone[0] + alone[2], rtol=0, atol=1e-5)

    def test_nothing_in_nothing_out(self, module):
        assert self.response(module).abs().max() < 1e-6

    def test_reads_the_pattern_of_the_input_and_the_scale_of_the_output(self, module):
        v, x = torch.randn(2, 5, self.N), torch.randn(2, 5, self.D)
        delta = module(x, Context(x_in=v))
        torch.testing.assert_close(module(x, Context(x_in=3 * v)), delta, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(module(3 * x, Context(x_in=v)), 3 * delta, rtol=1e-4, atol=1e-5)

    def test_every_input_belongs_to_one_branch(self, module):
        wired = module.wiring() != 0
        assert (wired.sum(0) == 1).all()
        assert wired.sum(1).tolist() == [self.N // self.M] * self.M

    def test_the_partition_is_random_and_repeatable(self, seed, module):
        again, other = (build_primitive("nmda_branches", self.N, 5, host=Host(seed=s), branches=4) for s in (seed, 9))
        assert torch.equal(again.branch, module.branch)
        assert not torch.equal(other.branch, module.branch)
        assert not torch.equal(module.branch, module.branch.sort().values)


@pytest.mark.parametrize("seed", SEEDS)
class TestVesicleRelease:
    D, DRAWS = 6, 20_000

    def module(self, seed, sites):
        torch.manual_seed(seed)
        module = build_primitive("vesicle_release", self.D, self.D, sites=sites)
        with torch.no_grad():
            module.gate.fill_(1.0)
            module.rest.copy_(torch.linspace(-2, 1, self.D))  # unreliable to reliable
        return module

    def probability(self, module, x):
        """Evaluation transmits the exact mean."""
        was_training = module.training
        p = (module.eval()(x) / x).detach()
        module.train(was_training)
        return p

    @pytest.mark.parametrize("sites", [1, 4, 64])
    def test_mean_variance_and_quanta(self, seed, sites):
        module = self.module(seed, sites)
        x = torch.randn(1, 1, self.D).expand(1, self.DRAWS, self.D)
        p = self.probability(module, x)[0, 0]
        release = (module.train()(x) / x)[0].detach()
        error = (p * (1 - p) / sites / self.DRAWS).sqrt()
        assert ((release.mean(0) - p).abs() < 5 * error).all()
        torch.testing.assert_close(release.var(0), p * (1 - p) / sites, rtol=0.08, atol=0)
        quanta = release * sites
        torch.testing.assert_close(quanta, quanta.round(), rtol=0, atol=1e-4)
        assert release.min() >= 0 and release.max() <= 1

    def test_evaluation_is_the_equation_and_deterministic(self, seed):
        module = self.module(seed, 4).eval()
        x = torch.randn(2, 5, self.D)
        p = torch.sigmoid(module.rest + softplus(module.drive) * unit(x).abs())
        torch.testing.assert_close(module(x), x * p)
        assert torch.equal(module(x), module(x))

    def test_gradients_follow_the_equation(self, seed):
        module = self.module(seed, 4).eval()
        module.wake()
        x, weight = torch.randn(2, 5, self.D, requires_grad=True), torch.randn(2, 5, self.D)

        def by_equation(x):
            return module.gate * x * torch.sigmoid(module.rest + softplus(module.drive) * unit(x).abs())

        results = []
        for function in (module, by_equation):
            y = function(x)
            results.append((y, *torch.autograd.grad((y * weight).sum(), (x, *module.parameters()))))
        for found, expected in zip(*results, strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)

    def test_stronger_drive_is_more_reliable(self, seed):
        module = self.module(seed, 4)
        x = torch.randn(2, 5, self.D)
        louder = x * torch.tensor([1.0] * 5 + [2.0])
        assert (self.probability(module, louder)[..., 5] > self.probability(module, x)[..., 5]).all()

    def test_reliability_is_blind_to_the_scale_of_the_token(self, seed):
        module, x = self.module(seed, 4), torch.randn(2, 5, self.D)
        p = self.probability(module, x)
        torch.testing.assert_close(self.probability(module, 3 * x), p, rtol=1e-4, atol=1e-5)

    def test_gradient_passes_straight_through(self, seed):
        module = self.module(seed, 4)
        x, gradients = torch.randn(2, 5, self.D), []
        for training in (True, False):
            module.train(training)(x).sum().backward()
            gradients.append((module.rest.grad.clone(), module.drive.grad.clone()))
            module.zero_grad()
        for drawn, mean in zip(*gradients, strict=True):
            torch.testing.assert_close(drawn, mean)
