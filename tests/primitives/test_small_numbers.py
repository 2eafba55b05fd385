"""What exporters to ONNX leave out: adding a number so small that it could be rounding."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from bioadapt import build_primitive, list_primitives
from bioadapt.primitives.base import Context, Host

LEFT_OUT = 1e-8  # onnxscript's optimiser takes this and everything below it for zero


class SmallAdditions(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket.__name__ in ("add", "add_", "sub", "sub_"):
            self.found += [number for number in args if isinstance(number, float) and 0 < abs(number) <= LEFT_OUT]
        return func(*args, **(kwargs or {}))


@torch.no_grad()
@pytest.mark.parametrize("name", list_primitives())
def test_no_mechanism_adds_what_would_be_left_out(name):
    torch.manual_seed(0)
    primitive = build_primitive(name, 16, 16, host=Host(torch.randn(16, 16))).eval()
    primitive.wake()
    x = torch.randn(2, 9, 16)
    with SmallAdditions() as additions:
        primitive(x, Context(x, bias=torch.zeros(16), bidirectional=True), with_x=True)
        primitive.transform(x, Context(x, bias=torch.zeros(16)))
    assert not additions.found
