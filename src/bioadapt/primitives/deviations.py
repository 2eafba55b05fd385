"""How far a wide series is from its own trace, by matrix products as long as it is short."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .base import Context, Fused
from .time import is_short, past_trace, powers


class _Deviation(Fused):
    """Products with a kernel that is I minus the past trace; keeps the result, from which the decay's gradient follows.

    With u the trace of the gradient with time reversed and e the result, that is sum(u e) / (1 - decay).
    """

    @staticmethod
    def forward(ctx: Any, columns: Tensor, decay: Tensor, kernel: Tensor) -> Tensor:
        error = kernel @ columns  # (G, T, T) @ (G, T, n)
        ctx.save_for_backward(error, decay, kernel)
        return error

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        error, decay, kernel = ctx.saved_tensors
        on_columns = kernel.mT @ grad
        return on_columns, (grad - on_columns).mul_(error).sum((1, 2)) / (1 - decay), None


def deviations(z: Tensor, decay: Tensor, bidirectional: bool = False) -> list[Tensor]:
    """z_t - E_tau(z)_{t-1} of a wide series, by matrix products as long as it is short.

    Args:
        z: (B, T, G, c). The trace starts from zero and hears every token: padding must be zero and at the end, as
            `front_aligned` leaves it.
        decay: one constant per group, (G,), strictly between 0 and 1.
        bidirectional: give also what reading time backwards gives.

    Returns:
        One reading of time, or two, both (B, T, G, c) and in the order of z.
    """
    if not is_short(z.shape[1]):

        def by_scan(series: Tensor) -> Tensor:
            return series - past_trace("", series, decay[:, None], Context())

        return [by_scan(z), by_scan(z.flip(1)).flip(1)] if bidirectional else [by_scan(z)]
    with torch.no_grad():
        kernel = _deviation_kernel(decay, z.shape[1])
    kernels = [kernel, kernel.mT] if bidirectional else [kernel]  # it depends on differences of time alone
    columns = z.permute(2, 1, 0, 3).flatten(2)  # (G, T, B c)
    errors = [_Deviation.apply(columns, decay, each) for each in kernels]
    return [error.unflatten(2, (z.shape[0], -1)).permute(2, 1, 0, 3) for error in errors]


def _deviation_kernel(decay: Tensor, steps: int) -> Tensor:
    """1 at (t, t), -(1 - a) a^(t - 1 - s) at (t, s < t), else 0: (G,) -> (G, T, T)."""
    kernel = powers(decay, steps, lag=1).mul_((decay - 1)[:, None, None])
    kernel.diagonal(dim1=1, dim2=2).fill_(1.0)
    return kernel
