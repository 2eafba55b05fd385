"""Spike-timing dependent plasticity: what came before is bound to what came after, with the sign of the order."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from bioadapt.primitives.base import Context, Host, setting
from bioadapt.primitives.frames import read_in, read_out
from bioadapt.primitives.latent import Latent
from bioadapt.primitives.time import decay_of, past_trace
from bioadapt.registry import register_primitive

STRENGTH = 4.0


@register_primitive("stdp_trace", stage="plasticity", kind="causal", zero_at="readout", zero_scale=4.0)
class StdpTrace(Latent):
    """An antisymmetric memory of which latent followed which, read by the latents of the present.

    Biology: a synapse is potentiated if its input fires shortly before the cell, and depressed if it fires shortly
    after, so that connections come to point from causes to effects.

    Equation: z = D u; zbar = E_4(z); M_t = lambda M_{t-1} + (1 - lambda) (z_t zbar_{t-1}^T - zbar_{t-1} z_t^T) with
    tau_M = 64; delta_t = 4 s U M_{t-1} z_t, with U = 0 at birth.

    Reference: Bi and Poo 1998, Synaptic modifications in cultured hippocampal neurons: dependence on spike timing,
    synaptic strength, and postsynaptic cell type, J Neurosci; Song, Miller and Abbott 2000, Competitive Hebbian
    learning through spike-timing-dependent synaptic plasticity, Nat Neurosci.

    Shapes: x (B, T, d) -> (B, T, d); M is (B, T, rank, rank), of which only the pairs above the diagonal are kept.
    """

    rank: int = setting(6, low=2, high=64, meaning="number r of latents whose order is learned")

    def build(self, host: Host) -> None:
        self.rank = r = min(self.rank, self.d_out)
        self.reader = read_in(r, self.d_out)
        self.writer = read_out(self.d_out, r)
        self.log_tau = nn.Parameter(torch.tensor([math.log(4.0)]))
        self.log_tau_memory = nn.Parameter(torch.tensor([math.log(64.0)]))
        first, second = torch.triu_indices(r, r, 1)
        self.register_buffer("first", nn.functional.one_hot(first, r).float(), persistent=False)  # (pairs, rank)
        self.register_buffer("second", nn.functional.one_hot(second, r).float(), persistent=False)

    def code(self, z: Tensor, context: Context) -> Tensor:
        """4 M_{t-1} z_t, (B, T, rank) -> (B, T, rank)."""
        recent = past_trace("recent", z, context.once(decay_of, self.log_tau), context)
        z_first, z_second = z @ self.first.T, z @ self.second.T
        order = z_first * (recent @ self.second.T) - (recent @ self.first.T) * z_second
        memory = past_trace("memory", order, context.once(decay_of, self.log_tau_memory), context)
        return STRENGTH * ((memory * z_second) @ self.first - (memory * z_first) @ self.second)
