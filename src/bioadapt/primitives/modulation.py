"""Gains of few factors: what many mechanisms of gain control, rhythm and neuromodulation come down to."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .base import Context, Fused, Primitive


class _Modulation(Fused):
    """Few passes over x forward and backward, and nothing of its width kept but x itself."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, gain: Tensor, channels: Tensor, with_x: bool) -> Tensor:
        ctx.save_for_backward(x, gain, channels)
        ctx.with_x = with_x
        return times(x, gain, channels, with_x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, None]:
        x, gain, channels = ctx.saved_tensors
        on_x, on_gain, on_channels = None, None, None
        if ctx.needs_input_grad[0]:
            on_x = times(grad, gain, channels, ctx.with_x)
        product = grad * x
        if ctx.needs_input_grad[1]:
            on_gain = product @ channels
        if ctx.needs_input_grad[2]:
            on_channels = product.flatten(0, -2).mT @ gain.flatten(0, -2)
        return on_x, on_gain, on_channels, None


def times(x: Tensor, gain: Tensor, channels: Tensor, with_x: bool) -> Tensor:
    """`modulated`, for gains (..., r) as many as there are tokens, where nothing is recorded."""
    factor = nn.functional.linear(gain, channels)
    return torch.addcmul(x, x, factor, out=factor) if with_x else factor.mul_(x)


def modulated(x: Tensor, gain: Tensor, channels: Tensor, with_x: bool = False) -> Tensor:
    """x_i sum_k gain_k channels_ik: x (..., d), gain (..., r) broadcastable to it, channels (d, r) -> (..., d).

    ``with_x``: x itself is added.
    """
    return _Modulation.apply(x, gain.expand(*x.shape[:-1], -1), channels, with_x)


def per_channel(scale: Tensor, channels: Tensor) -> Tensor:
    return scale[:, None] * channels


class Modulation(Primitive):
    """A primitive of the form delta_i = x_i sum_k gain_k channels_ik, whose gate costs nothing.

    A subclass defines `factors` instead of `transform`.
    """

    def factors(self, x: Tensor, context: Context) -> tuple[Tensor, Tensor]:
        """x (B, T, d) in fp32 -> gain (B or 1, T or 1, r), channels (d, r), a buffer or what `Context.once` gives."""
        raise NotImplementedError(f"{type(self).__name__} must define factors")

    def transform(self, x: Tensor, context: Context) -> Tensor:
        gain, channels = self.factors(x, context)
        return x * (gain @ channels.mT)

    def scaled(self, x: Tensor, context: Context, scale: Tensor, with_x: bool) -> Tensor:
        gain, channels = self.factors(x, context)
        return modulated(x, gain, context.once(per_channel, scale, channels), with_x)
