"""Divisive normalization: a unit's drive is divided by what the population does."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from bioadapt.primitives.base import Context, Host, Primitive, setting
from bioadapt.primitives.frames import positive
from bioadapt.registry import register_primitive


class _PooledRatio(torch.autograd.Function):
    """gain_i n_i / (floor_i + sum_j w_j |n_j| + alpha |n_i|) with n = sgn(x) |x|^p, in few passes; keeps x alone."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, gain: Tensor, floor: Tensor, weights: Tensor, alpha: float, p: float) -> Tensor:
        ctx.save_for_backward(x, gain, floor, weights)
        ctx.alpha, ctx.p = alpha, p
        drive = _power(x.abs(), p)
        divisor = _divisor(drive, floor, weights, alpha)
        return torch.copysign(drive, x).div_(divisor).mul_(gain)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, gain, floor, weights = ctx.saved_tensors
        alpha, p = ctx.alpha, ctx.p
        rate, axes = x.abs(), tuple(range(x.dim() - 1))
        drive = _power(rate, p)
        divisor = _divisor(drive, floor, weights, alpha)
        ratio = torch.copysign(drive, x).div_(divisor)
        on_signed = (grad * gain).div_(divisor)
        grad_gain = (grad * ratio).sum(axes)
        on_divisor = ratio.mul_(on_signed).neg_()
        on_pool = on_divisor.sum(-1, keepdim=True)
        grad_floor, grad_weights = on_divisor.sum(axes), on_pool.flatten() @ drive.flatten(0, -2)
        on_drive = on_divisor.mul_(alpha).addcmul_(on_pool, weights)
        slope = rate.mul_(2) if p == 2 else rate.pow_(p - 1).mul_(p)
        grad_x = on_drive.mul_(x.sign()).add_(on_signed).mul_(slope)
        return grad_x, grad_gain, grad_floor, grad_weights, None, None


def _power(rate: Tensor, p: float) -> Tensor:
    return rate.square() if p == 2 else rate.pow(p)


def _divisor(drive: Tensor, floor: Tensor, weights: Tensor, alpha: float) -> Tensor:
    return (floor + (drive @ weights)[..., None]).add_(drive, alpha=alpha)


def normalized(x: Tensor, level: Tensor, sigma: Tensor, weights: Tensor, alpha: float, p: float) -> Tensor:
    """rho R: the normalized response to x (..., d), in units of x.

    level rho (1,); semi-saturation sigma (d,) and pool weights (d,), both positive. R is at most (1 + sigma^p) / alpha.
    """
    floor = sigma.pow(p)
    # With rho^p multiplied out of the ratio, no copy of x in the contrast frame is needed.
    return _PooledRatio.apply(
        x, level * (1 + floor), level.pow(p) * floor, weights * ((1 - alpha) / x.shape[-1]), alpha, p
    )


@register_primitive("divisive_normalization", stage="sensory_gain", kind="pointwise", zero_at="gate")
class DivisiveNormalization(Primitive):
    """Each unit is divided by the pooled activity of the population: expansive when faint, saturating when strong.

    Biology: from the retina to the parietal cortex, a neuron's response is its own drive relative to that of its
    neighbours, so that it codes contrast within the scene and not the level of the light.

    Equation: R_i = (1 + sigma_i^p) sgn(c_i) |c_i|^p / (sigma_i^p + (1 - alpha) mean_j w_j |c_j|^p + alpha |c_i|^p) with
    c = x / rho; delta = rho (R - c). The self term alpha keeps one outlying channel from exploding.

    Reference: Carandini and Heeger 2012, Normalization as a canonical neural computation, Nat Rev Neurosci; Heeger
    1992, Normalization of cell responses in cat striate cortex, Vis Neurosci.

    Shapes: x (B, T, d) -> (B, T, d); the pool is one number per token.
    """

    exponent: float = setting(2.0, low=1.0, high=3.0, meaning="power p of the drive")
    self_weight: float = setting(0.25, low=0.1, high=1.0, meaning="share alpha of a unit's own drive in its pool")

    def build(self, host: Host) -> None:
        self.sigma = positive(1.0, self.d_out)
        self.weights = positive(1.0, self.d_out)
        self.log_level = nn.Parameter(torch.tensor([host.level]).log())

    def transform(self, x: Tensor, context: Context) -> Tensor:
        level = self.log_level.exp()
        sigma, weights = nn.functional.softplus(self.sigma), nn.functional.softplus(self.weights)
        return normalized(x, level, sigma, weights, self.self_weight, self.exponent) - x
