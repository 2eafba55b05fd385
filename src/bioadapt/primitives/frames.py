"""Frames of reference and small numeric helpers that the equations share."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .base import Context, Fused, Host

_FLOORS = {dtype: torch.tensor(1e-6, dtype=dtype, device="cpu") for dtype in (torch.float32, torch.float64)}


def check_indices(tensors: Mapping[str, Tensor], **ends: int) -> None:
    """Refuse indices of a checkpoint that point at nothing.

    Args:
        tensors: of the checkpoint, by their names in the primitive.
        ends: for each name of indices, the number of places there are.

    Raises:
        ValueError: naming the tensor and the index.
    """
    for name, end in ends.items():
        given = tensors.get(name)
        if given is None or given.is_meta or not given.numel():
            continue
        for value in (int(given.min()), int(given.max())):
            if not 0 <= value < end:
                raise ValueError(f"{name} of the checkpoint holds the index {value}; accepted is from 0 to {end - 1}")


class _MeanSquare(Fused):
    """One pass forward and one backward; what autograd records for the same formula takes five."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return torch.linalg.vector_norm(x, dim=-1, keepdim=True).square() / x.shape[-1]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return x * (grad * (2 / x.shape[-1]))


def mean_square(x: Tensor) -> Tensor:
    """Mean of x^2 over the last axis: (..., d) -> (..., 1)."""
    return _MeanSquare.apply(x)


class _TokenScale(Fused):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        scale = measured_scale(x)
        ctx.save_for_backward(x, scale)
        return scale

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        x, scale = ctx.saved_tensors
        return x * grad.div(scale).div_(x.shape[-1])


def measured_scale(x: Tensor) -> Tensor:
    """`token_scale` where nothing is recorded."""
    size = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    return torch.addcmul(_floor_for(size), size, size, value=1 / x.shape[-1]).sqrt_()


def _floor_for(size: Tensor) -> Tensor:
    """1e-6 beside a tensor, (): the floor of a mean square, so that a token of zeros has a scale.

    To make one costs a decoding step as much as any other operation. A graph makes its own, and from a literal: torch
    would make a number with a name an input of the graph, which the autograd functions inside it cannot share with it.
    """
    if not torch.compiler.is_compiling() and type(size) is Tensor and size.is_cpu and size.dtype in _FLOORS:
        return _FLOORS[size.dtype]
    return size.new_full((), 1e-6)


def token_scale(x: Tensor) -> Tensor:
    """s = sqrt(mean_d x^2 + 1e-6): (..., d) -> (..., 1)."""
    return _TokenScale.apply(x)


def unit(x: Tensor) -> Tensor:
    """u = x / s, the scale-free frame: (..., d) -> (..., d) of unit root mean square."""
    return x / token_scale(x)


def inverse_softplus(value: float) -> float:
    """The raw number whose softplus is ``value``: positive quantities are stored unconstrained."""
    return value + math.log(-math.expm1(-value))


def positive(value: float, *shape: int) -> nn.Parameter:
    """A trainable tensor that softplus maps to ``value`` everywhere."""
    return nn.Parameter(torch.full(shape, inverse_softplus(value)))


def read_in(rows: int, features: int) -> nn.Parameter:
    """Trainable (rows, features) with entries N(0, 1/features): a latent of a unit-scale input has unit variance."""
    return nn.Parameter(torch.randn(rows, features) / features**0.5)


def read_out(features: int, rows: int) -> nn.Parameter:
    """Trainable (features, rows) of zeros: the one zero on the path of a latent primitive."""
    return nn.Parameter(torch.zeros(features, rows))


def group_index(features: int, groups: int) -> Tensor:
    """Group of each channel, (features,): contiguous groups i * groups // features, so heads stay together."""
    return torch.arange(features) * groups // features


def group_matrix(features: int, groups: int) -> Tensor:
    """Frozen 0/1 membership (features, groups). A product with it replaces gathers with repeated indices."""
    return nn.functional.one_hot(group_index(features, groups), groups).float()


def products_pay(features: int, groups: int) -> bool:
    """Whether a trace costs less as products with one matrix per group: if each matrix serves several channels."""
    return features % groups == 0 and features // groups >= 8


class _GroupMeanMagnitude(Fused):
    @staticmethod
    def forward(ctx: Any, x: Tensor, pooling: Tensor) -> Tensor:
        ctx.save_for_backward(x, pooling)
        return x.abs() @ pooling

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        x, pooling = ctx.saved_tensors
        return (grad @ pooling.mT).mul_(x.sign()), None


def group_mean_magnitude(x: Tensor, pooling: Tensor) -> Tensor:
    """Mean of |x| over the channels of each group: x (..., d), pooling (d, groups) frozen -> (..., groups)."""
    return _GroupMeanMagnitude.apply(x, pooling)


class _GroupMeanSquare(Fused):
    @staticmethod
    def forward(ctx: Any, x: Tensor, pooling: Tensor) -> Tensor:
        ctx.save_for_backward(x, pooling)
        return x.square() @ pooling

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        x, pooling = ctx.saved_tensors
        return (grad @ (2 * pooling).mT).mul_(x), None


def group_mean_square(x: Tensor, pooling: Tensor) -> Tensor:
    """Mean of x^2 over the channels of each group: x (..., d), pooling (d, groups) frozen -> (..., groups)."""
    return _GroupMeanSquare.apply(x, pooling)


def pooling_matrix(features: int, groups: int) -> Tensor:
    """Frozen (features, groups): a product with it is the mean over each group."""
    membership = group_matrix(features, groups)
    return membership / membership.sum(0)


def masked_mean(values: Tensor, mask: Tensor | None) -> Tensor:
    """Mean over batch and real tokens: (B, T, ...) -> (...)."""
    if mask is None:
        return values.mean((0, 1))
    real = mask.reshape(*mask.shape, *(1,) * (values.dim() - 2))
    return torch.where(real, values, 0.0).sum((0, 1)) / mask.sum().clamp(min=1)


def token_count(x: Tensor, mask: Tensor | None) -> Tensor:
    """How many real tokens there are, as a number on the device of x (B, T, ...)."""
    return x.new_full((), x.shape[0] * x.shape[1]) if mask is None else mask.sum()


def report_loss(context: Context, weight: float, penalty: Tensor) -> None:
    """Put ``weight`` times the mean of a penalty (B, T, ...) over real tokens among the losses, where asked for."""
    if weight and context.losses is not None:
        context.losses.append(weight * masked_mean(penalty, context.mask).mean())


def base_weight(host: Host, d_out: int, d_in: int) -> Tensor:
    """The layer's weight (d_out, d_in), or where there is none a frozen Gaussian one that keeps unit variance.

    Raises:
        ValueError: the weight has no values yet, and the primitive begins from them.
    """
    if host.weight is None:
        return host.normal("weight", d_out, d_in) / d_in**0.5
    # Where modules are born without values as well (PEFT's low_cpu_mem_usage), theirs are loaded afterwards.
    if host.weight.is_meta and not nn.Linear(1, 1).weight.is_meta:
        raise ValueError(
            f"the layer's weight ({d_out}, {d_in}) is on the meta device and has no values, from which the adapter "
            "would begin: load the weights of the base model first"
        )
    return host.weight
