"""neuro_lora: its gain and its penalty. What it shares with fly_lora is tested there."""

from __future__ import annotations

import pytest
import torch
from helpers.models import awake, bert, bio_layers, tokens, unchanged
from peft import get_peft_model
from torch import Tensor

from bioadapt import auxiliary_loss, build_primitive
from bioadapt.methods.neuro_lora import gain, likeness
from bioadapt.primitives.base import Context, Host, Primitive

N, M, R, K = 29, 37, 12, 3
GATE = ("V", "U", "c")
GATES = pytest.mark.parametrize("gate_input", ["token", "projection"])


def built(name: str = "neuro_lora", seed: int = 0, **settings) -> Primitive:
    torch.manual_seed(seed)
    return build_primitive(name, N, M, host=Host(seed=seed), **{"r": R, "k": K, **settings})


def awakened(**settings) -> Primitive:
    module = built(**settings)
    module.wake()
    return module


def given(*shape: int) -> tuple[Tensor, Context]:
    return torch.zeros(*shape, M), Context(x_in=torch.randn(*shape, N))


class TestGain:
    @GATES
    @pytest.mark.parametrize("k", [K, R])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_a_fresh_gate_is_fly_lora_bit_for_bit(self, gate_input, k, dtype):
        module, fly = built(gate_input=gate_input, k=k), built("fly_lora", k=k)
        x, context = given(2, 7)
        x, context = x.to(dtype), Context(x_in=context.x_in.to(dtype))
        with torch.no_grad():
            fly.B.normal_(), fly.d.normal_(std=0.1)
            module.B.copy_(fly.B), module.d.copy_(fly.d)
        assert torch.equal(module.A, fly.A)
        assert torch.equal(module(x, context), fly(x, context)) and torch.count_nonzero(module(x, context)) > 0

    def test_it_lies_between_0_and_2(self):
        found = gain(torch.linspace(-6, 6, 101))
        assert (found > 0).all() and (found < 2).all() and (found.diff() > 0).all()
        assert gain(torch.zeros(1)).item() == 1.0

    @GATES
    def test_it_learns_as_soon_as_something_is_written(self, gate_input):
        module, (x, context) = awakened(gate_input=gate_input), given(2, 7)
        module(x, context).sum().backward()
        assert all(torch.count_nonzero(getattr(module, name).grad) > 0 for name in GATE)
        module.zero_grad()
        with torch.no_grad():
            module.B.zero_()
        module(x, context).sum().backward()
        assert all(torch.count_nonzero(getattr(module, name).grad) == 0 for name in GATE)
        assert torch.count_nonzero(module.B.grad) > 0

    @GATES
    def test_the_context_decides_what_units_write(self, gate_input):
        """Inputs of one projection: what reads the input itself may tell them apart, what reads the projection not."""
        module = awakened(gate_input=gate_input, rho=1.0)
        with torch.no_grad():
            module.U.mul_(20)
        silent = torch.linalg.svd(module.A.double()).Vh[R:].float()  # directions that the projection does not see
        v = torch.randn(1, 7, N)
        other = v + torch.randn(1, 7, N - R) @ silent * 3
        torch.testing.assert_close(v @ module.A.T, other @ module.A.T, rtol=0, atol=1e-5)
        found = []
        for one in (v, other):
            _, index = module.compete(one, one @ module.A.T, Context())
            found.append(index.sort(-1).values)
        assert torch.equal(*found) == (gate_input == "projection")

    @GATES
    def test_a_token_is_moved_by_itself_alone(self, gate_input):
        module, (x, context) = awakened(gate_input=gate_input), given(2, 7)
        changed = context.x_in.clone()
        changed[:, 3] = 5 * torch.randn(2, N)
        before, after = module(x, context), module(x, Context(x_in=changed))
        others = torch.arange(7) != 3
        assert torch.equal(after[:, others], before[:, others]) and not torch.equal(after[:, 3], before[:, 3])
        torch.testing.assert_close(module(x[:, 3:4], Context(x_in=changed[:, 3:4])), after[:, 3:4])

    @pytest.mark.parametrize("gate_input, width", [("token", N), ("projection", R)])
    @pytest.mark.parametrize("blocks", [1, 2])
    def test_count(self, gate_input, width, blocks):
        module = built(gate_input=gate_input, gate_width=5, blocks=blocks, save_projection=True)
        expected = blocks * (M * R + 5 * (width + R) + R)
        assert sum(parameter.numel() for parameter in module.parameters()) == expected


