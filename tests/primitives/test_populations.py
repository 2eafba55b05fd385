"""What makes the other mechanisms of the stage competition what they are: populations that balance, share and vote."""

from __future__ import annotations

import pytest
import torch
from helpers.oracles import assert_follows, woken
from torch import Tensor
from torch.nn.functional import normalize, one_hot, softplus

from bioadapt import build_primitive
from bioadapt.primitives.base import Context, Host
from bioadapt.primitives.competition.dale_small_world import small_world
from bioadapt.primitives.competition.sparse_coding import code_after
from bioadapt.primitives.frames import group_index, unit

SEEDS = range(4)


@pytest.mark.parametrize("seed", SEEDS)
class TestExcitationInhibitionBalance:
    D, GROUPS = 67, 2

    def balanced(self, seed, tightness):
        module = woken("excitation_inhibition_balance", seed, self.D, self.D)
        with torch.no_grad():
            module.gate.fill_(1.0)
            module.tightness.fill_(tightness)
        x = torch.randn(2, 5, self.D)
        return x, x + module(x)

    def halves(self, x):
        """Mean of the positive and of the negative half of each group: two of (B, T, groups)."""
        index = group_index(self.D, self.GROUPS)
        parts = [x[..., index == group] for group in range(self.GROUPS)]
        return [torch.stack([torch.relu(sign * part).mean(-1) for part in parts], -1) for sign in (1, -1)]

    def test_full_balance_makes_both_halves_equal(self, seed):
        _, f = self.balanced(seed, 30.0)
        excitation, inhibition = self.halves(f)
        torch.testing.assert_close(excitation, inhibition, rtol=1e-3, atol=0)

    def test_one_factor_for_each_sign_and_group(self, seed):
        x, f = self.balanced(seed, 30.0)
        excitation, inhibition = self.halves(x)
        index = group_index(self.D, self.GROUPS)
        factor = torch.where(
            x > 0, (inhibition / excitation).sqrt()[..., index], (excitation / inhibition).sqrt()[..., index]
        )
        torch.testing.assert_close(f, factor * x, rtol=1e-4, atol=1e-5)

    def test_no_balance_changes_nothing(self, seed):
        x, f = self.balanced(seed, -100.0)
        assert torch.equal(f, x)

    def test_a_missing_half_is_bounded(self, seed):
        module = woken("excitation_inhibition_balance", seed, self.D, self.D)
        with torch.no_grad():
            module.gate.fill_(1.0)
            module.tightness.fill_(100.0)
        x = torch.rand(1, 3, self.D) + 0.1
        torch.testing.assert_close(x + module(x), x / 8**0.5)
        torch.testing.assert_close(-x + module(-x), -x / 8**0.5)

    def test_is_the_equation(self, seed):
        module = woken("excitation_inhibition_balance", seed, self.D, self.D)
        index = group_index(self.D, self.GROUPS)

        def plain(x):
            excitation, inhibition = self.halves(x)
            q = (inhibition / excitation).clamp(1 / 8, 8)[..., index]
            half = torch.sigmoid(module.tightness)[index] / 2
            return torch.relu(x) * q**half - torch.relu(-x) * q**-half - x

        assert_follows(module, plain, torch.randn(2, 5, self.D))


