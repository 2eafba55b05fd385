"""What makes the circuits of the stage memory what they are, and each against its equation, token by token."""

from __future__ import annotations

import math

import pytest
import torch
from helpers.oracles import assert_agrees, awake, scan, written
from torch import Tensor
from torch.nn.functional import softplus

from bioadapt import build_primitive
from bioadapt.primitives.base import Context
from bioadapt.primitives.fast_weights import recall
from bioadapt.primitives.frames import token_scale, unit
from bioadapt.primitives.memory.cerebellar_granule import granule_drive, mossy_drive

SEEDS = range(4)
D = 24


def cosine(a: Tensor, b: Tensor) -> Tensor:
    return torch.nn.functional.cosine_similarity(a, b, dim=-1)


@pytest.mark.parametrize("seed", SEEDS)
class TestPlaceFields:
    @torch.no_grad()
    def test_peaks_at_the_centre_and_falls_along_every_ray(self, seed):
        module = awake("place_fields", seed, fields=1)
        rays = torch.nn.functional.normalize(torch.randn(20, 1, 3), dim=-1)
        places = module.centres + torch.linspace(0, 3, 31)[:, None] * rays
        found = module.code(places, Context())[..., 0]
        torch.testing.assert_close(found[:, 0], torch.full((20,), 0.8))  # 1 / (1 + 0.25)
        assert (found.diff(dim=1) < 0).all()

    @torch.no_grad()
    def test_silent_far_from_all_fields(self, seed):
        module = awake("place_fields", seed)
        far = 20 * torch.nn.functional.normalize(torch.randn(1, 50, 3), dim=-1)
        assert module.code(far, Context()).max() < 1e-6
        at_home = module.code(module.centres[None], Context())[0]
        assert (at_home.diagonal() > 0.05).all()

    def test_is_the_equation(self, seed):
        module = awake("place_fields", seed)

        def code(drive: Tensor) -> Tensor:
            distance = (drive[..., None, :] - module.centres).square().sum(-1)
            active = torch.exp(-distance / (2 * softplus(module.width) ** 2))
            return active / (0.25 + active.sum(-1, keepdim=True))

        assert_agrees(module, written(module, code), torch.randn(2, 5, D))


@pytest.mark.parametrize("seed", SEEDS)
class TestHopfieldCompletion:
    @pytest.fixture
    def module(self, seed):
        module = awake("hopfield_completion", seed)
        with torch.no_grad():
            module.log_beta.fill_(math.log(4))
            module.memories.copy_(unit(module.memories))  # of equal length, or the longest would win every contest
        return module

    @torch.no_grad()
    def test_completes_noisy_cues_and_keeps_stored_patterns(self, module):
        stored = module.memories
        cues = stored.repeat(20, 1) + 0.3 * torch.randn(640, 8)
        found = module.code(cues, Context())
        before, after = ((z - stored.repeat(20, 1)).norm(dim=-1) for z in (cues, found))
        assert (after < before).float().mean() > 0.9
        moved = (module.code(stored, Context()) - stored).norm(dim=-1) / stored.norm(dim=-1)
        assert moved.mean() < 0.15

    @torch.no_grad()
    def test_energy_never_increases(self, module):
        state = 3 * torch.randn(200, 8)

        def energy(q: Tensor) -> Tensor:
            return -torch.logsumexp(4 * q @ module.memories.T, -1) / 4 + 0.5 * q.square().sum(-1)

        for _ in range(4):
            following = module.recalled(state, module.keys())
            assert (energy(following) <= energy(state) + 1e-5).all()
            state = following

    @torch.no_grad()
    @pytest.mark.parametrize(("wanted", "held"), [(0.01, 0.5), (1e4, 16.0), (3.0, 3.0)])
    def test_the_inverse_temperature_stays_in_its_range(self, module, wanted, held):
        state = torch.randn(5, 8)
        module.log_beta.fill_(math.log(wanted))
        found = module.recalled(state, module.keys())
        module.log_beta.fill_(math.log(held))
        torch.testing.assert_close(found, module.recalled(state, module.keys()))

    def test_is_the_equation(self, module):
        with torch.no_grad():
            module.log_beta.fill_(-0.2)  # far from saturation, where gradients vanish

        def code(drive: Tensor) -> Tensor:
            patterns, beta = module.memories, module.log_beta.exp()
            for _ in range(2):
                weights = torch.stack([torch.exp(beta * (drive * p).sum(-1)) for p in patterns], -1)
                weights = weights / weights.sum(-1, keepdim=True)
                drive = sum(weights[..., m, None] * p for m, p in enumerate(patterns))
            return drive

        assert_agrees(module, written(module, code), torch.randn(2, 3, D))