class TestPenalty:
    def test_orthogonal_columns_cost_nothing_and_equal_ones_the_most(self):
        rows = torch.linalg.qr(torch.randn(M, R)).Q.T[None]
        assert likeness(rows).item() < 1e-12
        assert likeness(torch.eye(R)[None]).item() == 0.0
        alike = torch.randn(M).expand(1, R, M) * torch.linspace(-3, 3, R)[None, :, None].sign()
        assert likeness(alike).item() == pytest.approx(1.0, abs=1e-5)
        assert likeness(torch.stack([alike[0], rows[0]])).item() == pytest.approx(0.5, abs=1e-5)

    @pytest.mark.parametrize("readers", [None, torch.randn(2, R, N)])
    def test_size_does_not_matter(self, readers):
        rows = torch.randn(2, R, M)
        sizes = torch.logspace(-3, 3, R)[:, None]
        torch.testing.assert_close(likeness(sizes * rows, readers), likeness(rows, readers))

    def test_value_follows_the_equation(self):
        module = awakened(orthogonality=0.3)
        columns = module.B.detach().double().T
        pairs = [torch.cosine_similarity(a, b, 0) ** 2 for i, a in enumerate(columns) for b in columns[:i]]
        assert module.penalty().item() == pytest.approx(0.3 * torch.stack(pairs).mean().item(), rel=1e-5)

    def test_whole_experts_are_compared_without_being_formed(self):
        module = awakened(orthogonality=0.3, orth_space="delta")
        experts = [torch.outer(b, a).flatten() for b, a in zip(module.B.detach().T, module.A, strict=True)]
        pairs = [torch.cosine_similarity(a, b, 0).abs() for i, a in enumerate(experts) for b in experts[:i]]
        assert module.penalty().item() == pytest.approx(0.3 * torch.stack(pairs).mean().item(), rel=1e-4)

    @pytest.mark.parametrize("orth_space", ["columns", "delta"])
    @pytest.mark.parametrize("scale", [0.0, 1e-30, 1e-7])
    def test_at_birth_it_is_0_with_finite_gradient(self, orth_space, scale):
        module = built(orth_space=orth_space)
        with torch.no_grad():
            module.B.normal_().mul_(scale)
        penalty = module.penalty()
        penalty.backward()
        assert (penalty.item() == 0.0) == (scale < 1e-7) and torch.isfinite(module.B.grad).all()

    def test_one_expert_has_no_other(self):
        module = awakened(r=1, k=1)
        penalty = module.penalty()
        penalty.backward()
        assert penalty.item() == 0.0 and torch.count_nonzero(module.B.grad) == 0

    def test_it_says_nothing_to_the_gate(self):
        module = awakened()
        module.penalty().backward()
        assert torch.count_nonzero(module.B.grad) > 0
        assert all(getattr(module, name).grad is None for name in GATE)

    def test_descent_separates_the_experts(self):
        module = awakened(orthogonality=1.0)
        before = module.penalty().item()
        optimiser = torch.optim.SGD(module.parameters(), lr=0.5)
        for _ in range(50):
            optimiser.zero_grad()
            module.penalty().backward()
            optimiser.step()
        assert module.penalty().item() < 0.1 * before

    def test_weight_0_is_no_penalty(self):
        assert awakened(orthogonality=0.0).penalty() is None

    def test_of_a_model_it_is_the_mean_over_the_sites(self):
        model = get_peft_model(bert(), awake([{"name": "neuro_lora", "r": 8, "k": 2}])).train()
        found = auxiliary_loss(model)
        terms = [layer.circuits["default"]["neuro_lora"].penalty() for layer in bio_layers(model)]
        assert len(terms) > 1 and terms[0].item() != terms[1].item()
        torch.testing.assert_close(found, torch.stack(terms).mean())
        found.backward()
        assert all(torch.count_nonzero(layer.circuits["default"]["neuro_lora"].B.grad) for layer in bio_layers(model))


@pytest.mark.parametrize("k", [2, 8])
@pytest.mark.parametrize("approximate", [False, True])
def test_it_never_merges(k, approximate):
    model = get_peft_model(bert(), awake([{"name": "neuro_lora", "r": 8, "k": k}])).train()
    model(**tokens())
    with unchanged(model), pytest.raises(ValueError, match="neuro_lora depends on the input"):
        model.merge_and_unload(approximate=approximate)
