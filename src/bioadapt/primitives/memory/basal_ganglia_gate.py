"""Basal-ganglia gate: Go and NoGo decide when a memory is written."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from bioadapt.primitives.base import Context, Host, setting
from bioadapt.primitives.frames import group_matrix, read_in, read_out
from bioadapt.primitives.latent import Latent
from bioadapt.primitives.surrogate import rectified, with_slope
from bioadapt.primitives.time import recurrence
from bioadapt.registry import register_primitive


@register_primitive("basal_ganglia_gate", stage="memory", kind="causal", zero_at="readout")
class BasalGangliaGate(Latent):
    """Stripes of working memory take in the present where Go wins over NoGo, and hold what they have elsewhere.

    Biology: striatal Go and NoGo pathways open and close the thalamic door to each stripe of prefrontal cortex, and
    dopamine tips the balance between them through D1 and D2 receptors.

    Equation: p = clip(q + (1 - q) ((1 + D) [G u + b_g]_+ - (1 - D) [N u + b_n]_+), 0, 1) for each stripe, q = resting;
    h_t = (1 - p_t) h_{t-1} + p_t V u_t; delta = s U h, with D = tanh of a trainable level, 0 at birth. In backward
    thresholds and limits have the slopes of smooth ones: a gate that is shut or wide open could never learn otherwise.

    Reference: O'Reilly and Frank 2006, Making working memory work: a computational model of learning in the prefrontal
    cortex and basal ganglia, Neural Comput.

    Shapes: x (B, T, d) -> (B, T, d); the gate is (B, T, stripes), the memory (B, T, rank).
    """

    stripes: int = setting(2, low=1, high=64, meaning="number S of stripes with a gate of their own")
    rank: int = setting(8, low=1, high=256, meaning="number of latents r held by all stripes together")
    resting: float = setting(
        0.2, low=0.0, high=0.9, before=0.5, meaning="how far a gate is open while Go and NoGo are silent"
    )

    def build(self, host: Host) -> None:
        self.rank = min(self.rank, self.d_out)
        self.stripes = min(self.stripes, self.rank)
        self.reader = read_in(self.rank + 2 * self.stripes, self.d_out)  # rows: content, Go, NoGo
        self.writer = read_out(self.d_out, self.rank)
        self.go_bias = nn.Parameter(torch.zeros(self.stripes))
        self.nogo_bias = nn.Parameter(torch.zeros(self.stripes))
        self.dopamine = nn.Parameter(torch.zeros(self.stripes))
        self.register_buffer("membership", group_matrix(self.rank, self.stripes), persistent=False)

    def code(self, drive: Tensor, context: Context) -> Tensor:
        content, go, nogo = drive.split([self.rank, self.stripes, self.stripes], -1)
        opened = self.opening(go, nogo) @ self.membership.mT
        return recurrence("memory", 1 - opened, opened * content, context)

    def opening(self, go: Tensor, nogo: Tensor) -> Tensor:
        """How far the gate of each stripe opens, from 0 to 1: two (..., stripes) -> (..., stripes)."""
        dopamine = torch.tanh(self.dopamine)
        support, veto = (1 + dopamine) * rectified(go + self.go_bias), (1 - dopamine) * rectified(nogo + self.nogo_bias)
        balance = support - veto
        reach = 1 - self.resting
        # The sigmoid has the slope of the line between its limits where that is at one half.
        smooth = torch.sigmoid(4 * reach * balance + 4 * (self.resting - 0.5))
        return with_slope((self.resting + reach * balance).clamp(0.0, 1.0), smooth)
