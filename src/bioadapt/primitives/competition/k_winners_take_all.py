"""k winners take all: the strongest units fire, the others are silenced."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from bioadapt.primitives.base import Context, Fused, Host, Primitive, setting
from bioadapt.primitives.exporting import is_exporting
from bioadapt.registry import register_primitive


class _Silencing(Fused):
    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, k: int, with_x: bool) -> Tensor:
        winners = _winners(x, k)
        ctx.save_for_backward(x, scale, winners)
        ctx.with_x = with_x
        lost = _without(x.neg(), winners)
        return torch.addcmul(x, lost, scale, out=lost) if with_x else lost.mul_(scale)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, None]:
        x, scale, winners = ctx.saved_tensors
        on_losers = _without(grad.neg(), winners)
        on_scale = (on_losers * x).sum(tuple(range(x.dim() - 1)))
        on_x = torch.addcmul(grad, on_losers, scale, out=on_losers) if ctx.with_x else on_losers.mul_(scale)
        return on_x, on_scale, None, None


def _winners(x: Tensor, k: int) -> Tensor:
    """Which k entries of each row have the largest magnitudes: (..., d) -> (..., k)."""
    sizes = x.abs()
    # Read as integers, magnitudes keep their order, and no comparison has to look for NaN.
    if not is_exporting():
        sizes = sizes.view(torch.int64 if x.dtype == torch.float64 else torch.int32)
    return sizes.topk(k, dim=-1, sorted=False).indices


def _without(x: Tensor, places: Tensor) -> Tensor:
    """x, which is overwritten, with zeros at the places of each row."""
    # Writing at indices, not comparing with a threshold, so that ties cannot change k. A zero that is spread out is
    # written faster than a number.
    return x.scatter_(-1, places, x.new_zeros(()).expand(places.shape))


def silencing(x: Tensor, k: int, scale: Tensor, with_x: bool = False) -> Tensor:
    """-scale x with zeros at the k entries of largest magnitude, plus x if ``with_x``.

    x (..., d) in fp32 or fp64, scale (d,) -> (..., d).
    """
    return _Silencing.apply(x, scale, k, with_x)


@register_primitive("k_winners_take_all", stage="competition", kind="pointwise", zero_at="gate")
class KWinnersTakeAll(Primitive):
    """Only the k strongest units of a token pass, unchanged; all others are silenced.

    Biology: inhibition that is fast and shared by a whole population leaves time for only the most strongly driven
    cells to fire before it arrives.

    Equation: delta = (mask_k(|x|) - 1) x, where mask_k is 1 at the k = ceil(fraction d) largest magnitudes.

    Reference: Maass 2000, On the computational power of winner-take-all, Neural Comput; Makhzani and Frey 2015,
    Winner-take-all autoencoders, NeurIPS.

    Shapes: x (B, T, d) -> (B, T, d). Homogeneous of degree one.
    """

    fraction: float = setting(0.25, low=0.05, high=0.9, meaning="share of the units that win")

    def build(self, host: Host) -> None:
        # How many units pass. In `transform` a compiler would take the number for one that varies.
        self.winners = math.ceil(self.fraction * self.d_out - 1e-9)  # 0.07 * 100 is 7.000000000000001

    def transform(self, x: Tensor, context: Context) -> Tensor:
        winners = x.abs().topk(self.winners, dim=-1).indices
        return (torch.zeros_like(x).scatter(-1, winners, 1.0) - 1) * x

    def scaled(self, x: Tensor, context: Context, scale: Tensor, with_x: bool) -> Tensor:
        return silencing(x, self.winners, scale, with_x)
