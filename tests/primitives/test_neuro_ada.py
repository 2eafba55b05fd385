"""neuro_ada: its selection of synapses, and its sparse product against a dense one."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from bioadapt import build_primitive
from bioadapt.methods.neuro_ada import sparse_product, strongest
from bioadapt.primitives.base import Context, Host

SEEDS = range(4)
N, M = 29, 37


def dense(v: Tensor, index: Tensor, values: Tensor) -> Tensor:
    matrix = torch.zeros(index.shape[0], v.shape[-1], dtype=v.dtype).scatter(1, index.long(), values)
    return v @ matrix.T


def module_on(weight: Tensor | None, **settings):
    n, m = (N, M) if weight is None else (weight.shape[1], weight.shape[0])
    return build_primitive("neuro_ada", n, m, host=Host(weight=weight), **settings)


@pytest.mark.parametrize("seed", SEEDS)
class TestSelection:
    @pytest.fixture
    def weight(self, seed):
        torch.manual_seed(seed)
        return torch.randn(M, N)

    @pytest.mark.parametrize("k", [1, 4, 20, N])
    def test_change_has_k_entries_per_row_at_the_largest_magnitudes(self, weight, k):
        module = module_on(weight, k=k)
        module.wake()
        change, bias = module.weight_delta(weight, None)
        assert bias is None
        chosen = change != 0
        assert (chosen.sum(1) == k).all()  # which also excludes a column that was taken twice
        unchosen = weight.abs().masked_fill(chosen, -1.0).amax(1)
        assert (weight.abs().masked_fill(~chosen, torch.inf).amin(1) >= unchosen).all()
        assert torch.equal(chosen, torch.zeros_like(chosen).scatter(1, module.index.long(), True))

    def test_few_are_the_first_of_many(self, weight):
        many = module_on(weight, k=20).index
        for k in (1, 4, 19):
            assert torch.equal(module_on(weight, k=k).index, many[:, :k])
        magnitudes = weight.abs().gather(1, many.long())
        assert (magnitudes.diff(dim=1) <= 0).all()

    def test_ties_go_to_the_lower_column(self, weight):
        weight = weight.sign() * (1 + torch.arange(N) // 10)
        assert module_on(weight, k=4).index.tolist() == [[20, 21, 22, 23]] * M

    def test_smallest_and_random(self, seed, weight):
        least = module_on(weight, k=3, selection="reverse").index
        assert torch.equal(least.long(), weight.abs().sort(1).indices[:, :3])
        drawn = [
            build_primitive("neuro_ada", N, M, host=Host(weight, seed=s), k=5, selection="random").index
            for s in (seed, seed, seed + 1)
        ]
        assert torch.equal(drawn[0], drawn[1])
        assert not torch.equal(drawn[0], drawn[2])
        assert all(len(set(row)) == 5 for row in drawn[0].tolist())

    def test_a_layer_without_weight_gets_a_fixed_choice(self, seed):
        first, second = (build_primitive("neuro_ada", N, M, host=Host(seed=seed)).index for _ in range(2))
        assert torch.equal(first, second)
        assert first.shape == (M, 4) and first.dtype == torch.int32

    def test_training_leaves_base_and_choice_alone(self, seed, weight):
        module = module_on(weight)
        before, index, bits = weight.clone(), module.index.clone(), module.values.detach().clone()
        v = torch.randn(2, 5, N)
        optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
        (module(torch.zeros(2, 5, M), Context(x_in=v)) - torch.randn(2, 5, M)).square().sum().backward()
        optimizer.step()
        assert torch.equal(weight, before) and not weight.requires_grad
        assert torch.equal(module.index, index)
        assert (module.values != bits).all()
        assert [name for name, _ in module.named_parameters()] == ["values", "gate"]
        assert module.values.numel() == 4 * M


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-10), (torch.float32, 1e-5)])
@pytest.mark.parametrize("shape", [(0,), (1,), (1, 1), (2, 0), (3, 7), (2, 3, 4)])
@pytest.mark.parametrize("k", [1, 4, 20])
def test_product_and_gradients_equal_the_dense_ones(shape, k, dtype, tolerance):
    torch.manual_seed(0)
    index = strongest(torch.randn(M, N).abs(), k)
    values = torch.randn(M, k, dtype=dtype, requires_grad=True)
    v, weight = torch.randn(*shape, N, dtype=dtype, requires_grad=True), torch.randn(*shape, M, dtype=dtype)
    results = []
    for product in (sparse_product, dense):
        z = product(v, index, values)
        results.append((z, *torch.autograd.grad((z * weight).sum(), (v, values))))
    for found, expected in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, rtol=tolerance, atol=10 * tolerance)


def test_gradient_is_that_of_the_product():
    torch.manual_seed(0)
    index = strongest(torch.randn(5, 4), 2)
    v = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    values = torch.randn(5, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda v, values: sparse_product(v, index, values), (v, values))


class LargestTensor(TorchDispatchMode):
    """Remembers the largest number of elements of anything that a call returns."""

    def __init__(self) -> None:
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(tensor, Tensor):
                self.numel = max(self.numel, tensor.numel())
        return result


def test_neither_a_dense_matrix_nor_all_gathered_inputs_are_made():
    m, n, k, tokens = 512, 256, 8, 6
    index = strongest(torch.randn(m, n), k)
    v, values = torch.randn(tokens, n, requires_grad=True), torch.randn(m, k, requires_grad=True)
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t), LargestTensor() as seen:
        sparse_product(v, index, values).sum().backward()
    assert seen.numel <= max(tokens * m, m * k)
    assert seen.numel < min(m * n, tokens * m * k)
    kept = {tensor.data_ptr() for tensor in saved if tensor.numel() > 1}
    assert kept <= {v.data_ptr(), index.data_ptr(), values.data_ptr()}


def test_two_adapters_add_up():
    torch.manual_seed(0)
    weight, v, x = torch.randn(M, N), torch.randn(2, 5, N), torch.zeros(2, 5, M)
    one, two, both = (module_on(weight) for _ in range(3))
    one.wake(), two.wake()
    with torch.no_grad():
        both.values.copy_(one.gate * one.values + two.gate * two.values)
    context = Context(x_in=v)
    torch.testing.assert_close(one(x, context) + two(x, context), both(x, context))
