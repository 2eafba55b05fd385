"""Oja's rule: Hebbian growth with decay finds the directions in which the features vary most."""

from __future__ import annotations

import torch
from torch import Tensor

from bioadapt.primitives.base import Context, Host, LocalRule, Scaled, setting
from bioadapt.primitives.frames import mean_square, read_out, token_count
from bioadapt.registry import register_primitive


@register_primitive(
    "oja_subspace", stage="plasticity", kind="pointwise", zero_at="readout", zero_scale=8.0, merge="left", learns=True
)
class OjaSubspace(LocalRule, Scaled):
    """A local rule finds the principal components of the features; each gets one learned gain.

    Biology: Hebbian growth alone would run away; where every synapse also decays with the square of its neuron's
    activity, a neuron comes to represent the strongest component of its input, and a layer of them the strongest few.

    Equation: delta = Q^T (gamma * Q x), with gamma = 0 at birth; Q starts with orthonormal rows and, with y = Q u,
    follows Q <- Q + eta (E[y u^T] - tril(E[y y^T]) Q) / max(1, tr E[y y^T] / r).

    Reference: Oja 1982, Simplified neuron model as a principal component analyzer, J Math Biol; Sanger 1989, Optimal
    unsupervised learning in a single-layer linear feedforward neural network, Neural Networks.

    Shapes: x (B, T, d) -> (B, T, d); Q is (rank, d), gamma (rank,).
    """

    readout = "gains"
    rank: int = setting(8, low=1, high=256, meaning="number r of components")
    rate: float = setting(0.05, low=0.0, high=1.0, meaning="learning rate eta of the components")

    def build(self, host: Host) -> None:
        self.rank = min(self.rank, self.d_out)
        start = torch.linalg.qr(host.normal("components", self.d_out, self.rank)).Q.T.contiguous()
        self.register_buffer("components", start)
        self.gains = read_out(1, self.rank)
        self.declare_statistics(correlation=(self.rank, self.d_out))

    def transform(self, x: Tensor, context: Context) -> Tensor:
        return self.amplified(x, context, self.gains)

    def scaled_change(self, x: Tensor, context: Context, scale: Tensor) -> Tensor:
        return self.amplified(x, context, scale * self.gains)

    def amplified(self, x: Tensor, context: Context, gains: Tensor) -> Tensor:
        """What ``gains`` (1, rank) make of the components of x."""
        latent = x @ self.components.T
        if self.training and context.observing:
            correlation = self.correlation(x.detach(), latent.detach(), context)
            self.observe(context, tokens=token_count(x, context.mask), correlation=correlation)
        return (gains * latent) @ self.components

    def correlation(self, x: Tensor, latent: Tensor, context: Context) -> Tensor:
        """E[y u^T] over real tokens, (rank, d)."""
        count = token_count(x, context.mask).clamp(min=1)
        post = latent / (count * (mean_square(x) + 1e-6))
        if context.mask is not None:
            padding = ~context.mask[..., None]
            x, post = x.masked_fill(padding, 0.0), post.masked_fill(padding, 0.0)
        return post.flatten(0, 1).mT @ x.flatten(0, 1)

    def learn(self, fresh: Tensor) -> None:
        correlation = self.observed_correlation
        power = correlation @ self.components.T  # E[y y^T], for y is linear in u
        growth = correlation - power.tril() @ self.components
        self.components.add_(fresh * self.rate * growth / (power.trace() / self.rank).clamp(min=1.0))

    def left_matrix(self) -> Tensor:
        return (self.components.T * self.gains) @ self.components
