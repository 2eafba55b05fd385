"""What makes the circuits of the stage dynamics what they are, and each against its equation, token by token."""

from __future__ import annotations

import math

import pytest
import torch
from helpers.oracles import assert_agrees, awake, scan, written
from torch import Tensor
from torch.nn.functional import pad, softplus

from bioadapt import build_primitive
from bioadapt.primitives.base import Context
from bioadapt.primitives.dynamics.cortical_column import sweeps
from bioadapt.primitives.dynamics.travelling_wave import lags
from bioadapt.primitives.frames import token_scale, unit
from bioadapt.primitives.rotation import rotation

SEEDS = range(4)
D = 24


def delayed(series: Tensor, initial: float = 0.0) -> Tensor:
    return torch.cat([torch.full_like(series[:, :1], initial), series[:, :-1]], 1)


def hidden_from(module, tokens: int) -> Tensor:
    """Tokens of unit scale that the read-in does not see: (tokens, d)."""
    blind = torch.linalg.svd(module.reader.detach()).Vh[module.reader.shape[0] :]
    return unit(torch.randn(tokens, len(blind)) @ blind)


@pytest.mark.parametrize("seed", SEEDS)
class TestLeakyIntegrator:
    @torch.no_grad()
    def test_the_impulse_response_is_geometric(self, seed):
        module = awake("leaky_integrator", seed)
        x = hidden_from(module, 30)[None]
        x[0, 5] = unit(torch.randn(D))
        # Read unit by unit, through the pseudoinverse of the read-out.
        latents = module(x)[0] @ torch.linalg.pinv(module.writer).T
        torch.testing.assert_close(latents[:5], torch.zeros(5, 8), rtol=0, atol=1e-5)
        tau = torch.logspace(math.log2(2), math.log2(256), 8, 2)
        torch.testing.assert_close(
            latents[5], (1 - torch.exp(-1 / tau)) * (x[0, 5] @ module.reader.T), rtol=0, atol=1e-5
        )
        torch.testing.assert_close(latents[6:], latents[5:-1] * torch.exp(-1 / tau), rtol=0, atol=1e-5)

    def test_is_the_equation(self, seed):
        module = awake("leaky_integrator", seed)

        def code(drive: Tensor) -> Tensor:
            decay = torch.exp(-1 / module.log_tau.exp())
            return scan(lambda h, z: decay * h + (1 - decay) * z, drive, torch.zeros_like(drive[:, 0]))

        assert_agrees(module, written(module, code), torch.randn(2, 12, D))


@pytest.mark.parametrize("seed", SEEDS)
class TestShortTermFacilitation:
    @pytest.fixture
    def transmitted(self, seed):
        """What becomes of pulses of size 2 at the given tokens, relative to their size."""
        module = awake("short_term_facilitation", seed, groups=4)
        pulse = 2 * torch.randn(D).sign()

        @torch.no_grad()
        def transmit(*tokens: int):
            x = torch.zeros(1, max(tokens) + 1, D)
            x[0, list(tokens)] = pulse
            return ((x + module(x)) / pulse)[0, list(tokens)]

        return transmit

    def test_first_pulse_is_unchanged_and_the_second_facilitated(self, transmitted):
        first, second = transmitted(0, 1)
        torch.testing.assert_close(first, torch.ones(D), rtol=0, atol=1e-6)
        assert (second > 1.2).all()

    def test_fades_with_the_gap(self, transmitted):
        seconds = torch.stack([transmitted(0, gap)[1] for gap in (1, 2, 4, 8, 16, 32, 64)])
        assert (seconds.diff(dim=0) < 0).all()
        assert (seconds[-1] < 1.05).all()

    def test_a_train_of_pulses_saturates_below_certain_release(self, transmitted):
        train = transmitted(*range(60))
        assert (train[:4].diff(dim=0) > 0).all()
        certain = 1 / (0.1 * (1 - 1 / 11))  # 1 / U
        assert (train < certain).all() and (train[-1] > 2).all()

    def test_is_the_equation(self, seed):
        module = awake("short_term_facilitation", seed, groups=4)
        index = torch.arange(D) * 4 // D

        def expected(x: Tensor) -> Tensor:
            activity = torch.stack([x[..., index == g].abs().mean(-1) for g in range(4)], -1) / module.log_level.exp()
            activity, tau = activity.tanh(), 1 + softplus(module.recovery)
            u = module.release * (1 - 1 / tau)
            e = delayed(scan(lambda e, a: (1 - 1 / tau - u * a) * e + u * (1 - u) * a, activity, torch.zeros(2, 4)))
            used = (u + e) * activity
            back = 4 / (tau + 3)
            resource = delayed(scan(lambda r, spent: (1 - back) * (1 - spent) * r + back, used, torch.ones(2, 4)), 1.0)
            return module.gate * x * ((u + e) * resource / u - 1)[..., index]

        assert_agrees(module, expected, torch.randn(2, 12, D))

    @torch.no_grad()
    def test_it_is_no_multiple_of_depression(self, seed):
        """With the same constants, whatever gain each channel of the one is given."""
        other, module = (awake(name, seed, groups=4) for name in ("short_term_depression", "short_term_facilitation"))
        other.release.fill_(0.1)
        x = torch.randn(4, 40, D) * torch.rand(4, 40, 1).mul(4)
        one, two = ((m(x) / x).flatten(0, 1) for m in (other, module))
        ratio = two[one.abs() > 1e-3] / one[one.abs() > 1e-3]
        assert ratio.std() > 0.1 * ratio.mean().abs()

    @torch.no_grad()
    def test_a_release_of_zero_is_defined(self, seed):
        module = awake("short_term_facilitation", seed)
        module.release.zero_()
        assert torch.isfinite(module(torch.randn(1, 9, D))).all()


