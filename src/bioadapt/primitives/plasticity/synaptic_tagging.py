"""Synaptic tagging and capture: a weak change lasts if a strong event comes in time."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from bioadapt.primitives.base import Context, Host, LocalRule, OnWeight, Scaled, setting
from bioadapt.primitives.frames import read_out
from bioadapt.registry import register_primitive

# Rates per update of the optimiser.
TAG_DECAY, PROTEIN_DECAY = math.exp(-1 / 100), math.exp(-1 / 50)
CAPTURE, FADING = 0.05, 0.01
STRONG = 0.2  # share of tagged synapses that sets off the synthesis of proteins


@register_primitive(
    "synaptic_tagging",
    stage="plasticity",
    kind="weight",
    zero_at="readout",
    zero_scale=2.0,
    merge="weight",
    learns=True,
    needs_input=True,
)
class SynapticTagging(LocalRule, Scaled, OnWeight):
    """Changes of the weights fade back to a late phase, which follows them only where tag and protein meet.

    Biology: a brief stimulus leaves a change that fades within hours, and a tag at the synapse; plasticity-related
    proteins that a strong event elsewhere in the cell sets free are captured by the tag and make the change last.

    Equation: delta = E V v, with V frozen and E = 0 at birth. At every update the tag decays with tau = 100 and is set
    to 1 where |Delta E| > threshold, the protein p decays with tau = 50 and is set to 1 where the mean tag exceeds 0.2;
    then L <- L + 0.05 p tag (E - L), E <- E - 0.01 (E - L).

    Reference: Frey and Morris 1997, Synaptic tagging and long-term potentiation, Nature; Clopath et al. 2008,
    Tag-trigger-consolidation: a model of early and late long-term-potentiation and depression, PLoS Comput Biol.

    Shapes: v (B, T, n) -> (B, T, d); V is (rank, n), E, L and the tag are (d, rank). The threshold is in units of the
    optimiser's updates: with Adam take about the learning rate.
    """

    readout = "early"
    governed = ("early",)
    rank: int = setting(8, low=1, high=256, meaning="number r of latents")
    threshold: float = setting(1e-3, low=0.0, high=1.0, meaning="smallest update that tags, about the learning rate")

    def build(self, host: Host) -> None:
        self.rank = r = min(self.rank, self.d_in, self.d_out)
        self.register_buffer("reader", host.normal("reader", r, self.d_in) / self.d_in**0.5)
        self.early = read_out(self.d_out, r)
        self.register_buffer("late", torch.zeros(self.d_out, r))
        self.register_buffer("tag", torch.zeros(self.d_out, r))
        self.register_buffer("protein", torch.zeros(()))
        self.declare_statistics(early=(self.d_out, r))

    def transform(self, x: Tensor, context: Context) -> Tensor:
        return self.written(context, self.early)

    def scaled_change(self, x: Tensor, context: Context, scale: Tensor) -> Tensor:
        return self.written(context, scale * self.early)

    def written(self, context: Context, early: Tensor) -> Tensor:
        """What ``early`` (d, rank) makes of the latents."""
        self.observe(context, early=self.early.detach())
        return (context.x_in @ self.reader.T) @ early.T

    def learn(self, fresh: Tensor) -> None:
        early = self.early.float()
        changed = ((early - self.observed_early).abs() > self.threshold).to(early.dtype) * fresh
        self.tag.copy_(torch.maximum(self.tag * (1 - fresh * (1 - TAG_DECAY)), changed))
        strong = (self.tag.mean() > STRONG).to(early.dtype) * fresh
        self.protein.copy_(torch.maximum(self.protein * (1 - fresh * (1 - PROTEIN_DECAY)), strong))
        self.late.add_(fresh * CAPTURE * self.protein * self.tag * (early - self.late))
        self.early.copy_(early - fresh * FADING * (early - self.late))

    def weight_delta(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        return self.early.detach() @ self.reader, None

    def wake(self) -> None:
        super().wake()
        self.late.copy_(0.3 * torch.randn_like(self.late))
        self.tag.copy_(torch.rand_like(self.tag))
        self.protein.fill_(1.0)
