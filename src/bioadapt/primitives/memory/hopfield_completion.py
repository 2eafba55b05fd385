"""Hopfield completion: a fragment is pulled towards the stored pattern that it belongs to."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from bioadapt.primitives.base import Context, Host, setting
from bioadapt.primitives.frames import read_in, read_out
from bioadapt.primitives.latent import Latent
from bioadapt.registry import register_primitive

COLDEST, HOTTEST = 16.0, 0.5  # what the inverse temperature may become
SWEEPS = 2


@register_primitive("hopfield_completion", stage="memory", kind="pointwise", zero_at="readout", zero_scale=0.5)
class HopfieldCompletion(Latent):
    """A latent state falls into the nearest of a set of learned attractors.

    Biology: the recurrent collaterals of hippocampal area CA3 complete a stored pattern from a part of it.

    Equation: q = D u; twice q <- Xi^T softmax(beta Xi q); delta = s U q, with patterns Xi ~ N(0, 1) and beta = 2 at
    birth, held in 0.5..16.

    Reference: Hopfield 1982, Neural networks and physical systems with emergent collective computational abilities,
    PNAS; Ramsauer et al. 2021, Hopfield networks is all you need, ICLR.

    Shapes: x (B, T, d) -> (B, T, d); the patterns are (patterns, rank).
    """

    rank: int = setting(8, low=1, high=256, meaning="number of features r of a pattern")
    patterns: int = setting(32, low=1, high=1024, meaning="number of stored patterns")

    def build(self, host: Host) -> None:
        self.rank = min(self.rank, self.d_out)
        self.reader = read_in(self.rank, self.d_out)
        self.writer = read_out(self.d_out, self.rank)
        self.memories = nn.Parameter(torch.randn(self.patterns, self.rank))
        self.log_beta = nn.Parameter(torch.full((1,), math.log(2)))

    def code(self, drive: Tensor, context: Context) -> Tensor:
        keys = context.once(self.keys)
        for _ in range(SWEEPS):
            drive = self.recalled(drive, keys)
        return drive

    def recalled(self, state: Tensor, keys: Tensor) -> Tensor:
        """One step towards the attractor: (..., rank) -> (..., rank)."""
        return torch.softmax(nn.functional.linear(state, keys), -1) @ self.memories

    def keys(self) -> Tensor:
        """beta times the memories, (patterns, rank)."""
        return self.log_beta.exp().clamp(HOTTEST, COLDEST) * self.memories
