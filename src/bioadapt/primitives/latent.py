"""Few latents of the scale-free frame, written back at the token's scale: the form of most mechanisms with a code."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .base import Context, Fused, Primitive
from .frames import measured_scale
from .time import mean_reading


class _Encoding(Fused):
    """One product and one pass over x forward, one of each backward; nothing of its width is kept but x itself."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, reader: Tensor) -> tuple[Tensor, Tensor]:
        scale = measured_scale(x)
        drive = nn.functional.linear(x, reader).div_(scale)
        ctx.save_for_backward(x, reader, drive, scale)
        return drive, scale

    @staticmethod
    def backward(ctx: Any, on_drive: Tensor, on_scale: Tensor) -> tuple[Tensor | None, Tensor | None]:
        x, reader, drive, scale = ctx.saved_tensors
        on_product = on_drive / scale
        on_x, on_reader = None, None
        if ctx.needs_input_grad[0]:
            on_scale = on_scale - (on_product * drive).sum(-1, keepdim=True)
            on_x = (on_product @ reader).addcmul_(x, on_scale / (scale * x.shape[-1]))
        if ctx.needs_input_grad[1]:
            on_reader = on_product.flatten(0, -2).mT @ x.flatten(0, -2)
        return on_x, on_reader


def encoded(x: Tensor, reader: Tensor) -> tuple[Tensor, Tensor]:
    """D u and the scale s of each token, where x = s u: x (..., d), reader D (r, d) -> (..., r), (..., 1)."""
    return _Encoding.apply(x, reader)


class Latent(Primitive):
    """A primitive of the form delta = s U h(D u), whose gate costs nothing.

    A subclass makes the tensors ``reader`` D (r, d) and U (d, k), the one that ``readout`` names, and defines `code`.
    """

    reads_both_ways = True

    def code(self, drive: Tensor, context: Context) -> Tensor:
        """h from the series that `drive` gives: (B, T, r) -> (B, T, k). For ``causal``, one reading of time."""
        raise NotImplementedError(f"{type(self).__name__} must define code")

    def drive(self, x: Tensor, context: Context) -> tuple[Tensor, Tensor]:
        """The series that `code` reads, and the scale of each token: (B, T, d) -> (B, T, r), (B, T, 1)."""
        return encoded(x, self.reader)

    def transform(self, x: Tensor, context: Context) -> Tensor:
        code, scale = self.coded(x, context)
        return scale * (code @ getattr(self, self.readout).T)

    def scaled(self, x: Tensor, context: Context, scale: Tensor, with_x: bool) -> Tensor:
        writer = context.once(torch.mul, scale, getattr(self, self.readout))
        if not torch.is_grad_enabled():  # then the fewest operations are the quickest, else the fewest of full width
            code, size = self.coded(x, context)
            change = nn.functional.linear(code, writer)
            return torch.addcmul(x, change, size, out=change) if with_x else change.mul_(size)
        itself = x.flatten(0, -2)  # taken before the mechanism begins: see `Scaled`
        code, size = self.coded(x, context)
        written = size * code
        if not with_x:
            return nn.functional.linear(written, writer)
        return torch.addmm(itself, written.flatten(0, -2), writer.mT).view(x.shape)

    def coded(self, x: Tensor, context: Context) -> tuple[Tensor, Tensor]:
        """What is written, over both readings of time, and the scale of each token: (B, T, k), (B, T, 1)."""
        drive, scale = self.drive(x, context)
        return mean_reading(self.code, drive, context) if self.kind == "causal" else self.code(drive, context), scale
