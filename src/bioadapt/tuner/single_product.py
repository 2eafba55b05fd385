"""A layer and its change in a single product, where the layer is a product and nothing else."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook  # a watcher of all modules has to see the layer run

from ..primitives.base import OnWeight
from .circuit import AdapterCircuit

_LINEAR = nn.Linear.forward


def single_product(layer: nn.Module, v: Tensor, circuits: Iterable[AdapterCircuit]) -> Tensor | None:
    """What the layer makes of v with the change of its only circuit, or None where the two are computed apart.

    They are wherever somebody would miss the layer's own run (hooks, patches, compilers), where its weight is trained
    along or is not at hand as it is, and where the circuit does not offer it.
    """
    (circuit,) = circuits
    primitive = next(circuit.values())
    if not isinstance(primitive, OnWeight) or not _is_a_product(layer) or torch.is_autocast_enabled(v.device.type):
        return None
    weight, bias = layer.weight, layer.bias
    given = (v, weight) if bias is None else (v, weight, bias)
    if any(type(tensor) not in (Tensor, nn.Parameter) or tensor.dtype != weight.dtype for tensor in given):
        return None
    if v.shape[-1:] != weight.shape[1:] or any(tensor.requires_grad for tensor in given[1:]):
        return None
    return primitive.product_with(v, weight, bias)


def _is_a_product(layer: nn.Module) -> bool:
    """Whether the layer is a plain linear one whose run nobody watches or replaces."""
    if type(layer) is not nn.Linear or nn.Linear.forward is not _LINEAR or "forward" in vars(layer):
        return False
    if torch.compiler.is_compiling():
        return False
    hooks = (layer._forward_hooks, layer._forward_pre_hooks, layer._backward_hooks, layer._backward_pre_hooks)
    return not any(hooks) and not _has_any_global_hook()