@pytest.mark.parametrize("seed", SEEDS)
class TestDentateSeparation:
    @torch.no_grad()
    def test_one_of_a_block_fires_with_its_margin(self, seed):
        module = awake("dentate_separation", seed)
        drive = torch.randn(100, 8)
        code = module.granules(drive).unflatten(-1, (16, 8))
        assert (code.count_nonzero(-1) <= 1).all()
        ordered = (drive @ module.expansion.T).unflatten(-1, (16, 8)).sort(-1).values
        torch.testing.assert_close(code.sum(-1), ordered[..., -1] - ordered[..., -2])
        torch.testing.assert_close(module.expansion.norm(dim=1), torch.ones(128))

    @torch.no_grad()
    def test_similar_inputs_become_less_similar(self, seed):
        module = awake("dentate_separation", seed)
        first, other = torch.nn.functional.normalize(torch.randn(2, 500, 8), dim=-1)
        other = torch.nn.functional.normalize(other - (first * other).sum(-1, keepdim=True) * first, dim=-1)
        second = 0.88 * first + math.sqrt(1 - 0.88**2) * other
        similarity = cosine(module.granules(first), module.granules(second))
        assert (similarity < 0.88).float().mean() > 0.85
        assert 0.6 < similarity.mean() < 0.8

    def test_is_the_equation(self, seed):
        module = awake("dentate_separation", seed)

        def code(drive: Tensor) -> Tensor:
            h = (drive @ module.expansion.T + module.excitability).unflatten(-1, (16, 8))
            best, places = h.topk(2, dim=-1)
            first = torch.nn.functional.one_hot(places[..., 0], 8)
            return (first * (best[..., :1] - best[..., 1:])).flatten(-2) @ module.collector.T

        assert_agrees(module, written(module, code), torch.randn(2, 5, D))

    def test_ties_are_silent(self, seed):
        module = awake("dentate_separation", seed)
        x = torch.zeros(1, 2, D, requires_grad=True)
        module(x).sum().backward()
        assert torch.count_nonzero(module.granules(torch.zeros(3, 8))) == 0
        assert torch.isfinite(x.grad).all()


