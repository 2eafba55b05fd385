"""fly_lora, and what neuro_lora shares with it, against dense sums written from the formulas, and inside models."""

from __future__ import annotations

import copy
import json
import math
import warnings
from collections.abc import Callable

import pytest
import torch
from helpers.models import Chain, awake, bert, bio_layers, close, gpt2, output, step, tokens, unchanged
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from bioadapt import build_primitive
from bioadapt.methods.sparse_projection import fingerprint, sparse_projection
from bioadapt.primitives.base import Context, Host, Primitive

N, M, R, K = 29, 37, 12, 3
BOTH = pytest.mark.parametrize("name", ["fly_lora", "neuro_lora"])
WEIGHTS = "adapter_model.safetensors"


def built(name: str = "fly_lora", seed: int = 0, n: int = N, m: int = M, **settings) -> Primitive:
    """Awake and in training mode."""
    torch.manual_seed(seed)
    module = build_primitive(name, n, m, host=Host(seed=seed), **{"r": R, "k": K, **settings})
    module.wake()
    return module.train()


def given(*shape: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Context]:
    """Features, and a context with the layer's input."""
    return torch.zeros(*shape, M, dtype=dtype), Context(x_in=torch.randn(*shape, N, dtype=dtype, requires_grad=True))


def dense(v: Tensor, module: Primitive, **tensors: Tensor) -> tuple[Tensor, Tensor]:
    """The change and the mask of the choice, all units computed, in fp64."""
    A, d, r = module.A.double(), module.d.double(), module.r
    y = v @ A.T
    for block in range(module.blocks if "U" in tensors else 0):
        own = slice(block * r, (block + 1) * r)
        g = slice(block * module.gate_width, (block + 1) * module.gate_width)
        h = v if module.gate_input == "token" else v @ A[own].T
        hidden = h @ tensors["V"][g].T
        drive = (hidden * torch.sigmoid(hidden)) @ tensors["U"][block].T + tensors["c"][own]
        gain = 2 / (1 + torch.exp(-drive))
        y = torch.cat([y[..., : own.start], gain * y[..., own], y[..., own.stop :]], -1)
    score = (y.abs() if module.score == "magnitude" else y) + d
    least = [part.sort(-1, descending=True).values[..., module.k - 1 : module.k] for part in score.split(r, -1)]
    mask = score >= torch.cat([one.expand(*one.shape[:-1], r) for one in least], -1)
    return (2 * r if module.alpha is None else module.alpha) / r * (mask * y) @ tensors["B"].T, mask


def counts(module: Primitive, v: Tensor) -> Tensor:
    """How many tokens choose each unit: the rows of B that stay apart tell."""
    with torch.no_grad():
        return dense(v.double(), module, B=module.B.double())[1].flatten(0, -2).sum(0).float()


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-10), (torch.float32, 1e-5)], ids=["fp64", "fp32"])
@pytest.mark.parametrize(
    "name, settings",
    [
        ("fly_lora", {}),
        ("fly_lora", {"score": "signed", "alpha": 5.0}),
        ("fly_lora", {"projection": "rademacher", "rho": 0.5}),
        ("fly_lora", {"blocks": 2, "save_projection": True}),
        ("fly_lora", {"blocks": 2, "save_projection": True, "score": "signed"}),
        ("fly_lora", {"k": R}),
        ("fly_lora", {"k": R, "blocks": 2, "save_projection": True}),
        ("fly_lora", {"r": 300, "k": 40}),
        ("neuro_lora", {}),
        ("neuro_lora", {"score": "signed", "projection": "rademacher"}),
        ("neuro_lora", {"gate_input": "projection"}),
        ("neuro_lora", {"blocks": 2, "save_projection": True}),
        ("neuro_lora", {"blocks": 2, "save_projection": True, "gate_input": "projection"}),
        ("neuro_lora", {"k": R}),
    ],
)
def test_change_and_gradients_equal_the_dense_ones(name, settings, dtype, tolerance):
    module = built(name, **settings).to(dtype)
    module.d.normal_(std=0.05)
    x, context = given(2, 7, dtype=dtype)
    weight = torch.randn(2, 7, M, dtype=dtype)
    found = module(x, context)
    trained = dict(module.named_parameters())
    gradients = torch.autograd.grad((found * weight).sum(), (context.x_in, *trained.values()))
    exact = {key: parameter.detach().double().requires_grad_() for key, parameter in trained.items()}
    v = context.x_in.detach().double().requires_grad_()
    expected, _ = dense(v, module, **exact)
    wanted = torch.autograd.grad((expected * weight).sum(), (v, *exact.values()))
    for one, other in zip((found, *gradients), (expected, *wanted), strict=True):
        assert one.dtype == dtype
        torch.testing.assert_close(one.double(), other, rtol=0, atol=tolerance * max(1.0, other.abs().max().item()))


