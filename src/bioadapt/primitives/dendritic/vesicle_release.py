"""Vesicle release: a synapse transmits in quanta, and more reliably when it is driven."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from bioadapt.primitives.base import Context, Fused, Host, Scaled, setting
from bioadapt.primitives.frames import positive, token_scale, unit
from bioadapt.registry import register_primitive


class _Transmission(Fused):
    """Keeps x and the share that was released; backward computes its probability again."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, frame: Tensor, rest: Tensor, drive: Tensor, scale: Tensor, sites: int) -> Tensor:
        _, p = _probability(x, frame, rest, drive)
        share = released_share(p, sites) if sites else p
        ctx.save_for_backward(x, frame, rest, drive, scale, share)
        return (x * share).mul_(scale)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, frame, rest, drive, scale, share = ctx.saved_tensors
        rate, p = _probability(x, frame, rest, drive)
        axes = tuple(range(x.dim() - 1))
        on_share = grad * x
        on_scale = (on_share * share).sum(axes)
        on_argument = on_share.mul_(scale).mul_(p).mul_(p.neg_().add_(1))  # straight through the drawing of lots
        on_rate = rate.mul_(on_argument)
        on_rest, on_drive, on_frame = on_argument.sum(axes), on_rate.sum(axes), (on_rate @ -drive)[..., None] / frame
        on_x = on_argument.mul_(drive).div_(frame).mul_(x.sign()).addcmul_(grad * share, scale)
        return on_x, on_frame, on_rest, on_drive, on_scale, None


def _probability(x: Tensor, frame: Tensor, rest: Tensor, drive: Tensor) -> tuple[Tensor, Tensor]:
    rate = x.abs().div_(frame)
    return rate, (rate * drive).add_(rest).sigmoid_()


def released_share(p: Tensor, sites: int) -> Tensor:
    """n / sites with n ~ Binomial(sites, p), elementwise.

    One uniform number per element is compared with the cumulative distribution: drawing every site on its own costs
    ``sites`` times as many random numbers, which dominate on a CPU.
    """
    # Counting the rarer outcome, release or failure, keeps its first probability from underflowing.
    common = torch.maximum(p, 1 - p)
    left, mass, odds = torch.rand_like(p), _power(common, sites), common.reciprocal().sub_(1)
    count = torch.zeros_like(p)
    for n in range(sites):
        # Rounding up tells what is left of the uniform number from nothing; booleans cost a CPU several times as much.
        count.add_(left.sub_(mass, alpha=math.comb(sites, n)).ceil())
        mass.mul_(odds)
    return count.clamp_(min=0).sub_(p.round(), alpha=sites).abs_().div_(sites)


def _power(base: Tensor, exponent: int) -> Tensor:
    """A new tensor of base^exponent by repeated squaring."""
    if exponent == 1:
        return base.clone()
    half = _power(base, exponent // 2).square_()
    return half.mul_(base) if exponent % 2 else half


def transmitted(x: Tensor, frame: Tensor, rest: Tensor, drive: Tensor, scale: Tensor, sites: int) -> Tensor:
    """scale x n / sites with n ~ Binomial(sites, p), p = sigmoid(rest + drive |x| / frame); scale x p without sites.

    x (..., d); frame (..., 1); rest, drive and scale (d,). The gradient passes straight through to p.
    """
    return _Transmission.apply(x, frame, rest, drive, scale, sites)


@register_primitive("vesicle_release", stage="dendritic", kind="pointwise", zero_at="gate", stochastic=True)
class VesicleRelease(Scaled):
    """Transmission is the outcome of a few unreliable release sites, whose mean is used at evaluation.

    Biology: a synapse releases an integer number of vesicles from its sites; each site fails often at rest and rarely
    when the cell is strongly driven.

    Equation: p = sigmoid(a + b |u|); in training delta = x n / N with n ~ Binomial(N, p), in evaluation delta = x p.

    Reference: del Castillo and Katz 1954, Quantal components of the end-plate potential, J Physiol; Branco and Staras
    2009, The probability of neurotransmitter release: variability and feedback control at single synapses, Nat Rev
    Neurosci.

    Shapes: x (B, T, d) -> (B, T, d), elementwise.
    """

    sites: int = setting(4, low=1, high=64, meaning="number N of release sites")

    def build(self, host: Host) -> None:
        self.rest = nn.Parameter(torch.full((self.d_out,), -0.5))
        self.drive = positive(1.0, self.d_out)

    def transform(self, x: Tensor, context: Context) -> Tensor:
        p = torch.sigmoid(self.rest + nn.functional.softplus(self.drive) * unit(x).abs())
        if not self.training:
            return x * p
        return x * (p + (released_share(p.detach(), self.sites) - p).detach())  # the gradient passes straight through

    def scaled_change(self, x: Tensor, context: Context, scale: Tensor) -> Tensor:
        drive, frame = context.once(nn.functional.softplus, self.drive), token_scale(x)
        return transmitted(x, frame, self.rest, drive, scale, self.sites if self.training else 0)