@pytest.mark.parametrize("seed", SEEDS)
class TestPopulationCode:
    D = 12

    def plain(self, module, x):
        centres = torch.linspace(-2.5, 2.5, module.centres)
        sigma = 2.5 / (module.centres - 1)
        u = unit(x).clamp(-2.5, 2.5)
        tuning = torch.softmax(-((u[..., None] - centres) ** 2) / (2 * sigma**2), -1)
        return x / unit(x) * (tuning * module.votes.T).sum(-1)

    @pytest.mark.parametrize("centres", [2, 5, 6, 12])
    def test_is_the_equation(self, seed, centres):
        module = woken("population_code", seed, self.D, self.D, centres=centres)
        x = torch.randn(2, 5, self.D)
        x[0, 0, 0], x[0, 1, 1] = 30.0, -30.0  # out of the range of the centres
        assert_follows(module, lambda x: self.plain(module, x), x, tolerance=5e-4)

    def decoded(self, seed, votes: Tensor, x: Tensor) -> Tensor:
        module = woken("population_code", seed, self.D, self.D)
        with torch.no_grad():
            module.gate.fill_(1.0)
            module.votes.copy_(votes[:, None].expand(-1, self.D))
        return module(x) * unit(x) / x

    def test_voting_for_ones_own_preference_gives_the_value_back(self, seed):
        x = torch.randn(4, 50, self.D)
        u, found = unit(x), self.decoded(seed, torch.linspace(-2.5, 2.5, 6), x)
        inside = u.abs() < 1.6
        assert inside.sum() > 1000
        assert (found - u)[inside].abs().max() < 0.05

    def test_equal_votes_give_a_constant(self, seed):
        found = self.decoded(seed, torch.full((6,), 0.7), torch.randn(2, 5, self.D))
        torch.testing.assert_close(found, torch.full_like(found, 0.7))

    def test_votes_are_local(self, seed):
        x = torch.randn(2, 50, self.D)
        found, u = self.decoded(seed, torch.tensor([0.0, 0, 0, 0, 0, 1]), x), unit(x)
        assert found[u < 0].abs().max() < 1e-4
        assert (found[u > 2.1] > 0.5).all()


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("reach", [1, 2, 5])
class TestGapJunction:
    D = 13

    @pytest.fixture
    def module(self, seed, reach):
        module = woken("gap_junction", seed, self.D, self.D, reach=reach)
        with torch.no_grad():
            module.conductance.normal_(std=3.0)
            module.gate.fill_(1.0)
        return module

    def matrix(self, module, reach) -> Tensor:
        """Minus the Laplacian of the ring, pair by pair."""
        g = torch.sigmoid(module.conductance) / (4 * reach)
        total = torch.zeros(self.D, self.D)
        for offset in range(1, reach + 1):
            for place in range(self.D):
                pair = module.order[[place, (place + offset) % self.D]]
                edge = one_hot(pair, self.D).float()
                difference = (edge[0] - edge[1])[:, None]
                total = total - g[offset - 1, place] * difference @ difference.T
        return total

    def test_is_the_equation(self, module, reach):
        assert_follows(module, lambda x: x @ self.matrix(module, reach).T, torch.randn(2, 5, self.D))

    def test_conserves_the_sum_and_loses_energy(self, module):
        x = torch.randn(2, 5, self.D)
        delta = module(x)
        assert delta.sum(-1).abs().max() < 1e-5
        assert ((x * delta).sum(-1) < 0).all()

    def test_nothing_flows_between_equals(self, module):
        assert module(torch.full((1, 3, self.D), 1.7)).abs().max() < 1e-6

    def test_symmetric_with_the_spectrum_of_a_diffusion(self, module, reach):
        coupling = module.left_matrix()
        torch.testing.assert_close(coupling, coupling.T, rtol=0, atol=1e-6)
        assert (torch.count_nonzero(coupling, 1) == 2 * reach + 1).all()
        spectrum = torch.linalg.eigvalsh(torch.eye(self.D) + coupling)
        assert spectrum.min() > -1e-5 and spectrum.max() < 1 + 1e-5


@pytest.mark.parametrize("seed", SEEDS)
class TestDaleSmallWorld:
    D = 40

    def jacobian(self, module) -> Tensor:
        x = torch.rand(1, 1, self.D) + 0.1  # all senders speak
        return torch.autograd.functional.jacobian(lambda z: module(z[None, None])[0, 0], x[0, 0])

    def test_every_sender_has_one_sign_and_every_row_k_entries(self, seed):
        module = woken("dale_small_world", seed, self.D, self.D)
        with torch.no_grad():
            module.gate.fill_(1.0)
        wiring = self.jacobian(module)
        assert ((wiring >= 0).all(0) | (wiring <= 0).all(0)).all()
        assert (torch.count_nonzero(wiring, 1) == 4).all()
        assert (wiring.diagonal() == 0).all()
        assert (module.sign < 0).sum() == 8

    def test_silent_units_send_nothing(self, seed):
        module = woken("dale_small_world", seed, self.D, self.D)
        assert torch.count_nonzero(module(-torch.rand(1, 3, self.D))) == 0

    def test_weights_at_birth_balance_on_average(self, seed):
        module = build_primitive("dale_small_world", 400, 400, host=Host(seed=seed), neighbours=64)
        weights = module.weights()
        torch.testing.assert_close(weights.abs(), torch.where(weights > 0, 1 / 64, 4 / 64))
        assert weights.sum(1).mean().abs() < 0.05

    @pytest.mark.parametrize("neighbours", [1, 3, 4, 39])
    def test_is_the_equation(self, seed, neighbours):
        module = woken("dale_small_world", seed, self.D, self.D, neighbours=neighbours)

        def plain(x):
            dense = torch.zeros(self.D, self.D)
            weights = softplus(module.strength) * module.sign[module.senders]
            for unit_, (row, senders) in enumerate(zip(weights, module.senders, strict=True)):
                dense = dense + one_hot(torch.tensor(unit_), self.D)[:, None] * (row @ one_hot(senders, self.D).float())
            return torch.relu(x) @ dense.T

        assert_follows(module, plain, torch.randn(2, 5, self.D))

    @pytest.mark.parametrize("rewiring", [0.0, 0.5, 1.0])
    def test_senders_are_distinct(self, seed, rewiring):
        senders = small_world(20, 15, rewiring, torch.Generator().manual_seed(seed))
        for unit_, row in enumerate(senders.tolist()):
            assert len({*row, unit_}) == 16

    def test_small_world(self, seed):
        """Neighbours know each other, and yet everybody is near."""

        def clustering_and_path(rewiring: float) -> tuple[float, float]:
            senders = small_world(768, 8, rewiring, torch.Generator().manual_seed(seed))
            adjacency = torch.zeros(768, 768).scatter_(1, senders, 1.0)
            adjacency = ((adjacency + adjacency.T) > 0).float()
            degree, triangles = adjacency.sum(1), (adjacency @ adjacency * adjacency).sum(1)
            reached, lengths, steps = torch.eye(768), torch.zeros(768, 768), 0
            while (reached == 0).any() and steps < 100:
                steps += 1
                further = ((reached @ adjacency) > 0) & (reached == 0)
                lengths[further] = steps
                reached[further] = 1.0
            return (triangles / (degree * (degree - 1))).mean().item(), lengths.mean().item()

        clustering, path = clustering_and_path(0.1)
        random_clustering, random_path = clustering_and_path(1.0)
        assert clustering > 10 * random_clustering
        assert path < 1.6 * random_path


