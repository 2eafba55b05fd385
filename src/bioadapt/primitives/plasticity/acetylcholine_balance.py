"""Acetylcholine: under expected uncertainty the input counts, in a familiar stream the context does."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from bioadapt.primitives.alignment import front_aligned
from bioadapt.primitives.base import Context, Fused, Host, Scaled, setting
from bioadapt.primitives.deviations import deviations
from bioadapt.primitives.frames import group_matrix, mean_square, positive, products_pay, token_scale, unit
from bioadapt.primitives.time import decay_of, mean_reading, past_trace, readings
from bioadapt.registry import register_primitive

FASTEST, SLOWEST = 2.0, 16.0  # time constants of the context at birth, in tokens
UNCERTAINTY = 0.5  # before the first token


class _Power(Fused):
    """Half the mean square of what each token is wrong by: error (G, T, B, c) -> (B, T, 1)."""

    @staticmethod
    def forward(ctx: Any, error: Tensor) -> Tensor:
        ctx.save_for_backward(error)
        channels = error.shape[0] * error.shape[-1]
        return error.square().sum(0).sum(-1).mul_(0.5 / channels).mT[..., None]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (error,) = ctx.saved_tensors
        channels = error.shape[0] * error.shape[-1]
        return error * _spread(grad.squeeze(-1).mT / channels, error.shape[-1])


class _Interpolation(Fused):
    """scale sum_r shares_r errors_r: scale (G, c), shares (R, T, B), R errors (G, T, B, c) -> (B, T, G, c)."""

    @staticmethod
    def forward(ctx: Any, scale: Tensor, shares: Tensor, *errors: Tensor) -> Tensor:
        ctx.save_for_backward(scale, shares, *errors)
        total = errors[0] * _spread(shares[0], scale.shape[-1])
        for error, share in zip(errors[1:], shares[1:], strict=True):
            total.addcmul_(error, _spread(share, scale.shape[-1]))
        return total.permute(2, 1, 0, 3).contiguous().mul_(scale)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:
        scale, shares, *errors = ctx.saved_tensors
        moved = grad.permute(2, 1, 0, 3).contiguous()
        spare, on_scale, on_shares = torch.empty_like(moved), torch.zeros_like(scale), torch.empty_like(shares)
        for i, error in enumerate(errors):
            product = torch.mul(moved, error, out=spare).flatten(1, 2)  # (G, T B, c)
            on_shares[i] = (product @ scale[..., None]).sum(0).view_as(shares[i])
            on_scale += shares[i].flatten() @ product
        moved.flatten(2).mul_(scale.repeat(1, grad.shape[0])[:, None])
        first, *others = (_spread(share, scale.shape[-1]) for share in shares)
        on_errors = [torch.mul(moved, first, out=spare), *(moved.mul_(other) for other in others)]
        return on_scale, on_shares, *on_errors


def _spread(share: Tensor, width: int) -> Tensor:
    """(T, B) -> (T, B, width) in memory: a factor of whole tokens is slow to repeat over so few channels at a time."""
    return share[..., None].expand(-1, -1, width).contiguous()


@register_primitive("acetylcholine_balance", stage="plasticity", kind="causal", zero_at="gate", zero_scale=16.0)
class AcetylcholineBalance(Scaled):
    """Features move towards their own recent past as far as that has been predicting them well.

    Biology: acetylcholine is high where an animal knows that it cannot predict, and then strengthens input from the
    senses against recurrent connections; where it is low, cortex completes from context.

    Equation: m = E_tau(u); e_t = mean_d (u_t - m_{t-1})^2 / 2; h = E_16(e) with h_0 = 0.5;
    alpha = sigmoid(kappa (h_{t-1} - theta)); delta = s (1 - alpha) (m_{t-1} - u).

    Reference: Hasselmo 2006, The role of acetylcholine in learning and memory, Curr Opin Neurobiol; Yu and Dayan 2005,
    Uncertainty, neuromodulation, and attention, Neuron.

    Shapes: x (B, T, d) -> (B, T, d); the uncertainty h is (B, T, 1).
    """

    reads_both_ways = True
    groups: int = setting(16, low=1, high=4096, meaning="number of channel groups that share a time constant")

    def build(self, host: Host) -> None:
        self.groups = min(self.groups, self.d_out)
        self.log_tau = nn.Parameter(torch.linspace(math.log(FASTEST), math.log(SLOWEST), self.groups))
        self.log_tau_uncertainty = nn.Parameter(torch.tensor([math.log(16.0)]))
        self.steepness = positive(16.0, 1)
        self.threshold = nn.Parameter(torch.tensor([0.45]))
        self.products = products_pay(self.d_out, self.groups)
        self.register_buffer("membership", group_matrix(self.d_out, self.groups), persistent=False)

    def transform(self, x: Tensor, context: Context) -> Tensor:
        return token_scale(x) * mean_reading(self.by_scan, unit(x), context)

    def scaled_change(self, x: Tensor, context: Context, scale: Tensor) -> Tensor:
        if self.products and context.resets is None and context.state is None:
            return front_aligned(lambda moved, around: self.by_products(moved, around, scale), x, context)
        size = token_scale(x)
        return scale * size * mean_reading(self.by_scan, x / size, context)

    def by_products(self, x: Tensor, context: Context, scale: Tensor) -> Tensor:
        """`scaled_change` where padding is zero and at the end."""
        # The products leave (groups, T, B, c) in memory; all that is wide stays in that order up to the result.
        size = token_scale(x)
        z = (x * size.reciprocal()).unflatten(-1, (self.groups, -1))
        errors = [e.permute(2, 1, 0, 3) for e in deviations(z, decay_of(self.log_tau), context.bidirectional)]
        powers = [_Power.apply(e) for e in errors]
        trust = readings(self.trust, powers[0], context, backwards=powers[-1])  # (R, B, T, 1)
        shares = (trust * size * (-1 / len(errors))).squeeze(-1).transpose(1, 2)
        return _Interpolation.apply(scale.view(self.groups, -1), shares, *errors).flatten(-2)

    def by_scan(self, u: Tensor, context: Context) -> Tensor:
        """The change of u (B, T, d) for one reading of time, in any context."""
        error = past_trace("context", u, context.once(self.decay), context) - u
        return self.trust(0.5 * mean_square(error), context) * error

    def decay(self) -> Tensor:
        """Of the context, for each channel: (d,)."""
        return decay_of(self.log_tau) @ self.membership.T

    def trust(self, power: Tensor, context: Context) -> Tensor:
        """1 - alpha from the power of the errors before each token: (B, T, 1) -> (B, T, 1)."""
        decay = context.once(decay_of, self.log_tau_uncertainty)
        uncertainty = past_trace("uncertainty", power, decay, context, initial=UNCERTAINTY)
        return torch.sigmoid(context.once(nn.functional.softplus, self.steepness) * (self.threshold - uncertainty))
