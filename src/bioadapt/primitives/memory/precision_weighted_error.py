"""Precision-weighted error: a surprise counts as much as its source is reliable."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from bioadapt.primitives.base import Context, Host, Primitive, setting
from bioadapt.primitives.frames import group_matrix, mean_square, positive
from bioadapt.primitives.time import decay_of, past_trace
from bioadapt.registry import register_primitive


@register_primitive(
    "precision_weighted_error",
    stage="memory",
    kind="causal",
    zero_at="gate",
    aliases=("precision_weighted_prediction_error",),
)
class PrecisionWeightedError(Primitive):
    """The deviation from each channel's own past is divided by how much its group has been deviating.

    Biology: cortical error units are under neuromodulatory gain control, so that errors from a reliable channel weigh
    more than the same errors from a noisy one.

    Equation: e_t = c_t - E_tau(c)_{t-1}; V = E_tau'(<e^2>_g) with V_0 = 1;
    delta_t = rho e_t (1 + sigma) / (V_{t-1} + sigma).

    Reference: Feldman and Friston 2010, Attention, uncertainty, and free-energy, Front Hum Neurosci; Friston 2005, A
    theory of cortical responses, Phil Trans B.

    Shapes: x (B, T, d) -> (B, T, d); the variance V is (B, T, groups).
    """

    groups: int = setting(16, low=1, high=4096, meaning="number of channel groups that share a precision")
    tau: float = setting(8.0, low=1.0, high=4096.0, meaning="time constant of the mean at birth, in tokens")
    tau_variance: float = setting(32.0, low=1.0, high=4096.0, meaning="time constant of the variance at birth")

    def build(self, host: Host) -> None:
        self.groups = min(self.groups, self.d_out)
        self.log_tau = nn.Parameter(torch.full((self.groups,), math.log(self.tau)))
        self.log_tau_variance = nn.Parameter(torch.full((self.groups,), math.log(self.tau_variance)))
        self.sigma = positive(0.1, 1)
        self.log_level = nn.Parameter(torch.tensor([host.level]).log())
        # Groups of equal size become an axis of their own; otherwise every channel is a group of one.
        self.even = self.d_out % self.groups == 0
        self.register_buffer("membership", group_matrix(self.d_out, self.groups), persistent=False)

    def transform(self, x: Tensor, context: Context) -> Tensor:
        if not context.bidirectional:
            return self.weighted(x, context)
        return self.weighted(x, context, share=0.5) + self.weighted(x, context, share=0.5, backwards=True)

    def weighted(self, x: Tensor, context: Context, share: float = 1.0, backwards: bool = False) -> Tensor:
        """The errors of one reading of time, times their precision: (B, T, d) -> (B, T, d)."""
        error = self.error(x, context, backwards)  # in units of x: the trace is linear, so the level cancels
        gain = share * self.precision(error, context, backwards)
        return (error * self.spread(gain)).flatten(-2)

    def error(self, x: Tensor, context: Context, backwards: bool = False) -> Tensor:
        """x minus what its own past leads to expect: (B, T, d) -> (B, T, groups, channels of a group)."""
        z = x.unflatten(-1, (self.groups if self.even else self.d_out, -1))
        return z - past_trace("mean", z, self.spread(decay_of(self.log_tau)), context, backwards=backwards)

    def precision(self, error: Tensor, context: Context, backwards: bool = False) -> Tensor:
        """The gain of each group, (B, T, groups), from the errors before each token."""
        power = mean_square(error).squeeze(-1)
        if not self.even:
            power = power @ (self.membership / self.membership.sum(0))
        power = power * torch.exp(-2 * self.log_level)
        variance = past_trace(
            "variance", power, decay_of(self.log_tau_variance), context, initial=1.0, backwards=backwards
        )
        sigma = nn.functional.softplus(self.sigma)
        return (1 + sigma) / (variance + sigma)

    def _both_ways(self, x: Tensor, context: Context) -> Tensor:
        return self.gate * self.transform(x, context)  # reads backwards without reversing x

    def spread(self, values: Tensor) -> Tensor:
        """One value per group (..., groups) -> one per group or per channel, (..., groups or d, 1)."""
        return (values if self.even else values @ self.membership.T)[..., None]
