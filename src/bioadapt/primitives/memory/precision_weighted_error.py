"""Precision-weighted error: a surprise counts as much as its source is reliable."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from bioadapt.primitives.base import Context, Host, Primitive, setting
from bioadapt.primitives.frames import group_matrix, mean_square, positive
from bioadapt.primitives.time import decay_of, deviations, front_aligned, past_trace, readings
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
        # Products take one matrix per group, which pays if that serves several channels.
        self.products = self.d_out % self.groups == 0 and self.d_out // self.groups >= 8
        self.register_buffer("membership", group_matrix(self.d_out, self.groups), persistent=False)

    def transform(self, x: Tensor, context: Context) -> Tensor:
        if self.products and context.resets is None and context.state is None:
            return front_aligned(self.by_products, x, context)
        return readings(self.by_scan, x, context).mean(0)

    def by_products(self, x: Tensor, context: Context) -> Tensor:
        """`transform` where padding is zero and at the end: (B, T, d) -> (B, T, d)."""
        z = x.unflatten(-1, (self.groups, -1))
        errors = deviations(z, decay_of(self.log_tau), context.bidirectional)  # each (B, T, groups, c)
        powers = [mean_square(error).squeeze(-1) for error in errors]
        gains = readings(self.precision, powers[0], context, backwards=powers[-1])[..., None] / len(errors)
        delta = errors[0] * gains[0]
        if context.bidirectional:
            delta = torch.addcmul(delta, errors[1], gains[1])
        return delta.flatten(-2)

    def by_scan(self, x: Tensor, context: Context) -> Tensor:
        """`transform` of one reading of time in any context: (B, T, d) -> (B, T, d)."""
        decay = decay_of(self.log_tau) @ self.membership.T
        error = x - past_trace("mean", x, decay, context)
        power = error.square() @ (self.membership / self.membership.sum(0))
        return error * (self.precision(power, context) @ self.membership.T)

    def precision(self, power: Tensor, context: Context) -> Tensor:
        """The gain of each group from the power of the errors before each token: (B, T, groups) -> (B, T, groups)."""
        power = power * torch.exp(-2 * self.log_level)  # errors are in units of x, for the trace is linear
        variance = past_trace("variance", power, decay_of(self.log_tau_variance), context, initial=1.0)
        sigma = nn.functional.softplus(self.sigma)
        return (1 + sigma) / (variance + sigma)
