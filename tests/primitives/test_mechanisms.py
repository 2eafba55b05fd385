"""Each mechanism does what its biology says: the invariant of its equation, on four seeds."""

import math

import pytest
import torch

from bioadapt import build_primitive
from bioadapt.primitives.base import Context, Host
from bioadapt.primitives.dendritic.nmda_branches import branch_spikes
from bioadapt.primitives.frames import inverse_softplus, token_scale, unit


@pytest.fixture(params=range(4), autouse=True)
def seed(request):
    torch.manual_seed(request.param)
    return request.param


def awake(name, d_in, d_out=None, **settings):
    """A primitive with its gate open, so that its delta is the mechanism's own."""
    module = build_primitive(name, d_in, d_in if d_out is None else d_out, **settings).eval()
    module.gate.data.fill_(1.0)
    return module


def fill(parameter, value):
    parameter.data.copy_(torch.as_tensor(value, dtype=torch.float32).expand_as(parameter))


def fill_positive(parameter, value):
    parameter.data.fill_(inverse_softplus(value))


@torch.no_grad()
class TestDivisiveNormalization:
    def response(self, module, x):
        return module(x) + x

    def test_it_saturates_and_is_invariant_at_high_contrast(self):
        module, x = awake("divisive_normalization", 24), torch.randn(1, 3, 24)
        torch.testing.assert_close(self.response(module, 1e3 * x), self.response(module, 1e4 * x), rtol=1e-3, atol=1e-3)

    def test_it_is_expansive_at_low_contrast(self):
        module, x = awake("divisive_normalization", 24), 1e-3 * torch.randn(1, 3, 24)
        ratio = self.response(module, 2 * x) / self.response(module, x)
        torch.testing.assert_close(ratio, torch.full_like(ratio, 4.0), rtol=1e-3, atol=1e-3)

    def test_one_louder_channel_silences_every_other(self):
        module, x = awake("divisive_normalization", 24), torch.randn(1, 1, 24)
        louder = x.clone()
        louder[..., 5] *= 3
        before, after = self.response(module, x).abs()[0, 0], self.response(module, louder).abs()[0, 0]
        others = torch.arange(24) != 5
        assert (after[others] < before[others]).all()

    def test_no_unit_exceeds_the_bound_that_the_self_term_sets(self):
        module, x = awake("divisive_normalization", 24), 100 * torch.randn(2, 5, 24)
        assert self.response(module, x).abs().max() <= (1 + 1.0) / 0.25 + 1e-4


@torch.no_grad()
class TestLateralInhibition:
    def test_raising_a_unit_lowers_all_others_and_itself_one_for_one(self):
        module, x = awake("lateral_inhibition", 16), 1 + torch.rand(1, 1, 16)
        before = (module(x) + x)[0, 0]
        raised = x.clone()
        raised[..., 3] += 0.5
        after = (module(raised) + raised)[0, 0]
        assert after[3] - before[3] == pytest.approx(0.5, abs=1e-5)
        others = torch.arange(16) != 3
        assert (after[others] < before[others]).all()

    def test_inhibition_never_turns_a_unit_over(self):
        module, x = awake("lateral_inhibition", 16), torch.randn(2, 5, 16)
        assert ((module(x) + x) * x >= 0).all()


@torch.no_grad()
class TestKWinnersTakeAll:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_exactly_k_survive_unchanged_whatever_the_ties(self, dtype):
        module = awake("k_winners_take_all", 30, fraction=0.2)
        for x in (torch.randn(2, 4, 30), torch.ones(2, 4, 30), torch.randn(2, 4, 30).round()):
            x = torch.where(x == 0, 1.0, x).to(dtype)
            result = module(x) + x
            assert (torch.count_nonzero(result, dim=-1) == 6).all()
            assert ((result == 0) | (result == x)).all()

    def test_the_strongest_survive(self):
        module, x = awake("k_winners_take_all", 30, fraction=0.2), torch.randn(2, 4, 30)
        survived = (module(x) + x) != 0
        weakest = torch.where(survived, x.abs(), torch.inf).amin(-1)
        assert (weakest > torch.where(survived, 0.0, x.abs()).amax(-1)).all()


