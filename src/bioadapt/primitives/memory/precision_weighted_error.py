"""Precision-weighted error: a surprise counts as much as its source is reliable."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from bioadapt.primitives.alignment import front_aligned
from bioadapt.primitives.base import Context, Fused, Host, Scaled, setting
from bioadapt.primitives.deviations import deviations
from bioadapt.primitives.frames import (
    group_matrix,
    group_mean_square,
    mean_square,
    pooling_matrix,
    positive,
    products_pay,
)
from bioadapt.primitives.modulation import modulated, per_channel
from bioadapt.primitives.time import decay_of, mean_reading, past_trace, readings
from bioadapt.registry import register_primitive


class _Weighting(Fused):
    """scale sum_r gains_r errors_r: scale (G, c), gains (R, G, T, B), R errors (G, T, B, c) -> (B, T, G, c)."""

    @staticmethod
    def forward(ctx: Any, scale: Tensor, gains: Tensor, *errors: Tensor) -> Tensor:
        ctx.save_for_backward(scale, gains, *errors)
        total = errors[0] * gains[0, ..., None]
        for error, gain in zip(errors[1:], gains[1:], strict=True):
            total.addcmul_(error, gain[..., None])
        return total.permute(2, 1, 0, 3).contiguous().mul_(scale)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:
        scale, gains, *errors = ctx.saved_tensors
        moved = grad.permute(2, 1, 0, 3).contiguous()
        products = [(moved * error).flatten(1, 2) for error in errors]  # (G, T B, c)
        on_gains = torch.stack([product @ scale[..., None] for product in products]).view(gains.shape)
        on_scale = sum(gain.flatten(1)[:, None] @ product for gain, product in zip(gains, products, strict=True))
        moved.mul_(scale[:, None, None])
        return on_scale.squeeze(1), on_gains, *(moved * gain[..., None] for gain in gains)


@register_primitive(
    "precision_weighted_error",
    stage="memory",
    kind="causal",
    zero_at="gate",
    aliases=("precision_weighted_prediction_error",),
)
class PrecisionWeightedError(Scaled):
    """The deviation from each channel's own past is divided by how much its group has been deviating.

    Biology: cortical error units are under neuromodulatory gain control, so that errors from a reliable channel weigh
    more than the same errors from a noisy one.

    Equation: e_t = c_t - E_tau(c)_{t-1}; V = E_tau'(<e^2>_g) with V_0 = 1;
    delta_t = rho e_t (1 + sigma) / (V_{t-1} + sigma).

    Reference: Feldman and Friston 2010, Attention, uncertainty, and free-energy, Front Hum Neurosci; Friston 2005, A
    theory of cortical responses, Phil Trans B.

    Shapes: x (B, T, d) -> (B, T, d); the variance V is (B, T, groups).
    """

    reads_both_ways = True
    groups: int = setting(16, low=1, high=4096, meaning="number of channel groups that share a precision")
    tau: float = setting(8.0, low=1.0, high=4096.0, meaning="time constant of the mean at birth, in tokens")
    tau_variance: float = setting(32.0, low=1.0, high=4096.0, meaning="time constant of the variance at birth")

    def build(self, host: Host) -> None:
        self.groups = min(self.groups, self.d_out)
        self.log_tau = nn.Parameter(torch.full((self.groups,), math.log(self.tau)))
        self.log_tau_variance = nn.Parameter(torch.full((self.groups,), math.log(self.tau_variance)))
        self.sigma = positive(0.1, 1)
        self.log_level = nn.Parameter(torch.tensor([host.level]).log())
        self.products = products_pay(self.d_out, self.groups)
        self.register_buffer("membership", group_matrix(self.d_out, self.groups), persistent=False)
        self.register_buffer("pooling", pooling_matrix(self.d_out, self.groups), persistent=False)

    def transform(self, x: Tensor, context: Context) -> Tensor:
        def one_way(series: Tensor, around: Context) -> Tensor:
            error = series - past_trace("mean", series, self.decay(), around)
            return error * (self.precision(error.square() @ self.pooling, around) @ self.membership.T)

        return mean_reading(one_way, x, context)

    def scaled_change(self, x: Tensor, context: Context, scale: Tensor) -> Tensor:
        return self.weighted(x, context, context.once(per_channel, scale, self.membership))

    def weighted(self, x: Tensor, context: Context, channels: Tensor) -> Tensor:
        """The change (B, T, d); ``channels`` (d, groups) is what a gain of each group means to each channel."""
        if self.products and context.resets is None and context.state is None:
            return front_aligned(lambda moved, around: self.by_products(moved, around, channels), x, context)
        return mean_reading(lambda series, around: self.by_scan(series, around, channels), x, context)

    def by_products(self, x: Tensor, context: Context, channels: Tensor) -> Tensor:
        """`weighted` where padding is zero and at the end."""
        z = x.unflatten(-1, (self.groups, -1))
        # The products leave (groups, T, B, c) in memory; all that is wide stays in that order up to the result.
        errors = [e.permute(2, 1, 0, 3) for e in deviations(z, decay_of(self.log_tau), context.bidirectional)]
        powers = [mean_square(e).squeeze(-1).permute(2, 1, 0) for e in errors]
        gains = readings(self.precision, powers[0], context, backwards=powers[-1]) / len(errors)
        scale = channels.sum(1).view(self.groups, -1)
        return _Weighting.apply(scale, gains.permute(0, 3, 2, 1), *errors).flatten(-2)

    def by_scan(self, x: Tensor, context: Context, channels: Tensor) -> Tensor:
        """`weighted` for one reading of time, in any context."""
        error = x - past_trace("mean", x, context.once(self.decay), context)
        return modulated(error, self.precision(group_mean_square(error, self.pooling), context), channels)

    def precision(self, power: Tensor, context: Context) -> Tensor:
        """The gain of each group from the power of the errors before each token: (B, T, groups) -> (B, T, groups)."""
        unit, decay, sigma, full = context.once(self.constants)
        variance = past_trace("variance", power * unit, decay, context, initial=1.0)
        return full / (variance + sigma)

    def decay(self) -> Tensor:
        """Of the mean, for each channel: (d,)."""
        return decay_of(self.log_tau) @ self.membership.T

    def constants(self) -> tuple[Tensor, ...]:
        """1 / rho^2, since errors are in units of x, the trace being linear; the variance's decay; sigma; 1 + sigma."""
        sigma = nn.functional.softplus(self.sigma)
        return torch.exp(-2 * self.log_level), decay_of(self.log_tau_variance), sigma, 1 + sigma