@pytest.mark.parametrize("seed", SEEDS)
class TestBasalGangliaGate:
    @torch.no_grad()
    def memory(self, module, go: float, nogo: float, tokens: int = 20) -> tuple[Tensor, Tensor]:
        """Content and memory; from token 5 on the biases decide."""
        drive = torch.randn(2, tokens, 12)
        drive[..., 8:] = 0.0
        drive[:, 5:, 8:10], drive[:, 5:, 10:] = go, nogo
        return drive[..., :8], module.code(drive, Context())

    def test_nogo_holds(self, seed):
        _, memory = self.memory(awake("basal_ganglia_gate", seed, resting=0.5), 0.0, 1.0)
        assert memory[:, 4].abs().min() > 0
        torch.testing.assert_close(memory[:, 5:], memory[:, 4:5].expand(-1, 15, -1), rtol=0, atol=1e-6)

    def test_go_takes_in(self, seed):
        content, memory = self.memory(awake("basal_ganglia_gate", seed), 1.0, 0.0)
        torch.testing.assert_close(memory[:, 5:], content[:, 5:], rtol=0, atol=1e-6)

    @torch.no_grad()
    def test_dopamine_opens_the_gate(self, seed):
        module, (go, nogo) = awake("basal_ganglia_gate", seed), torch.randn(2, 500, 2)
        means = []
        for level in (-0.5, 0.0, 0.5):
            module.dopamine.fill_(level)
            opened = module.opening(go, nogo)
            assert opened.min() >= 0 and opened.max() <= 1
            means.append(opened.mean())
        assert means[0] < means[1] < means[2]

    def test_a_shut_gate_can_learn_to_open(self, seed):
        module = awake("basal_ganglia_gate", seed)
        opened = module.opening(torch.full((1, 2), -1.0), torch.full((1, 2), 3.0))
        assert torch.count_nonzero(opened) == 0
        opened.sum().backward()
        assert (module.go_bias.grad > 0).all() and (module.nogo_bias.grad < 0).all()

    @pytest.mark.parametrize("resting", [0.0, 0.5])
    def test_is_the_equation(self, seed, resting):
        module = awake("basal_ganglia_gate", seed, resting=resting)

        def smooth(exact: Tensor, other: Tensor) -> Tensor:
            return exact.detach() + other - other.detach()

        def code(drive: Tensor) -> Tensor:
            content, go, nogo = drive[..., :8], drive[..., 8:10] + module.go_bias, drive[..., 10:] + module.nogo_bias
            go, nogo = (smooth(z.clamp(min=0), softplus(4 * z) / 4) for z in (go, nogo))
            level = module.dopamine.tanh()
            balance = (1 + level) * go - (1 - level) * nogo
            line = resting + (1 - resting) * balance
            p = smooth(line.clamp(0, 1), torch.sigmoid(4 * line - 2)).repeat_interleave(4, -1)
            series = torch.cat([p, content], -1)
            return scan(lambda h, z: (1 - z[:, :8]) * h + z[:, :8] * z[:, 8:], series, torch.zeros(2, 8))

        with torch.no_grad():
            module.dopamine.normal_()
        assert_agrees(module, written(module, code), torch.randn(2, 12, D))


@pytest.mark.parametrize("seed", SEEDS)
class TestBumpAttractor:
    @torch.no_grad()
    def test_holds_the_cue_through_silence_until_another(self, seed):
        module = awake("bump_attractor", seed)
        x = torch.zeros(1, 100, D)
        x[0, 2], x[0, 80:] = torch.randn(D), torch.randn(D)
        drive, _ = module.drive(x, Context())
        state, code = module.state(drive, Context())[0], module.code(drive, Context())[0]
        assert (state[2].norm(dim=-1) > 0.01).all()
        assert torch.equal(state[77], state[2])
        torch.testing.assert_close(code[77], code[2], rtol=0, atol=1e-3)
        assert (code[99] - code[2]).abs().max() > 0.1
        angle, cue = (torch.atan2(h[..., 1], h[..., 0]) for h in (state[99], drive[0, 99, :4].view(2, 2)))
        torch.testing.assert_close(torch.cos(angle - cue), torch.ones(2), rtol=0, atol=1e-2)

    @torch.no_grad()
    def test_the_bump_has_the_same_shape_at_any_amplitude(self, seed):
        module, state = awake("bump_attractor", seed), torch.randn(50, 2, 2)
        torch.testing.assert_close(module.bumps(0.1 * state), module.bumps(10 * state), rtol=0, atol=1e-4)
        bump = module.bumps(torch.tensor([1.0, 0.0]).expand(2, 2))
        expected = torch.exp(2 * (torch.cos(math.tau * torch.arange(8) / 8) - 1))
        torch.testing.assert_close(bump, expected.expand(2, 8))

    def test_is_the_equation(self, seed):
        module = awake("bump_attractor", seed)

        def code(drive: Tensor) -> Tensor:
            cue, gamma = drive[..., :4].unflatten(-1, (2, 2)), torch.sigmoid(drive[..., 4:] + module.bias)[..., None]
            leak = torch.sigmoid(module.leak)[:, None]
            series = torch.cat([gamma, cue], -1)
            h = scan(lambda h, z: (1 - z[..., :1] * leak) * h + z[..., :1] * z[..., 1:], series, torch.zeros(2, 2, 2))
            angle = torch.atan2(h[..., 1], h[..., 0])[..., None]
            place = math.tau * torch.arange(8) / 8
            return torch.exp(softplus(module.concentration)[:, None] * (torch.cos(place - angle) - 1)).flatten(-2)

        assert_agrees(module, written(module, code), torch.randn(2, 12, D))