@torch.no_grad()
class TestNmdaBranches:
    def module(self):
        module = awake("nmda_branches", 32, 8, branches=4)
        fill(module.synapses, 1.0)
        fill(module.soma, torch.randn(8, 4))
        return module

    def response(self, module, synapses, size=0.8):
        v = torch.zeros(1, 1, 32)
        v[..., synapses] = size
        drive = v @ module.wiring()
        threshold, steepness = (torch.nn.functional.softplus(p) for p in (module.threshold, module.steepness))
        return branch_spikes(drive, threshold, steepness)[0, 0]

    def test_two_inputs_on_one_branch_add_up_supralinearly_and_across_branches_linearly(self):
        module = self.module()
        first, second = torch.nonzero(module.branch == 0).flatten()[:2].tolist()
        elsewhere = torch.nonzero(module.branch == 1).flatten()[0].item()
        alone = [self.response(module, [synapse]).sum() for synapse in (first, second, elsewhere)]
        assert self.response(module, [first, second]).sum() > 1.5 * (alone[0] + alone[1])
        together = self.response(module, [first, elsewhere]).sum()
        torch.testing.assert_close(together, alone[0] + alone[2], rtol=1e-5, atol=1e-6)

    def test_every_input_belongs_to_one_branch(self):
        module = awake("nmda_branches", 37, 8)
        assert ((module.wiring() != 0).sum(1) == 1).all()
        sizes = torch.bincount(module.branch, minlength=module.branches)
        assert sizes.min() >= 1 and sizes.max() - sizes.min() <= 1

    def test_silence_is_answered_with_silence(self):
        module = self.module()
        assert module(torch.randn(1, 2, 8), Context(x_in=torch.zeros(1, 2, 32))).abs().max() < 1e-6


@torch.no_grad()
class TestVesicleRelease:
    def test_training_has_the_mean_and_the_variance_of_a_binomial(self):
        module, x = awake("vesicle_release", 12, sites=4), torch.randn(1, 1, 12)
        p = module.probability(x)
        mean = module(x)
        torch.testing.assert_close(mean, x * p)
        drawn = module.train()(x.expand(1, 40_000, 12))
        torch.testing.assert_close(drawn.mean(1), mean[:, 0], atol=0.02, rtol=0.02)
        torch.testing.assert_close(drawn.var(1), (x.square() * p * (1 - p) / 4)[:, 0], atol=0.01, rtol=0.06)

    def test_release_comes_in_quanta(self):
        module, x = awake("vesicle_release", 12, sites=4).train(), torch.randn(2, 50, 12)
        quanta = 4 * module(x) / x
        torch.testing.assert_close(quanta, quanta.round(), atol=1e-4, rtol=0)
        assert 0 <= quanta.min() and quanta.max() <= 4 + 1e-4

    def test_evaluation_is_deterministic_and_training_is_not(self):
        module, x = awake("vesicle_release", 12), torch.randn(2, 50, 12)
        assert torch.equal(module(x), module(x))
        module.train()
        assert not torch.equal(module(x), module(x))


def host(d_out, d_in):
    return Host(torch.randn(d_out, d_in))


