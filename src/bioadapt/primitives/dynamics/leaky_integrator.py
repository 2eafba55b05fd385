"""Leaky integrator: traces of the recent past at a hierarchy of time constants."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from bioadapt.primitives.base import Context, Host, setting
from bioadapt.primitives.frames import read_in, read_out
from bioadapt.primitives.latent import Latent
from bioadapt.primitives.time import decay_of, trace
from bioadapt.registry import register_primitive


@register_primitive("leaky_integrator", stage="dynamics", kind="causal", zero_at="readout")
class LeakyIntegrator(Latent):
    """Latents are averaged over the past, each with a time constant of its own.

    Biology: the activity of cortical areas is correlated over times that grow from sensory to prefrontal areas, so that
    higher areas add evidence up for longer.

    Equation: delta = s U E_tau(D u), with tau spread evenly in its logarithm from 2 to 256 tokens.

    Reference: Murray et al. 2014, A hierarchy of intrinsic timescales across primate cortex, Nat Neurosci.

    Shapes: x (B, T, d) -> (B, T, d); the trace is (B, T, rank).
    """

    rank: int = setting(8, low=1, high=256, meaning="number of integrators r")

    def build(self, host: Host) -> None:
        self.rank = min(self.rank, self.d_out)
        self.reader = read_in(self.rank, self.d_out)
        self.writer = read_out(self.d_out, self.rank)
        self.log_tau = nn.Parameter(torch.linspace(math.log(2), math.log(256), self.rank))

    def code(self, drive: Tensor, context: Context) -> Tensor:
        return trace("latents", drive, context.once(decay_of, self.log_tau), context)