@BOTH
def test_gradients_are_those_of_the_change(name):
    module = built(name, n=5, m=4, r=4, k=2).double()
    x, v = torch.zeros(1, 2, 4).double(), torch.randn(1, 2, 5).double().requires_grad_()
    parameters = dict(module.named_parameters())

    def change(v: Tensor, *values: Tensor) -> Tensor:
        replaced = dict(zip(parameters, values, strict=True))
        return torch.func.functional_call(module, replaced, (x, Context(x_in=v)))

    assert torch.autograd.gradcheck(change, (v, *parameters.values()))


@BOTH
def test_half_precision_chooses_what_full_precision_chooses(name):
    """A layer in bf16 without autocast: what comes in is rounded, scores are not."""
    module = built(name, n=256, r=32, k=8)
    v = torch.randn(64, 32, 256).bfloat16()
    module.d.normal_(std=1e-3)
    seen = {}
    for dtype in (torch.bfloat16, torch.float32, torch.float64):
        own = copy.deepcopy(module).to(dtype)
        own.winners = lambda y, context, dtype=dtype, choose=own.winners: seen.setdefault(dtype, choose(y, context))
        x = v.to(dtype).requires_grad_()
        own(torch.zeros(64, 32, M, dtype=dtype), Context(x_in=x)).float().square().sum().backward()
        seen[dtype] = seen[dtype].sort(-1).values, own.B.grad.double()
    (half, on_b), (full, expected), (exact, _) = (seen[d] for d in (torch.bfloat16, torch.float32, torch.float64))
    if name == "fly_lora":  # the other one's gain comes from a matrix that is in half precision itself
        assert torch.equal(half, full)
        assert (on_b - expected).norm() < 8e-3 * expected.norm()
    assert (full == exact).float().mean() > 0.999


class TestPerForward:
    def test_every_training_forward_moves_the_excitability_once(self):
        module, once = built(per_forward=True), built()
        for _ in range(3):
            x, context = given(4, 16)
            load, before = counts(module, context.x_in), module.d.clone()
            module(x, context)
            torch.testing.assert_close(module.d - before, 1e-3 * torch.sign(load.mean() - load))
            module(x, context).sum().backward()
        moved = module.d.clone()
        module.commit()
        assert torch.equal(module.d, moved)
        x, context = given(4, 16)
        once(x, context)
        assert not once.d.any()

    def test_neither_eval_nor_unobserved_forwards_move_it(self):
        module, (x, context) = built(per_forward=True), given(4, 16)
        module.eval()(x, context)
        with torch.no_grad():
            module.train()(x, context.replace(observing=False))
        module.requires_grad_(False)(x, context)
        assert not module.d.any()

    @pytest.mark.parametrize("reentrant", [False, True])
    def test_gradient_checkpointing_is_refused(self, reentrant):
        model = get_peft_model(bert(), awake([{"name": "fly_lora", "per_forward": True}])).train()
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
        model.enable_input_require_grads()
        with pytest.raises(RuntimeError, match="per_forward=True.*without gradient checkpointing"):
            model(**tokens()).last_hidden_state.sum().backward()

    def test_it_balances_the_load_as_fast_as_a_rate_that_is_as_many_times_larger(self):
        """Four forwards a step move the excitability four times; about as far goes a rate four times as large."""
        v, distance = torch.randn(1, N) + 0.5 * torch.randn(64, N), {}
        for name, settings in (("each", {"per_forward": True}), ("step", {}), ("larger", {"rate": 4e-3})):
            module = built(**settings)
            for _ in range(10):
                for part in v.split(16):
                    module(torch.zeros(1, 16, M), Context(x_in=part[None])).sum().backward()
                module.commit()
            distance[name] = module.d.norm().item()
        assert distance["each"] > 2 * distance["step"]
        assert distance["each"] == pytest.approx(distance["larger"], rel=0.4)