@pytest.mark.parametrize("seed", SEEDS)
class TestSpikeFrequencyAdaptation:
    @torch.no_grad()
    def test_onset_adaptation_and_no_rebound(self, seed):
        module = awake("spike_frequency_adaptation", seed)
        module.log_tau.fill_(math.log(6))
        x = torch.randn(1, 1, D).expand(1, 80, D).clone()
        x[:, 60:] = 0.0
        response = (x + module(x))[0]
        torch.testing.assert_close(response[0], x[0, 0])
        size = response[:60].abs()
        assert (size[:20].diff(dim=0) < 0).all()
        torch.testing.assert_close(size[59], 0.5 * x[0, 0].abs(), rtol=1e-3, atol=1e-4)
        assert torch.count_nonzero(response[60:]) == 0

    @pytest.mark.parametrize("tokens", [1, 12])
    @pytest.mark.parametrize("groups", [2, 3, 5])  # the first two by products, the last by scan
    @pytest.mark.parametrize("bidirectional", [False, True])
    def test_is_the_equation(self, seed, groups, tokens, bidirectional):
        module = awake("spike_frequency_adaptation", seed, groups=groups)
        assert module.products == (D % groups == 0)
        index = torch.arange(D) * groups // D
        assert module.log_tau.exp()[[0, -1]].tolist() == pytest.approx([4, 64])

        def one_way(x: Tensor) -> Tensor:
            decay, beta = torch.exp(-1 / module.log_tau.exp())[index], torch.sigmoid(module.strength)
            w = scan(lambda w, z: decay * w + (1 - decay) * z, x.abs(), torch.zeros(2, D))
            return x.sign() * torch.relu(x.abs() - beta * delayed(w)) - x

        def expected(x: Tensor) -> Tensor:
            both = 0.5 * (one_way(x) + one_way(x.flip(1)).flip(1)) if bidirectional else one_way(x)
            return module.gate * both

        context = Context(bidirectional=bidirectional)
        if tokens == 1:
            x = torch.randn(2, 1, D)
            assert torch.count_nonzero(module(x, context)) == 0
        else:
            assert_agrees(module, expected, torch.randn(2, tokens, D), context)


class TestLags:
    """The shift register behind the sheet, against a queue."""

    SITES = 4

    def queue(self, z: Tensor, mask: Tensor, resets: Tensor) -> Tensor:
        found = torch.zeros(*z.shape, self.SITES)
        for b in range(z.shape[0]):
            line = [torch.zeros(z.shape[2])] * self.SITES
            for t in range(z.shape[1]):
                if resets[b, t]:
                    line = [torch.zeros(z.shape[2])] * self.SITES
                if mask[b, t]:
                    line = [z[b, t], *line[:-1]]
                found[b, t] = torch.stack(line, -1)
        return found

    @pytest.mark.parametrize("seed", SEEDS)
    @pytest.mark.parametrize("masked", [False, True])
    @pytest.mark.parametrize("packed", [False, True])
    def test_is_a_queue(self, seed, masked, packed):
        torch.manual_seed(seed)
        z = torch.randn(3, 15, 2)
        mask = torch.rand(3, 15) > 0.4 if masked else torch.ones(3, 15, dtype=torch.bool)
        resets = (torch.rand(3, 15) > 0.8) & mask if packed else torch.zeros(3, 15, dtype=torch.bool)
        context = Context(mask=mask if masked else None, resets=resets if packed else None)
        found = lags("z", z, self.SITES, context)
        torch.testing.assert_close(found[mask], self.queue(z, mask, resets)[mask], rtol=0, atol=0)

    def test_goes_on_where_a_padded_prompt_stopped(self):
        from bioadapt.primitives._state import Memory

        torch.manual_seed(0)
        z = torch.randn(2, 12, 2)
        mask = torch.ones(2, 12, dtype=torch.bool)
        mask[0, 3:7] = False  # padding at the end of a prompt of seven tokens
        state = Memory().part("layer")
        parts = [lags("z", z[:, :7], self.SITES, Context(mask=mask[:, :7], state=state))]
        parts += [lags("z", z[:, t : t + 1], self.SITES, Context(state=state)) for t in range(7, 12)]
        expected = self.queue(z, mask, torch.zeros_like(mask))
        torch.testing.assert_close(torch.cat(parts, 1)[mask], expected[mask], rtol=0, atol=0)


