"""What makes the laws of sensory gain what they are, each next to its equation written out plainly."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from helpers.oracles import assert_law, born, both_ways, past
from torch import Tensor, nn

from bioadapt import build_primitive
from bioadapt.primitives._state import Memory
from bioadapt.primitives.base import Context
from bioadapt.primitives.frames import unit

SEEDS = range(4)
N, D = 29, 37


def groups_of(d: int, groups: int) -> list[Tensor]:
    index = torch.arange(d) * groups // d
    return [torch.nonzero(index == g).flatten() for g in range(groups)]


def per_group(z: Tensor, groups: int) -> Tensor:
    """Mean over each group, (..., d) -> (..., groups)."""
    return torch.stack([z[..., members].mean(-1) for members in groups_of(z.shape[-1], groups)], -1)


def per_channel(z: Tensor, d: int) -> Tensor:
    """The value of its group for each channel, (..., groups) -> (..., d)."""
    return z[..., torch.arange(d) * z.shape[-1] // d]


@pytest.mark.parametrize("seed", SEEDS)
class TestOnOffRectification:
    @torch.no_grad()
    def test_the_on_half_alone(self, seed):
        module = born("on_off_rectification", seed)
        module.off_gain.zero_()
        x = 2 * torch.randn(3, 7, D)
        delta, below = module(x), unit(x) <= 0.3 - 1e-6
        assert torch.count_nonzero(delta[below]) == 0
        assert (delta >= 0).all() and (delta[unit(x) > 0.3 + 1e-6] > 0).all()

    @torch.no_grad()
    def test_on_minus_off_reconstructs(self, seed):
        module = born("on_off_rectification", seed)
        module.on_threshold.fill_(-40.0)
        module.off_threshold.fill_(-40.0)
        x = torch.randn(3, 7, D)
        torch.testing.assert_close(module(x), x)

    def test_is_the_equation(self, seed):
        module = born("on_off_rectification", seed)

        def by_equation(x: Tensor) -> Tensor:
            scale = torch.sqrt(x.square().mean(-1, keepdim=True) + 1e-6)
            high, low = nn.functional.softplus(module.on_threshold), nn.functional.softplus(module.off_threshold)
            on, off = torch.relu(x / scale - high), torch.relu(-x / scale - low)
            return scale * (module.on_gain * on - module.off_gain * off)

        assert_law(module, by_equation, 3 * torch.randn(2, 5, D))


@pytest.mark.parametrize("seed", SEEDS)
class TestContrastAdaptation:
    @torch.no_grad()
    def test_a_step_of_contrast_overshoots_and_is_adapted_to(self, seed):
        module = born("contrast_adaptation", seed, 64, level=1.0, groups=4)
        module.sigma.fill_(-20.0)
        module.log_tau.fill_(math.log(8.0))
        x = torch.randn(2, 300, 64)
        x[:, 150:] *= 4
        response = (x + module(x)).square().mean((0, 2)).sqrt()
        before = response[50:150].mean()
        assert response[150] > 2.5 * before
        assert response[220:].mean() == pytest.approx(before.item(), rel=0.15)

    @pytest.mark.parametrize("bidirectional", [False, True])
    def test_is_the_equation(self, seed, bidirectional):
        module = born("contrast_adaptation", seed, level=1.3, groups=5)

        def read(x: Tensor) -> Tensor:
            power = per_group((x / module.log_level.exp()).square(), 5)
            variance, sigma = past(power, module.log_tau.exp(), 1.0), nn.functional.softplus(module.sigma)
            return x * (per_channel(torch.sqrt((1 + sigma) / (variance + sigma)), D) - 1)

        law = (lambda x: both_ways(read, x)) if bidirectional else read
        assert_law(module, law, torch.randn(2, 20, D), Context(bidirectional=bidirectional))

    def test_time_constants_are_spread(self, seed):
        tau = build_primitive("contrast_adaptation", D, D).log_tau.exp()
        torch.testing.assert_close(tau[[0, -1]], torch.tensor([4.0, 64.0]))
        torch.testing.assert_close(tau[1:] / tau[:-1], (tau[1] / tau[0]).expand(15))


def window_average(x: Tensor, width: Tensor, seen: Callable[[int, int], bool]) -> Tensor:
    """sum_s G(t - s) x_s / sum_s G(t - s) over the tokens s that t sees, term by term: x (T, d), width (d,)."""
    rows = []
    for t in range(len(x)):
        near = [s for s in range(len(x)) if seen(t, s)]
        weights = torch.stack([torch.exp(-((t - s) ** 2) / (2 * width**2)) for s in near])
        rows.append((weights * x[near]).sum(0) / weights.sum(0))
    return torch.stack(rows)


@pytest.mark.parametrize("seed", SEEDS)
class TestSurroundSuppression:
    @torch.no_grad()
    @pytest.mark.parametrize("context", [Context(), Context(bidirectional=True), Context(True, grid=(10, 20))])
    def test_a_uniform_field_is_silent_also_at_the_borders(self, seed, context):
        module = born("surround_suppression", seed)
        module.wake()
        field = torch.randn(2, 1, D).expand(-1, 200, -1)
        assert module(field, context.replace(x_in=None)).abs().max() < 1e-5

    @torch.no_grad()
    def test_an_impulse(self, seed):
        module = born("surround_suppression", seed)
        x = torch.zeros(1, 100, D)
        x[:, 60] = torch.rand(D) + 0.5
        delta = module(x)
        assert (delta[0, 60] > 0).all() and (delta[0, 64] < 0).all()
        assert torch.count_nonzero(delta[:, :60]) == 0
        assert torch.count_nonzero(delta[:, 76:]) == 0 and (delta[0, 75] != 0).all()
        around = module(x, Context(bidirectional=True))
        torch.testing.assert_close(around[0, 45:60].flip(0), around[0, 61:76])

    def law(self, module: nn.Module, seen: Callable[[int, int, int], bool], x: Tensor) -> Tensor:
        center = nn.functional.softplus(module.center)
        surround = center * torch.exp(torch.relu(module.ratio) + 0.1)

        def one(b: int) -> Tensor:
            narrow, wide = (
                window_average(x[b], per_channel(width, x.shape[-1]), lambda t, s: seen(b, t, s))
                for width in (center, surround)
            )
            return narrow - wide

        return torch.stack([one(b) for b in range(len(x))])

    @pytest.mark.parametrize(("bidirectional", "groups", "d"), [(False, 3, 7), (True, 3, 7), (True, 2, 8)])
    def test_is_the_equation(self, seed, bidirectional, groups, d):
        """On more than one block of tokens, with channels that fit the groups or do not."""
        module = born("surround_suppression", seed, d, groups=groups)
        ahead = 15 if bidirectional else 0
        context = Context(bidirectional=bidirectional)
        assert_law(
            module, lambda x: self.law(module, lambda b, t, s: -ahead <= t - s <= 15, x), torch.randn(1, 70, d), context
        )

    @pytest.mark.parametrize("bidirectional", [False, True])
    def test_padding_and_other_documents_do_not_exist(self, seed, bidirectional):
        module = born("surround_suppression", seed, 6)
        document = torch.tensor([[0] * 9 + [1] * 4 + [2] * 17, [-1] * 5 + [1] * 5 + [2] * 20])
        resets = torch.nn.functional.pad(document[:, 1:] != document[:, :-1], (1, 0), value=True)
        context = Context(mask=document >= 0, resets=resets & (document >= 0), bidirectional=bidirectional)
        ahead = 15 if bidirectional else 0

        def seen(b: int, t: int, s: int) -> bool:
            return -ahead <= t - s <= 15 and bool(document[b, t] == document[b, s])

        assert_law(module, lambda x: self.law(module, seen, x), torch.randn(2, 30, 6), context)

    @pytest.mark.parametrize("grid", [(5, 4), (18, 2), (2, 3, 2)])
    def test_a_grid_has_a_window_of_as_many_axes(self, seed, grid):
        module = born("surround_suppression", seed, 5, groups=2)
        places = list(torch.cartesian_prod(*map(torch.arange, grid)))

        def average(x: Tensor, width: Tensor) -> Tensor:
            rows = []
            for here in places:
                lags = torch.stack([here - there for there in places]).float()
                weights = (
                    torch.exp(-lags.square().sum(1)[:, None] / (2 * width**2)) * (lags.abs() <= 15).all(1)[:, None]
                )
                rows.append((weights * x).sum(1) / weights.sum(0))
            return torch.stack(rows, 1)

        def law(x: Tensor) -> Tensor:
            center = nn.functional.softplus(module.center)
            surround = center * torch.exp(torch.relu(module.ratio) + 0.1)
            return average(x, per_channel(center, 5)) - average(x, per_channel(surround, 5))

        assert_law(module, law, torch.randn(2, len(places), 5), Context(bidirectional=True, grid=grid))

    @torch.no_grad()
    def test_decoding_in_pieces_of_any_length(self, seed):
        module = born("surround_suppression", seed)
        module.wake()
        x, resets = torch.randn(2, 150, D), torch.zeros(2, 150, dtype=torch.bool)
        resets[0, [0, 95, 104]] = True
        memory, lengths = Memory(), (100, 1, 3, 40, 6)
        found = [
            module(part, Context(state=memory.part("layer"), resets=new))
            for part, new in zip(x.split(lengths, 1), resets.split(lengths, 1), strict=True)
        ]
        torch.testing.assert_close(torch.cat(found, 1), module(x, Context(resets=resets)), rtol=1e-4, atol=1e-5)

    def test_widths_at_birth(self, seed):
        center, surround = build_primitive("surround_suppression", D, D).widths()
        torch.testing.assert_close(center, torch.full((4,), 0.7))
        torch.testing.assert_close(surround, torch.full((4,), 4.4))


@pytest.mark.parametrize("seed", SEEDS)
class TestThalamicRelay:
    @torch.no_grad()
    def test_bursts_after_silence_and_relays_after_activity(self, seed):
        module = born("thalamic_relay", seed, level=1.0)
        strong, weak = 3 * torch.randn(D).sign(), 0.3 * torch.randn(D).sign()
        silence, activity = torch.zeros(60, D), 1.5 * torch.randn(60, D).sign()

        def response(before: Tensor, now: Tensor) -> Tensor:
            x = torch.cat([before, now[None]])[None]
            return (x + module(x))[0, -1] / now

        assert (response(silence, strong) > 1.3 * response(activity, strong)).all()
        assert (response(silence, weak).abs() < 0.1).all()
        for now in (strong, weak):
            torch.testing.assert_close(response(activity, now), torch.ones(D), rtol=0, atol=0.05)

    @pytest.mark.parametrize("bidirectional", [False, True])
    def test_is_the_equation(self, seed, bidirectional):
        module = born("thalamic_relay", seed, level=0.9, groups=5)

        def read(x: Tensor) -> Tensor:
            level = module.log_level.exp()
            contrast = x / level
            recent = past(per_group(contrast.abs(), 5), module.log_tau.exp(), 0.8)
            mode = per_channel(torch.sigmoid(module.steepness * (module.threshold - recent)), D)
            threshold = per_channel(nn.functional.softplus(module.burst_threshold), D)
            amplification = per_channel(module.amplification, D)
            burst = contrast.sign() * torch.relu(contrast.abs() - threshold)
            # Worth nothing, but a hundredth of what lies below the threshold has a gradient at what sets the burst.
            units = level * threshold
            below, inside = x.clamp(-units, units).detach(), (x * (x.abs() < units)).detach()
            leak = amplification * below - amplification.detach() * inside * units / units.detach()
            leak = 0.01 * mode.detach() * leak
            return level * mode * (amplification * burst - contrast) + leak - leak.detach()

        law = (lambda x: both_ways(read, x)) if bidirectional else read
        assert_law(module, law, torch.randn(2, 20, D), Context(bidirectional=bidirectional))


@pytest.mark.parametrize("seed", SEEDS)
class TestTrnSearchlight:
    @torch.no_grad()
    def test_the_total_gain_is_conserved(self, seed):
        module = born("trn_searchlight", seed)
        module.wake()
        gain = module.gain(10 * torch.randn(3, 7, D))
        torch.testing.assert_close(gain.sum(-1), torch.full((3, 7), 8.0))
        kappa = torch.sigmoid(module.focus)
        assert (gain > 1 - kappa - 1e-5).all() and (gain < 1 - kappa + 8 * kappa + 1e-5).all()
        assert gain.std() > 0.1

    @torch.no_grad()
    def test_lighting_one_sector_dims_each_other(self, seed):
        module = born("trn_searchlight", seed)
        x = torch.randn(3, 7, D)
        before = module.gain(x)
        module.bias[2] += 0.5
        change = module.gain(x) - before
        assert (change[..., 2] > 0).all()
        assert (change[..., torch.arange(8) != 2] < 0).all()

    def test_is_the_equation(self, seed):
        module = born("trn_searchlight", seed)

        def by_equation(x: Tensor) -> Tensor:
            u = x / torch.sqrt(x.square().mean(-1, keepdim=True) + 1e-6)
            steepness, salience = nn.functional.softplus(module.steepness), nn.functional.softplus(module.salience)
            drive = math.sqrt(D / 8) * per_group(module.query * u, 8) + module.bias
            drive = drive + salience * torch.log(per_group(u.square(), 8) + 1e-4)
            kappa = torch.sigmoid(module.focus)
            gain = 1 - kappa + kappa * 8 * torch.softmax(steepness * drive, -1)
            return x * (per_channel(gain, D) - 1)

        assert_law(module, by_equation, 2 * torch.randn(2, 5, D))


@pytest.mark.parametrize("seed", SEEDS)
class TestGainField:
    @torch.no_grad()
    def test_linear_and_diagonal_for_a_fixed_modulator(self, seed):
        module = born("gain_field", seed, n=N)
        module.writer.normal_()
        context = Context(x_in=torch.randn(1, 3, N))
        x, y = torch.randn(2, 1, 3, D)
        torch.testing.assert_close(module(2 * x - y, context), 2 * module(x, context) - module(y, context))
        gain = module(torch.ones(1, 3, D), context)
        torch.testing.assert_close(module(x, context), gain * x)
        assert gain.abs().max() <= 1 and gain.std() > 0.1
        other = module(torch.ones(1, 3, D), Context(x_in=torch.randn(1, 3, N)))
        assert (other - gain).abs().mean() > 0.1
        louder = module(torch.ones(1, 3, D), Context(x_in=5 * context.x_in))
        torch.testing.assert_close(louder, gain, rtol=1e-3, atol=1e-4)

    def test_is_the_equation(self, seed):
        module = born("gain_field", seed, n=N)
        v = torch.randn(2, 5, N)

        def by_equation(x: Tensor) -> Tensor:
            return x * torch.tanh(
                v / torch.sqrt(v.square().mean(-1, keepdim=True) + 1e-6) @ module.reader.T @ module.writer.T
            )

        assert_law(module, by_equation, torch.randn(2, 5, D), Context(x_in=v))


@pytest.mark.parametrize("seed", SEEDS)
class TestAttentionGain:
    @torch.no_grad()
    def attending(self, seed: int, x: Tensor, field: Tensor, level: float = 1.0) -> Tensor:
        """The size of the response to one token x (d,) under an attention field A (d,)."""
        module = born("attention_gain", seed, level=level, rank=1)
        module.reader.copy_(2 * unit(x) / D)  # reads 2 from x
        module.writer.copy_(torch.atanh(field.log() / 2)[:, None])
        return (x + module(x[None])[0]) / x.sign()

    def test_attending_one_unit_lowers_all_others(self, seed):
        torch.manual_seed(seed)
        x, field = torch.randn(D), torch.ones(D)
        before = self.attending(seed, x, field)
        field[5] = 3.0
        change = self.attending(seed, x, field) - before
        assert change[5] > 0 and (change[torch.arange(D) != 5] < 0).all()

    def test_a_uniform_field_scales_faint_responses_and_cancels_in_strong_ones(self, seed):
        torch.manual_seed(seed)
        x, one = torch.randn(D).sign() * (0.5 + torch.rand(D)), torch.ones(D)
        faint, strong = (
            self.attending(seed, x, 3 * one, level) / self.attending(seed, x, one, level) for level in (1e3, 1e-3)
        )
        torch.testing.assert_close(faint, 3 * one, rtol=1e-2, atol=0)
        torch.testing.assert_close(strong, one, rtol=1e-3, atol=0)

    @pytest.mark.parametrize("exponent", [1.0, 1.5, 2.0, 3.0])
    def test_is_the_equation(self, seed, exponent):
        module = born("attention_gain", seed, level=1.2, exponent=exponent, self_weight=0.4)

        def by_equation(x: Tensor) -> Tensor:
            level, sigma = module.log_level.exp(), nn.functional.softplus(module.sigma) ** exponent
            u = x / torch.sqrt(x.square().mean(-1, keepdim=True) + 1e-6)
            attention = torch.exp(2 * torch.tanh(u @ module.reader.T @ module.writer.T / 2))
            drive = attention * (x / level).abs() ** exponent
            divisor = sigma + 0.6 * drive.mean(-1, keepdim=True) + 0.4 * drive
            return level * (1 + sigma) * x.sign() * drive / divisor - x

        assert_law(module, by_equation, torch.randn(2, 5, D))


@pytest.mark.parametrize("seed", SEEDS)
class TestEfferenceCopy:
    def stream(self, module: nn.Module, mixture: Tensor) -> tuple[Tensor, Tensor]:
        """An input, and the features that follow from it with a delay of one token."""
        v = torch.randn(4, 40, N)
        copy = unit(v) @ module.command.T
        x = torch.cat([torch.randn(4, 1, D), copy[:, :-1] @ mixture.T], 1)
        return v, x

    @torch.no_grad()
    def test_cancels_what_follows_from_the_command_alone(self, seed):
        module = born("efference_copy", seed, n=N).train()
        mixture = torch.randn(D, 16)
        for _ in range(150):
            v, x = self.stream(module, mixture)
            module(x, Context(x_in=v))
            module.commit()
        v, x = self.stream(module.eval(), mixture)
        left = (x + module(x, Context(x_in=v)))[:, 1:]
        assert left.norm() < 0.25 * x[:, 1:].norm()
        surprise = torch.randn(4, 1, D) * x.std()
        more = x.clone()
        more[:, 20:21] += surprise
        passed = (more + module(more, Context(x_in=v)) - x - module(x, Context(x_in=v)))[:, 20:21]
        assert (passed * surprise).sum() > 0.7 * surprise.square().sum()

    @pytest.mark.parametrize("bidirectional", [False, True])
    def test_is_the_equation(self, seed, bidirectional):
        module = born("efference_copy", seed, n=N)
        v = torch.randn(2, 9, N)
        copy = v / torch.sqrt(v.square().mean(-1, keepdim=True) + 1e-6) @ module.command.T
        before = nn.functional.pad(copy, (0, 0, 1, 0))[:, :-1]
        after = nn.functional.pad(copy, (0, 0, 0, 1))[:, 1:]

        def by_equation(x: Tensor) -> Tensor:
            heard = 0.5 * (before + after) if bidirectional else before
            return -torch.sqrt(x.square().mean(-1, keepdim=True) + 1e-6) * (heard @ module.image.T)

        assert_law(module, by_equation, torch.randn(2, 9, D), Context(x_in=v, bidirectional=bidirectional))

    @torch.no_grad()
    @pytest.mark.parametrize("bidirectional", [False, True])
    def test_one_commit_is_normalized_least_mean_squares(self, seed, bidirectional):
        module = born("efference_copy", seed, n=N, rank=5, rate=0.7).train()
        module.wake()
        start = module.image.clone()
        x, v, mask = torch.randn(2, 9, D), torch.randn(2, 9, N), torch.rand(2, 9) > 0.3
        context = Context(x_in=v.where(mask[..., None], 1e3), mask=mask, bidirectional=bidirectional)
        module(x.where(mask[..., None], torch.nan), context)
        module.commit()
        cross, power, count = torch.zeros(D, 5), torch.zeros(()), 0
        for b in range(2):
            pairs = [(v[b, mask[b]], x[b, mask[b]])]
            if bidirectional:
                pairs.append((pairs[0][0].flip(0), pairs[0][1].flip(0)))
            for inputs, features in pairs:
                before = torch.zeros(5)
                for now, feature in zip(unit(inputs) @ module.command.T, unit(features), strict=True):
                    cross += torch.outer(feature - start @ before, before)
                    power += before.square().sum()
                    before, count = now, count + 1
        torch.testing.assert_close(module.image, start + 0.7 * cross / power, rtol=1e-4, atol=1e-5)

    def test_starts_by_itself(self, seed):
        module = born("efference_copy", seed, n=N).train()
        context = Context(x_in=torch.randn(2, 5, N))
        module(torch.randn(2, 5, D), context).sum().backward()
        assert torch.count_nonzero(module.gate.grad) == 0
        module.commit()
        module(torch.randn(2, 5, D), context).sum().backward()
        assert (module.gate.grad != 0).all()
