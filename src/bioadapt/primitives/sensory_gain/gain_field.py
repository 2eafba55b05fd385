"""Gain fields: what a cell is tuned to stays, and a second signal scales its height."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from bioadapt.primitives.base import Context, Fused, Host, Scaled, setting
from bioadapt.primitives.frames import read_in, read_out, token_scale
from bioadapt.registry import register_primitive


class _BoundedGain(Fused):
    """Keeps x and the latents; backward computes the gain again."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, latent: Tensor, writer: Tensor, scale: Tensor) -> Tensor:
        ctx.save_for_backward(x, latent, writer, scale)
        return (latent @ writer.mT).tanh_().mul_(x).mul_(scale)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        x, latent, writer, scale = ctx.saved_tensors
        gain = (latent @ writer.mT).tanh_()
        product = grad * x
        on_scale = torch.dot(product.flatten(), gain.flatten()).reshape(1)
        sized = grad * scale
        on_x = sized.mul_(gain)
        on_drive = product.mul_(gain.square_().neg_().add_(1)).mul_(scale)
        return on_x, on_drive @ writer, on_drive.flatten(0, -2).mT @ latent.flatten(0, -2), on_scale


def bounded_gain(x: Tensor, latent: Tensor, writer: Tensor, scale: Tensor) -> Tensor:
    """scale x_i tanh(sum_k writer_ik latent_k): x (..., d), latent (..., r), writer (d, r), scale (1,)."""
    return _BoundedGain.apply(x, latent, writer, scale)


@register_primitive("gain_field", stage="sensory_gain", kind="pointwise", zero_at="readout", needs_input=True)
class GainField(Scaled):
    """The layer's input sets a bounded gain for each feature of its output.

    Biology: a parietal neuron keeps its visual receptive field while the position of the eyes scales how strongly it
    answers, which lets later areas read places in other frames of reference.

    Equation: delta = x tanh(U V v / rms(v)), with U = 0 at birth.

    Reference: Andersen, Essick and Siegel 1985, Encoding of spatial location by posterior parietal neurons, Science;
    Salinas and Thier 2000, Gain modulation: a major computational principle of the central nervous system, Neuron.

    Shapes: x (B, T, d), v (B, T, n) -> (B, T, d); the latents are (B, T, rank). Linear and diagonal in x for fixed v.
    """

    rank: int = setting(8, low=1, high=256, meaning="number of latents r that modulate")

    def build(self, host: Host) -> None:
        self.rank = min(self.rank, self.d_in, self.d_out)
        self.reader = read_in(self.rank, self.d_in)
        self.writer = read_out(self.d_out, self.rank)

    def transform(self, x: Tensor, context: Context) -> Tensor:
        return x * torch.tanh(self.latent(context) @ self.writer.T)

    def scaled_change(self, x: Tensor, context: Context, scale: Tensor) -> Tensor:
        return bounded_gain(x, self.latent(context), self.writer, scale)

    def latent(self, context: Context) -> Tensor:
        """V v / rms(v), (B, T, rank)."""
        return (context.x_in @ self.reader.T) / token_scale(context.x_in)