@pytest.mark.parametrize("seed", SEEDS)
class TestGridCellCode:
    @pytest.fixture
    def module(self, seed):
        module = awake("grid_cell_code", seed)
        with torch.no_grad():
            module.wake()
        return module

    def lattice(self, module, m: int) -> Tensor:
        """Both steps of the lattice of a module, (2, 2)."""
        angles = module.orientation[m] + torch.tensor([0.0, math.pi / 3])
        return module.log_scale[m].exp() * torch.stack([angles.cos(), angles.sin()], -1)

    @torch.no_grad()
    def test_invariant_under_translations_of_its_lattice(self, module):
        places = 3 * torch.randn(50, 2)
        for m in range(4):
            for steps in ((1.0, 0.0), (0.0, 1.0), (2.0, -3.0)):
                moved = places + torch.tensor(steps) @ self.lattice(module, m)
                torch.testing.assert_close(module.cells(moved)[:, m], module.cells(places)[:, m], rtol=0, atol=1e-4)
            half = module.cells(places + 0.5 * self.lattice(module, m)[0])[:, m]
            assert (half - module.cells(places)[:, m]).abs().max() > 0.3

    @torch.no_grad()
    def test_invariant_under_rotation_by_60_degrees_about_a_field(self, module):
        places, c, s = 3 * torch.randn(50, 2), math.cos(math.pi / 3), math.sin(math.pi / 3)
        rotation = torch.tensor([[c, -s], [s, c]])
        for m in range(4):
            for field, (a, b) in enumerate(((0.0, 0.0), (0.5, 0.0), (0.0, 0.5), (0.5, 0.5))):
                centre = torch.tensor([a, b]) @ self.lattice(module, m)
                one, other = (module.cells(centre + z)[:, m, field] for z in (places, places @ rotation.T))
                torch.testing.assert_close(one, other, rtol=0, atol=1e-4)
                assert module.cells(centre)[m, field] == pytest.approx(1.0, abs=1e-4)

    @torch.no_grad()
    def test_a_path_and_its_reverse_lead_back(self, module):
        steps = torch.randn(1, 20, 2)
        place = module.place(torch.cat([steps, -steps.flip(1)], 1), Context())
        torch.testing.assert_close(place[:, -1], torch.zeros(1, 2), rtol=0, atol=1e-5)
        assert place.abs().max() > 0.5

    def test_scales_at_birth(self, seed):
        module = build_primitive("grid_cell_code", D, D)
        torch.testing.assert_close(module.log_scale.exp(), 4 * 1.42 ** torch.arange(4.0))

    def test_is_the_equation(self, module):
        def code(drive: Tensor) -> Tensor:
            place = scan(lambda p, z: p + 0.5 * z.tanh(), drive, torch.zeros(2, 2))
            cells = []
            for m in range(4):
                # Phases are the coordinates in the basis of the lattice, in turns.
                phase = math.tau * place @ torch.linalg.inv(self.lattice(module, m))
                for offset in ((0.0, 0.0), (0.5, 0.0), (0.0, 0.5), (0.5, 0.5)):
                    one, two = (phase - math.tau * torch.tensor(offset)).unbind(-1)
                    cells.append(torch.relu(one.cos() + two.cos() + (one + two).cos()) / 3)
            return torch.stack(cells, -1)

        assert_agrees(module, written(module, code), torch.randn(2, 12, D))


