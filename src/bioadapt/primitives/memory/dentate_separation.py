"""Dentate separation: a sparse expansion makes similar inputs less similar."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from bioadapt.primitives.base import Context, Fused, Host, setting
from bioadapt.primitives.frames import read_in, read_out
from bioadapt.primitives.latent import Latent
from bioadapt.registry import register_primitive

LAMELLA = 8  # granule cells that compete with one another


class _Winners(Fused):
    """Keeps where the two best of each block are, a byte each."""

    @staticmethod
    def forward(ctx: Any, h: Tensor) -> Tensor:
        best, first = h.max(-1, keepdim=True)
        others = h.scatter(-1, first, -torch.inf)
        runner_up, second = others.max(-1, keepdim=True)
        ctx.save_for_backward(first.byte(), second.byte())
        return torch.zeros_like(h).scatter_(-1, first, best - runner_up)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        first, second = (places.long() for places in ctx.saved_tensors)
        on_margin = grad.gather(-1, first)
        return torch.zeros_like(grad).scatter_(-1, first, on_margin).scatter_(-1, second, -on_margin)


def block_winners(h: Tensor) -> Tensor:
    """The best of each block with its margin over the runner-up, zero elsewhere: (..., blocks, m > 1) -> the same."""
    return _Winners.apply(h)


@register_primitive("dentate_separation", stage="memory", kind="pointwise", zero_at="readout")
class DentateSeparation(Latent):
    """A latent is expanded onto many granule cells, of which only one in each block fires.

    Biology: the dentate gyrus spreads entorhinal input over many more granule cells, of which strong local inhibition
    lets very few fire, so that memories of similar events do not mix.

    Equation: h = E D u + exc, with E frozen rows of unit length; of each block of 8 units only the best one fires, with
    its margin over the runner-up, which makes the code continuous where winners change; delta = s U R code.

    Reference: Leutgeb et al. 2007, Pattern separation in the dentate gyrus and CA3 of the hippocampus, Science; Yassa
    and Stark 2011, Pattern separation in the hippocampus, Trends Neurosci.

    Shapes: x (B, T, d) -> (B, T, d); the code is (B, T, 8 blocks).
    """

    rank: int = setting(8, low=1, high=256, meaning="number of latents r on either side of the granule cells")
    blocks: int = setting(16, low=1, high=512, meaning="number of blocks of 8 granule cells")

    def build(self, host: Host) -> None:
        self.rank = min(self.rank, self.d_out)
        cells = LAMELLA * self.blocks
        expansion = host.normal("expansion", cells, self.rank)
        self.register_buffer("expansion", expansion / expansion.norm(dim=1, keepdim=True))
        self.reader = read_in(self.rank, self.d_out)
        self.excitability = nn.Parameter(torch.zeros(cells))
        self.collector = nn.Parameter(torch.randn(self.rank, cells) / self.blocks**0.5)
        self.writer = read_out(self.d_out, self.rank)

    def code(self, drive: Tensor, context: Context) -> Tensor:
        return self.granules(drive) @ self.collector.mT

    def granules(self, drive: Tensor) -> Tensor:
        """The sparse code of a latent: (..., rank) -> (..., 8 blocks)."""
        h = nn.functional.linear(drive, self.expansion, self.excitability)
        return block_winners(h.unflatten(-1, (self.blocks, LAMELLA))).flatten(-2)
