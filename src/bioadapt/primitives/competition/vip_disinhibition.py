"""VIP disinhibition: one class of interneurons silences another, which opens the gate that the other held shut."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from bioadapt.primitives.base import Context, Fused, Host, Scaled, setting
from bioadapt.primitives.frames import (
    group_matrix,
    group_mean_magnitude,
    pooling_matrix,
    positive,
    read_in,
    token_scale,
)
from bioadapt.primitives.surrogate import rectified, with_slope
from bioadapt.registry import register_primitive


class _Microcircuit(Fused):
    """Keeps x and what is narrow; backward computes the rest again."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, subtracted: Tensor, gain: Tensor, scale: Tensor, membership: Tensor) -> Tensor:
        ctx.save_for_backward(x, subtracted, gain, scale, membership)
        change = _beyond(x.abs(), subtracted, membership).mul_(x.sign())
        return change.mul_(gain @ membership.mT).sub_(x).mul_(scale)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, None]:
        x, subtracted, gain, scale, membership = ctx.saved_tensors
        sign, gains = x.sign(), gain @ membership.mT
        left = _beyond(x.abs(), subtracted, membership)
        fires = left.sign()
        left.mul_(sign)
        on_scale = (left * gains).sub_(x).mul_(grad).sum(tuple(range(x.dim() - 1)))
        on_change = grad * scale
        on_gain = left.mul_(on_change) @ membership
        on_left = gains.mul_(on_change).mul_(fires)
        on_x = on_left - on_change
        return on_x, on_left.mul_(sign) @ membership.mul(-1), on_gain, on_scale, None


def _beyond(rate: Tensor, subtracted: Tensor, membership: Tensor) -> Tensor:
    """[rate - subtracted]_+, where all units of a group lose the same; ``rate`` is overwritten."""
    return rate.sub_(subtracted @ membership.mT).clamp_(min=0.0)


def microcircuit(x: Tensor, subtracted: Tensor, gain: Tensor, scale: Tensor, membership: Tensor) -> Tensor:
    """scale (gain sgn(x) [|x| - subtracted]_+ - x).

    x (..., d); subtracted and gain (..., G), one for each group; scale (d,); membership (d, G), frozen 0/1.
    """
    return _Microcircuit.apply(x, subtracted, gain, scale, membership)


@register_primitive(
    "vip_disinhibition", stage="competition", kind="pointwise", zero_at="gate", zero_scale=8.0, needs_input=True
)
class VipDisinhibition(Scaled):
    """Local activity recruits subtractive and divisive inhibition; the layer's input can call off the subtractive.

    Biology: in cortex, SST cells inhibit the dendrites of pyramidal cells and PV cells their bodies. VIP cells, driven
    by top-down and neuromodulatory input, inhibit the SST cells and thus release the dendrites.

    Equation: a = <|c|>_g; vip = softplus(V v / rms(v) + b), sst = [w_s a - w_v vip]_+, pv = w_p a;
    f = sgn(c) [|c| - sst]_+ / (1 + pv); delta = rho (f - c). In backward sst has the slope of a smooth threshold:
    where the layer is quiet, SST cells are silent, and what calls them off could never learn otherwise.

    Reference: Pfeffer et al. 2013, Inhibition of inhibition in visual cortex: the logic of connections between
    molecularly distinct interneurons, Nat Neurosci; Pi et al. 2013, Cortical interneurons that specialize in
    disinhibitory control, Nature.

    Shapes: v (B, T, n), x (B, T, d) -> (B, T, d); vip, sst and pv are (B, T, groups).
    """

    groups: int = setting(8, low=1, high=256, meaning="number G of channel groups with interneurons of their own")

    def build(self, host: Host) -> None:
        self.groups = g = min(self.groups, self.d_out)
        self.context_weights = read_in(g, self.d_in)
        self.context_bias = nn.Parameter(torch.zeros(g))
        self.onto_sst, self.vip_onto_sst, self.onto_pv = positive(1.0, g), positive(0.5, g), positive(0.5, g)
        self.log_level = nn.Parameter(torch.tensor([host.level]).log())
        self.register_buffer("membership", group_matrix(self.d_out, g), persistent=False)
        self.register_buffer("pooling", pooling_matrix(self.d_out, g), persistent=False)

    def transform(self, x: Tensor, context: Context) -> Tensor:
        subtracted, gain = (each @ self.membership.T for each in self.interneurons(x, context))
        return gain * x.sign() * torch.relu(x.abs() - subtracted) - x

    def scaled_change(self, x: Tensor, context: Context, scale: Tensor) -> Tensor:
        return microcircuit(x, *self.interneurons(x, context), scale, self.membership)

    def interneurons(self, x: Tensor, context: Context) -> tuple[Tensor, Tensor]:
        """What SST cells subtract, in units of x, and the gain that PV cells leave: each (B, T, groups)."""
        softplus, v, once = nn.functional.softplus, context.x_in, context.once
        level = once(torch.exp, self.log_level)
        activity = group_mean_magnitude(x, self.pooling)
        vip = softplus((v @ self.context_weights.T) / token_scale(v) + self.context_bias)
        drive = once(softplus, self.onto_sst) * activity - level * once(softplus, self.vip_onto_sst) * vip
        sst = with_slope(torch.relu(drive), level * rectified(drive / level))
        return sst, 1 / (1 + once(softplus, self.onto_pv) * activity / level)
