"""What makes the other mechanisms of the stage dendritic what they are: single neurons, their dendrites and spikes."""

from __future__ import annotations

import math

import pytest
import torch
from helpers.oracles import assert_follows, results_of, woken
from torch import Tensor
from torch.nn.functional import softplus

from bioadapt import build_primitive
from bioadapt.primitives.base import Context, Host
from bioadapt.primitives.dendritic import _spiking
from bioadapt.primitives.frames import inverse_softplus, unit

SEEDS = range(4)


@pytest.mark.parametrize("seed", SEEDS)
class TestShuntingInhibition:
    N, D = 9, 12

    @pytest.fixture
    def module(self, seed):
        return woken("shunting_inhibition", seed, self.N, self.D)

    def response(self, module, x: Tensor, h: float) -> Tensor:
        """f under a given shunt."""
        with torch.no_grad():
            module.gate.fill_(1.0)
            module.spread.zero_()
            module.rest.fill_(inverse_softplus(h))
            return (x + module(x, Context(x_in=torch.ones(2, 5, self.N)))) / module.log_level.exp()

    def test_silent_alone(self, module):
        for h in (0.1, 10.0):
            assert torch.count_nonzero(self.response(module, torch.zeros(2, 5, self.D), h)) == 0

    def test_the_inverse_of_the_response_is_affine_in_the_shunt(self, module):
        x = (1 + torch.rand(2, 5, self.D)) * torch.randn(2, 5, self.D).sign()
        low, middle, high = (1 / self.response(module, x, h) for h in (1.0, 2.0, 3.0))
        torch.testing.assert_close(high - middle, middle - low, rtol=0, atol=1e-4)
        assert ((high - low) * x.sign() > 0).all()

    def test_no_drive_exceeds_the_reversal_potential(self, module):
        x = torch.randn(2, 5, self.D) * torch.logspace(-2, 4, 5)[:, None]
        assert (self.response(module, x, 0.01).abs() <= softplus(module.reversal) * (1 + 1e-2)).all()
        assert (self.response(module, x, 0.01).abs() > 0.99 * softplus(module.reversal))[:, -1].float().mean() > 0.9

    def test_is_the_equation(self, module):
        def plain(x, v):
            rho = module.log_level.exp()
            c, h = x / rho, softplus(unit(v) @ module.inhibitors.T @ module.spread.T + module.rest)
            return rho * (softplus(module.reversal) * c / (1 + c.abs() + h) - c)

        assert_follows(module, plain, 2 * torch.randn(2, 5, self.D), torch.randn(2, 5, self.N))


