"""Shunting inhibition: a conductance that is silent alone and divides what else arrives."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from bioadapt.primitives.base import Context, Fused, Host, Primitive, setting
from bioadapt.primitives.frames import positive, read_in, token_scale
from bioadapt.registry import register_primitive


class _Shunt(Fused):
    """Keeps x and the divisor, from which backward gets the conductance and its slope."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, latent: Tensor, spread: Tensor, rest: Tensor, level: Tensor, gain: Tensor, direct: Tensor
    ) -> Tensor:
        drive = torch.addmm(rest, latent.flatten(0, -2), spread.mT).view(x.shape)
        divisor = _softplus(drive).addcmul_(x.abs(), level.reciprocal()).add_(1)
        ctx.save_for_backward(x, latent, spread, level, gain, direct, divisor)
        return (x / divisor).mul_(gain).addcmul_(x, direct)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:
        x, latent, spread, level, gain, direct, divisor = ctx.saved_tensors
        axes, rate, inverse = tuple(range(x.dim() - 1)), x.abs(), level.reciprocal()
        on_ratio = grad / divisor
        product = on_ratio * x
        on_gain = product.sum(axes)
        on_divisor = product.mul_(gain).div_(divisor)  # with the wrong sign
        on_level = torch.linalg.vecdot(on_divisor, rate).sum() * inverse.square()
        slope = torch.addcmul(divisor, rate, inverse, value=-1).neg_().add_(1).exp_()  # exp(-conductance)
        on_drive = slope.sub_(1).mul_(on_divisor)
        flat = on_drive.flatten(0, -2)
        on_x = on_ratio.mul_(gain).addcmul_(grad, direct)
        on_x.sub_(on_divisor.mul_(x.sign()).mul_(inverse))
        on_direct = rate.copy_(x).mul_(grad).sum(axes)
        return on_x, on_drive @ spread, flat.mT @ latent.flatten(0, -2), flat.sum(0), on_level, on_gain, on_direct


def _softplus(z: Tensor) -> Tensor:
    """log(1 + exp(z)); ``z`` is overwritten."""
    positive_part = z.clamp(min=0.0)
    return z.abs_().neg_().exp_().log1p_().add_(positive_part)


def shunted(
    x: Tensor, latent: Tensor, spread: Tensor, rest: Tensor, level: Tensor, gain: Tensor, direct: Tensor
) -> Tensor:
    """gain x / (1 + |x| / level + h) + direct x, with h = softplus(spread latent + rest).

    x (..., d); latent (..., r), spread (d, r), rest, gain and direct (d,), level (1,).
    """
    return _Shunt.apply(x, latent, spread, rest, level, gain, direct)


@register_primitive(
    "shunting_inhibition", stage="dendritic", kind="pointwise", zero_at="gate", zero_scale=8.0, needs_input=True
)
class ShuntingInhibition(Primitive):
    """Each unit saturates with its own drive, and the layer's input divides it further.

    Biology: where inhibitory synapses reverse at the resting potential, they change nothing at rest, but add to the
    conductance across which excitation has to build up a voltage.

    Equation: h = softplus(U V v / rms(v) + b); f = E c / (1 + |c| + h); delta = rho (f - c).

    Reference: Koch, Poggio and Torre 1983, Nonlinear interactions in a dendritic tree: localization, timing, and role
    in information processing, PNAS; Borg-Graham, Monier and Frégnac 1998, Visual input evokes transient and strong
    shunting inhibition in visual cortical neurons, Nature.

    Shapes: v (B, T, n), x (B, T, d) -> (B, T, d); V is (rank, n), U is (d, rank).
    """

    rank: int = setting(4, low=1, high=64, meaning="number r of inhibitory latents")

    def build(self, host: Host) -> None:
        self.rank = min(self.rank, self.d_in)
        self.inhibitors = read_in(self.rank, self.d_in)
        self.spread = nn.Parameter(0.3 * torch.randn(self.d_out, self.rank) / self.rank**0.5)
        self.rest = nn.Parameter(torch.full((self.d_out,), -1.0))
        self.reversal = positive(2.0, self.d_out)  # E, which no drive can exceed
        self.log_level = nn.Parameter(torch.tensor([host.level]).log())

    def transform(self, x: Tensor, context: Context) -> Tensor:
        softplus, v, level = nn.functional.softplus, context.x_in, self.log_level.exp()
        conductance = softplus((v / token_scale(v)) @ self.inhibitors.T @ self.spread.T + self.rest)
        return softplus(self.reversal) * x / (1 + x.abs() / level + conductance) - x

    def scaled(self, x: Tensor, context: Context, scale: Tensor, with_x: bool) -> Tensor:
        return self.shunted(x, context, scale, 1 - scale if with_x else -scale)

    def shunted(self, x: Tensor, context: Context, scale: Tensor, direct: Tensor) -> Tensor:
        """``scale`` (d,) times the response, plus ``direct`` (d,) times x."""
        v = context.x_in
        latent = (v @ self.inhibitors.T) / token_scale(v)
        gain = scale * nn.functional.softplus(self.reversal)
        return shunted(x, latent, self.spread, self.rest, self.log_level.exp(), gain, direct)