class TestProjection:
    @pytest.mark.parametrize("rho, entries", [(None, 96), (0.1, 38), (1.0, 384), (1e-6, 1)])
    def test_rows_have_as_many_entries_as_asked_for(self, rho, entries):
        matrix = build_primitive("fly_lora", 384, 8, r=32, k=8, rho=rho).A
        assert matrix.shape == (32, 384)
        assert (torch.count_nonzero(matrix, 1) == entries).all()
        values = matrix[matrix != 0]
        if entries > 1:
            assert values.std().item() == pytest.approx(1 / 32, rel=4 / (2 * len(values)) ** 0.5)
            assert abs(values.mean().item()) < 4 / 32 / len(values) ** 0.5
            share = torch.count_nonzero(matrix, 0).float()  # no part of the input is read more than another
            assert share.mean().item() == pytest.approx(entries / 12)
            assert share.std().item() <= 1.3 * (32 * (entries / 384) * (1 - entries / 384)) ** 0.5

    def test_rademacher_entries_are_exact(self):
        matrix = build_primitive("fly_lora", 64, 8, r=32, k=8, projection="rademacher", host=Host(seed=3)).A
        values = matrix[matrix != 0]
        assert (values.abs() == 1 / 32).all() and 0.4 < (values > 0).float().mean() < 0.6
        # Made of integers alone: the same on every machine.
        assert bytes(fingerprint(matrix).tolist()).hex()[:16] == "efc62469d0089471"

    @BOTH
    def test_it_is_neither_trained_nor_saved(self, name):
        module = built(name)
        assert not module.A.requires_grad and module.A.dtype == torch.float32
        assert "A" not in dict(module.named_parameters()) and "A" not in module.state_dict()
        assert torch.equal(module.fingerprint, fingerprint(module.A, values=False))

    @BOTH
    def test_seed_shape_and_kind_fix_it(self, name):
        first = built(name, seed=1).A
        assert torch.equal(first, built(name, seed=1, gate_width=3).A if name == "neuro_lora" else built(seed=1).A)
        others = [built(name, seed=2), built(name, seed=1, m=M + 1), built(name, seed=1, projection="rademacher")]
        for other in others:
            assert not torch.equal(other.A, first)
            assert not torch.equal(other.fingerprint, fingerprint(first, values=False))

    def test_two_seeds_give_nearly_orthogonal_projections(self):
        first, second = (build_primitive("fly_lora", 384, 8, host=Host(seed=seed)).A for seed in (1, 2))
        cosines = nn.functional.normalize(first) @ nn.functional.normalize(second).T
        assert cosines.abs().mean() < 0.06 and cosines.abs().max() < 0.25

    @BOTH
    def test_defaults_of_torch_and_its_generator_do_not_matter(self, name):
        expected = built(name).A
        torch.set_default_dtype(torch.float64)
        try:
            assert torch.equal(built(name).A, expected) and built(name).d.dtype == torch.float32
        finally:
            torch.set_default_dtype(torch.float32)
        torch.rand(3)
        with torch.device("meta"):
            module = build_primitive(name, N, M, host=Host(seed=0), r=R, k=K)
        assert module.B.is_meta and torch.equal(module.A, expected)
        assert torch.equal(module.fingerprint, fingerprint(expected, values=False))

    def test_fingerprint_tells_places_and_values(self):
        matrix = sparse_projection((4, 9), 3, 0.5, "gaussian", torch.Generator().manual_seed(0))
        moved, changed = matrix.roll(1, 1), matrix.clone()
        changed[matrix != 0] = matrix[matrix != 0] * (1 + 1e-6)
        prints = {bytes(fingerprint(one).tolist()) for one in (matrix, moved, changed, matrix.double(), matrix.clone())}
        assert len(prints) == 3
        prints = {bytes(fingerprint(one, values=False).tolist()) for one in (matrix, moved, changed)}
        assert len(prints) == 2

    def test_layers_of_one_shape_differ(self):
        model = get_peft_model(bert(), awake(["fly_lora"]))
        projections = [layer.circuits["default"]["fly_lora"].A for layer in bio_layers(model)]
        alike = [(a, b) for i, a in enumerate(projections) for b in projections[:i] if a.shape == b.shape]
        assert alike and not any(torch.equal(a, b) for a, b in alike)


