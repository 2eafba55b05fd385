"""Intrinsic plasticity: a neuron tunes gain and threshold until its rates are exponentially distributed."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from bioadapt.primitives.base import Context, Fused, Host, LocalRule, Primitive, setting
from bioadapt.primitives.frames import masked_mean, measured_scale, token_count, token_scale
from bioadapt.registry import register_primitive

FLATTEST, STEEPEST = 0.05, 20.0


class _Excess(Fused):
    """Keeps x and the rates."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, frame: Tensor, rate: Tensor, slope: Tensor, scale: Tensor, target: float, with_x: bool
    ) -> Tensor:
        ctx.save_for_backward(x, frame, rate, slope, scale)
        ctx.target, ctx.with_x = target, with_x
        change = (rate - target).mul_(frame)
        return torch.addcmul(x, change, scale, out=change) if with_x else change.mul_(scale)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, frame, rate, slope, scale = ctx.saved_tensors
        excess, pulled = rate - ctx.target, grad * frame
        on_scale = (excess * pulled).sum(tuple(range(x.dim() - 1)))
        on_x = torch.addcmul(rate, rate, rate, value=-1).mul_(pulled.mul_(scale)).mul_(slope)  # times the frame
        on_frame = excess.mul_(scale).mul_(grad).sum(-1, keepdim=True)
        on_x.div_(frame)
        on_frame -= torch.linalg.vecdot(on_x, x)[..., None] / frame
        on_x.addcmul_(x, on_frame.div_(frame), value=1 / x.shape[-1])
        return on_x.add_(grad) if ctx.with_x else on_x, None, None, None, on_scale, None, None


def excess(
    x: Tensor, frame: Tensor, rate: Tensor, slope: Tensor, scale: Tensor, target: float, with_x: bool = False
) -> Tensor:
    """``scale`` times s (rate - target), plus x if ``with_x``.

    rate (..., d) = sigmoid(slope x / s + ...) and the frame s (..., 1) are those of x (..., d), as is their gradient;
    slope and scale (d,).
    """
    return _Excess.apply(x, frame, rate, slope, scale, target, with_x)


@register_primitive(
    "intrinsic_plasticity", stage="dendritic", kind="pointwise", zero_at="gate", zero_scale=16.0, learns=True
)
class IntrinsicPlasticity(LocalRule, Primitive):
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
        self.watch(x, frame, rate, context)
        return frame * (rate - self.target)

    def scaled(self, x: Tensor, context: Context, scale: Tensor, with_x: bool) -> Tensor:
        with torch.no_grad():
            frame = measured_scale(x)
            rate = torch.addcmul(self.offset, x / frame, self.slope).sigmoid_()
        self.watch(x, frame, rate, context)
        slope = self.slope.clone() if self.training else self.slope  # it may have learned before the backward reads it
        return excess(x, frame, rate, slope, scale, self.target, with_x)

    @torch.no_grad()
    def watch(self, x: Tensor, frame: Tensor, rate: Tensor, context: Context) -> None:
        """Observe how far the rates are from their target, and how that goes with the input."""
        if self.training and context.observing:
            u = x / frame
            error = (rate - (2 * self.target + 1)).mul_(rate).div_(self.target).add_(1)
            mean, by_input = masked_mean(error, context.mask), masked_mean(u * error, context.mask)
            self.observe(context, tokens=token_count(u, context.mask), error=mean, error_by_input=by_input)

    def learn(self, fresh: Tensor) -> None:
        pace = fresh * self.rate
        self.offset.add_(pace * self.observed_error)
        self.slope.add_(pace * (1 / self.slope + self.observed_error_by_input)).clamp_(FLATTEST, STEEPEST)
