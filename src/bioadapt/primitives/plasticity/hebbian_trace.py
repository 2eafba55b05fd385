"""Hebbian trace: connections between latents grow with their correlation."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from bioadapt.primitives.base import Context, Host, LocalRule, OnWeight, setting
from bioadapt.primitives.frames import masked_mean, read_in, read_out, token_count, token_scale
from bioadapt.registry import register_primitive


@register_primitive(
    "hebbian_trace",
    stage="plasticity",
    kind="weight",
    zero_at="readout",
    zero_scale=0.25,
    merge="weight",
    learns=True,
    needs_input=True,
)
class HebbianTrace(LocalRule, OnWeight):
    """A low-rank path whose core is a running correlation of what goes in and what comes out.

    Biology: cells that fire together wire together; the plasticity of each connection is itself under genetic, here
    under gradient, control.

    Equation: delta = U (alpha * H) V v; H starts at 0.1 I and follows
    H <- H + eta (E[(D y / s) (V v / rms v)^T] - H), with D frozen.

    Reference: Hebb 1949, The organization of behavior: a neuropsychological theory, Wiley; Miconi, Stanley and Clune
    2018, Differentiable plasticity: training plastic neural networks with backpropagation, ICML.

    Shapes: v (B, T, n) -> (B, T, d); alpha and H are (rank, rank).
    """

    rank: int = setting(8, low=1, high=256, meaning="number of latents r on either side")
    rate: float = setting(0.02, low=0.0, high=1.0, meaning="learning rate eta of the trace")

    def build(self, host: Host) -> None:
        self.rank = r = min(self.rank, self.d_in, self.d_out)
        self.reader = read_in(r, self.d_in)
        self.writer = read_out(self.d_out, r)
        self.plasticity = nn.Parameter(torch.ones(r, r))
        self.register_buffer("post", host.normal("post", r, self.d_out) / self.d_out**0.5)
        self.register_buffer("trace", 0.1 * torch.eye(r))
        self.declare_statistics(correlation=(r, r))

    def transform(self, x: Tensor, context: Context) -> Tensor:
        v = context.x_in
        latent = v @ self.reader.T
        if self.training and context.observing:
            correlation = self.correlation(x.detach(), v.detach(), latent.detach(), context)
            self.observe(context, tokens=token_count(x, context.mask), correlation=correlation)
        return latent @ (self.plasticity * self.trace).T @ self.writer.T

    def correlation(self, y: Tensor, v: Tensor, latent: Tensor, context: Context) -> Tensor:
        """Mean over real tokens of the outer product of post- and presynaptic latents, (rank, rank)."""
        post, pre = y @ self.post.T / token_scale(y), latent / token_scale(v)
        return masked_mean(post[..., :, None] * pre[..., None, :], context.mask)

    def learn(self, fresh: Tensor) -> None:
        self.trace.add_(fresh * self.rate * (self.observed_correlation - self.trace))

    def weight_delta(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        core = self.plasticity.detach() * self.trace
        return self.writer.detach() @ core @ self.reader.detach(), None