@pytest.mark.parametrize("seed", SEEDS)
class TestTravellingWave:
    @torch.no_grad()
    def test_an_impulse_visits_one_site_after_the_other(self, seed):
        module = awake("travelling_wave", seed)
        x = hidden_from(module, 20)[None]
        x[0, 3] = unit(torch.randn(D))
        height = x[0, 3] @ module.reader.T
        sheet = (module(x)[0] @ torch.linalg.pinv(module.writer).T).unflatten(-1, (2, 8))
        expected = torch.zeros(20, 2, 8)
        for site in range(8):
            expected[3 + site, :, site] = height * 0.9**site
        torch.testing.assert_close(sheet, expected, rtol=0, atol=1e-4)

    def test_is_the_equation(self, seed):
        module = awake("travelling_wave", seed)

        def code(drive: Tensor) -> Tensor:
            decay = torch.sigmoid(module.transmission)

            def step(sheet: Tensor, z: Tensor) -> Tensor:
                return torch.cat([z[..., None], sheet[..., :-1] * decay[:, None]], -1)

            return scan(step, drive, torch.zeros(2, 2, 8)).flatten(2)

        assert_agrees(module, written(module, code), torch.randn(2, 12, D))


@pytest.mark.parametrize("seed", SEEDS)
class TestLiquidReservoir:
    @torch.no_grad()
    def test_forgets_how_it_began(self, seed):
        module = awake("liquid_reservoir", seed)
        x = torch.randn(1, 310, D)
        y = torch.cat([torch.randn(1, 5, D), x[:, 5:]], 1)
        difference = (module(x) - module(y)).abs().amax((0, 2))
        assert (difference[:5] > 0.1).all()
        assert difference[305:].max() < 1e-3

    def test_only_the_read_out_learns(self, seed):
        module = awake("liquid_reservoir", seed)
        assert {name for name, _ in module.named_parameters()} == {"writer", "gate"}
        assert (module.modulus >= 0.6).all() and (module.modulus <= 0.97).all()
        torch.testing.assert_close(module.mix @ module.mix.T, torch.eye(16), rtol=0, atol=1e-5)

    def test_is_the_equation(self, seed):
        module = awake("liquid_reservoir", seed)

        def code(drive: Tensor) -> Tensor:
            turn = torch.polar(module.modulus, module.angle)
            scaled = (1 - module.modulus**2).sqrt() * drive
            z = scan(lambda z, d: turn * z + d, scaled, torch.zeros(2, 8, dtype=torch.complex64))
            return torch.tanh(1.5 * torch.cat([z.real, z.imag], -1) @ module.mix.T)

        assert_agrees(module, written(module, code), torch.randn(2, 12, D))


@pytest.mark.parametrize("seed", SEEDS)
class TestRotation:
    @pytest.mark.parametrize("padded", [False, True])
    def test_value_and_gradients(self, seed, padded):
        torch.manual_seed(seed)
        mask = torch.rand(2, 12) > 0.3 if padded else None
        inputs = [torch.rand(3), math.tau * torch.rand(3), torch.randn(2, 12, 3)]
        inputs = [tensor.requires_grad_() for tensor in inputs]
        weights = torch.randn(2, 12, 3, dtype=torch.complex64)

        def loop(decay: Tensor, angle: Tensor, drive: Tensor) -> Tensor:
            z, found = torch.zeros(2, 3, dtype=torch.complex64), []
            for t in range(12):
                new = decay * torch.exp(1j * angle) * z + drive[:, t]
                z = new if mask is None else torch.where(mask[:, t, None], new, z)
                found.append(z)
            return torch.stack(found, 1)

        results = []
        for z in (rotation("z", *inputs, Context(mask=mask)), loop(*inputs)):
            results.append((z, *torch.autograd.grad((z * weights).real.sum(), inputs)))
        for found, wanted in zip(*results, strict=True):
            torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("seed", SEEDS)
