"""The thalamic relay: faithful while it is busy, a burst after silence."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from bioadapt.primitives.base import Context, Fused, Host, Scaled, setting
from bioadapt.primitives.frames import group_matrix, group_mean_magnitude, inverse_softplus, pooling_matrix
from bioadapt.primitives.time import decay_of, mean_reading, past_trace
from bioadapt.registry import register_primitive

RESTING = 0.8  # activity before the first token: a relay starts in its tonic mode


LEAK = 0.01  # how much of what lies below the threshold counts in the gradients of amplification and threshold


class _Bursting(Fused):
    """scale_i mode_g (A_i sgn(x_i) [|x_i| - t_i]_+ - x_i); keeps x, the mode of each group and what is small."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, mode: Tensor, channels: Tensor, scale: Tensor, amplification: Tensor, threshold: Tensor
    ) -> Tensor:
        ctx.save_for_backward(x, mode, channels, scale, amplification, threshold)
        change = _change(x, x.clamp(-threshold, threshold), scale, amplification)
        return change.mul_(mode @ channels.mT)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, mode, channels, scale, amplification, threshold = ctx.saved_tensors
        axes = tuple(range(x.dim() - 1))
        below = x.clamp(-threshold, threshold)
        change = _change(x, below.clone(), scale, amplification)
        on_mode = change.mul_(grad) @ channels
        onwards = (mode @ channels.mT).mul_(grad)
        along_x = torch.mul(onwards, x, out=change).sum(axes)
        along_below = torch.mul(onwards, below, out=change).sum(axes)
        beyond = torch.sub(x, below, out=below).sign_()  # 0 up to the threshold, the sign of x beyond it
        along_beyond = torch.mul(onwards, beyond, out=change).sum(axes)
        burst = scale * amplification
        on_scale = amplification * (along_x - along_below) - along_x
        on_amplification = scale * (along_x - (1 - LEAK) * along_below)
        on_threshold = -burst * ((1 - LEAK) * along_beyond + LEAK * along_below / threshold.clamp(min=1e-20))
        on_x = onwards.mul_(beyond.abs_().mul_(burst).sub_(scale))
        return on_x, on_mode, None, on_scale, on_amplification, on_threshold


def _change(x: Tensor, below: Tensor, scale: Tensor, amplification: Tensor) -> Tensor:
    """scale (A (x - below) - x); ``below``, what of x lies up to the threshold, is overwritten."""
    burst = scale * amplification
    return below.mul_(-burst).addcmul_(x, burst - scale)


@register_primitive("thalamic_relay", stage="sensory_gain", kind="causal", zero_at="gate", zero_scale=8.0)
class ThalamicRelay(Scaled):
    """Past silence switches a group of channels from relaying to answering strong inputs in bursts.

    Biology: a depolarised thalamic cell passes its input on spike by spike; after a while of hyperpolarisation its
    low-threshold calcium current is ready, and the next strong input sets off a burst, while a weak one does nothing.

    Equation: m = E_tau(<|c|>_g) with c = x / rho and m_0 = 0.8; b_t = sigmoid(beta (theta - m_{t-1}));
    delta = rho b_t (A sgn(c) [|c| - theta_b]_+ - c).

    Reference: Sherman 2001, Tonic and burst firing: dual modes of thalamocortical relay, TINS.

    Shapes: x (B, T, d) -> (B, T, d); the burst mode b is (B, T, groups). Where the features stay below theta_b, A and
    theta_b would never get a gradient; to these two, a hundredth of what lies below it looks as if it passed.
    """

    reads_both_ways = True
    groups: int = setting(16, low=1, high=4096, meaning="number of channel groups that switch together")

    def build(self, host: Host) -> None:
        self.groups = min(self.groups, self.d_out)
        self.log_tau = nn.Parameter(torch.full((self.groups,), math.log(8.0)))
        self.threshold = nn.Parameter(torch.full((self.groups,), 0.4))
        self.steepness = nn.Parameter(torch.full((self.groups,), 8.0))
        self.amplification = nn.Parameter(torch.full((self.groups,), 2.5))
        self.burst_threshold = nn.Parameter(torch.full((self.groups,), inverse_softplus(0.5)))
        self.log_level = nn.Parameter(torch.tensor([host.level]).log())
        self.register_buffer("membership", group_matrix(self.d_out, self.groups), persistent=False)
        self.register_buffer("pooling", pooling_matrix(self.d_out, self.groups), persistent=False)

    def scaled_change(self, x: Tensor, context: Context, scale: Tensor) -> Tensor:
        level, amplification, threshold = context.once(self.constants)
        mode = mean_reading(self.mode, group_mean_magnitude(x, self.pooling) / level, context)
        return _Bursting.apply(x, mode, self.membership, scale, amplification, threshold)

    def constants(self) -> tuple[Tensor, Tensor, Tensor]:
        """rho (1,); what a burst is amplified by and its threshold, in units of x, (d,) each."""
        level = self.log_level.exp()
        threshold = self.membership @ (level * nn.functional.softplus(self.burst_threshold))
        return level, self.membership @ self.amplification, threshold

    def mode(self, activity: Tensor, context: Context) -> Tensor:
        """How far each group is ready to burst, from the activity before: (B, T, groups) -> (B, T, groups)."""
        recent = past_trace("activity", activity, context.once(decay_of, self.log_tau), context, initial=RESTING)
        return torch.sigmoid(self.steepness * (self.threshold - recent))