class TestRecall:
    """The fading memory behind both comparators, by pairs of tokens and by scan."""

    @pytest.mark.parametrize("tokens", [20, 300])  # one block of pairs, three
    @pytest.mark.parametrize("masked", [False, True])
    @pytest.mark.parametrize("seed", SEEDS)
    def test_pairs_and_scan_agree_in_value_and_gradient(self, seed, masked, tokens):
        torch.manual_seed(seed)
        mask = torch.rand(2, tokens) > 0.3 if masked else torch.ones(2, tokens, dtype=torch.bool)
        inputs = [torch.randn(2, tokens, 4), torch.randn(2, tokens, 3), torch.tensor([0.95])]
        inputs = [tensor.requires_grad_() for tensor in inputs]
        by_pairs = Context(mask=mask if masked else None)
        by_scan = by_pairs.replace(resets=torch.zeros(2, tokens, dtype=torch.bool))
        results = []
        for context in (by_pairs, by_scan):
            torch.manual_seed(seed + 10)
            found = [part * mask[..., None] for part in recall("memory", *inputs, context)]
            loss = sum((part * torch.randn_like(part)).sum() for part in found)
            results.append((*found, *torch.autograd.grad(loss, inputs)))
        for one, other in zip(*results, strict=True):
            assert other.any()
            torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4 * other.abs().max().item())


@pytest.mark.parametrize("seed", SEEDS)
class TestCa1Comparator:
    @torch.no_grad()
    def test_the_first_is_new_and_a_repeat_is_not(self, seed):
        module = awake("ca1_comparator", seed)
        x = torch.randn(1, 12, D)
        x[0, 4] = 2 * x[0, 1]
        novelty = (module(x) / x)[0].mean(-1) + 0.5
        assert novelty[0] == pytest.approx(1.0, abs=1e-5)
        assert novelty[4] < 0.4
        assert novelty[4] < novelty[1] - 0.2

    def test_is_the_equation(self, seed):
        module = awake("ca1_comparator", seed)

        def expected(x: Tensor) -> Tensor:
            memory, found, decay = torch.zeros(2, 8, 8), [], torch.exp(-1 / module.log_tau.exp())
            for t in range(x.shape[1]):
                drive = x[:, t] @ module.reader.T
                key = drive / drive.norm(dim=-1, keepdim=True)
                familiarity = torch.relu(torch.einsum("bi,bij,bj->b", key, memory, key))
                found.append(1 / (1 + softplus(module.sensitivity) * familiarity))
                memory = decay * memory + key[:, :, None] * key[:, None, :] - torch.eye(8) / 8
            return module.gate * x * (torch.stack(found, 1)[..., None] - module.baseline)

        assert_agrees(module, expected, torch.randn(2, 12, D))