class TestPhaseCoding:
    @torch.no_grad()
    def test_the_stronger_the_drive_the_earlier_the_phase(self, seed):
        module = awake("phase_coding", seed)
        drive = torch.linspace(-6, 6, 101)[None, :, None].expand(1, 101, 4)
        phase = module.phase(drive, torch.full((1, 101), 7))[0]
        assert (phase.diff(dim=0) < 0).all()
        assert (phase.amax(0) - phase.amin(0) < math.tau).all()

    @torch.no_grad()
    def test_the_amplitude_carries_nothing(self, seed):
        module = awake("phase_coding", seed)
        code = module.code(3 * torch.randn(1, 40, 4), Context())
        torch.testing.assert_close(code[..., :4].square() + code[..., 4:].square(), torch.ones(1, 40, 4))

    @torch.no_grad()
    def test_keeps_its_phase_in_the_millions(self, seed):
        module = awake("phase_coding", seed)
        module.frequency.copy_(math.tau / torch.tensor([64.0, 32.0, 16.0, 8.0]))
        drive = torch.randn(1, 1, 4)
        early, late = (module.code(drive, Context(positions=torch.tensor([[t]]))) for t in (5, 64 * 50_000 + 5))
        torch.testing.assert_close(early, late, rtol=0, atol=1e-6 * 64 * 50_000 / 2**10)

    def test_is_the_equation(self, seed):
        module = awake("phase_coding", seed)

        def code(drive: Tensor) -> Tensor:
            clock = module.frequency * torch.arange(12.0)[:, None]
            phase = clock % math.tau - math.pi * torch.tanh(softplus(module.precession) * drive)
            return torch.cat([phase.cos(), phase.sin()], -1)

        assert_agrees(module, written(module, code), torch.randn(2, 12, D))


class TestResonateAndFire:
    @torch.no_grad()
    def potentials(self, damping: float, *times: int, length: int = 160) -> Tensor:
        """Of a resonator of period 16 to pulses at the given tokens, (length,)."""
        module = build_primitive("resonate_and_fire", D, D, rank=1)
        module.frequency.fill_(math.tau / 16)
        module.damping.fill_(math.log(math.expm1(damping)))
        drive = torch.zeros(1, length, 1)
        drive[0, list(times)] = 1.0
        return module.potential(drive, Context())[0, :, 0]

    def test_prefers_its_own_period(self):
        trains = (self.potentials(0.02, *range(0, 480, gap), length=480)[-96:] for gap in (16, 12, 24))
        own, faster, slower = (train.abs().max() for train in trains)
        assert own > 4 * faster and own > 4 * slower

    def test_two_pulses_half_a_period_apart_cancel(self):
        apart, together = (self.potentials(0.02, 0, gap)[gap:].abs().max() for gap in (8, 16))
        assert apart < 0.3 * together

    @pytest.mark.parametrize("seed", SEEDS)
    @torch.no_grad()
    def test_fires_above_the_threshold_alone(self, seed):
        module = awake("resonate_and_fire", seed)
        drive = 3 * torch.randn(2, 30, 8)
        code, potential = module.code(drive, Context()), module.potential(drive, Context())
        silent = potential.abs() <= softplus(module.threshold)
        assert 0.1 < silent.float().mean() < 0.9
        assert torch.count_nonzero(code[silent]) == 0
        assert torch.equal(code[~silent], potential[~silent])

    @pytest.mark.parametrize("seed", SEEDS)
    def test_is_the_equation_with_the_slope_of_a_sigmoid(self, seed):
        module = awake("resonate_and_fire", seed)

        def code(drive: Tensor) -> Tensor:
            damping, threshold = softplus(module.damping), softplus(module.threshold)
            turn = torch.exp(torch.complex(-damping, module.frequency))
            z = scan(lambda z, d: turn * z + d, 3 * drive, torch.zeros(2, 8, dtype=torch.complex64))
            m = (2 * damping).sqrt() * z.imag
            soft = torch.sigmoid(4 * (m.abs() - threshold))
            return m * ((m.abs() > threshold).float() + soft - soft.detach())

        with torch.no_grad():
            module.reader *= 3  # so that many fire
        wide = written(module, lambda drive: code(drive / 3))
        assert_agrees(module, wide, torch.randn(2, 12, D))


