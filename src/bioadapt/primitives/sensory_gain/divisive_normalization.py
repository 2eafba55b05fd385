"""Divisive normalization: a unit's drive is divided by what the population does."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from bioadapt.primitives.base import Context, Fused, Host, Primitive, setting
from bioadapt.primitives.frames import positive
from bioadapt.registry import register_primitive


class _PooledRatio(Fused):
    """direct_i x_i + gain_i n_i / (floor_i + sum_j w_j |n_j| + alpha |n_i|), n = sgn(x) |x|^p; keeps x alone."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, direct: Tensor, gain: Tensor, floor: Tensor, weights: Tensor, alpha: float, p: float
    ) -> Tensor:
        ctx.save_for_backward(x, direct, gain, floor, weights)
        ctx.alpha, ctx.p = alpha, p
        drive = _drive(x, p)
        divisor = _divisor(drive, floor, weights, alpha)
        return drive.div_(divisor).mul_(torch.sign(x, out=divisor)).mul_(gain).addcmul_(x, direct)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, direct, gain, floor, weights = ctx.saved_tensors
        alpha, p = ctx.alpha, ctx.p
        sign, rate, axes = x.sign(), x.abs(), tuple(range(x.dim() - 1))
        drive = _drive(x, p)
        divisor = _divisor(drive, floor, weights, alpha)
        ratio = (sign * drive).div_(divisor)
        product = grad * ratio
        on_gain = product.sum(axes)
        on_divisor = product.mul_(gain).div_(divisor)  # with the wrong sign up to here
        on_pool = on_divisor.sum(-1, keepdim=True).neg_()
        on_floor, on_weights = on_divisor.sum(axes).neg_(), on_pool.flatten() @ drive.flatten(0, -2)
        on_drive = on_divisor.mul_(-alpha).addcmul_(on_pool, weights)
        on_signed = torch.mul(grad, gain, out=drive).div_(divisor)
        slope = rate.mul_(2) if p == 2 else rate.pow_(p - 1).mul_(p)
        on_x = on_drive.mul_(sign).add_(on_signed).mul_(slope).addcmul_(grad, direct)
        on_direct = torch.mul(grad, x, out=ratio).sum(axes)
        return on_x, on_direct, on_gain, on_floor, on_weights, None, None


def _drive(x: Tensor, p: float) -> Tensor:
    return x.square() if p == 2 else x.abs().pow_(p)


def _divisor(drive: Tensor, floor: Tensor, weights: Tensor, alpha: float) -> Tensor:
    return (floor + (drive @ weights)[..., None]).add_(drive, alpha=alpha)


def normalized(
    x: Tensor,
    level: Tensor,
    sigma: Tensor,
    weights: Tensor,
    alpha: float,
    p: float,
    scale: Tensor | float = 1.0,
    direct: Tensor | float = 0.0,
) -> Tensor:
    """scale rho R + direct x, with the normalized response rho R to x (..., d), in units of x.

    level rho (1,); semi-saturation sigma (d,) and pool weights (d,), both positive; scale and direct (d,). R is at most
    (1 + sigma^p) / alpha.
    """
    direct = torch.as_tensor(direct, dtype=x.dtype, device=x.device).expand(x.shape[-1])
    return _PooledRatio.apply(x, direct, *_multiplied_out(level, sigma, weights, alpha, p, scale), alpha, p)


def _multiplied_out(
    level: Tensor, sigma: Tensor, weights: Tensor, alpha: float, p: float, scale: Tensor | float
) -> tuple[Tensor, Tensor, Tensor]:
    """Gain, floor and weights of `_PooledRatio`: with rho^p outside the ratio, no copy of x in its frame is needed."""
    floor = sigma.pow(p)
    return scale * level * (1 + floor), level.pow(p) * floor, weights * ((1 - alpha) / len(weights))


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
        level, sigma, weights, alpha, p = self.shape()
        drive = (x / level).abs().pow(p)
        pool = (1 - alpha) * (weights * drive).mean(-1, keepdim=True) + alpha * drive
        response = (1 + sigma.pow(p)) * x.sign() * drive / (sigma.pow(p) + pool)
        return level * response - x

    def scaled(self, x: Tensor, context: Context, scale: Tensor, with_x: bool) -> Tensor:
        constants = context.once(self.constants, scale, with_x)
        return _PooledRatio.apply(x, *constants, self.self_weight, self.exponent)

    def constants(self, scale: Tensor, with_x: bool) -> tuple[Tensor, ...]:
        """The factor of x itself, and gain, floor and weights of the response times ``scale``: (d,) each."""
        return 1 - scale if with_x else -scale, *_multiplied_out(*self.shape(), scale)

    def shape(self) -> tuple[Tensor, Tensor, Tensor, float, float]:
        """Level, semi-saturation, pool weights, self weight and exponent."""
        sigma, weights = nn.functional.softplus(self.sigma), nn.functional.softplus(self.weights)
        return self.log_level.exp(), sigma, weights, self.self_weight, self.exponent