@pytest.mark.parametrize("seed", SEEDS)
class TestVipDisinhibition:
    N, D = 10, 24

    @pytest.fixture
    def module(self, seed):
        return woken("vip_disinhibition", seed, self.N, self.D)

    def response(self, module, x: Tensor, vip: float = 0.0, sst: float = 1.0) -> Tensor:
        """|f| with the given drive of VIP cells and the given strength of SST cells."""
        with torch.no_grad():
            module.gate.fill_(1.0)
            module.context_weights.zero_()
            module.context_bias.fill_(vip)
            module.onto_sst.fill_(sst)
            return (x + module(x, Context(x_in=torch.ones(2, 5, self.N)))).abs()

    def sst_is_active(self, module, x: Tensor) -> Tensor:
        sst, _ = module.interneurons(x, Context(x_in=torch.ones(2, 5, self.N)))
        return (sst > 0)[..., group_index(self.D, 8)]

    def test_disinhibition(self, module):
        x = 2 * torch.randn(2, 5, self.D)
        little, active = self.response(module, x, vip=-2.0), self.sst_is_active(module, x)
        more = self.response(module, x, vip=0.0)
        assert (more >= little).all()
        released = active & (more > 0)
        assert released.sum() > 50
        assert (more > little)[released].all()
        assert torch.equal(more[~active], little[~active])

    def test_nothing_is_left_to_disinhibit(self, module):
        x = torch.randn(2, 5, self.D)
        much = self.response(module, x, vip=20.0)
        assert not self.sst_is_active(module, x).any()
        assert torch.equal(self.response(module, x, vip=40.0), much)

    def test_stronger_sst_cells_subtract_more(self, module):
        x = 2 * torch.randn(2, 5, self.D)
        weak, strong = self.response(module, x, sst=1.0), self.response(module, x, sst=2.0)
        assert (strong <= weak).all()
        assert (strong < weak)[self.sst_is_active(module, x) & (weak > 0)].all()

    def test_is_the_equation(self, module):
        index = group_index(self.D, 8)

        def plain(x, v):
            rho = module.log_level.exp()
            c = x / rho
            activity = torch.stack([c[..., index == group].abs().mean(-1) for group in range(8)], -1)
            vip = softplus(unit(v) @ module.context_weights.T + module.context_bias)
            excess = softplus(module.onto_sst) * activity - softplus(module.vip_onto_sst) * vip
            slope = softplus(4 * excess) / 4  # of a smooth threshold, in backward alone
            sst = (torch.relu(excess).detach() + slope - slope.detach())[..., index]
            pv = (softplus(module.onto_pv) * activity)[..., index]
            return rho * (c.sign() * torch.relu(c.abs() - sst) / (1 + pv) - c)

        assert_follows(module, plain, 2 * torch.randn(2, 5, self.D), torch.randn(2, 5, self.N))


