"""Spike-frequency adaptation: a slow current that a cell's own drive builds up is subtracted from its response."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from bioadapt.primitives.alignment import front_aligned
from bioadapt.primitives.base import Context, Fused, Host, Scaled, setting
from bioadapt.primitives.frames import group_matrix, products_pay
from bioadapt.primitives.time import decay_of, is_short, mean_reading, past_trace
from bioadapt.registry import register_primitive


class Subtraction(Fused):
    """-scale sgn(x) min(|x|, current): x and current (..., d), scale (d,)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, current: Tensor, scale: Tensor) -> Tensor:
        ctx.save_for_backward(x, current, scale)
        return x.abs().minimum(current).mul_(x.sign()).mul_(-scale)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x, current, scale = ctx.saved_tensors
        sign, rate = x.sign(), x.abs()
        on_lost = (grad * sign).neg_()
        on_scale = rate.minimum(current).mul_(on_lost).sum(tuple(range(x.dim() - 1)))
        on_current = current.clone().lt_(rate).mul_(on_lost.mul_(scale))
        return on_lost.sub_(on_current).mul_(sign), on_current, on_scale


class _Adaptation(Fused):
    """`Subtraction` of strength times the current that |x| drives, by matrix products; keeps x alone.

    x (B, T, d) with padding zeroed and at the end; strength and scale (d,), decay (G,).
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, strength: Tensor, scale: Tensor, decay: Tensor, both_ways: bool) -> Tensor:
        ctx.save_for_backward(x, strength, scale, decay)
        ctx.both_ways = both_ways
        rate = x.abs()
        # The trace is linear, so that it may run over what is subtracted, and the strength is multiplied in but once.
        rates, drive = _by_group(rate, decay), _by_group(rate * strength, decay)
        kernels = _kernels(decay, x.shape[1], both_ways)
        lost = (kernels[0] @ drive).minimum(rates)
        for kernel in kernels[1:]:
            lost.add_((kernel @ drive).minimum(rates))
        return _by_token(lost, x).mul_(x.sign()).mul_(scale * (-1 / len(kernels)))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, None]:
        x, strength, scale, decay = ctx.saved_tensors
        sign, rate = x.sign(), x.abs()
        kernels = _kernels(decay, x.shape[1], ctx.both_ways)
        on_lost = (grad * sign).mul_(-1 / len(kernels))
        on_minimum = on_lost * scale
        rates, drive, on_minima = (_by_group(t, decay) for t in (rate, rate * strength, on_minimum))
        lost, on_currents, on_drive = (torch.zeros_like(rates) for _ in range(3))
        on_decay = torch.zeros_like(decay)
        for kernel in kernels:
            current = kernel @ drive
            on_current = current.clone().lt_(rates).mul_(on_minima)  # comparing in place spares the CPU slow booleans
            heard = kernel.mT @ on_current
            on_decay += _inner(heard, current)
            on_currents.add_(on_current)
            on_drive.add_(heard)
            lost.add_(current.minimum(rates))
        on_decay = (on_decay - _inner(on_drive, drive)) / (1 - decay)
        on_drive, axes = _by_token(on_drive, x), (0, 1)
        on_strength, on_scale = rate.mul_(on_drive).sum(axes), on_lost.mul_(_by_token(lost, x)).sum(axes)
        on_x = on_minimum.mul_(len(kernels)).sub_(_by_token(on_currents, x)).addcmul_(on_drive, strength).mul_(sign)
        return on_x, on_strength, on_scale, on_decay, None


def _by_group(x: Tensor, decay: Tensor) -> Tensor:
    """A copy (G, T, B c) of x (B, T, G c): one product for each group then serves all sequences."""
    return x.unflatten(-1, (len(decay), -1)).permute(2, 1, 0, 3).flatten(2)


def _by_token(z: Tensor, x: Tensor) -> Tensor:
    """The inverse of `_by_group`; x tells the shape."""
    return z.unflatten(2, (x.shape[0], -1)).permute(2, 1, 0, 3).reshape(x.shape)


def _inner(a: Tensor, b: Tensor) -> Tensor:
    """The inner product of each group: two (G, ...) -> (G,)."""
    return (a * b).sum((1, 2))


def _kernels(decay: Tensor, steps: int, both_ways: bool) -> list[Tensor]:
    """(1 - a) a^(t - 1 - s) at (t, s < t), else 0, and what reading backwards makes of it: each (G, T, T)."""
    ages = torch.arange(steps - 2, -1, -1, device=decay.device)
    weights = torch.cat([decay[:, None] ** ages, decay.new_zeros(decay.shape[0], steps)], 1)
    kernel = (weights * (1 - decay[:, None])).unfold(1, steps, 1).flip(1)  # it depends on differences of time alone
    return [kernel, kernel.mT] if both_ways else [kernel]


@register_primitive("spike_frequency_adaptation", stage="dynamics", kind="causal", zero_at="gate", zero_scale=16.0)
class SpikeFrequencyAdaptation(Scaled):
    """Each channel answers fully to what is new and less to what lasts, and is silent, not reversed, afterwards.

    Biology: calcium-driven and slow potassium currents grow with a cell's own firing and subtract from its drive, so
    that its rate falls from onset to a lower steady level.

    Equation: w = E_tau(|x|); f = sgn(x) [|x| - beta w_{t-1}]_+; delta = f - x, with beta = 1/2 at birth and tau of each
    group spread evenly in its logarithm from 4 to 64 tokens. The current is driven by the input, not by the output,
    which keeps the recurrence linear and leaves |x| (1 - beta) in the end.

    Reference: Benda and Herz 2003, A universal model for spike-frequency adaptation, Neural Comput.

    Shapes: x (B, T, d) -> (B, T, d); the current w is (B, T, d).
    """

    reads_both_ways = True
    groups: int = setting(16, low=1, high=4096, meaning="number of channel groups that share a time constant")

    def build(self, host: Host) -> None:
        self.groups = min(self.groups, self.d_out)
        self.strength = nn.Parameter(torch.zeros(self.d_out))
        self.log_tau = nn.Parameter(torch.linspace(math.log(4), math.log(64), self.groups))
        self.products = products_pay(self.d_out, self.groups)
        self.register_buffer("membership", group_matrix(self.d_out, self.groups), persistent=False)

    def transform(self, x: Tensor, context: Context) -> Tensor:
        def one_way(series: Tensor, around: Context) -> Tensor:
            strength, decay = self.constants()
            current = past_trace("current", strength * series.abs(), decay, around)
            return series.sign() * torch.relu(series.abs() - current) - series

        return mean_reading(one_way, x, context)

    def scaled_change(self, x: Tensor, context: Context, scale: Tensor) -> Tensor:
        if self.products and context.resets is None and context.state is None and is_short(x.shape[1]):
            return front_aligned(lambda moved, around: self.by_products(moved, around, scale), x, context)
        return mean_reading(lambda series, around: self.by_scan(series, around, scale), x, context)

    def by_products(self, x: Tensor, context: Context, scale: Tensor) -> Tensor:
        """`scaled_change` where padding is zero and at the end."""
        return _Adaptation.apply(x, torch.sigmoid(self.strength), scale, decay_of(self.log_tau), context.bidirectional)

    def by_scan(self, x: Tensor, context: Context, scale: Tensor) -> Tensor:
        """`scaled_change` for one reading of time, in any context."""
        strength, decay = context.once(self.constants)
        return Subtraction.apply(x, past_trace("current", strength * x.abs(), decay, context), scale)

    def constants(self) -> tuple[Tensor, Tensor]:
        """beta, and the decay of each channel: (d,) each."""
        return torch.sigmoid(self.strength), decay_of(self.log_tau) @ self.membership.mT