class TestCompetition:
    @BOTH
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    @pytest.mark.parametrize("blocks", [1, 2])
    def test_exactly_k_units_of_a_block_write(self, name, dtype, blocks):
        module = built(name, m=blocks * R, blocks=blocks, save_projection=True).to(dtype)
        v = torch.randn(2, 7, N, dtype=dtype)
        with torch.no_grad():
            module.B.copy_(torch.eye(blocks * R))
            written = module(torch.zeros(2, 7, blocks * R, dtype=dtype), Context(x_in=v))
            assert (torch.count_nonzero(written.unflatten(-1, (blocks, R)), -1) == K).all()
            module.A.fill_(1.0)  # a tie of all
            for parameter in (p for key, p in module.named_parameters() if key != "B"):
                parameter.zero_()
            written = module(torch.zeros(2, 7, blocks * R, dtype=dtype), Context(x_in=v))
        assert (torch.count_nonzero(written.unflatten(-1, (blocks, R)), -1) == K).all()

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
    def test_with_all_units_it_is_a_lora(self, dtype):
        module, (x, context) = built(k=R), given(2, 7)
        module.d.normal_()
        expected = 2 * context.x_in @ module.A.T @ module.B.T
        found = module(x.to(dtype), Context(x_in=context.x_in.to(dtype)))
        torch.testing.assert_close(found.float(), expected, rtol=0, atol=1e-5 if dtype == torch.float32 else 1e-3)

    @BOTH
    def test_excitability_acts_on_the_choice_alone(self, name):
        module, (x, context) = built(name), given(2, 7)
        expected = module(x, context)
        module.d.add_(torch.full((R,), 0.25) + 1e-6 * torch.randn(R))
        assert torch.equal(module(x, context), expected)
        module.d[0] += 10.0
        assert not torch.equal(module(x, context), expected)

    @BOTH
    def test_units_that_nobody_chose_get_no_gradient(self, name):
        module, (x, context) = built(name), given(2, 7)
        module.d[:5] = -100.0
        module(x, context).square().sum().backward()
        assert torch.count_nonzero(module.B.grad[:, :5]) == 0
        assert (torch.count_nonzero(module.B.grad[:, 5:], 0) == M).all()

    def test_magnitudes_keep_more_of_the_energy_than_signed_values(self):
        kept = {}
        for score in ("magnitude", "signed"):
            module, (x, context) = built(score=score), given(4, 64)
            module(x, context)
            module.commit()
            kept[score] = (module.energy_chosen.sum() / module.energy.sum()).item()
        assert kept["magnitude"] > 1.3 * kept["signed"]

    @BOTH
    def test_detached_input_gets_no_gradient(self, name):
        module, (x, context) = built(name, detach_input=True), given(2, 7)
        plain = built(name)
        assert torch.equal(module(x, context), plain(x, context))
        with pytest.raises(RuntimeError, match="not have been used"):
            torch.autograd.grad(module(x, context).sum(), context.x_in)
        module(x, context).sum().backward(), plain(x, context).sum().backward()
        assert torch.equal(module.B.grad, plain.B.grad)

    def test_dropout_is_for_training(self):
        module, (x, context) = built(dropout=0.5), given(2, 7)
        assert not torch.equal(module(x, context), module(x, context))
        assert torch.equal(module.eval()(x, context), built().eval()(x, context))

    @pytest.mark.parametrize(
        "settings, words",
        [
            ({"r": 4, "k": 5}, ["k=5", "r=4"]),
            ({"blocks": 2}, ["blocks=2", "save_projection=True"]),
            ({"rho": 0.0}, ["rho"]),
            ({"score": "abs"}, ["score", "signed"]),
        ],
    )
    @BOTH
    def test_settings_that_do_not_fit_are_refused(self, name, settings, words):
        with pytest.raises(ValueError) as refusal:
            built(name, **settings)
        assert all(word in str(refusal.value) for word in [*words, name])
        with pytest.raises(ValueError) as refusal:
            awake([{"name": name, **settings}])
        assert all(word in str(refusal.value) for word in words)


class TestBalance:
    @BOTH
    @pytest.mark.parametrize("rate", [1e-3, 0.25, 0.0])
    def test_excitability_moves_one_step_towards_the_mean(self, name, rate):
        module = build_primitive(name, N, M, r=R, k=K, rate=rate).train()
        x, context = given(2, 7)
        v, mask = context.x_in.detach(), torch.rand(2, 7) > 0.4
        load = counts(module, v[mask][None])
        assert load.sum() == K * mask.sum()
        module(x, context.replace(mask=mask))
        assert torch.count_nonzero(module.d) == 0 and torch.equal(module.observed_load, load)
        module.commit()
        torch.testing.assert_close(module.d, rate * (load.mean() - load).sign())

    @BOTH
    def test_without_a_token_nothing_moves(self, name):
        module, (x, context) = built(name), given(2, 7)
        before = {key: value.clone() for key, value in module.state_dict().items()}
        module.commit()
        module(x, context.replace(mask=torch.zeros(2, 7, dtype=torch.bool)))
        assert module.evidence is not None and not module.observed_load.any()
        module.commit()
        assert all(torch.equal(value, before[key]) for key, value in module.state_dict().items())

    def test_load_evens_out(self):
        torch.manual_seed(0)
        module = built(rate=3e-3)
        mixing, mean = torch.randn(N, N) / N**0.5, torch.randn(N)

        def spread() -> float:
            load = counts(module, torch.randn(1000, N) @ mixing + mean)
            return (load.std() / load.mean()).item()

        uneven = spread()
        for _ in range(300):
            module(torch.zeros(1, 64, M), Context(x_in=torch.randn(1, 64, N) @ mixing + mean))
            module.commit()
        assert uneven > 0.5 and spread() < 0.2 * uneven
        assert module.d.abs().max() < 1.0

    def test_replicas_learn_what_one_learns_from_the_whole_batch(self):
        x, context = given(4, 7)
        whole, one, other = built(), built(), built()
        whole(x, context), one(x[:2], Context(x_in=context.x_in[:2])), other(x[2:], Context(x_in=context.x_in[2:]))
        one.evidence = one.evidence + other.evidence  # as replicas agree: `tuner.learning`
        whole.commit(), one.commit()
        assert torch.equal(one.d, whole.d) and torch.count_nonzero(one.d) > 0
        torch.testing.assert_close(one.energy_chosen / one.energy, whole.energy_chosen / whole.energy)


