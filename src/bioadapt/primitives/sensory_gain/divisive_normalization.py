"""Divisive normalization: a unit's drive is divided by what the population does."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from bioadapt.primitives.base import Context, Host, Primitive, setting
from bioadapt.primitives.frames import positive
from bioadapt.registry import register_primitive


class _PooledRatio(torch.autograd.Function):
    """n_i / (floor_i + sum_j w_j |n_j| + alpha |n_i|) with n = sgn(x) |x|^p, in few passes; keeps x alone."""

    @staticmethod
    def forward(ctx, x: Tensor, floor: Tensor, weights: Tensor, exponent: float, self_weight: float) -> Tensor:
        ctx.save_for_backward(x, floor, weights)
        ctx.constants = exponent, self_weight
        drive = _power(x.abs(), exponent)
        divisor = _divisor(drive, floor, weights, self_weight)
        return torch.copysign(drive, x).div_(divisor)

    @staticmethod
    def backward(ctx, grad: Tensor):
        x, floor, weights = ctx.saved_tensors
        exponent, self_weight = ctx.constants
        rate = x.abs()
        drive = _power(rate, exponent)
        divisor = _divisor(drive, floor, weights, self_weight)
        on_signed = grad / divisor
        on_divisor = torch.copysign(drive, x).div_(divisor).mul_(on_signed).neg_()
        on_pool = on_divisor.sum(-1, keepdim=True)
        axes = tuple(range(x.dim() - 1))
        grad_floor, grad_weights = on_divisor.sum(axes), (on_pool * drive).sum(axes)
        on_drive = on_divisor.mul_(self_weight).addcmul_(on_pool, weights)
        slope = exponent * (rate if exponent == 2 else rate.pow(exponent - 1))
        return on_drive.mul_(x.sign()).add_(on_signed).mul_(slope), grad_floor, grad_weights, None, None


def _power(rate: Tensor, exponent: float) -> Tensor:
    return rate.square() if exponent == 2 else rate.pow(exponent)


def _divisor(drive: Tensor, floor: Tensor, weights: Tensor, self_weight: float) -> Tensor:
    return (floor + (drive @ weights)[..., None]).add_(drive, alpha=self_weight)


def normalized(c: Tensor, sigma: Tensor, weights: Tensor, exponent: float, self_weight: float) -> Tensor:
    """The normalized response R to the contrast c.

    c (..., d); semi-saturation sigma (d,) and pool weights (d,), both positive. Returns (..., d), bounded by
    (1 + sigma^p) / self_weight.
    """
    floor = sigma.pow(exponent)
    weights = weights * ((1 - self_weight) / c.shape[-1])
    return (1 + floor) * _PooledRatio.apply(c, floor, weights, exponent, self_weight)


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
        return level * normalized(x / level, sigma, weights, self.exponent, self.self_weight) - x