@pytest.mark.parametrize("seed", SEEDS)
class TestCerebellarGranule:
    @torch.no_grad()
    def test_sparse_and_blind_to_scale(self, seed):
        module, v = awake("cerebellar_granule", seed, d=64), torch.randn(100, 64)
        code = module.granules(v)
        torch.testing.assert_close(module.granules(9 * v), code, rtol=0, atol=1e-5)
        assert 0.03 < (code > 0).float().mean() < 0.2
        assert (module.wiring.sort(1).values.diff(dim=1) > 0).all()  # four different fibres

    @torch.no_grad()
    def test_expands_the_dimension(self, seed):
        module = awake("cerebellar_granule", seed, d=64)
        v = torch.randn(2000, 6) @ torch.randn(6, 64)

        def dimension(z: Tensor) -> Tensor:
            spread = torch.linalg.svdvals(z - z.mean(0)).square()
            return spread.sum().square() / spread.square().sum()

        assert dimension(module.granules(v)) > 3 * dimension(v)

    def test_errors_come_as_spikes(self, seed):
        module = awake("cerebellar_granule", seed, d=64)
        purkinje = module.purkinje.detach()
        v, error = torch.randn(1, 64), torch.randn(1, 8)
        # One token: what reaches the Purkinje weights is the spikes times the code.
        with torch.no_grad():
            module.writer.zero_()
            module.writer[:8] = torch.eye(8)
        weights = torch.zeros(1, 64)
        weights[:, :8] = -error
        x = unit(torch.randn(1, 64))
        (module(x, Context(x_in=v)) * weights).sum().backward()
        code = module.granules(v)[0].detach()
        spikes = module.purkinje.grad[:, code.argmax()] / code.max()
        size = error.square().mean().sqrt()
        expected = torch.where(error.abs() > size, size * error.sign(), 0.0)[0]
        torch.testing.assert_close(spikes, expected, rtol=1e-4, atol=1e-5)
        assert purkinje.shape == (8, 256)

    def test_is_the_equation(self, seed):
        module = awake("cerebellar_granule", seed)
        v = torch.randn(2, 5, D)
        dense = torch.zeros(256, D).scatter(1, module.wiring, 0.5)

        def code(v: Tensor) -> Tensor:
            a = v @ dense.T / token_scale(v)
            z = (a - a.mean(-1, keepdim=True)) / a.std(-1, keepdim=True, correction=0)
            return torch.relu(z - softplus(module.threshold))

        def expected(x: Tensor) -> Tensor:
            return -module.gate * token_scale(x) * (code(v) @ module.purkinje.T @ module.writer.T)

        with torch.no_grad():
            module.wake()
            x = torch.randn(2, 5, D)
            torch.testing.assert_close(module(x, Context(x_in=v)), expected(x), rtol=1e-4, atol=1e-4)

    def test_gradients_are_those_of_the_spikes(self, seed):
        module = awake("cerebellar_granule", seed)
        v = torch.randn(3, D, requires_grad=True)
        x, weights = torch.randn(3, D), torch.randn(3, D)
        parameters = (v, module.threshold, module.purkinje)
        found = torch.autograd.grad((module(x, Context(x_in=v)) * weights).sum(), parameters)
        error = -(weights * token_scale(x)) @ module.writer.detach()
        size = error.square().mean(-1, keepdim=True).sqrt()
        spikes = torch.where(error.abs() > size, error.sign() * size, 0.0)
        assert spikes.any()
        wanted = torch.autograd.grad((module.granules(v) @ module.purkinje.T * spikes).sum(), parameters)
        for one, other in zip(found, wanted, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)

    def test_claws_carry_back_what_they_carry(self, seed):
        torch.manual_seed(seed)
        wiring = torch.rand(50, 13).argsort(1)[:, :3].clone()
        v, drive = torch.randn(7, 13), torch.randn(50, 7)
        dense = torch.zeros(50, 13).scatter(1, wiring, 3**-0.5)
        torch.testing.assert_close(granule_drive(v, wiring), dense @ v.T)
        torch.testing.assert_close(mossy_drive(drive, wiring, 13), drive.T @ dense)

    def test_fibres_without_a_claw_get_nothing(self, seed):
        wiring = torch.tensor([[2, 4], [4, 0]])
        found = mossy_drive(torch.ones(2, 1), wiring, 6)[0] * 2**0.5
        torch.testing.assert_close(found, torch.tensor([1.0, 0.0, 1.0, 0.0, 2.0, 0.0]))


