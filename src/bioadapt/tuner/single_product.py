"""A layer and its change in a single product, where the layer is a product and nothing else."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from ..primitives.base import OnWeight
from . import patches
from .circuit import AdapterCircuit


def single_product(layer: nn.Module, v: Tensor, circuits: Iterable[AdapterCircuit]) -> Tensor | None:
    """What the layer makes of v with the change of its only circuit, or None where the two are computed apart.

    They are wherever somebody would miss the layer's own run (hooks, patches, compilers), where its weight is trained
    along or is not at hand as it is, and where the circuit does not offer it.
    """
    (circuit,) = circuits
    primitive = next(circuit.values())
    if not isinstance(primitive, OnWeight) or type(layer) is not nn.Linear or torch.compiler.is_compiling():
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