@pytest.mark.parametrize("seed", SEEDS)
class TestSparseCoding:
    D = 24

    def test_a_rival_is_explained_away(self, seed):
        """Two atoms of cosine 0.9, input on the first: the other is driven above threshold, and yet silent."""
        overlap = torch.tensor([[1.0, 0.9], [0.9, 1.0]])
        strength = 2 + torch.rand(5, 1, generator=torch.Generator().manual_seed(seed))
        drive, threshold = strength * overlap[0], torch.full((2,), 0.5)
        assert (drive[:, 1] > threshold[1]).all()
        code = code_after(drive, overlap, threshold, 0.4, 300)
        assert (code[:, 1] == 0).all()
        torch.testing.assert_close(code[:, 0], drive[:, 0] - 0.5, rtol=1e-3, atol=0)

    def test_settles_where_the_lasso_is_optimal(self, seed):
        torch.manual_seed(seed)
        atoms = normalize(torch.randn(8, self.D), dim=1)
        x, threshold = torch.randn(20, self.D), torch.linspace(0.3, 0.8, 8)
        code = code_after(x @ atoms.T, atoms @ atoms.T, threshold, 0.4, 300)
        residual = (x - code @ atoms) @ atoms.T
        active = code != 0
        assert 20 < active.sum() < 140
        assert (residual - threshold * code.sign())[active].abs().max() < 1e-3
        assert (residual.abs() - threshold)[~active].max() < 1e-3

    def test_atoms_that_are_all_alike_do_not_diverge(self, seed):
        overlap = torch.ones(64, 64)
        code = code_after(torch.full((1, 64), 3.0), overlap, torch.full((64,), 0.5), 1.0, 64)
        assert code.sum() == pytest.approx(2.5, abs=0.5)

    def test_is_the_equation(self, seed):
        module = woken("sparse_coding", seed, self.D, self.D)

        def plain(x):
            u, atoms, threshold = unit(x), normalize(module.dictionary, dim=1), softplus(module.threshold)
            drive = u @ atoms.T
            inhibition = atoms @ atoms.T - torch.eye(8)
            rate = min(0.4, 1 / (atoms @ atoms.T).abs().sum(1).max().item())

            def exceeding(z):
                return z.sign() * torch.relu(z.abs() - threshold)

            z = torch.zeros_like(drive)
            for _ in range(6):
                z = z + rate * (drive - z - exceeding(z) @ inhibition.T)
            return x / u * (exceeding(z) @ module.writer.T)

        assert_follows(module, plain, torch.randn(2, 5, self.D))


@pytest.mark.parametrize("seed", SEEDS)
class TestAntihebbianDecorrelation:
    D = 16

    @pytest.fixture
    def module(self, seed):
        return woken("antihebbian_decorrelation", seed, self.D, self.D, rank=6).train()

    def correlation(self, module, x) -> Tensor:
        y = unit(x).flatten(0, 1) @ (module.steady_state() @ module.reader).T
        together = y.T @ y
        return together / together.diagonal().sqrt() / together.diagonal().sqrt()[:, None]

    def test_correlations_disappear(self, module):
        mixing = torch.eye(self.D) + 0.5 * torch.randn(self.D, self.D)
        x = torch.randn(4, 50, self.D) @ mixing
        mask = torch.rand(4, 50) > 0.3
        context = Context(mask=mask)
        real = x[mask][None]
        others = ~torch.eye(6, dtype=torch.bool)
        before = self.correlation(module, real)[others].abs().mean()
        for _ in range(400):
            module(torch.where(mask[..., None], x, 1e3), context)
            module.commit()
        assert self.correlation(module, real)[others].abs().mean() < 0.35 * before
        assert torch.equal(module.lateral, module.lateral.T)
        assert torch.count_nonzero(module.lateral.diagonal()) == 0

    def test_the_circuit_stays_stable(self, module):
        """However strong two latents oppose each other, which no linear inhibition can undo."""
        with torch.no_grad():
            module.reader[1:] = -module.reader[0]
        for _ in range(100):
            module(torch.randn(2, 5, self.D))
            module.commit()
        assert torch.linalg.eigvalsh(module.lateral)[0] > -0.9 - 1e-4
        assert torch.count_nonzero(module.lateral.diagonal()) == 0
        assert module.lateral.abs().max() > 0.1

    def test_is_the_steady_state_of_lateral_inhibition(self, module):
        with torch.no_grad():
            lateral = 0.1 * torch.randn(6, 6)
            module.lateral.copy_((lateral + lateral.T).fill_diagonal_(0.0))

        def plain(x):
            feed_forward = x @ module.reader.T
            y = torch.zeros_like(feed_forward)
            for _ in range(100):
                y = feed_forward - y @ module.lateral.T
            return y @ module.writer.T

        assert_follows(module.eval(), plain, torch.randn(2, 5, self.D))