@pytest.mark.parametrize("seed", SEEDS)
class TestComplementaryFastWeights:
    def keys(self, module, x: Tensor) -> tuple[Tensor, Tensor]:
        key, content = (unit(x) @ module.reader.T).split(8, -1)
        return key / key.norm(dim=-1, keepdim=True), content

    @torch.no_grad()
    def test_recalls_after_one_presentation(self, seed):
        module = awake("complementary_fast_weights", seed)
        drive = torch.zeros(1, 6, 16)
        drive[0, 0] = torch.randn(16)
        drive[0, 0, :8] /= drive[0, 0, :8].norm()
        drive[0, 1:5, 7] = 1.0  # other keys, orthogonal to the first, and no content
        drive[0, 0, 7] = 0.0
        drive[0, 0, :8] /= drive[0, 0, :8].norm()
        drive[0, 5, :8] = drive[0, 0, :8]
        recalled = module.fast(drive, Context())[0, 5]
        torch.testing.assert_close(recalled, math.exp(-4 / 32) * drive[0, 0, 8:], rtol=1e-4, atol=1e-5)

    @torch.no_grad()
    def test_repetition_does_not_pile_up(self, seed):
        module = awake("complementary_fast_weights", seed)
        x = torch.randn(1, 1, D).expand(1, 200, D)
        _, content = self.keys(module, x)
        drive, _ = module.drive(x, Context())
        torch.testing.assert_close(module.fast(drive, Context())[0, -1], content[0, 0], rtol=1e-3, atol=1e-3)

    def test_consolidates_by_commit_alone(self, seed):
        module = awake("complementary_fast_weights", seed).train()
        x = torch.randn(1, 1, D)
        key, content = (z[0, 0].detach() for z in self.keys(module, x))
        module(x)
        assert torch.count_nonzero(module.slow) == 0
        module.commit()
        torch.testing.assert_close(module.slow, 0.02 * content[:, None] * key)
        with torch.no_grad():
            module.balance.fill_(-100.0)
            module.gate.fill_(1.0)
            fresh = module.eval()(x) @ torch.linalg.pinv(module.writer).T
        assert cosine(fresh[0, 0], content) > 0.999

    def test_what_is_consolidated_is_the_end_of_each_sequence(self, seed):
        module = awake("complementary_fast_weights", seed).train()
        x, mask, resets = torch.randn(3, 12, D), torch.rand(3, 12) > 0.3, torch.zeros(3, 12, dtype=torch.bool)
        mask[:, 4], resets[:2, 4] = True, True
        module(torch.where(mask[..., None], x, 1e3), Context(mask=mask, resets=resets))
        module.commit()
        episodes, decay = [], math.exp(-1 / 32)
        for b in range(3):
            bound, norms = torch.zeros(8, 8), torch.zeros(8, 8)
            for t in range(12):
                if resets[b, t]:
                    bound, norms = torch.zeros(8, 8), torch.zeros(8, 8)
                if mask[b, t]:
                    key, content = (z.detach() for z in self.keys(module, x[b, t]))
                    bound = decay * bound + content[:, None] * key
                    norms = decay * norms + key[:, None] * key
            episodes.append(bound / norms.trace().clamp(min=1))
        torch.testing.assert_close(module.slow, 0.02 * torch.stack(episodes).mean(0), rtol=1e-4, atol=1e-6)

    @pytest.mark.parametrize("bidirectional", [False, True])
    def test_is_the_equation(self, seed, bidirectional):
        module = awake("complementary_fast_weights", seed)
        module.slow.normal_()
        mask = torch.rand(2, 12) > 0.3

        def one_way(key: Tensor, content: Tensor, mask: Tensor) -> Tensor:
            share, decay = torch.sigmoid(module.balance), torch.exp(-1 / module.log_tau.exp())
            bound, norms, found = torch.zeros(2, 8, 8), torch.zeros(2, 8, 8), []
            for t in range(key.shape[1]):
                k, w = key[:, t], content[:, t]
                match = torch.einsum("bi,bij,bj->b", k, norms, k).clamp(min=1)[:, None]
                fast = torch.einsum("bij,bj->bi", bound, k) / match
                found.append(share * fast + (1 - share) * k @ module.slow.T)
                real = mask[:, t, None, None]
                bound = torch.where(real, decay * bound + w[:, :, None] * k[:, None], bound)
                norms = torch.where(real, decay * norms + k[:, :, None] * k[:, None], norms)
            return torch.stack(found, 1)

        def expected(x: Tensor) -> Tensor:
            series = (*self.keys(module, x), mask)
            code = one_way(*series)
            if bidirectional:
                code = 0.5 * (code + one_way(*(z.flip(1) for z in series)).flip(1))
            return mask[..., None] * module.gate * token_scale(x) * (code @ module.writer.T)

        class Masked(torch.nn.Module):
            """The change at real tokens alone."""

            def __init__(self) -> None:
                super().__init__()
                self.module = module

            def wake(self) -> None:
                self.module.wake()

            def forward(self, x: Tensor, context: Context) -> Tensor:
                return mask[..., None] * self.module(x, context)

        assert_agrees(Masked(), expected, torch.randn(2, 12, D), Context(mask=mask, bidirectional=bidirectional))


