"""Synaptic consolidation: what is learned sinks through ever slower variables, and is forgotten slowly."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from bioadapt.primitives.base import Context, Host, LocalRule, Primitive, setting
from bioadapt.registry import register_primitive


@register_primitive(
    "synaptic_consolidation",
    stage="plasticity",
    kind="pointwise",
    zero_at="readout",
    zero_scale=32.0,
    merge="left",
    learns=True,
)
class SynapticConsolidation(LocalRule, Primitive):
    """A gain per channel whose value flows, step by step, into a chain of hidden variables, each slower than the last.

    Biology: the strength of a synapse rests on many biochemical processes with time scales from seconds to years, which
    exchange with each other; a new memory is written in the fast ones and kept by the slow ones.

    Equation: delta = w x, w = 0 at birth; at every step neighbouring variables u_0 = w, u_1, .., u_{m-1} exchange the
    flux g 2^-k (u_{k+1} - u_k), and u_k has the capacity 2^k. Counting from k = 0 lets w leak at the rate g.

    Reference: Benna and Fusi 2016, Computational principles of synaptic memory consolidation, Nat Neurosci; compare
    Kirkpatrick et al. 2017, Overcoming catastrophic forgetting in neural networks, PNAS.

    Shapes: x (B, T, d) -> (B, T, d); w is (d,), the hidden variables are (levels - 1, d).
    """

    readout = "efficacy"
    governed = ("efficacy",)
    levels: int = setting(6, low=2, high=16, meaning="number m of variables in the chain, w among them")
    exchange: float = setting(0.25, low=0.0, high=0.5, meaning="rate g at which the two fastest exchange")

    def build(self, host: Host) -> None:
        self.efficacy = nn.Parameter(torch.zeros(self.d_out))
        self.register_buffer("hidden", torch.zeros(self.levels - 1, self.d_out))
        self.declare_statistics()

    def transform(self, x: Tensor, context: Context) -> Tensor:
        self.observe(context)
        return self.efficacy * x

    def scaled(self, x: Tensor, context: Context, scale: Tensor, with_x: bool) -> Tensor:
        self.observe(context)
        return x * context.once(self.gain, scale, with_x)

    def gain(self, scale: Tensor, with_x: bool) -> Tensor:
        """``scale`` times the efficacy, plus one if ``with_x``: (d,)."""
        return scale * self.efficacy + with_x

    def learn(self, fresh: Tensor) -> None:
        chain = torch.cat([self.efficacy.float()[None], self.hidden])
        capacity = 2.0 ** torch.arange(self.levels, device=chain.device)[:, None]
        flux = fresh * self.exchange / capacity[:-1] * chain.diff(dim=0)
        still = torch.zeros_like(chain[:1])
        chain = chain + (torch.cat([flux, still]) - torch.cat([still, flux])) / capacity
        self.efficacy.copy_(chain[0])
        self.hidden.copy_(chain[1:])

    def left_matrix(self) -> Tensor:
        return self.efficacy
