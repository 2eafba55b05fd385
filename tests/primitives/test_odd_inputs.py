"""No tokens, and default dtypes other than fp32: what an idle expert, or a model in half precision, asks for."""

from __future__ import annotations

import pytest
import torch

from bioadapt import build_primitive, list_primitives
from bioadapt.primitives.base import Context
from bioadapt.testing.primitive.subject import commit

ALL = list_primitives()


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("shape", [(0, 1, 8), (2, 0, 8), (0, 8)], ids=str)
def test_no_token_is_changed_by_nothing_and_teaches_nothing(name, shape):
    primitive = build_primitive(name, 8, 8).train()
    primitive.wake()
    before = {key: tensor.clone() for key, tensor in primitive.state_dict().items()}
    x = torch.zeros(shape, requires_grad=True)
    for bidirectional in (False, True):
        delta = primitive(x, Context(bidirectional=bidirectional))
        assert delta.shape == x.shape and primitive(x, with_x=True).shape == x.shape
        delta.sum().backward()
    assert all(p.grad is not None and not p.grad.any() for p in primitive.parameters() if p.requires_grad)
    commit(primitive)
    assert all(torch.equal(tensor, before[key]) for key, tensor in primitive.state_dict().items())


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_a_primitive_is_in_fp32_whatever_the_default_dtype_is(name, dtype):
    x = torch.randn(2, 5, 8)

    def build():
        torch.manual_seed(0)
        primitive = build_primitive(name, 8, 8)
        primitive.wake()
        return primitive

    plain = build()
    torch.set_default_dtype(dtype)
    try:
        primitive = build()
        delta = primitive.eval()(x)
    finally:
        torch.set_default_dtype(torch.float32)
    tensors = [*primitive.parameters(), *primitive.buffers()]
    assert {tensor.dtype for tensor in tensors if tensor.is_floating_point()} <= {torch.float32}
    assert delta.dtype == x.dtype
    torch.testing.assert_close(delta, plain.eval()(x))