class TestNeuroAda:
    @torch.no_grad()
    def test_the_change_has_k_entries_per_row_at_the_largest_weights(self):
        layer = host(11, 23)
        module = build_primitive("neuro_ada", 23, 11, host=layer, k=3)
        fill(module.values, torch.rand(11, 3) + 1)
        change, _ = module.weight_delta(layer.weight, None)
        chosen = change != 0
        assert (chosen.sum(1) == 3).all()
        magnitude = layer.weight.abs()
        smallest = torch.where(chosen, magnitude, torch.inf).amin(1)
        assert (smallest >= torch.where(chosen, 0.0, magnitude).amax(1)).all()

    @torch.no_grad()
    def test_a_smaller_k_chooses_a_prefix_and_ties_go_to_the_lower_column(self):
        layer = host(11, 23)
        three, five = (build_primitive("neuro_ada", 23, 11, host=layer, k=k).index for k in (3, 5))
        assert torch.equal(five[:, :3], three)
        tied = build_primitive("neuro_ada", 6, 2, host=Host(torch.ones(2, 6)), k=3)
        assert tied.index.tolist() == [[0, 1, 2]] * 2

    @torch.no_grad()
    def test_other_selections(self):
        layer = host(11, 23)
        reverse = build_primitive("neuro_ada", 23, 11, host=layer, k=1, selection="reverse")
        assert torch.equal(reverse.index[:, 0].long(), layer.weight.abs().argmin(1))
        random = [build_primitive("neuro_ada", 23, 11, host=layer, k=4, selection="random").index for _ in range(2)]
        assert torch.equal(*random)
        assert all(len(set(row)) == 4 for row in random[0].tolist())

    @pytest.mark.parametrize("tokens", [0, 1, 7])
    def test_it_equals_the_dense_product_in_value_and_every_gradient(self, tokens):
        module = build_primitive("neuro_ada", 23, 11, host=host(11, 23), k=4)
        fill(module.values, torch.randn(11, 4))
        v = torch.randn(2, tokens, 23, requires_grad=True)
        upstream = torch.randn(2, tokens, 11)
        sparse = module.transform(torch.zeros(2, tokens, 11), Context(x_in=v))
        gradients = torch.autograd.grad((sparse * upstream).sum(), [v, module.values])
        dense = torch.zeros(11, 23).scatter(1, module.index.long(), module.values)
        expected = torch.autograd.grad(((v @ dense.T) * upstream).sum(), [v, module.values])
        torch.testing.assert_close(sparse, v @ dense.T, atol=1e-5, rtol=1e-5)
        for found, wanted in zip(gradients, expected, strict=True):
            torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)

    def test_nothing_of_the_size_of_the_weight_is_kept_for_backward(self):
        module = build_primitive("neuro_ada", 512, 1024, host=host(1024, 512), k=4)
        kept = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
            module.transform(torch.zeros(1, 8, 1024), Context(x_in=torch.randn(1, 8, 512, requires_grad=True)))
        assert kept and max(kept) < 1024 * 512 / 8


@torch.no_grad()
class TestShortTermDepression:
    def transmitted(self, pulses, steps):
        module = awake("short_term_depression", 8, groups=2)
        x = torch.zeros(1, steps, 8)
        x[:, pulses] = 2.0
        return ((module(x) + x) / 2)[0, pulses, 0]

    def test_the_first_pulse_passes_and_the_second_recovers_with_the_gap(self):
        seconds = []
        for gap in (1, 2, 4, 8, 16, 32, 64):
            first, second = self.transmitted([0, gap], gap + 1)
            assert first == pytest.approx(1.0, abs=1e-6)
            seconds.append(second.item())
        assert seconds[0] < 0.8 and seconds[-1] > 0.98
        assert seconds == sorted(seconds)