class TestSurrogate:
    """The linear map that an approximate merge puts in the place of the choice."""

    @staticmethod
    def correlated(module: Primitive, tokens: int) -> tuple[Tensor, Context]:
        source = torch.Generator().manual_seed(5)
        mixing, mean = torch.randn(N, N, generator=source) / N**0.5, torch.randn(N, generator=source)
        return torch.zeros(1, tokens, M), Context(x_in=torch.randn(1, tokens, N) @ mixing + mean)

    def trained(self, steps: int = 60, **settings) -> Primitive:
        module = built(rate=0.0, **settings)
        for _ in range(steps):
            module(*self.correlated(module, 64))
            module.commit()
        return module

    def error(self, module: Primitive, matrix: Tensor) -> float:
        x, context = self.correlated(module, 2000)
        change = module.eval()(x, context)
        return ((context.x_in @ matrix.T - change).norm() / change.norm()).item()

    def test_before_anything_was_observed_units_count_by_chance(self):
        module = built()
        matrix, bias = module.weight_delta(torch.zeros(M, N), None)
        assert bias is None
        torch.testing.assert_close(matrix, 2 * (K / R) * module.B.detach() @ module.A)
        assert math.isnan(module.surrogate_error())

    def test_share_of_the_energy_is_measured_on_real_tokens(self):
        module, (x, context) = built(), given(2, 40)
        mask = torch.rand(2, 40) > 0.3
        module(x, context.replace(mask=mask))
        module.commit()
        v = context.x_in.detach()[mask].double()
        energy, chosen = (v @ module.A.double().T).square(), dense(v, built(), B=module.B.double())[1]
        torch.testing.assert_close(module.share().double(), (energy * chosen).sum(0) / energy.sum(0))
        expected = 2 * module.B.detach() * module.share() @ module.A
        torch.testing.assert_close(module.weight_delta(torch.zeros(M, N), None)[0], expected)

    def test_averages_begin_with_the_mean_and_then_forget(self):
        module = built()
        energies = []
        for _ in range(130):
            x, context = given(1, 4)
            module(x, context)
            energies.append(module.observed_energy.clone())
            module.commit()
            if len(energies) in (1, 7, 100):
                torch.testing.assert_close(module.energy, torch.stack(energies).mean(0))
        expected = torch.stack(energies[:100]).mean(0)
        for energy in energies[100:]:
            expected = expected + 0.01 * (energy - expected)
        torch.testing.assert_close(module.energy, expected)

    @pytest.mark.parametrize("score", ["magnitude", "signed"])
    def test_it_beats_the_plain_product(self, score):
        module = self.trained(score=score)
        mine = self.error(module, module.weight_delta(torch.zeros(M, N), None)[0])
        assert mine < 0.8 * self.error(module, 2 * module.B.detach() @ module.A)

    def test_the_error_it_tells_is_the_error_it_makes(self):
        module = self.trained(steps=100)
        made = self.error(module, module.weight_delta(torch.zeros(M, N), None)[0])
        assert 0.05 < made < 1.0
        assert module.surrogate_error() == pytest.approx(made, rel=0.1)

    @pytest.mark.parametrize("count, every", [(64, 4), (65, 5), (10, 1), (1, 1)])
    def test_few_tokens_from_all_over_the_batch_are_witnesses(self, count, every):
        module, (x, context) = built(), given(1, count)
        change = module(x, context)[0, ::every]
        wrong = (context.x_in @ module.weight_delta(torch.zeros(M, N), None)[0].T)[0, ::every] - change
        expected = torch.stack([wrong.square().sum(), change.square().sum()]) / 4  # the scale is left out of both
        torch.testing.assert_close(module.observed_error, expected.detach())

    def test_padding_has_no_part_in_the_error(self):
        errors = []
        for junk in (0.0, 1e3):
            torch.manual_seed(1)
            module, (x, context) = built(), given(2, 40)
            mask = torch.arange(40).expand(2, -1) < 25
            module(x, Context(x_in=context.x_in.detach().masked_fill(~mask[..., None], junk), mask=mask))
            module.commit()
            errors.append(module.surrogate_error())
        assert errors[0] == errors[1] > 0


