"""Synaptic pruning: weak synapses are lost, and the strong ones that remain are scaled."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from bioadapt.primitives.base import Context, Fused, Host, OnWeight, Scaled, setting
from bioadapt.primitives.frames import base_weight, positive
from bioadapt.registry import register_primitive


class _Pruning(Fused):
    """Keeps nothing of the weight's size but the weight itself; backward prunes it again."""

    @staticmethod
    def forward(ctx: Any, v: Tensor, weight: Tensor, threshold: Tensor, factor: Tensor, scale: Tensor) -> Tensor:
        ctx.save_for_backward(v, weight, threshold, factor, scale)
        return v @ _change(weight, pruned(weight, threshold), factor, scale).mT

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        v, weight, threshold, factor, scale = ctx.saved_tensors
        left = pruned(weight, threshold)
        on_weight = grad.flatten(0, -2).mT @ v.flatten(0, -2)
        on_lost = (on_weight * weight).sum(1)
        on_threshold = (on_weight * left.sign()).sum(1).mul_(factor * -scale)
        on_left = on_weight.mul_(left).sum(1)
        on_v = grad @ _change(weight, left, factor, scale) if ctx.needs_input_grad[0] else None
        return on_v, None, on_threshold, on_left * scale, on_left * factor - on_lost


def pruned(weight: Tensor, threshold: Tensor) -> Tensor:
    """sgn(W) [|W| - threshold]_+ by rows: weight (d, n), threshold (d,) -> (d, n)."""
    return weight.abs().sub_(threshold[:, None]).clamp_(min=0.0).mul_(weight.sign())


def _change(weight: Tensor, left: Tensor, factor: Tensor, scale: Tensor) -> Tensor:
    """scale (factor left - W); ``left`` is overwritten."""
    return left.mul_((scale * factor)[:, None]).addcmul_(weight, scale[:, None], value=-1)


@register_primitive(
    "synaptic_pruning",
    stage="dendritic",
    kind="weight",
    zero_at="gate",
    zero_scale=32.0,
    merge="weight",
    needs_input=True,
)
class SynapticPruning(Scaled, OnWeight):
    """The layer's weak weights are set to zero, its strong ones shrunk and scaled, neuron by neuron.

    Biology: during development and sleep weak spines are lost while strong ones stay or grow, at rates that differ from
    cell to cell.

    Equation: W' = sgn(W) a_i [|W| - t_i]_+ with t_i = softplus(raw_i) mean_j |W_ij| and a_i > 0; delta = (W' - W) v.
    Lost synapses have no gradient: a threshold moves by what its surviving synapses ask for.

    Reference: Cai et al. 2025, NSPDI-SNN: An efficient lightweight SNN based on nonlinear synaptic pruning and
    dendritic integration, arXiv:2508.21566.

    Shapes: v (B, T, n) -> (B, T, d); t and a are (d,). A copy of the layer's weight in fp32 is kept, though not saved:
    the weight itself may be quantised, or hold for a while what an adapter beneath was merged into. What is weak goes
    by the weight of the plain layer at the time of injection: over a base into which a LoRA has been merged, that
    weight holds the LoRA, and the same thresholds make another function than over the base with the LoRA beside it.
    """

    threshold: float = setting(0.2, low=0.001, high=10.0, meaning="threshold at birth, in means of |W| of its row")

    def build(self, host: Host) -> None:
        weight = base_weight(host, self.d_out, self.d_in).clone()
        self.register_buffer("synapses", weight, persistent=False)
        self.register_buffer("typical", weight.abs().mean(1), persistent=False)
        self.loss = positive(self.threshold, self.d_out)
        self.log_factor = nn.Parameter(torch.zeros(self.d_out))

    def transform(self, x: Tensor, context: Context) -> Tensor:
        weight = self.synapses
        left = weight.sign() * torch.relu(weight.abs() - self.thresholds()[:, None])
        return context.x_in @ (self.log_factor.exp()[:, None] * left - weight).T

    def scaled_change(self, x: Tensor, context: Context, scale: Tensor) -> Tensor:
        thresholds, factor = context.once(self.thresholds), context.once(torch.exp, self.log_factor)
        return _Pruning.apply(context.x_in, self.synapses, thresholds, factor, scale)

    def thresholds(self) -> Tensor:
        """t, (d,)."""
        return nn.functional.softplus(self.loss) * self.typical

    def weight_delta(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        with torch.no_grad():
            left = pruned(self.synapses, self.thresholds())
            return (self.log_factor.exp()[:, None] * left - self.synapses).to(weight.device), None

    @torch.no_grad()
    def harden(self) -> None:
        """Open all gates fully: a merged weight is then zero where it was pruned, not only smaller."""
        self.gate.fill_(1.0 / self.zero_scale)