@torch.no_grad()
class TestOscillatoryGating:
    def test_it_has_the_period_and_no_mean(self):
        module, x = awake("oscillatory_gating", 6), torch.ones(1, 96, 6)
        gain = module(x)[0]
        torch.testing.assert_close(gain[:32], gain[32:64], atol=1e-6, rtol=0)
        assert gain[:32].mean(0).abs().max() < 1e-5
        for divisor in (2, 4, 8, 16):
            assert (gain[: 32 // divisor] - gain[32 // divisor : 64 // divisor]).abs().max() > 1e-3

    def test_it_keeps_time_in_the_millions(self):
        module, x = awake("oscillatory_gating", 6), torch.ones(1, 1, 6)
        here, far = (module(x, Context(positions=torch.tensor([[p]]))) for p in (5, 3_200_000 + 5))
        assert torch.equal(here, far)

    def test_gamma_rides_on_the_crest_of_theta(self):
        module = awake("oscillatory_gating", 1)
        fill(module.theta_phase, 0.0)
        fill(module.coupling, 1.0)
        with_gamma = module(torch.ones(1, 32, 1))[0, :, 0]
        gamma = (with_gamma - torch.cos(torch.arange(32) * math.tau / 32)).abs()
        crest, trough = gamma[[*range(4), *range(29, 32)]].max(), gamma[13:20].max()
        assert crest > 5 * trough

    def test_padding_and_documents_have_clocks_of_their_own(self):
        module, x = awake("oscillatory_gating", 6), torch.ones(1, 5, 6)
        mask = torch.tensor([[False, False, True, True, True]])
        torch.testing.assert_close(module(x, Context(mask=mask))[:, 2:], module(x)[:, :3])
        resets = torch.tensor([[True, False, True, False, False]])
        torch.testing.assert_close(module(x, Context(resets=resets))[:, 2:], module(x)[:, :3])


@torch.no_grad()
class TestPredictiveCoding:
    def test_what_is_predicted_is_explained_away_and_a_surprise_passes(self):
        module = awake("predictive_coding", 24, rank=4)
        cause = torch.randn(4) @ module.causes
        steady = cause.expand(1, 400, 24).clone()
        left = module(steady)[0, -1]
        assert left.norm() < 1e-3 * cause.norm()
        surprise = torch.randn(24)
        surprise -= module.causes.T @ (module.causes @ surprise)  # outside of what it can predict
        surprise *= 0.1
        shocked = steady.clone()
        shocked[0, -1] += surprise
        # The prediction is made in the frame of the token's scale, which the surprise moves only to second order.
        torch.testing.assert_close(module(shocked)[0, -1], surprise, atol=2e-2, rtol=2e-2)

    def test_feeding_the_prediction_gives_no_error(self):
        module = awake("predictive_coding", 24, rank=4)
        past = torch.randn(1, 6, 24)
        expected = module.expected(unit(past) @ module.causes.T, Context())
        following = module.expected(torch.cat([unit(past) @ module.causes.T, torch.zeros(1, 1, 4)], 1), Context())[
            :, -1
        ]
        prediction = following @ module.predictor.T
        fed = torch.cat([past, prediction[:, None] / token_scale(prediction)[:, None]], 1)
        # Scaled to unit size the prediction is compared with itself in its own frame.
        error = module(fed)[0, -1] / token_scale(fed)[0, -1]
        difference = unit(prediction)[0] - prediction[0]
        torch.testing.assert_close(error, difference, atol=1e-4, rtol=1e-3)
        assert expected.shape == (1, 6, 4)


@torch.no_grad()
class TestPrecisionWeightedError:
    def weighted(self, noise):
        module = awake("precision_weighted_error", 32, groups=1)
        fill_positive(module.sigma, 1e-4)
        history = noise * torch.randn(1, 300, 32)
        history[:, -1] = 0.0
        probe = torch.zeros(1, 1, 32)
        probe[..., :] = 0.5
        x = torch.cat([history, history[:, :1] * 0], 1)
        base = module(x)[0, -1]
        x[:, -1] += probe[:, 0]
        return (module(x)[0, -1] - base).mean().item()

    def test_the_same_error_counts_by_the_inverse_of_the_variance(self):
        ratio = self.weighted(0.2) / self.weighted(1.0)
        assert ratio > 3 and ratio == pytest.approx(25, rel=0.3)


@torch.no_grad()
class TestDopamineRpe:
    def module(self):
        module = awake("dopamine_rpe", 4)
        fill(
            module.critic, torch.tensor([[1.0, 0, 0, 0], [0, 1.0, 0, 0]])
        )  # the first unit is value, the second reward
        fill(module.bias, 0.0)
        return module

    def gain(self, tokens):
        module, x = self.module(), torch.tensor([tokens])
        return (module(x) / x.where(x != 0, 1.0))[0, -1, 3].item(), token_scale(x)

    def test_sign_of_the_error(self):
        # Fourth unit constant, so that the gain can be read from it; third fills the scale up to one.
        def token(value, reward):
            rest = math.sqrt(max(4 - value**2 - reward**2 - 1, 0.0))
            return [value, reward, rest, 1.0]

        quiet, cue = token(0.0, 0.0), token(0.9, 0.0)
        assert self.gain([quiet, token(0.0, 0.9)])[0] > 0.5  # unexpected reward
        assert self.gain([cue, token(0.0, 0.0)])[0] < -0.5  # omitted reward
        assert abs(self.gain([cue, token(0.0, 0.9)])[0]) < 1e-4  # fully predicted: 0.9 + gamma 0 - 0.9
        assert self.gain([token(0.0, 0.9)])[0] == 0.0  # the first token has no past to be compared with


@torch.no_grad()
class TestHebbianTrace:
    def test_the_trace_converges_to_the_correlation(self):
        module = build_primitive("hebbian_trace", 12, 10, rank=4, rate=0.1).train()
        mixing = torch.randn(10, 12) / 12**0.5
        wanted = torch.zeros(4, 4)
        for step in range(300):
            v = torch.randn(8, 16, 12)
            y = v @ mixing.T
            module(y, Context(x_in=v))
            if step >= 200:
                wanted += module.observed_correlation / 100
            module.commit()
        torch.testing.assert_close(module.trace, wanted, atol=0.05, rtol=0.1)

    def test_a_silent_postsynaptic_side_makes_it_decay(self):
        module = build_primitive("hebbian_trace", 12, 10, rank=4, rate=0.1).train()
        before = module.trace.clone()
        module(torch.zeros(2, 3, 10), Context(x_in=torch.randn(2, 3, 12)))
        module.commit()
        torch.testing.assert_close(module.trace, 0.9 * before)

    def test_padding_teaches_nothing(self):
        padded, bare = (build_primitive("hebbian_trace", 12, 10, rank=4).train() for _ in range(2))
        padded.load_state_dict(bare.state_dict())
        v, y = torch.randn(1, 5, 12), torch.randn(1, 5, 10)
        mask = torch.tensor([[True, True, True, False, False]])
        padded(y, Context(x_in=v, mask=mask))
        bare(y[:, :3], Context(x_in=v[:, :3]))
        torch.testing.assert_close(padded.observed_correlation, bare.observed_correlation)


@torch.no_grad()
class TestHomeostaticScaling:
    def test_rates_become_equal(self):
        module = build_primitive("homeostatic_scaling", 12, 12).train()
        loudness = torch.rand(12) + 0.7
        for _ in range(600):
            module(loudness * torch.randn(4, 16, 12))
            module.commit()
        x = loudness * torch.randn(64, 64, 12)
        rates = module.scale * unit(x).abs().mean((0, 1))
        assert rates.std() / rates.mean() < 0.05

    def test_the_change_is_proportional_to_the_features(self):
        module = awake("homeostatic_scaling", 12)
        module.scale.copy_(torch.rand(12) + 0.5)
        first, second = torch.randn(1, 3, 12), torch.randn(1, 3, 12)
        torch.testing.assert_close(module(first) / first, module(second) / second, atol=1e-4, rtol=1e-4)


@torch.no_grad()
class TestHeterosynapticScaling:
    def test_the_length_of_every_row_is_conserved(self):
        layer = host(11, 23)
        module = build_primitive("heterosynaptic_scaling", 23, 11, host=layer)
        fill(module.change, 3 * torch.randn(11, 8))
        change, _ = module.weight_delta(layer.weight, None)
        assert (change.norm() / layer.weight.norm()) > 0.1
        torch.testing.assert_close((layer.weight + change).norm(dim=1), layer.weight.norm(dim=1), rtol=1e-4, atol=1e-4)


MERGING = ["neuro_ada", "hebbian_trace", "heterosynaptic_scaling", "homeostatic_scaling"]


@torch.no_grad()
@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("name", MERGING)
def test_merging_is_exact_onto_any_weight(name, with_bias):
    """The layer may have been changed since birth, by a LoRA that was merged before."""
    layer = host(11, 23)
    module = build_primitive(name, 23, 11, host=layer).eval()
    module.wake()
    weight, bias = layer.weight + 0.1 * torch.randn(11, 23), torch.randn(11) if with_bias else None
    v = torch.randn(2, 5, 23)
    y = torch.nn.functional.linear(v, weight, bias)
    forward = y + module(y, Context(x_in=v, bias=bias))
    dw, db = module.merged_change(weight, bias, (weight, bias))
    merged = torch.nn.functional.linear(v, weight + dw, bias if db is None or bias is None else bias + db)
    torch.testing.assert_close(merged, forward, atol=1e-4, rtol=1e-4)