def episode(*items: int, seed: int = 0) -> Tensor:
    """A sequence of items, each one the same random features wherever it comes: (1, T, D)."""
    return torch.randn(10, D, generator=torch.Generator().manual_seed(seed))[list(items)][None]


@pytest.mark.parametrize("seed", SEEDS)
class TestSequenceMemory:
    @torch.no_grad()
    def test_a_cue_brings_back_what_followed_it(self, seed):
        module = awake("sequence_memory", seed)
        module.writer.fill_(1.0)
        x = episode(1, 2, 3, 4, 1, 5, 3, seed=seed)
        recalled = module(x)[0] / token_scale(x)[0]
        items = episode(*range(6), seed=seed)[0]
        unseen = recalled[[0, 1, 2, 3, 5]]
        assert unseen.abs().max() < 1e-2  # nothing has followed these yet
        assert cosine(recalled[4], items[2]) > 0.999 and cosine(recalled[6], items[4]) > 0.999

    @torch.no_grad()
    def test_of_several_followers_the_latest_is_recalled_best(self, seed):
        module = awake("sequence_memory", seed)
        module.writer.fill_(1.0)
        items, x = episode(*range(6), seed=seed)[0], episode(1, 2, 3, 1, 4, 5, 1, seed=seed)
        earlier, later = (unit(items[i]) for i in (2, 4))
        share = torch.linalg.lstsq(torch.stack([earlier, later], 1), module(x)[0, 6] / token_scale(x)[0, 6]).solution
        decay = math.exp(-1 / 64)
        # The sum of both weights is above one, so that they are shares of one whole.
        expected = torch.tensor([decay**5, decay**2]) / (decay**5 + decay**2)
        torch.testing.assert_close(share, expected, rtol=0, atol=1e-3)
        assert share[1] > share[0]

    @torch.no_grad()
    def test_what_is_older_than_the_span_is_gone(self, seed):
        items = (1, 2, 3, 4, 5, 6, 7, 1)
        kept, gone = (awake("sequence_memory", seed, span=span) for span in (7, 6))
        for module in (kept, gone):
            module.writer.fill_(1.0)
        # The transition from 1 to 2 was stored six tokens before the second 1 comes.
        assert kept(episode(*items, seed=seed))[0, -1].norm() > 1
        assert gone(episode(*items, seed=seed))[0, -1].norm() < 1e-2

    @torch.no_grad()
    @pytest.mark.parametrize("tokens", [4, 5, 23])  # within a span, above it, and not a multiple of it
    def test_blocks_of_long_sequences_change_nothing(self, seed, tokens):
        module = awake("sequence_memory", seed, span=4)
        module.wake()
        x = torch.randn(2, tokens, D)
        by_steps = torch.cat([module(x[:, max(0, t - 4) : t + 1])[:, -1:] for t in range(tokens)], 1)
        torch.testing.assert_close(module(x), by_steps, rtol=1e-4, atol=1e-5)

    def test_is_the_equation(self, seed):
        module = awake("sequence_memory", seed)

        def expected(x: Tensor) -> Tensor:
            u, decay, found = unit(x), torch.exp(-1 / module.log_tau.exp()), [torch.zeros_like(x[:, 0])]
            for t in range(1, x.shape[1]):
                weights = [
                    decay ** (t - s) * torch.sigmoid(32 * ((u[:, t] * u[:, s - 1]).mean(-1) - module.threshold))
                    for s in range(1, t + 1)
                ]
                total = torch.stack(weights).sum(0).clamp(min=1)
                recalled = sum(w[:, None] * u[:, s] for s, w in enumerate(weights, 1))
                found.append(recalled / total[:, None])
            return module.gate * token_scale(x) * module.writer * torch.stack(found, 1)

        assert_agrees(module, expected, torch.randn(2, 9, D))