@pytest.mark.parametrize("seed", SEEDS)
class TestAstrocyteGain:
    @torch.no_grad()
    def gains(self, seed: int, x: Tensor, **settings) -> Tensor:
        """A tanh(kappa Ca) after the tokens of x, (groups,)."""
        module = awake("astrocyte_gain", seed, d=32, groups=4, **settings)
        module.log_level.zero_()
        probe = torch.cat([x, torch.ones(1, 1, 32)], 1)
        return module(probe)[0, -1].unflatten(0, (4, 8))[:, 0]

    def test_neutral_at_the_set_point(self, seed):
        x = 0.5 * torch.randn(1, 200, 32).sign()
        torch.testing.assert_close(self.gains(seed, x), torch.zeros(4), rtol=0, atol=1e-4)

    def test_slow(self, seed):
        rest = 0.5 * torch.randn(1, 20, 32).sign()
        strong = 2 * torch.randn(1, 1, 32).sign()
        assert (self.gains(seed, torch.cat([rest, strong], 1)).abs() < 0.2).all()
        assert (self.gains(seed, strong.expand(1, 200, 32)) > 0.6).all()

    def test_territorial_and_spreading(self, seed):
        x = 0.5 * torch.randn(1, 200, 32).sign()
        x[..., 3] *= 12  # one channel of the first domain
        first, second, third, fourth = self.gains(seed, x)
        assert first > second > 0.05
        assert abs(third) < 1e-3 and abs(fourth) < 1e-3

    def test_is_the_equation(self, seed):
        module = awake("astrocyte_gain", seed, groups=4, tau=5.0)
        index = torch.arange(D) * 4 // D

        def expected(x: Tensor) -> Tensor:
            q = torch.stack([x[..., index == g].abs().mean(-1) for g in range(4)], -1) / module.log_level.exp()
            left, right = torch.cat([q[..., :1], q[..., :-1]], -1), torch.cat([q[..., 1:], q[..., -1:]], -1)
            share, decay = 0.5 * torch.sigmoid(module.coupling), torch.exp(-1 / module.log_tau.exp())
            excess = (1 - 2 * share) * q + share * (left + right) - softplus(module.set_point)
            calcium = scan(lambda c, e: decay * c + (1 - decay) * e, excess, torch.zeros(2, 4))
            gain = module.amplitude * torch.tanh(softplus(module.sensitivity) * delayed(calcium))
            return module.gate * x * gain[..., index]

        assert_agrees(module, expected, torch.randn(2, 12, D))


@pytest.mark.parametrize("seed", SEEDS)
class TestCorticalColumn:
    @torch.no_grad()
    def test_columns_may_be_permuted(self, seed):
        module = awake("cortical_column", seed)
        x, order = torch.randn(2, 3, D), torch.randperm(3)
        found = module(x.unflatten(-1, (3, 8))[..., order, :].flatten(-2))
        torch.testing.assert_close(found.unflatten(-1, (3, 8)), module(x).unflatten(-1, (3, 8))[..., order, :])

    @torch.no_grad()
    def test_layer_6_turns_layer_4_down(self, seed):
        module, u = awake("cortical_column", seed), torch.randn(50, 8)
        wiring, inputs = module.wiring(), []
        for feedback in (wiring.feedback, 2 * wiring.feedback):
            found = sweeps(u, wiring._replace(feedback=feedback))
            inputs.append(found.drive / (1 + found.gain))
        weak, strong = inputs
        assert (strong <= weak).all()
        assert (strong < weak).any()

    @pytest.mark.parametrize("d", [D, 21])
    def test_is_the_equation(self, seed, d):
        module = awake("cortical_column", seed, d=d)

        def expected(x: Tensor) -> Tensor:
            u, g = pad(unit(x), (0, -d % 8)).unflatten(-1, (-1, 8)), 0.0
            for _ in range(2):
                l4 = torch.relu(u @ module.layer4.T) / (1 + g)
                e = torch.relu(l4 @ module.layer23.T)
                l23 = e**2 / (e + 2 * softplus(module.kappa) * e.mean(-1, keepdim=True) + 1e-4)
                l5 = torch.relu(l23 @ module.layer5.T + module.bypass * l4)
                g = (l5 @ softplus(module.feedback))[..., None]
            return module.gate * token_scale(x) * (l5 @ module.output.T).flatten(-2)[..., :d]

        assert_agrees(module, expected, torch.randn(2, 5, d))