@BOTH
def test_few_bytes_are_kept_for_backward(name):
    module, count = built(name, n=64, m=48, r=32, k=8), 256
    v = torch.randn(1, count, 64, requires_grad=True)

    def kept(forward: Callable[[], Tensor], v: Tensor) -> float:
        """Bytes per token of all storages but those that exist anyway; the input exists only where a gate reads it."""
        found: dict[int, Tensor] = {}

        def pack(tensor: Tensor) -> Tensor:
            found.setdefault(tensor.untyped_storage().data_ptr(), tensor)
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(lambda t: pack(t) if t.numel() >= count else t, lambda t: t):
            result = forward()
        assert result.requires_grad
        anyway = [*module.parameters(), *module.buffers(), *([v] if name == "neuro_lora" else [])]
        for tensor in anyway:
            found.pop(tensor.untyped_storage().data_ptr(), None)
        return sum(tensor.untyped_storage().nbytes() for tensor in found.values()) / count

    def masked() -> Tensor:
        y = v @ module.A.T
        if name == "neuro_lora":
            y = 2 * torch.sigmoid(nn.functional.silu(v @ module.V.T) @ module.U[0].T + module.c) * y
        index = y.detach().abs().topk(8).indices
        return 2 * (torch.zeros_like(y).scatter(-1, index, 1.0) * y) @ module.B.T

    def mine(v: Tensor) -> float:
        return kept(lambda: module(torch.zeros(1, count, 48, dtype=v.dtype), Context(x_in=v)), v)

    assert mine(v) <= kept(masked, v) / 2
    if name == "fly_lora":
        assert mine(v) == 8 + 8 * 4
        assert mine(v.detach().half().requires_grad_()) == 8 + 8 * 2


# -- in models --


QUIET = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
SMALL = {"r": 8, "k": 2}


def adapted(name: str = "fly_lora", base: nn.Module | None = None, **settings) -> PeftModel:
    model = get_peft_model(bert(**QUIET) if base is None else base, awake([{"name": name, **SMALL, **settings}]))
    return model.train()


def primitives(model: nn.Module, name: str = "fly_lora") -> list[Primitive]:
    return [layer.circuits["default"][name] for layer in bio_layers(model)]


def state(model: nn.Module, name: str) -> dict[str, Tensor]:
    """Whatever the local rules may write, slots for statistics included."""
    return {f"{i} {k}": b.clone() for i, p in enumerate(primitives(model, name)) for k, b in p.named_buffers()}


def run(model: nn.Module, seed: int = 1) -> Tensor:
    return model(**tokens(seed=seed)).last_hidden_state.square().sum()


def optimiser(model: nn.Module, rate: float = 0.0) -> torch.optim.Optimizer:
    return torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=rate)


@BOTH
def test_fresh_it_changes_nothing_and_awake_it_does(name):
    plain = output(bert(), tokens())
    model = get_peft_model(bert(), awake([{"name": name, **SMALL}], init_weights=True))
    assert torch.equal(output(model, tokens()), plain)
    assert not close(output(adapted(name, bert()), tokens()), plain, 1e-3)


@BOTH
def test_checkpointing_changes_neither_gradients_nor_choices(name):
    found = []
    for reentrant in (None, True, False):
        model = adapted(name)
        model.enable_input_require_grads()
        if reentrant is not None:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
        for seed in (1, 2):
            run(model, seed).backward()
        gradients = {key: p.grad for key, p in model.named_parameters() if p.requires_grad}
        observed = state(model, name)
        optimiser(model).step()
        found.append((gradients, observed, state(model, name)))
    for gradients, observed, learned in found[1:]:
        for key, expected in found[0][0].items():
            torch.testing.assert_close(gradients[key], expected, rtol=1e-4, atol=1e-4, msg=key)
        for key in (key for key in observed if key.endswith("observed_load")):
            assert torch.equal(observed[key], found[0][1][key]) and observed[key].sum() > 0, key
        for key in (key for key in learned if key.endswith(" d")):
            assert torch.equal(learned[key], found[0][2][key]) and torch.count_nonzero(learned[key]) > 0, key


@BOTH
def test_nothing_is_observed_in_eval_under_no_grad_or_while_disabled(name):
    model = adapted(name)
    before = state(model, name)
    with torch.no_grad():
        run(model)
    run(model.eval())
    model.train()
    with model.disable_adapter():
        run(model)
    optimiser(model).step()
    after = state(model, name)
    assert all(torch.equal(after[key], value) for key, value in before.items())
    run(model).backward()
    optimiser(model).step()
    after = state(model, name)
    assert not all(torch.equal(after[key], value) for key, value in before.items() if key.endswith(" d"))


