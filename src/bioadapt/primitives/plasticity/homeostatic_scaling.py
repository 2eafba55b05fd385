"""Homeostatic scaling: a neuron multiplies all its synapses until its mean rate is right."""

from __future__ import annotations

import torch
from torch import Tensor

from bioadapt.primitives.base import Context, Host, LocalRule, Primitive, setting
from bioadapt.primitives.frames import masked_mean, token_count, token_scale
from bioadapt.registry import register_primitive

FAINTEST, STRONGEST = 0.25, 4.0


@register_primitive(
    "homeostatic_scaling",
    stage="plasticity",
    kind="pointwise",
    zero_at="gate",
    zero_scale=8.0,
    merge="left",
    learns=True,
    aliases=("synaptic_scaling",),
)
class HomeostaticScaling(LocalRule, Primitive):
    """A slow gain per channel brings every channel to the mean rate of all.

    Biology: when a cortical neuron is silenced or overdriven for days, all its synapses grow or shrink by one common
    factor, until it fires at its own set point again.

    Equation: delta = (S - 1) x; S starts at 1 and follows S <- S (1 + eta (r* - S r) / r*), held in 1/4..4, with r the
    mean |u| of the channel and r* its mean over channels.

    Reference: Turrigiano et al. 1998, Activity-dependent scaling of quantal amplitude in neocortical neurons, Nature;
    Turrigiano 2008, The self-tuning neuron: synaptic scaling of excitatory synapses, Cell.

    Shapes: x (B, T, d) -> (B, T, d); S is (d,). It has no effect before the first commit.
    """

    rate: float = setting(0.05, low=0.0, high=1.0, meaning="learning rate eta of the scale")

    def build(self, host: Host) -> None:
        self.register_buffer("scale", torch.ones(self.d_out))
        self.declare_statistics(rates=(self.d_out,))

    def transform(self, x: Tensor, context: Context) -> Tensor:
        if self.training and context.observing:
            with torch.no_grad():
                rates = masked_mean(x.abs() / token_scale(x), context.mask)
                self.observe(context, tokens=token_count(x, context.mask), rates=rates)
        return context.once(self.left_matrix) * x

    def learn(self, fresh: Tensor) -> None:
        rates = self.observed_rates
        target = rates.mean().clamp(min=1e-6)
        growth = self.rate * (target - self.scale * rates) / target
        self.scale.mul_(1 + fresh * growth).clamp_(FAINTEST, STRONGEST)

    def left_matrix(self) -> Tensor:
        return self.scale - 1

    def wake(self) -> None:
        super().wake()
        self.scale.copy_(torch.randn_like(self.scale).mul(0.3).exp().clamp(FAINTEST, STRONGEST))
