"""Metaplasticity: the more often a synapse was confirmed, the harder it is to reverse."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from bioadapt.primitives.base import Context, Fused, Host, LocalRule, OnWeight, Scaled, setting
from bioadapt.primitives.frames import read_out
from bioadapt.registry import register_primitive


class _Binary(Fused):
    """The sign, whose gradient passes straight through."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor) -> Tensor:
        return 1 - 2 * (hidden < 0).to(hidden.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad


@register_primitive(
    "metaplasticity",
    stage="plasticity",
    kind="weight",
    zero_at="readout",
    merge="weight",
    learns=True,
    needs_input=True,
)
class Metaplasticity(LocalRule, Scaled, OnWeight):
    """A low-rank path with binary input synapses, whose hidden strengths resist what would weaken them.

    Biology: how easily a synapse changes depends on its own history; one that has been potentiated again and again
    needs more than one contrary event to change sides.

    Equation: delta = U sgn(H) v / sqrt(n), U = 0 at birth, with a straight-through gradient to H; of the optimiser's
    update of H, what points towards zero is scaled by 1 - tanh^2(m |H|), and the rest passes.

    Reference: Abraham and Bear 1996, Metaplasticity: the plasticity of synaptic plasticity, TINS; Laborieux et al.
    2021, Synaptic metaplasticity in binarized neural networks, Nat Commun.

    Shapes: v (B, T, n) -> (B, T, d); H is (rank, n), U is (d, rank). H before the update is what the forwards saw, so
    nothing has to be kept for the law.
    """

    governed = ("hidden",)
    rank: int = setting(8, low=1, high=256, meaning="number r of latents")
    hardness: float = setting(2.0, low=0.0, high=20.0, meaning="how fast resistance m grows with a hidden strength")

    def build(self, host: Host) -> None:
        self.rank = min(self.rank, self.d_in, self.d_out)
        self.hidden = nn.Parameter(0.3 * torch.randn(self.rank, self.d_in))
        self.writer = read_out(self.d_out, self.rank)
        self.declare_statistics(hidden=(self.rank, self.d_in))

    def transform(self, x: Tensor, context: Context) -> Tensor:
        return self.written(context, self.writer)

    def scaled_change(self, x: Tensor, context: Context, scale: Tensor) -> Tensor:
        return self.written(context, context.once(torch.mul, scale, self.writer))

    def written(self, context: Context, writer: Tensor) -> Tensor:
        """What ``writer`` (d, rank) makes of the binary latents."""
        self.observe(context, hidden=self.hidden.detach())
        return (context.x_in @ context.once(self.binary).T) @ writer.T

    def binary(self) -> Tensor:
        """sgn(H) / sqrt(n), (rank, n)."""
        return _Binary.apply(self.hidden) / self.d_in**0.5

    def learn(self, fresh: Tensor) -> None:
        before, after = self.observed_hidden, self.hidden.float()
        change = after - before
        # The square of the hyperbolic secant, without the cancellation of 1 - tanh^2.
        plasticity = torch.cosh((self.hardness * before.abs()).clamp(max=40.0)).pow(-2)
        lost = (before * change < 0) * (1 - plasticity) * change
        self.hidden.copy_(after - fresh * lost)

    def weight_delta(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        return self.writer.detach() @ self.binary().detach(), None
