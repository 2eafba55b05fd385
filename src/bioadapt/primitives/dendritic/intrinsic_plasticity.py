"""Intrinsic plasticity: a neuron tunes gain and threshold until its rates are exponentially distributed."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from bioadapt.primitives.base import Context, Fused, Host, LocalRule, Scaled, setting
from bioadapt.primitives.frames import masked_mean, token_count, token_scale
from bioadapt.registry import register_primitive

FLATTEST, STEEPEST = 0.05, 20.0


class _Excess(Fused):
    """Keeps x and the rates."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, rate: Tensor, slope: Tensor, gate: Tensor, target: float) -> Tensor:
        ctx.save_for_backward(x, scale, rate, slope, gate)
        ctx.target = target
        return (rate - target).mul_(gate).mul_(scale)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, scale, rate, slope, gate = ctx.saved_tensors
        excess, pulled = rate - ctx.target, grad * scale
        on_gate = (excess * pulled).sum(tuple(range(x.dim() - 1)))
        on_x = torch.addcmul(rate, rate, rate, value=-1).mul_(pulled.mul_(gate)).mul_(slope)  # times scale
        on_scale = excess.mul_(gate).mul_(grad).sum(-1, keepdim=True)
        on_x.div_(scale)
        on_scale -= torch.linalg.vecdot(on_x, x)[..., None] / scale
        return on_x, on_scale, None, None, on_gate, None


def excess(x: Tensor, scale: Tensor, rate: Tensor, slope: Tensor, gate: Tensor, target: float) -> Tensor:
    """gate scale (rate - target), where rate = sigmoid(slope x / scale + ...): x (..., d), scale (..., 1)."""
    return _Excess.apply(x, scale, rate, slope, gate, target)


@register_primitive(
    "intrinsic_plasticity", stage="dendritic", kind="pointwise", zero_at="gate", zero_scale=16.0, learns=True
)
class IntrinsicPlasticity(LocalRule, Scaled):
    """A sigmoid whose gain and threshold adapt, so that each unit is mostly silent and rarely strong.

    Biology: neurons change their ion channels until their rates over days have a mean they can afford; of all
    distributions with that mean the exponential carries the most information.

    Equation: y = sigmoid(a u + b), delta = s (y - mu); a starts at 1 and b at logit(mu), and with
    e = 1 - (2 + 1 / mu) y + y^2 / mu they follow b <- b + eta E[e], a <- a + eta E[1 / a + u e], a held in 1/20..20.

    Reference: Triesch 2007, Synergies between intrinsic and synaptic plasticity mechanisms, Neural Comput.

    Shapes: x (B, T, d) -> (B, T, d); a and b are (d,).
    """

    target: float = setting(0.2, low=0.05, high=0.3, meaning="mean rate mu that each unit strives for")
    rate: float = setting(0.02, low=0.0, high=1.0, meaning="learning rate eta of gain and threshold")

    def build(self, host: Host) -> None:
        self.register_buffer("slope", torch.ones(self.d_out))
        self.register_buffer("offset", torch.full((self.d_out,), math.log(self.target / (1 - self.target))))
        self.declare_statistics(error=(self.d_out,), error_by_input=(self.d_out,))

    def transform(self, x: Tensor, context: Context) -> Tensor:
        frame = token_scale(x)
        rate = torch.sigmoid(self.slope.clone() * (x / frame) + self.offset)
        self.watch(x / frame, rate, context)
        return frame * (rate - self.target)

    def scaled_change(self, x: Tensor, context: Context, scale: Tensor) -> Tensor:
        frame = token_scale(x)
        with torch.no_grad():
            u = x / frame
            rate = torch.addcmul(self.offset, u, self.slope).sigmoid_()
        slope = self.slope
        if self.training:
            self.watch(u, rate, context)
            slope = slope.clone()  # it may have learned before the backward reads it
        return excess(x, frame, rate, slope, scale, self.target)

    @torch.no_grad()
    def watch(self, u: Tensor, rate: Tensor, context: Context) -> None:
        """Observe how far the rates are from their target, and how that goes with the input."""
        if self.training and context.observing:
            error = (rate - (2 * self.target + 1)).mul_(rate).div_(self.target).add_(1)
            mean, by_input = masked_mean(error, context.mask), masked_mean(u * error, context.mask)
            self.observe(context, tokens=token_count(u, context.mask), error=mean, error_by_input=by_input)

    def learn(self, fresh: Tensor) -> None:
        pace = fresh * self.rate
        self.offset.add_(pace * self.observed_error)
        self.slope.add_(pace * (1 / self.slope + self.observed_error_by_input)).clamp_(FLATTEST, STEEPEST)
