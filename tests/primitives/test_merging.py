"""What merges is the same function of the layer's input before and after."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import linear

from bioadapt import build_primitive, list_primitives, primitive_info
from bioadapt.primitives.base import Context, Host

N, D = 29, 37


def of(merge: str) -> list[str]:
    return [name for name in list_primitives() if primitive_info(name).merge == merge]


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("has_bias", [True, False])
class TestMerging:
    @pytest.fixture
    def layer(self, seed, has_bias):
        """A layer's weight at birth, what an earlier merge has made of it, and a bias."""
        torch.manual_seed(seed)
        born = torch.randn(D, N) / N**0.5
        return born, born + 0.3 * torch.randn(D, N) / N**0.5, torch.randn(D) if has_bias else None

    @torch.no_grad()
    @pytest.mark.parametrize("name", of("weight"))
    def test_weight(self, name, layer):
        born, weight, bias = layer
        module = build_primitive(name, N, D, host=Host(born)).eval()
        module.wake()
        v = torch.randn(2, 5, N)
        y = linear(v, weight, bias)
        dw, db = module.merged_change(weight, bias, (weight, bias))
        merged = linear(v, weight + dw, bias if bias is None or db is None else bias + db)
        assert (merged - y).abs().max() > 1e-2
        torch.testing.assert_close(y + module(y, Context(x_in=v, bias=bias)), merged, rtol=0, atol=1e-4)

    @torch.no_grad()
    @pytest.mark.parametrize("name", of("left"))
    def test_left(self, name, layer):
        _, weight, bias = layer
        module = build_primitive(name, N, D).eval()
        module.wake()
        matrix, v = module.left_matrix(), torch.randn(2, 5, N)
        map_ = torch.eye(D) + module.gate[:, None] * (matrix.diag() if matrix.dim() == 1 else matrix)
        dw, db = module.merged_change(weight, bias, (weight, bias))
        torch.testing.assert_close(weight + dw, map_ @ weight, rtol=0, atol=1e-4)
        if bias is not None:
            torch.testing.assert_close(bias + db, map_ @ bias, rtol=0, atol=1e-4)
        y = linear(v, weight, bias)
        assert module(y).abs().max() > 1e-2
        torch.testing.assert_close(y + module(y), y @ map_.T, rtol=0, atol=1e-4)


def test_something_merges_either_way():
    assert {"neuro_ada", "hebbian_trace", "heterosynaptic_scaling"} <= set(of("weight"))
    assert "homeostatic_scaling" in of("left")
