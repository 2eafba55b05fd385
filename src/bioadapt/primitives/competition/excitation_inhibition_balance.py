"""Excitation-inhibition balance: the two halves of a signal are pulled towards equal strength."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from bioadapt.primitives.base import Context, Fused, Host, Primitive, setting
from bioadapt.primitives.frames import group_matrix, group_mean_magnitude, pooling_matrix
from bioadapt.primitives.modulation import per_channel, times
from bioadapt.registry import register_primitive

FAINTEST = 1e-12  # keeps the logarithm of a silent half finite
CHANNELS = 32  # a balance needs a population: no group is smaller, unless the layer is
LARGEST_RATIO = 8.0


class _TwoSidedGain(Fused):
    """Keeps x and what is narrow; backward computes the gains again."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, common: Tensor, signed: Tensor, channels: Tensor, with_x: bool) -> Tensor:
        ctx.save_for_backward(x, common, signed, channels)
        ctx.with_x = with_x
        return times(x, common, channels, with_x).addcmul_(signed @ channels.mT, x.abs())

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, None]:
        x, common, signed, channels = ctx.saved_tensors
        sign, product = x.sign(), grad * x
        on_common = product @ channels
        on_channels = product.flatten(0, -2).mT @ common.flatten(0, -2)
        product.mul_(sign)
        on_signed = product @ channels
        on_channels.addmm_(product.flatten(0, -2).mT, signed.flatten(0, -2))
        on_x = times(grad, common, channels, ctx.with_x).addcmul_((signed @ channels.mT).mul_(sign), grad)
        return on_x, on_common, on_signed, on_channels, None


def two_sided_gain(x: Tensor, common: Tensor, signed: Tensor, channels: Tensor, with_x: bool = False) -> Tensor:
    """x_i sum_k (common_k + sgn(x_i) signed_k) channels_ik, plus x_i if ``with_x``.

    x (..., d), gains (..., r), channels (d, r) -> (..., d).
    """
    return _TwoSidedGain.apply(x, common, signed, channels, with_x)


@register_primitive(
    "excitation_inhibition_balance", stage="competition", kind="pointwise", zero_at="gate", zero_scale=16.0
)
class ExcitationInhibitionBalance(Primitive):
    """In each group of units the positive and the negative half are scaled towards their geometric mean.

    Biology: cortical neurons receive strong excitation and strong inhibition that follow each other closely, so that
    what is left is small, fluctuates and can react fast.

    Equation: E = <[x]_+>_g, I = <[-x]_+>_g, q = I / E held in 1/8..8; f = [x]_+ q^(kappa/2) - [-x]_+ q^(-kappa/2);
    delta = f - x. With b = kappa log(q) / 2 this is x (cosh b - 1) + |x| sinh b, which is what is computed.

    Reference: van Vreeswijk and Sompolinsky 1996, Chaos in neuronal networks with balanced excitatory and inhibitory
    activity, Science; Okun and Lampl 2008, Instantaneous correlation of excitation and inhibition during ongoing and
    sensory-evoked activities, Nat Neurosci; Denève and Machens 2016, Efficient codes and balanced networks, Nat
    Neurosci.

    Shapes: x (B, T, d) -> (B, T, d); q is (B, T, groups). Homogeneous of degree one.
    """

    groups: int = setting(8, low=1, high=256, meaning="most groups of channels; none is smaller than 32")

    def build(self, host: Host) -> None:
        self.groups = max(1, min(self.groups, self.d_out // CHANNELS))
        self.tightness = nn.Parameter(torch.logit(torch.full((self.groups,), 0.88)))  # kappa
        self.register_buffer("membership", group_matrix(self.d_out, self.groups), persistent=False)
        self.register_buffer("pooling", pooling_matrix(self.d_out, self.groups), persistent=False)

    def transform(self, x: Tensor, context: Context) -> Tensor:
        common, signed = (gain @ self.membership.T for gain in self.gains(x, context))
        return x * common + x.abs() * signed

    def scaled(self, x: Tensor, context: Context, scale: Tensor, with_x: bool) -> Tensor:
        return two_sided_gain(x, *self.gains(x, context), context.once(per_channel, scale, self.membership), with_x)

    def gains(self, x: Tensor, context: Context) -> tuple[Tensor, Tensor]:
        """What both halves gain in common, and what the positive gains and the negative loses: each (B, T, groups)."""
        total, net = group_mean_magnitude(x, self.pooling), x @ self.pooling
        excitation, inhibition = ((0.5 * half).clamp(min=FAINTEST) for half in (total + net, total - net))
        largest = math.log(LARGEST_RATIO)
        log_ratio = (inhibition.log() - excitation.log()).clamp(-largest, largest)
        bend = 0.5 * context.once(torch.sigmoid, self.tightness) * log_ratio
        return torch.cosh(bend) - 1, torch.sinh(bend)
