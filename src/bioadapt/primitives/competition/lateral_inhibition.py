"""Lateral inhibition: each unit subtracts what its neighbours do."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from bioadapt.primitives.base import Context, Fused, Host, Primitive, setting
from bioadapt.primitives.frames import inverse_softplus
from bioadapt.registry import register_primitive


class _Suppression(Fused):
    """Keeps x and what is small; backward computes the inhibition again."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, pools: Tensor, sources: Tensor, own: Tensor, scale: Tensor, with_x: bool
    ) -> Tensor:
        ctx.save_for_backward(x, pools, sources, own, scale)
        ctx.with_x = with_x
        rate = x.abs()
        lost = _inhibition(rate, rate @ sources.mT, pools, own)
        torch.minimum(rate, lost, out=lost)
        lost.mul_(torch.sign(x, out=rate))  # to allocate a tensor this wide costs more than to fill it
        return torch.addcmul(x, lost, scale, value=-1, out=lost) if with_x else lost.mul_(-scale)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, None]:
        x, pools, sources, own, scale = ctx.saved_tensors
        axes, sign, rate = tuple(range(x.dim() - 1)), x.sign(), x.abs()
        pooled = rate @ sources.mT
        inhibition = _inhibition(rate, pooled, pools, own)
        on_lost = (grad * sign).neg_()
        on_scale = rate.minimum(inhibition).mul_(on_lost).sum(axes)
        on_rate = on_lost.mul_(scale)
        on_inhibition = inhibition.lt_(rate).mul_(on_rate)  # a unit that still fires loses it, others their rate
        flat = on_inhibition.flatten(0, -2)
        on_pools, on_pooled = flat.mT @ pooled.flatten(0, -2), on_inhibition @ pools
        on_sources = on_pooled.flatten(0, -2).mT @ rate.flatten(0, -2)
        on_own = rate.mul_(on_inhibition).sum(axes).neg_()
        on_rate = on_rate.sub_(on_inhibition).addcmul_(on_inhibition, own, value=-1).add_(on_pooled @ sources)
        on_x = torch.addcmul(grad, on_rate, sign, out=on_rate) if ctx.with_x else on_rate.mul_(sign)
        return on_x, on_pools, on_sources, on_own, on_scale, None


def _inhibition(rate: Tensor, pooled: Tensor, pools: Tensor, own: Tensor) -> Tensor:
    return (pooled @ pools.mT).addcmul_(rate, own, value=-1)


def suppression(x: Tensor, pools: Tensor, sources: Tensor, own: Tensor, scale: Tensor, with_x: bool = False) -> Tensor:
    """``scale`` times what inhibition takes from x: scale_i (sgn(x_i) [|x_i| - inhibition_i]_+ - x_i).

    Plus x if ``with_x``. The inhibition P Q |x| of a unit is free of that unit itself. x (..., d); pools P (d, r),
    sources Q (r, d), both non-negative; own = diag(P Q) and scale (d,). Returns (..., d).
    """
    # [r - h]_+ - r = -min(r, h) leaves no difference of wide tensors to compute.
    return _Suppression.apply(x, pools, sources, own, scale, with_x)


@register_primitive("lateral_inhibition", stage="competition", kind="pointwise", zero_at="gate", zero_scale=16.0)
class LateralInhibition(Primitive):
    """Each unit is reduced by a weighted sum of its neighbours' activity, down to silence.

    Biology: in the eye of Limulus, and in every sensory sheet since, neighbouring receptors inhibit each other, which
    sharpens contrast.

    Equation: f = sgn(x) [|x| - (PQ|x| - diag(PQ)|x|)]_+, delta = f - x, with P (d, r) and Q (r, d) non-negative.

    Reference: Hartline and Ratliff 1957, Inhibitory interaction of receptor units in the eye of Limulus, J Gen Physiol.

    Shapes: x (B, T, d) -> (B, T, d). Homogeneous of degree one, so no frame is needed.
    """

    rank: int = setting(4, low=1, high=64, meaning="number of inhibitory pools r")

    def build(self, host: Host) -> None:
        d, r = self.d_out, self.rank
        noise = 0.1 * torch.randn(d, r)
        self.pools = nn.Parameter(inverse_softplus(0.3 / r) + noise)
        self.sources = nn.Parameter(inverse_softplus(1.0) + 0.1 * torch.randn(r, d))

    def transform(self, x: Tensor, context: Context) -> Tensor:
        pools, sources, own = self.connections()
        rate = x.abs()
        inhibition = rate @ sources.T @ pools.T - own * rate
        return x.sign() * torch.relu(rate - inhibition) - x

    def scaled(self, x: Tensor, context: Context, scale: Tensor, with_x: bool) -> Tensor:
        return suppression(x, *context.once(self.connections), scale, with_x)

    def connections(self) -> tuple[Tensor, Tensor, Tensor]:
        """The non-negative pools P (d, r) and sources Q (r, d), and diag(P Q) (d,)."""
        pools, sources = nn.functional.softplus(self.pools), nn.functional.softplus(self.sources) / self.d_out
        return pools, sources, (pools * sources.mT).sum(-1)