@pytest.mark.parametrize("seed", SEEDS)
class TestQuadraticDendrite:
    N, D = 9, 12

    def test_is_a_quadratic_form(self, seed):
        module = woken("quadratic_dendrite", seed, self.N, self.D)

        def q(v):
            return module.code(v @ module.branches.T, Context())

        a, b = torch.randn(5, self.N), torch.randn(5, self.N)
        torch.testing.assert_close(q(3 * a), 9 * q(a), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(q(-a), q(a))
        torch.testing.assert_close(q(a + b) + q(a - b), 2 * q(a) + 2 * q(b), rtol=1e-4, atol=1e-5)

    def test_is_the_equation(self, seed):
        module = woken("quadratic_dendrite", seed, self.N, self.D)

        def plain(x, v):
            first, second = (unit(v) @ rows.T for rows in module.branches.split(6))
            return x / unit(x) * ((first * second) @ module.writer.T)

        assert_follows(module, plain, torch.randn(2, 5, self.D), torch.randn(2, 5, self.N))

    def test_ndi_multiplies_the_output(self, seed):
        module = woken("quadratic_dendrite", seed, self.N, self.D, mode="ndi")
        assert sum(p.numel() for p in module.parameters()) == 6 * (self.N + self.D) + 1

        def plain(x, v):
            return x * (unit(v) @ module.branches.T @ module.writer.T)

        assert_follows(module, plain, torch.randn(2, 5, self.D), torch.randn(2, 5, self.N))


@pytest.mark.parametrize("seed", SEEDS)
class TestApicalBasal:
    D = 24

    @pytest.fixture
    def module(self, seed):
        module = woken("apical_basal", seed, self.D, self.D)
        with torch.no_grad():
            module.apical.normal_()
        return module

    def test_neither_alone_but_both_together(self, module):
        x = (1 + torch.rand(1, 8, self.D)) * torch.randn(1, 8, self.D).sign()
        x[:, 5] = 0.0
        burst = module(x)
        assert torch.count_nonzero(burst[:, 0]) == 0  # nothing in the past
        assert torch.count_nonzero(burst[:, 5]) == 0  # nothing now
        assert torch.count_nonzero(burst[:, 1]) > 0.7 * self.D
        assert torch.count_nonzero(burst[:, 7]) > 0.7 * self.D

    def test_the_basal_drive_has_a_threshold(self, module):
        with torch.no_grad():
            module.basal_threshold.fill_(inverse_softplus(0.5))
        x = torch.randn(1, 20, self.D)
        silent = module(x)[:, 1:] == 0
        assert torch.equal(silent, (unit(x).abs() <= 0.5)[:, 1:])

    @pytest.mark.parametrize("bidirectional", [False, True])
    def test_is_the_equation(self, module, bidirectional):
        def onwards(x):
            u, a = unit(x), torch.exp(-1 / module.log_tau.exp())
            beta, theta = softplus(module.steepness), softplus(module.apical_threshold)
            h, rows = torch.zeros(2, 8), []
            for t in range(x.shape[1]):
                p = (h * ((1 + a) / (1 - a)).sqrt()) @ module.apical.T
                apical = torch.sigmoid(beta * (p - theta)) - torch.sigmoid(-beta * theta)
                rows.append(u[:, t].sign() * torch.relu(u[:, t].abs() - softplus(module.basal_threshold)) * apical)
                h = a * h + (1 - a) * (u[:, t] @ module.reader.T)
            return x / u * torch.stack(rows, 1)

        def plain(x):
            return (onwards(x) + onwards(x.flip(1)).flip(1)) / 2 if bidirectional else onwards(x)

        x, weight = torch.randn(2, 7, self.D, requires_grad=True), torch.randn(2, 7, self.D)
        forms = (lambda x: module(x, Context(bidirectional=bidirectional)), lambda x: module.gate * plain(x))
        results = [results_of(form, (x,), list(module.parameters()), weight) for form in forms]
        for found, expected in zip(*results, strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("seed", SEEDS)
class TestIntrinsicPlasticity:
    MU = 0.2

    def test_rates_become_exponential(self, seed):
        """Mean mu and, as the exponential has it, twice the mean's square as second moment, whatever the variance."""
        torch.manual_seed(seed)
        d = 8
        module = build_primitive("intrinsic_plasticity", d, d, rate=0.1).train()
        x = torch.randn(1, 400, d) * torch.linspace(0.5, 1.5, d)
        mask = torch.rand(1, 400) > 0.3
        junk, context = torch.where(mask[..., None], x, 1e3), Context(mask=mask)
        with torch.no_grad():
            for _ in range(600):
                module(junk, context)
                module.commit()
        y = torch.sigmoid(module.slope * unit(x)[mask] + module.offset)
        torch.testing.assert_close(y.mean(0), torch.full((d,), self.MU), rtol=0, atol=0.03)
        spread = y.square().mean(0) / y.mean(0).square()
        torch.testing.assert_close(spread, torch.full((d,), 2.0), rtol=0, atol=0.35)

    def test_one_commit_is_the_rule(self, seed):
        torch.manual_seed(seed)
        module = build_primitive("intrinsic_plasticity", 6, 6, target=0.1, rate=0.5).train()
        x = torch.randn(2, 5, 6)
        u = unit(x)
        y = torch.sigmoid(u + math.log(0.1 / 0.9))
        module(x)
        module.commit()
        bracket = 1 - (2 + 1 / 0.1) * y + y.square() / 0.1
        torch.testing.assert_close(module.offset, math.log(0.1 / 0.9) + 0.5 * bracket.mean((0, 1)))
        torch.testing.assert_close(module.slope, (1 + 0.5 * (1 + (u * bracket).mean((0, 1)))).clamp(0.05, 20))

    def test_is_the_equation(self, seed):
        module = woken("intrinsic_plasticity", seed, 12, 12)
        with torch.no_grad():
            module.slope.uniform_(0.5, 2)
            module.offset.normal_()

        def plain(x):
            return x / unit(x) * (torch.sigmoid(module.slope * unit(x) + module.offset) - self.MU)

        assert_follows(module, plain, torch.randn(2, 5, 12))

    def test_a_commit_between_forward_and_backward_leaves_the_gradient_alone(self, seed):
        torch.manual_seed(seed)
        gradients = []
        for commits in (False, True):
            module = build_primitive("intrinsic_plasticity", 6, 6, rate=1.0).train()
            with torch.no_grad():
                module.gate.fill_(1.0)
            x = torch.linspace(-2, 2, 18).view(1, 3, 6).requires_grad_()
            delta = module(x)
            if commits:
                module.commit()
            delta.sum().backward()
            gradients.append(x.grad)
        assert torch.equal(*gradients)


@pytest.mark.parametrize("seed", SEEDS)
class TestSynapticPruning:
    N, D = 9, 12

    @pytest.fixture
    def module(self, seed):
        torch.manual_seed(seed)
        weight = torch.randn(self.D, self.N)
        module = build_primitive("synaptic_pruning", self.N, self.D, host=Host(weight, seed=seed))
        with torch.no_grad():
            module.log_factor.normal_(std=0.3)
            module.loss.normal_(std=0.5)
            module.gate.fill_(1.0)
        return module

    def left(self, module) -> Tensor:
        return module.synapses + module.weight_delta(module.synapses, None)[0]

    def test_weak_weights_are_lost_and_no_sign_flips(self, module):
        weak = module.synapses.abs() <= module.thresholds()[:, None]
        left = self.left(module)
        assert 10 < weak.sum() < self.N * self.D - 10
        assert left[weak].abs().max() < 1e-6
        assert (left * module.synapses > 0)[~weak].all()

    def test_a_larger_threshold_prunes_more(self, module):
        few = self.left(module).abs() < 1e-6
        with torch.no_grad():
            module.loss.add_(0.5)
        more = self.left(module).abs() < 1e-6
        assert (more | ~few).all()
        assert more.sum() > few.sum()

    def test_is_the_equation(self, module):
        module.wake()

        def plain(x, v):
            threshold = (softplus(module.loss) * module.synapses.abs().mean(1))[:, None]
            left = (
                module.synapses.sign()
                * module.log_factor.exp()[:, None]
                * torch.relu(module.synapses.abs() - threshold)
            )
            return v @ (left - module.synapses).T

        x, v = torch.randn(2, 5, self.D), torch.randn(2, 5, self.N, requires_grad=True)
        forms = (lambda v: module(x, Context(x_in=v)), lambda v: module.gate * plain(x, v))
        parameters = list(module.parameters())
        results = [results_of(form, (v,), parameters, torch.ones(2, 5, self.D)) for form in forms]
        for found, expected in zip(*results, strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)

    def test_hardened_it_merges_into_a_sparse_weight(self, module):
        module.wake()
        weight = module.synapses.clone()
        weak = weight.abs() <= module.thresholds()[:, None]
        halfway, _ = module.merged_change(weight, None, (weight, None))
        assert (weight + halfway)[weak].abs().max() > 1e-3
        module.harden()
        change, _ = module.merged_change(weight, None, (weight, None))
        assert torch.equal((weight + change)[weak], torch.zeros(int(weak.sum())))

    def test_what_happens_to_the_layer_later_changes_nothing(self, module):
        """An adapter beneath may be merged into the layer's weight, in place."""
        weight = torch.randn(self.D, self.N)
        again = build_primitive("synaptic_pruning", self.N, self.D, host=Host(weight))
        again.wake()
        x, context = torch.randn(2, 5, self.D), Context(x_in=torch.randn(2, 5, self.N))
        before = again(x, context)
        weight.add_(1.0)
        assert torch.equal(again(x, context), before)
        assert not {"synapses", "typical"} & again.state_dict().keys()


class Spike(torch.autograd.Function):
    @staticmethod
    def forward(ctx, excess):
        ctx.save_for_backward(excess)
        return (excess >= 0).float()

    @staticmethod
    def backward(ctx, grad):
        return grad / (1 + 5 * ctx.saved_tensors[0].abs()) ** 2


def assert_follows_with_surrogate_slopes(module, plain, monkeypatch) -> None:
    """The forward is exact; slopes come from a table, and are as good as its cells are small."""
    x = torch.randn(4, 60, module.d_out, requires_grad=True)
    weight, parameters = x.detach().sign(), list(module.parameters())
    expected = results_of(lambda x: module.gate * plain(x), (x,), parameters, weight)
    for cells, tolerance in ((_spiking.CELLS, 0.1), (2**18, 0.01)):
        monkeypatch.setattr(_spiking, "CELLS", cells)
        found = results_of(module, (x,), parameters, weight)
        torch.testing.assert_close(found[0], expected[0], rtol=1e-4, atol=1e-5)
        for gradient, exact in zip(found[1:], expected[1:], strict=True):
            assert exact.norm() > 0
            assert (gradient - exact).norm() < tolerance * exact.norm()


def lif_rate(drive: Tensor, theta, leak, steps: int, beta: float = 0.0) -> Tensor:
    """The equation of leaky_integrate_fire, written plainly."""
    m, n = torch.zeros_like(drive), torch.zeros_like(drive)
    for _ in range(steps):
        m = drive / leak + (m - drive / leak) * torch.exp(-leak)
        threshold = theta * (1 + beta * n)
        z = Spike.apply((m - threshold) / theta)
        m, n = m - threshold * z, n + z
    return n / steps


def kv_rate(drive: Tensor, theta, leak, potassium, by_spike, deepening, memory, steps: int) -> Tensor:
    """The equation of kv_lif, written plainly."""
    m, n, count = (torch.zeros_like(drive) for _ in range(3))
    for _ in range(steps):
        conductance = leak + potassium * n
        target = (drive - 0.5 * potassium * n) / conductance
        m = target + (m - target) * torch.exp(-conductance)
        z = Spike.apply(m - theta)
        n = memory * n + (1 - memory) * torch.sigmoid(6 * (m - 0.7)) + by_spike * z
        m = m - (theta + deepening * n) * z
        count = count + z
    return count / steps


def response(module, drive: Tensor) -> Tensor:
    """The rate of a spiking unit of gain one at the given currents."""
    currents = drive[:, None]
    return module.fired(currents, torch.ones_like(currents), torch.ones(1), Context()).detach()[:, 0]


@pytest.mark.parametrize("seed", SEEDS)
class TestLeakyIntegrateFire:
    D = 12

    @pytest.mark.parametrize("steps", [1, 4, 6])
    def test_a_staircase_between_rheobase_and_saturation(self, seed, steps):
        rate = response(build_primitive("leaky_integrate_fire", 1, 1, steps=steps), torch.linspace(0, 6, 4001))
        assert (rate.diff() >= 0).all()
        assert (rate.unique() * steps).round().tolist() == list(range(steps + 1))

    def test_silent_below_and_saturated_above(self, seed):
        module = build_primitive("leaky_integrate_fire", 1, 1)
        assert response(module, torch.linspace(-0.25, 0.25, 100)).abs().max() == 0
        assert (response(module, torch.linspace(3, 30, 100)) == 1).all()
        assert (response(module, -torch.linspace(3, 30, 100)) == -1).all()

    def test_adaptation_never_raises_the_rate(self, seed):
        drive = torch.linspace(0, 6, 2001)
        plain = response(build_primitive("leaky_integrate_fire", 1, 1), drive)
        adapted = response(build_primitive("leaky_integrate_fire", 1, 1, beta=0.5), drive)
        assert (adapted <= plain).all()
        assert (adapted < plain).float().mean() > 0.2

    @pytest.mark.parametrize("beta", [0.0, 0.4])
    def test_is_the_equation(self, seed, beta, monkeypatch):
        module = woken("leaky_integrate_fire", seed, self.D, self.D, beta=beta)

        def plain(x):
            u = unit(x)
            current = module.gain * u + module.bias
            rate = lif_rate(current.abs(), softplus(module.threshold), softplus(module.leak), 4, beta)
            return x / u * current.sign() * rate

        assert_follows_with_surrogate_slopes(module, plain, monkeypatch)


@pytest.mark.parametrize("seed", SEEDS)
class TestKvLif:
    D = 12

    def without_channels(self):
        module = build_primitive("kv_lif", 1, 1)
        with torch.no_grad():
            for raw in (module.potassium, module.spike_opening, module.deepening):
                raw.fill_(-100.0)
        return module

    def test_without_channels_it_is_a_leaky_integrator(self, seed):
        drive = 2 * torch.randn(4000, generator=torch.Generator().manual_seed(seed))
        found = response(self.without_channels(), drive)
        expected = response(build_primitive("leaky_integrate_fire", 1, 1, steps=6), drive)
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)

    def test_channels_lower_the_rate_and_widen_the_range(self, seed):
        drive = torch.linspace(0, 8, 4001)
        free, damped = response(self.without_channels(), drive), response(build_primitive("kv_lif", 1, 1), drive)
        assert (damped <= free).all()
        saturation = [drive[rate == 1].min() for rate in (free, damped)]
        assert saturation[1] > 1.3 * saturation[0]

    def test_is_the_equation(self, seed, monkeypatch):
        module = woken("kv_lif", seed, self.D, self.D)

        def plain(x):
            u = unit(x)
            current = module.gain * u + module.bias
            raw = module.threshold, module.leak, module.potassium, module.spike_opening, module.deepening
            constants = [*map(softplus, raw), torch.sigmoid(module.memory)]
            return x / u * current.sign() * kv_rate(current.abs(), *constants, 6)

        assert_follows_with_surrogate_slopes(module, plain, monkeypatch)

    @pytest.mark.parametrize("name", ["kv_lif", "leaky_integrate_fire"])
    def test_many_units_at_a_time_are_as_few(self, seed, name, monkeypatch):
        """A CPU takes them in blocks."""
        module, results = woken(name, seed, self.D, self.D), []
        x, weight = torch.randn(3, 70, self.D, requires_grad=True), torch.randn(3, 70, self.D)
        for block in (_spiking.BLOCK, 64 * self.D, 1):
            monkeypatch.setattr(_spiking, "BLOCK", block)
            results.append(results_of(module, (x,), list(module.parameters()), weight))
        for once, *others in zip(*results, strict=True):
            for other in others:
                torch.testing.assert_close(other, once, rtol=1e-3, atol=1e-4)
