"""A layer and its change in a single product, where the layer is a product and nothing else."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..primitives.base import OnWeight
from . import patches


def single_product(layer: nn.Module, v: Tensor, primitive: OnWeight) -> Tensor | None:
    """What the layer makes of v with the primitive's change, or None where the two are to be computed apart.

    They are for few tokens, and where somebody would miss the run of either (hooks, patches, compilers), where the
    layer's weight is trained along or is not at hand as it is, and where the primitive says that it is cheaper.
    """
    if type(layer) is not nn.Linear or torch.compiler.is_compiling():
        return None
    if v.numel() < primitive.joins_product_from * v.shape[-1]:
        return None
    if not (patches.left_alone(layer) and patches.left_alone(primitive)) or torch.is_autocast_enabled(v.device.type):
        return None
    weight, bias = layer.weight, layer.bias
    given = (v, weight) if bias is None else (v, weight, bias)
    if any(type(tensor) not in (Tensor, nn.Parameter) or tensor.dtype != weight.dtype for tensor in given):
        return None
    if v.shape[-1:] != weight.shape[1:] or any(tensor.requires_grad for tensor in given[1:]):
        return None
    return primitive.product_with(v, weight, bias)
