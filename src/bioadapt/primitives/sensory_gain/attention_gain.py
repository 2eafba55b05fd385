"""Attention multiplies the drive of a unit before the population divides it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from bioadapt.primitives.base import Context, Fused, Host, Primitive, setting
from bioadapt.primitives.frames import positive, read_in, token_scale
from bioadapt.registry import register_primitive


class _AttendedRatio(Fused):
    """direct_i x_i + gain_i sgn(x_i) n_i / (floor_i + share sum_j n_j + alpha n_i), n = exp(2 tanh(writer z)) |x|^p.

    Keeps x and the latents z; backward computes the rest again.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        latent: Tensor,
        writer: Tensor,
        direct: Tensor,
        gain: Tensor,
        floor: Tensor,
        alpha: float,
        p: float,
    ) -> Tensor:
        ctx.save_for_backward(x, latent, writer, direct, gain, floor)
        ctx.alpha, ctx.p = alpha, p
        field = _field(latent, writer).mul_(2).exp_()
        drive = field.mul_(_power(x, p))
        divisor = _divisor(drive, floor, alpha)
        return drive.mul_(x.sign()).div_(divisor).mul_(gain).addcmul_(x, direct)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, latent, writer, direct, gain, floor = ctx.saved_tensors
        alpha, p = ctx.alpha, ctx.p
        sign, axes = x.sign(), tuple(range(x.dim() - 1))
        field = _field(latent, writer)
        attention = torch.mul(field, 2).exp_()
        drive = _power(x, p).mul_(attention)
        divisor = _divisor(drive, floor, alpha)
        signed = (grad * sign).div_(divisor)
        product = signed * drive
        on_gain = product.sum(axes)
        on_divisor = product.mul_(gain).div_(divisor)  # with the wrong sign up to here
        on_pool = on_divisor.sum(-1, keepdim=True).mul_((alpha - 1) / x.shape[-1])
        on_floor = on_divisor.sum(axes).neg_()
        on_drive = signed.mul_(gain).sub_(on_divisor, alpha=alpha).add_(on_pool)
        slope = x * 2 if p == 2 else x.abs().pow_(p - 1).mul_(sign).mul_(p)
        on_x = slope.mul_(attention).mul_(on_drive).addcmul_(grad, direct)
        on_direct = torch.mul(grad, x, out=sign).sum(axes)
        on_field = on_drive.mul_(drive).mul_(field.square_().mul_(-2).add_(2))
        on_writer = on_field.flatten(0, -2).mT @ latent.flatten(0, -2)
        return on_x, on_field @ writer, on_writer, on_direct, on_gain, on_floor, None, None


def _field(latent: Tensor, writer: Tensor) -> Tensor:
    return (latent @ writer.mT).tanh_()


def _power(x: Tensor, p: float) -> Tensor:
    return x.square() if p == 2 else x.abs().pow_(p)


def _divisor(drive: Tensor, floor: Tensor, alpha: float) -> Tensor:
    others = drive.sum(-1, keepdim=True)
    return torch.add(floor, others, alpha=(1 - alpha) / drive.shape[-1]).add_(drive, alpha=alpha)


@register_primitive("attention_gain", stage="sensory_gain", kind="pointwise", zero_at="gate")
class AttentionGain(Primitive):
    """A learned attention field multiplies each unit's drive, and the attended population normalizes it.

    Biology: attending to a stimulus acts as if its drive were multiplied before divisive normalization, which explains
    why the same attention sometimes raises contrast gain and sometimes the response itself.

    Equation: A = exp(2 tanh(U V u / 2)); R_i = (1 + sigma_i^p) sgn(c_i) A_i |c_i|^p / (sigma_i^p + (1 - alpha)
    mean_j A_j |c_j|^p + alpha A_i |c_i|^p) with c = x / rho; delta = rho (R - c).

    Reference: Reynolds and Heeger 2009, The normalization model of attention, Neuron.

    Shapes: x (B, T, d) -> (B, T, d); the latents of the field are (B, T, rank).
    """

    rank: int = setting(4, low=1, high=256, meaning="number of latents r of the attention field")
    exponent: float = setting(2.0, low=1.0, high=3.0, meaning="power p of the drive")
    self_weight: float = setting(0.25, low=0.1, high=1.0, meaning="share alpha of a unit's own drive in its pool")

    def build(self, host: Host) -> None:
        self.rank = min(self.rank, self.d_out)
        self.reader = read_in(self.rank, self.d_out)
        self.writer = nn.Parameter(0.1 * torch.randn(self.d_out, self.rank) / self.rank**0.5)
        self.sigma = positive(1.0, self.d_out)
        self.log_level = nn.Parameter(torch.tensor([host.level]).log())

    def transform(self, x: Tensor, context: Context) -> Tensor:
        level, sigma = self.log_level.exp(), nn.functional.softplus(self.sigma)
        alpha, p = self.self_weight, self.exponent
        attention = torch.exp(2 * torch.tanh(0.5 * (x / token_scale(x)) @ self.reader.T @ self.writer.T))
        drive = attention * (x / level).abs().pow(p)
        pool = (1 - alpha) * drive.mean(-1, keepdim=True) + alpha * drive
        response = (1 + sigma.pow(p)) * x.sign() * drive / (sigma.pow(p) + pool)
        return level * response - x

    def scaled(self, x: Tensor, context: Context, scale: Tensor, with_x: bool) -> Tensor:
        reader, direct, gain, floor = context.once(self.constants, scale, with_x)
        latent = nn.functional.linear(x, reader) / token_scale(x)
        return _AttendedRatio.apply(x, latent, self.writer, direct, gain, floor, self.self_weight, self.exponent)

    def constants(self, scale: Tensor, with_x: bool) -> tuple[Tensor, ...]:
        """The reader (rank, d); the factor of x, and the gain and floor of ``scale`` times the response, (d,) each."""
        level, drive = self.log_level.exp(), nn.functional.softplus(self.sigma).pow(self.exponent)
        # With rho^p multiplied out of the ratio, no copy of x in the contrast frame is needed.
        gain, floor = scale * level * (1 + drive), level.pow(self.exponent) * drive
        return 0.5 * self.reader, 1 - scale if with_x else -scale, gain, floor