@BOTH
def test_excitability_moves_once_per_step_of_the_optimiser(name):
    model = adapted(name)
    for seed in (1, 2, 3):
        run(model, seed).backward()
    assert all(torch.count_nonzero(p.d) == 0 for p in primitives(model, name))
    optimiser(model).step()
    for primitive in primitives(model, name):
        assert torch.count_nonzero(primitive.d) > 0
        assert set(primitive.d.tolist()) <= {torch.tensor(u).item() for u in (-1e-3, 0.0, 1e-3)}
    once = state(model, name)
    optimiser(model).step()
    assert all(torch.equal(value, once[key]) for key, value in state(model, name).items())


def test_micro_batches_teach_what_the_whole_batch_teaches():
    taught, rows = [], tokens(rows=4)
    for parts in (1, 2):
        model = adapted()
        for part in range(parts):
            share = slice(part * 4 // parts, (part + 1) * 4 // parts)
            model(**{key: value[share] for key, value in rows.items()})
        optimiser(model).step()
        taught.append(primitives(model))
    for one, other in zip(*taught, strict=True):
        assert torch.equal(one.d, other.d)
        torch.testing.assert_close(one.share(), other.share())


@BOTH
@pytest.mark.parametrize("saved", [False, True], ids=["drawn again", "saved"])
@pytest.mark.parametrize("low", [False, True], ids=["", "low memory"])
def test_round_trip_is_exact(name, saved, low, tmp_path):
    model = adapted(name, save_projection=saved)
    step(model, tokens(), steps=2)
    model.save_pretrained(tmp_path)
    held = {key.rpartition(".")[2] for key in load_file(tmp_path / WEIGHTS)}
    assert ("A" in held) == saved and {"B", "d", "fingerprint"} <= held
    loaded = PeftModel.from_pretrained(bert(**QUIET), str(tmp_path), low_cpu_mem_usage=low)
    assert torch.equal(output(loaded, tokens()), output(model, tokens()))
    for one, other in zip(primitives(loaded, name), primitives(model, name), strict=True):
        assert torch.equal(one.A, other.A) and torch.equal(one.d, other.d) and torch.count_nonzero(one.d) > 0


def reseeded(folder, **changes) -> None:
    """Edit a saved configuration."""
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "settings_fingerprint": None, **changes}))


@BOTH
@pytest.mark.parametrize("low", [False, True], ids=["", "low memory"])
def test_a_file_of_another_projection_is_refused(name, low, tmp_path):
    adapted(name).save_pretrained(tmp_path)
    reseeded(tmp_path, seed=1)
    own = bytes(fingerprint(primitives(adapted(name), name)[0].A, values=False).tolist()).hex()[:12]
    base = bert()
    with unchanged(base), pytest.raises(ValueError, match=f"{name}.*{own}"):
        PeftModel.from_pretrained(base, str(tmp_path), low_cpu_mem_usage=low)
    model = adapted(name)
    with unchanged(model), pytest.raises(ValueError, match="fingerprint"):
        model.load_adapter(str(tmp_path), "other", low_cpu_mem_usage=low)


@BOTH
def test_a_file_from_another_processor_is_loaded(name, tmp_path, monkeypatch):
    """There the values that one seed gives differ in the last bits."""
    model = adapted(name)
    model.save_pretrained(tmp_path)

    def drawn(*arguments):
        return sparse_projection(*arguments) * (1 + 2**-22)

    monkeypatch.setattr("bioadapt.methods.fly_lora.sparse_projection", drawn)
    loaded = PeftModel.from_pretrained(bert(**QUIET), str(tmp_path))
    assert not torch.equal(primitives(loaded, name)[0].A, primitives(model, name)[0].A)
    torch.testing.assert_close(output(loaded, tokens()), output(model, tokens()), rtol=1e-4, atol=1e-5)


@BOTH
def test_an_earlier_file_whose_fingerprint_covers_the_values_is_loaded(name):
    module, earlier = built(name), built(name).state_dict()
    earlier["fingerprint"] = fingerprint(module.A)
    module.load_state_dict(earlier)
    assert torch.equal(module.fingerprint, earlier["fingerprint"])  # and is saved again as it was
    module.load_state_dict(built(name).state_dict())


def test_a_state_dict_of_another_projection_is_refused():
    module, other = built(seed=0), built(seed=1)
    before = {key: value.clone() for key, value in module.state_dict().items()}
    with pytest.raises(RuntimeError, match="fingerprint"):
        module.load_state_dict(other.state_dict())
    assert all(torch.equal(value, before[key]) for key, value in module.state_dict().items())


