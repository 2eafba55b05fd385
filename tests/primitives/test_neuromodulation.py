"""What makes neuromodulators and the laws of slow change what they are, each next to its equation written out."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from helpers.oracles import assert_law, born, both_ways, past
from torch import Tensor, nn

from bioadapt.primitives.base import Context
from bioadapt.primitives.frames import unit

SEEDS = range(4)
N, D = 29, 37


def plain_scale(x: Tensor) -> Tensor:
    return torch.sqrt(x.square().mean(-1, keepdim=True) + 1e-6)


@torch.no_grad()
def learn(module: nn.Module, commits: int, x: Tensor | None = None, x_in: Tensor | None = None) -> None:
    """Forwards and commits; without features the law depends on nothing but time."""
    x = torch.ones(1, 1, module.d_out) if x is None else x
    x_in = torch.ones(1, 1, module.d_in) if x_in is None else x_in
    for _ in range(commits):
        module(x, Context(x_in=x_in))
        module.commit()


@pytest.mark.parametrize("seed", SEEDS)
class TestAcetylcholineBalance:
    @torch.no_grad()
    def test_input_counts_after_noise_and_context_in_a_steady_stream(self, seed):
        module = born("acetylcholine_balance", seed, 256)
        noise = torch.randn(4, 200, 256)
        assert (module(noise)[:, -20:].norm(dim=-1) < 0.25 * noise[:, -20:].norm(dim=-1)).all()
        steady = 5 * torch.randn(4, 1, 256).expand(-1, 200, -1)
        odd = 5 * torch.randn(4, 1, 256)
        x = torch.cat([steady, odd], 1)
        response = (x + module(x))[:, -1]
        expected = unit(steady[:, -1]) * plain_scale(odd[:, -1])
        assert ((response - expected).norm(dim=-1) < 0.02 * expected.norm(dim=-1)).all()

    def law(self, module: nn.Module, x: Tensor) -> Tensor:
        scale = plain_scale(x)
        u, d = x / scale, x.shape[-1]
        tau = module.log_tau.exp()[torch.arange(d) * module.groups // d]
        before = past(u, tau)
        error = 0.5 * (u - before).square().mean(-1, keepdim=True)
        uncertainty = past(error, module.log_tau_uncertainty.exp(), 0.5)
        alpha = torch.sigmoid(nn.functional.softplus(module.steepness) * (uncertainty - module.threshold))
        return scale * (1 - alpha) * (before - u)

    @pytest.mark.parametrize("bidirectional", [False, True])
    @pytest.mark.parametrize("groups", [4, 5])  # solved by products, by scan
    def test_is_the_equation(self, seed, groups, bidirectional):
        module = born("acetylcholine_balance", seed, 32, groups=groups)

        def read(x: Tensor) -> Tensor:
            return self.law(module, x)

        law = (lambda x: both_ways(read, x)) if bidirectional else read
        assert_law(module, law, 2 * torch.randn(2, 20, 32), Context(bidirectional=bidirectional))

    @pytest.mark.parametrize("bidirectional", [False, True])
    def test_products_skip_padding(self, seed, bidirectional):
        module = born("acetylcholine_balance", seed, 32, groups=4)
        mask = torch.ones(2, 20, dtype=torch.bool)
        mask[0, :7], mask[1, 5:9] = False, False

        def law(x: Tensor) -> Tensor:
            rows = []
            for b in range(2):
                real = x[b, mask[b]][None]
                delta = both_ways(lambda x: self.law(module, x), real) if bidirectional else self.law(module, real)
                rows.append(torch.zeros_like(x[b]).index_put((mask[b],), delta[0]))
            return torch.stack(rows)

        x = torch.randn(2, 20, 32).where(mask[..., None], 1e3)
        assert_law(module, law, x, Context(mask=mask, bidirectional=bidirectional))


@pytest.mark.parametrize("seed", SEEDS)
class TestNoradrenalineReset:
    @torch.no_grad()
    def test_a_jump_restarts_the_memory_whatever_came_before(self, seed):
        module = born("noradrenaline_reset", seed)
        for size in (0.3, 1.0):
            before, now = size * torch.randn(2, 200, 8), 6 * torch.randn(8).sign()
            z = torch.cat([before, now.expand(2, 1, 8)], 1)
            interrupt, memory = module.interrupt(z, Context()), module.code(z, Context())
            assert interrupt[:, :-1].mean() < 0.3
            assert (interrupt[:, -1] > 0.95).all()
            assert ((memory[:, -1] - now).norm(dim=-1) < 0.1 * now.norm()).all()
        assert module.code(before, Context())[:, -1].norm(dim=-1).max() < 0.5 * before[:, -1].norm(dim=-1).min()

    @pytest.mark.parametrize("bidirectional", [False, True])
    def test_is_the_equation(self, seed, bidirectional):
        module = born("noradrenaline_reset", seed)

        def read(x: Tensor) -> Tensor:
            scale = plain_scale(x)
            z = x / scale @ module.reader.T
            tau = module.log_tau_surprise.exp()
            error = (z - past(z, tau)).square().mean(-1, keepdim=True)
            surprise = error / (past(error, tau, 1.0) + 0.05)
            interrupt = torch.sigmoid(nn.functional.softplus(module.steepness) * (surprise - module.threshold))
            h, rows = torch.zeros_like(z[:, 0]), []
            for t in range(z.shape[1]):
                kept = torch.exp(-1 / module.log_tau.exp()) * (1 - interrupt[:, t])
                h = kept * h + (1 - kept) * z[:, t]
                rows.append(h)
            return scale * (torch.stack(rows, 1) @ module.writer.T)

        law = (lambda x: both_ways(read, x)) if bidirectional else read
        assert_law(module, law, 2 * torch.randn(2, 20, D), Context(bidirectional=bidirectional))


@pytest.mark.parametrize("seed", SEEDS)
class TestSerotoninHorizon:
    @torch.no_grad()
    def test_the_horizon_grows_with_the_level(self, seed):
        module = born("serotonin_horizon", seed)
        scores = torch.zeros(1, 1500, 5)
        scores[:, 0, :4] = 1.0
        centroids = []
        for level in torch.linspace(0.01, 0.99, 15):
            module.bias.copy_(torch.logit(level))
            kernel = module.code(scores, Context())[0, :, 0]
            assert kernel.sum() == pytest.approx(1, abs=1e-4)
            centroids.append((kernel * torch.arange(1500)).sum().item())
        assert all(later > earlier for earlier, later in itertools.pairwise(centroids))
        assert centroids[-1] > 8 * centroids[0]

    @pytest.mark.parametrize("bidirectional", [False, True])
    def test_is_the_equation(self, seed, bidirectional):
        module = born("serotonin_horizon", seed)

        def read(x: Tensor) -> Tensor:
            scale = plain_scale(x)
            u = x / scale

            def trace(z: Tensor, tau: Tensor | float) -> Tensor:
                return past(torch.cat([z, z[:, :1]], 1), tau)[:, 1:]

            level = torch.sigmoid(3 * trace(u @ module.mood.T, module.log_tau.exp()) + module.bias)
            horizon = module.shortest + (module.longest - module.shortest) * level
            width = nn.functional.softplus(module.width) + 1e-3
            logits = [-0.5 * ((math.log(2**j) - horizon) / width) ** 2 for j in range(1, 7)]
            weights = torch.softmax(torch.cat(logits, -1), -1)
            bank = [trace(u @ module.reader.T, 2.0**j) for j in range(1, 7)]
            memory = sum(weights[..., j, None] * h for j, h in enumerate(bank))
            return scale * (memory @ module.writer.T)

        law = (lambda x: both_ways(read, x)) if bidirectional else read
        assert_law(module, law, 2 * torch.randn(2, 20, D), Context(bidirectional=bidirectional))


@pytest.mark.parametrize("seed", SEEDS)
class TestOjaSubspace:
    @torch.no_grad()
    def test_finds_the_principal_subspace(self, seed):
        module = born("oja_subspace", seed, 12, rank=4).train()
        x = torch.randn(1, 150, 12) * torch.cat([torch.linspace(3, 2, 4), torch.full((8,), 0.7)])
        x = x @ torch.linalg.qr(torch.randn(12, 12)).Q
        u = unit(x[0])
        covariance = u.T @ u / len(u)
        for _ in range(2500):
            module.observe(Context(), correlation=module.components @ covariance)  # as a forward on x does
            module.commit()
        torch.testing.assert_close(module.components @ module.components.T, torch.eye(4), rtol=0, atol=0.08)
        plane = torch.linalg.qr(module.components.T).Q
        found = (plane.T @ covariance @ plane).trace()
        assert found > 0.95 * torch.linalg.eigvalsh(covariance)[-4:].sum()

    @torch.no_grad()
    def test_one_commit_is_sangers_rule(self, seed):
        module = born("oja_subspace", seed, rank=3, rate=0.3).train()
        start = module.components.clone()
        torch.testing.assert_close(start @ start.T, torch.eye(3))
        x, mask = 3 * torch.randn(2, 9, D), torch.rand(2, 9) > 0.3
        module(x.where(mask[..., None], torch.nan), Context(mask=mask))
        module.commit()
        correlation, power = torch.zeros(3, D), torch.zeros(3, 3)
        for u in unit(x[mask]):
            y = start @ u
            correlation += torch.outer(y, u) / mask.sum()
            power += torch.outer(y, y) / mask.sum()
        growth = (correlation - power.tril() @ start) / max(1.0, power.trace().item() / 3)
        torch.testing.assert_close(module.components, start + 0.3 * growth, rtol=1e-4, atol=1e-5)

    def test_is_the_equation(self, seed):
        module = born("oja_subspace", seed)

        def by_equation(x: Tensor) -> Tensor:
            return torch.einsum("rd,r,re,bte->btd", module.components, module.gains[0], module.components, x)

        assert_law(module, by_equation, torch.randn(2, 5, D))


@pytest.mark.parametrize("seed", SEEDS)
class TestBcmThreshold:
    @torch.no_grad()
    def test_depresses_below_the_threshold_and_potentiates_above(self, seed):
        module = born("bcm_threshold", seed)
        module.threshold.copy_(torch.rand(D) + 0.5)
        for sign in (1, -1):
            below, above = sign * (module.threshold - 0.1), sign * (module.threshold + 0.1)
            assert (sign * module(below[None]) < 0).all()
            assert (sign * module(above[None]) > 0).all()

    @torch.no_grad()
    def test_the_threshold_follows_the_square_of_activity(self, seed):
        thresholds = []
        for activity in (1.0, 2.0):
            module = born("bcm_threshold", seed).train()
            module.level.fill_(0.7)
            x = activity * torch.randn(2, 6, D)
            learn(module, 400, x)
            thresholds.append(module.threshold)
            torch.testing.assert_close(module.threshold, (x / 0.7).square().mean((0, 1)), rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(thresholds[1], 4 * thresholds[0], rtol=1e-3, atol=1e-3)

    @torch.no_grad()
    def test_padding_does_not_move_the_threshold(self, seed):
        module = born("bcm_threshold", seed).train()
        x, mask = torch.randn(2, 9, D), torch.rand(2, 9) > 0.3
        module(x.where(mask[..., None], torch.nan), Context(mask=mask))
        module.commit()
        torch.testing.assert_close(module.threshold, 1 + 0.05 * (x[mask].square().mean(0) - 1))

    def test_is_the_equation(self, seed):
        module = born("bcm_threshold", seed)
        module.level.fill_(0.7)
        module.threshold.copy_(2 * torch.rand(D))

        def by_equation(x: Tensor) -> Tensor:
            y = (x / 0.7).abs()
            return 0.7 * x.sign() * y * (y - module.threshold) / (1 + y)

        assert_law(module, by_equation, torch.randn(2, 5, D))

    def test_an_outlier_grows_linearly(self, seed):
        module = born("bcm_threshold", seed)
        x = torch.full((1, 1, D), 1e4)
        torch.testing.assert_close(module(x), x, rtol=1e-3, atol=0)


@pytest.mark.parametrize("seed", SEEDS)
class TestStdpTrace:
    R = 6

    def memory(self, module: nn.Module, history: Tensor) -> Tensor:
        """4 M after a history of latents (T, r), column by column."""
        probes = torch.eye(self.R)[:, None]
        z = torch.cat([history.expand(self.R, -1, -1), probes], 1)
        return module.code(z, Context())[:, -1].T

    @torch.no_grad()
    def test_the_memory_is_antisymmetric(self, seed):
        module = born("stdp_trace", seed)
        m = self.memory(module, torch.randn(30, self.R))
        assert m.abs().max() > 1e-3
        torch.testing.assert_close(m, -m.T, rtol=0, atol=1e-7)
        z = torch.randn(2, 30, self.R)
        assert (z * module.code(z, Context())).sum(-1).abs().max() < 1e-5

    @torch.no_grad()
    def test_order_sets_the_sign_and_the_gap_the_size(self, seed):
        module = born("stdp_trace", seed)
        a, b = torch.randn(2, self.R)

        def pair(first: Tensor, second: Tensor, gap: int) -> Tensor:
            return self.memory(module, torch.cat([first[None], torch.zeros(gap, self.R), second[None]]))

        near = pair(a, b, 0)
        torch.testing.assert_close(pair(b, a, 0), -near, rtol=1e-4, atol=1e-7)
        torch.testing.assert_close(pair(a, b, 5), math.exp(-5 / 4) * near, rtol=1e-4, atol=1e-7)
        b = b - (b @ a) / (a @ a) * a
        near = pair(a, b, 0)
        assert (near @ a) @ b > 0 and (
            near @ b
        ) @ a < 0  # the first evokes the second, the second the first with a minus

    @pytest.mark.parametrize("bidirectional", [False, True])
    def test_is_the_equation(self, seed, bidirectional):
        module = born("stdp_trace", seed)

        def read(x: Tensor) -> Tensor:
            scale = plain_scale(x)
            z = x / scale @ module.reader.T
            fast, slow = torch.exp(-1 / module.log_tau.exp()), torch.exp(-1 / module.log_tau_memory.exp())
            m, recent, rows = z.new_zeros(len(z), self.R, self.R), torch.zeros_like(z[:, 0]), []
            for now in z.unbind(1):
                rows.append((m @ now[..., None])[..., 0])
                order = now[:, :, None] * recent[:, None] - recent[:, :, None] * now[:, None]
                m, recent = slow * m + (1 - slow) * order, fast * recent + (1 - fast) * now
            return 4 * scale * (torch.stack(rows, 1) @ module.writer.T)

        law = (lambda x: both_ways(read, x)) if bidirectional else read
        assert_law(module, law, 2 * torch.randn(2, 20, D), Context(bidirectional=bidirectional))


@pytest.mark.parametrize("seed", SEEDS)
class TestMetaplasticity:
    def arrived(self, seed: int, start: float, update: float) -> Tensor:
        """The share of an update that is left after the law."""
        module = born("metaplasticity", seed, n=N).train()
        with torch.no_grad():
            module.hidden.fill_(start)
            module(torch.ones(1, 1, D), Context(x_in=torch.ones(1, 1, N)))
            module.hidden.add_(update)
            module.commit()
        return (module.hidden.detach() - start) / update

    @pytest.mark.parametrize("sign", [1, -1])
    def test_a_confirming_update_passes_and_a_reversing_one_meets_resistance(self, seed, sign):
        for size in (0.05, 0.5, 2.0, 30.0):
            torch.testing.assert_close(self.arrived(seed, sign * size, sign * 0.1), torch.ones(8, N), rtol=1e-3, atol=0)
        assert (self.arrived(seed, sign * 0.05, -sign * 0.1) > 0.98).all()
        assert (self.arrived(seed, sign * 1.5, -sign * 0.1) < 0.02).all()
        expected = torch.full((8, N), 1 - math.tanh(2 * 0.7) ** 2)
        torch.testing.assert_close(self.arrived(seed, sign * 0.7, -sign * 0.1), expected, rtol=1e-3, atol=0)

    def test_an_update_without_a_forward_passes(self, seed):
        module = born("metaplasticity", seed, n=N).train()
        before = module.hidden.detach().clone()
        with torch.no_grad():
            module.hidden.sub_(before, alpha=0.5)
            module.commit()
        assert torch.equal(module.hidden, before - 0.5 * before)

    def test_is_the_equation(self, seed):
        module = born("metaplasticity", seed, n=N)
        v = torch.randn(2, 5, N)

        def by_equation(x: Tensor) -> Tensor:
            straight = module.hidden + (module.hidden.sign() - module.hidden).detach()
            return v @ straight.T @ module.writer.T / math.sqrt(N)

        assert_law(module, by_equation, torch.randn(2, 5, D), Context(x_in=v))

    def test_the_read_in_takes_one_bit(self, seed):
        module = born("metaplasticity", seed, n=N)
        with torch.no_grad():
            module.hidden[0, 0] = 0.0
        assert set((module.binary() * math.sqrt(N)).round(decimals=5).unique().tolist()) == {-1.0, 1.0}


@pytest.mark.parametrize("seed", SEEDS)
class TestSynapticConsolidation:
    @torch.no_grad()
    def test_forgets_by_a_power_law_and_loses_nothing(self, seed):
        module = born("synaptic_consolidation", seed, levels=8).train()
        start = torch.randn(D)
        module.efficacy.copy_(start)
        left = {}
        for commit in range(1, 257):
            learn(module, 1)
            left[commit] = module.efficacy / start
        chain = torch.cat([module.efficacy[None], module.hidden])
        torch.testing.assert_close((2.0 ** torch.arange(8) @ chain), start, rtol=1e-4, atol=1e-5)
        for earlier, later in ((4, 16), (16, 64), (64, 256)):
            slope = torch.log(left[later] / left[earlier]) / math.log(later / earlier)
            assert ((slope > -0.85) & (slope < -0.2)).all()

    @torch.no_grad()
    def test_one_commit_is_the_flux_between_neighbours(self, seed):
        module = born("synaptic_consolidation", seed, levels=4, exchange=0.4).train()
        chain = torch.randn(4, D)
        module.efficacy.copy_(chain[0])
        module.hidden.copy_(chain[1:])
        learn(module, 1)
        expected = chain.clone()
        for k in range(3):
            flux = 0.4 * 2**-k * (chain[k + 1] - chain[k])
            expected[k] += flux / 2**k
            expected[k + 1] -= flux / 2 ** (k + 1)
        torch.testing.assert_close(torch.cat([module.efficacy[None], module.hidden]), expected)

    def test_is_the_equation(self, seed):
        module = born("synaptic_consolidation", seed)
        assert_law(module, lambda x: module.efficacy * x, torch.randn(2, 5, D))


@pytest.mark.parametrize("seed", SEEDS)
class TestSynapticTagging:
    @torch.no_grad()
    def surviving(self, seed: int, event_after: int | None, wait: int) -> Tensor:
        """What is left of a weak change some commits later, if a strong event comes meanwhile or does not."""
        module = born("synaptic_tagging", seed, d=20, n=6, rank=4).train()
        weak = torch.zeros(20, 4, dtype=torch.bool)
        weak[:2] = True  # a tenth of the synapses
        for commit in range(wait):
            module.observe(Context(), early=module.early)  # as a forward does
            if commit == 0:
                module.early[weak] += 0.05 * torch.randn(8).sign()
                first = module.early[weak].clone()
            if commit == event_after:
                module.early[~weak] += 0.05
            module.commit()
        return module.early[weak] / first

    def test_a_weak_change_fades(self, seed):
        assert (self.surviving(seed, None, 500) < 0.01).all()

    def test_a_strong_event_in_time_makes_it_last(self, seed):
        assert (self.surviving(seed, 20, 500) > 0.25).all()

    def test_a_strong_event_too_late_does_not(self, seed):
        assert (self.surviving(seed, 700, 1000) < 0.05).all()

    @torch.no_grad()
    def test_one_commit(self, seed):
        module = born("synaptic_tagging", seed, n=N).train()
        module.wake()
        module.protein.fill_(0.3)
        tag, late, change = module.tag.clone(), module.late.clone(), 2e-3 * torch.rand(D, 8) * (torch.rand(D, 8) > 0.5)
        early = module.early + change
        module(torch.ones(1, 1, D), Context(x_in=torch.ones(1, 1, N)))
        module.early.copy_(early)
        module.commit()
        expected = torch.where(change > 1e-3, torch.ones(()), tag * math.exp(-1 / 100))
        torch.testing.assert_close(module.tag, expected)
        assert module.protein == 1
        late = late + 0.05 * expected * (early - late)
        torch.testing.assert_close(module.late, late)
        torch.testing.assert_close(module.early.detach(), early - 0.01 * (early - late))

    @torch.no_grad()
    def test_proteins_need_enough_tags_and_decay(self, seed):
        module = born("synaptic_tagging", seed, n=N).train()
        module.protein.fill_(1.0)
        learn(module, 3)
        torch.testing.assert_close(module.protein, torch.tensor(math.exp(-3 / 50)))

    def test_is_the_equation(self, seed):
        module = born("synaptic_tagging", seed, n=N)
        v = torch.randn(2, 5, N)
        assert_law(module, lambda x: v @ module.reader.T @ module.early.T, torch.randn(2, 5, D), Context(x_in=v))