def test_a_saved_projection_counts_more_than_the_seed(tmp_path):
    model = adapted(save_projection=True)
    model.save_pretrained(tmp_path)
    reseeded(tmp_path, seed=1)
    assert torch.equal(
        output(PeftModel.from_pretrained(bert(**QUIET), str(tmp_path)), tokens()), output(model, tokens())
    )
    tensors = load_file(tmp_path / WEIGHTS)
    key = next(key for key in tensors if key.endswith(".A"))
    tensors[key] *= 1.001
    save_file(tensors, tmp_path / WEIGHTS)
    reseeded(tmp_path, fingerprint=None)
    base = bert()
    with unchanged(base), pytest.raises(ValueError, match="fingerprint.*A beside it"):
        PeftModel.from_pretrained(base, str(tmp_path))


def test_the_file_is_half_as_large_without_the_projection(tmp_path):
    sizes = []
    for saved in (False, True):
        model = get_peft_model(
            Chain(lin=nn.Linear(384, 384)),
            awake([{"name": "fly_lora", "save_projection": saved}], ["lin"]),
        )
        model.save_pretrained(tmp_path / str(saved))
        sizes.append((tmp_path / str(saved) / WEIGHTS).stat().st_size)
    assert sizes[0] <= 0.55 * sizes[1]


@BOTH
def test_merging_is_refused_with_the_reason(name):
    model = adapted(name)
    run(model)
    with unchanged(model), pytest.raises(ValueError, match=f"{name} depends on the input"):
        model.merge_and_unload()


@pytest.mark.parametrize("build", [bert, gpt2])
def test_approximate_merging_puts_the_surrogate_there_and_tells_its_error(build):
    model = adapted(base=build())
    for seed in (1, 2, 3):
        model(**tokens(seed=seed))[0].sum().backward()
        optimiser(model).step()
    layer = bio_layers(model)[0]
    primitive, weight = layer.circuits["default"]["fly_lora"], layer.site.matrix(layer.get_base_weight())
    expected = weight + primitive.weight_delta(weight, None)[0]
    errors = [p.surrogate_error() for p in primitives(model)]
    assert all(error > 0 for error in errors)
    path = layer.path
    with pytest.warns(
        UserWarning, match=f"merged approximately: .* {sum(errors) / len(errors):.3f} .*{max(errors):.3f}"
    ):
        merged = model.merge_and_unload(approximate=True)
    torch.testing.assert_close(layer.site.matrix(merged.get_submodule(path).weight), expected)


@pytest.mark.parametrize("build", [bert, gpt2])
def test_with_all_units_it_merges_exactly_over_a_lora(build):
    lora = LoraConfig(
        r=2, target_modules=r".*(output\.dense|c_proj)", init_lora_weights=False, fan_in_fan_out=build is gpt2
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = adapted(base=get_peft_model(build(), lora), k=8)
    wanted = output(model, tokens())
    assert not close(wanted, output(build(), tokens()), 1e-3)
    assert close(output(model.merge_and_unload(), tokens()), wanted, 1e-4)


@BOTH
def test_adapters_are_chosen_by_sample_and_add_up(name):
    torch.manual_seed(0)
    base, x = Chain(lin=nn.Linear(N, M)), torch.randn(3, N)
    plain = output(base, x)
    model = get_peft_model(base, awake([{"name": name, **SMALL}], ["lin"]))
    model.add_adapter("other", awake([{"name": name, **SMALL}], ["lin"], seed=1))
    alone = []
    for chosen in ("default", "other"):
        model.set_adapter(chosen)
        alone.append(output(model, x))
    assert not close(*alone, 1e-3)
    with torch.no_grad():
        mixed = model(x, adapter_names=["other", "__base__", "default"])
    assert close(mixed, torch.stack([alone[1][0], plain[1], alone[0][2]]))
    model.base_model.set_adapter(["default", "other"])
    assert close(output(model, x), alone[0] + alone[1] - plain)


@BOTH
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_models_train(name, dtype):
    model = adapted(name, bert(**QUIET).to(dtype))
    assert all(p.B.dtype == torch.float32 for p in primitives(model, name))
    found = model(**tokens()).last_hidden_state
    assert found.dtype == dtype
    found.float().square().mean().backward()
    for primitive in primitives(model, name):
        for parameter in primitive.parameters():
            assert torch.isfinite(parameter.grad).all() and torch.count_nonzero(parameter.grad) > 0
    optimiser(model, 0.1).step()
    assert torch.isfinite(output(model, tokens())).all()
    assert all(torch.isfinite(value).all() for value in state(model, name).values() if value.is_floating_point())
